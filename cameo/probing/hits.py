"""How often the attention of a layer finds the token that shows the same surface point.

Axes: B samples, V views, Q query views, N tokens per view, K heads, D head dimension, R readouts of one kind, A groups
of view pairs (such as angle bins), P matches, W distances. In a layer that attends by row, column or cell, each of
these is a sample of its own: B' = B, B h, B w or B h w.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cameo.alignment import AlignmentHead
from cameo.errors import ShapeError
from cameo.geometry.grids import TokenGrids, token_distance
from cameo.probing.truth import Block, Pairs, TrueMatches

__all__ = ["ERROR_CLASSES", "READOUTS", "attention_maps", "count_hits", "view_maps"]

READOUTS = ("mean", "best_head", "through_head")
# Classes of the distance from the found token to the true match, by their smallest distance in tokens, and their
# colors: blue for a hit, then from yellow to dark red. Readers who do not tell red from green tell these apart, and the
# misses get darker with the distance.
ERROR_CLASSES = {0: "#08519c", 1: "#6baed6", 2: "#fed976", 4: "#fd8d3c", 8: "#bd0026"}
# Entries of the logits that are held in memory at once; the alignment head needs several times as many.
BLOCK_ENTRIES = 1 << 24


def count_hits(
    query: Tensor,
    key: Tensor,
    true_matches: TrueMatches,
    head: AlignmentHead | None,
    scale: float,
    within: tuple[int, ...],
    *,
    near: float | None = None,
) -> dict[str, Tensor]:
    """Count the hits of one captured call by sample and group of view pairs, block by block to bound the memory.

    Example:
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1] = torch.tensor([0, 1, 2, 3])
        >>> query = 9 * torch.eye(4).expand(1, 1, 2, 4, 4)  # each token attends to the token at its own position
        >>> from cameo import Correspondence
        >>> true_matches = TrueMatches.plain(Correspondence(index, ((2, 2), (2, 2))))
        >>> count_hits(query, query, true_matches, None, 1.0, within=(0, 1))["mean"].tolist()
        [[[[4.0, 4.0]]]]

    Args:
        query, key, head, scale: as of `attention_maps`, with the queries of all views: Q = V.
        true_matches: the matches that the queries should find.
        within: distances in tokens of the key view, the larger of the row and the column difference.
        near: a last distance, in world units; needs `true_matches.points`.

    Returns:
        Hits `[R, B, A, W]` per readout, on the CPU. Where a query reaches only one token of each view, W is 1, and a
        hit is a query whose most-attended view shows the same surface point.

    Raises:
        ShapeError: if the matches are not those of the views and samples of the call.
    """
    expected = (query.shape[0], query.shape[2], key.shape[2], query.shape[3])
    index = true_matches.match.index
    if tuple(index.shape) != expected:
        raise ShapeError("true_matches.match.index", expected=f"{list(expected)} as the call", got=index.shape)
    totals: dict[str, Tensor] = {}
    for block in _blocks(query):
        samples, views, tokens = block
        if not bool((index[samples, views, :, tokens] >= 0).any()):
            continue
        call = query[samples, :, views, tokens], key[samples], true_matches.match.token_grids, head, scale
        if true_matches.one_token:
            bins, hits = _view_hits(view_maps(*call, first_view=views.start), true_matches, block)
        else:
            pairs = true_matches.pairs_in(block)
            maps = _pair_maps(*call, pairs, block)
            bins, hits = pairs.bin, _token_hits(maps, true_matches, pairs, within, near)
        for readout, of_readout in hits.items():
            by_bin = of_readout.new_zeros(true_matches.num_bins, *of_readout.shape[1:]).index_add_(0, bins, of_readout)
            totals[readout] = totals.get(readout, 0) + by_bin.cpu()
    shape = (true_matches.num_samples, true_matches.num_groups)
    return {readout: total.unflatten(0, shape).permute(2, 0, 1, 3) for readout, total in totals.items()}


def _blocks(query: Tensor) -> Iterator[Block]:
    """Blocks of queries whose logits are held in memory at once."""
    samples, heads, views, tokens = query.shape[:4]
    of_token = heads * views * tokens  # entries of the logits of one query token
    of_view, of_sample = of_token * tokens, of_token * tokens * views
    samples_each = max(1, BLOCK_ENTRIES // of_sample)
    views_each = views if of_sample <= BLOCK_ENTRIES else max(1, BLOCK_ENTRIES // of_view)
    tokens_each = tokens if of_view <= BLOCK_ENTRIES else max(1, BLOCK_ENTRIES // of_token)
    for sample in range(0, samples, samples_each):
        for view in range(0, views, views_each):
            for token in range(0, tokens, tokens_each):
                yield (
                    slice(sample, sample + samples_each),
                    slice(view, view + views_each),
                    slice(token, token + tokens_each),
                )


def _pair_maps(
    query: Tensor,
    key: Tensor,
    token_grids: TokenGrids,
    head: AlignmentHead | None,
    scale: float,
    pairs: Pairs,
    block: Block,
) -> dict[str, Tensor]:
    """Attention of the queries of a block's P matches over the tokens of the key view, `[P, R, N]`."""
    positions = zip((pairs.sample, pairs.query, pairs.token), block, strict=True)
    sample, view, token = (position - part.start for position, part in positions)
    logits = _logits(query, key, scale)[:, sample, view, token, pairs.key]
    return _readouts(logits, _padding(token_grids, logits)[pairs.key], head)


def _token_hits(
    maps: dict[str, Tensor], true_matches: TrueMatches, pairs: Pairs, within: tuple[int, ...], near: float | None
) -> dict[str, Tensor]:
    """Whether the most-attended tokens of P matches are hits, `[P, R, W]` per readout."""
    hits = {}
    for readout, attention in maps.items():
        most_attended = attention.argmax(-1)  # [P, R]
        distance = token_distance(most_attended, pairs.target[:, None], pairs.width[:, None])
        are_near = [distance <= limit for limit in within]
        if near is not None:
            are_near.append(true_matches.distance_to(pairs, most_attended) <= near)
        hits[readout] = torch.stack(are_near, dim=-1).float()
    return hits


def _view_hits(maps: dict[str, Tensor], true_matches: TrueMatches, block: Block) -> tuple[Tensor, dict[str, Tensor]]:
    """Bin `[P]` and hits `[P, R, 1]` per readout of the P queries of a block that have a match."""
    shown, has_match, bins = true_matches.queries_in(block)
    views = {readout: attention.movedim(1, -1)[has_match].argmax(1) for readout, attention in maps.items()}  # [P, R]
    return bins, {readout: shown.gather(1, view)[..., None].float() for readout, view in views.items()}


def attention_maps(
    query: Tensor, key: Tensor, token_grids: TokenGrids, head: AlignmentHead | None, scale: float
) -> dict[str, Tensor]:
    """Attention of query tokens over the tokens of each view, per readout.

    Args:
        query: `[B, K, Q, N, D]` as the layer's kernel receives them, of all or some of the tokens.
        key: `[B, K, V, N, D]`.
        token_grids: token grid of each view of the keys; tokens beyond a view's grid get probability 0.
        head: the trained alignment head, or None to leave its readout out.
        scale: factor of the logits.

    Returns:
        Probabilities `[B, R, Q, N, V, N]` (the last axis sums to 1): `"mean"`, the mean over the heads (R = 1);
        `"best_head"`, the heads one by one (R = K); `"through_head"` (R = 1, or K for a head of kind "none").
    """
    logits = _logits(query, key, scale)
    return _readouts(logits, _padding(token_grids, logits), head)


def view_maps(
    query: Tensor,
    key: Tensor,
    token_grids: TokenGrids,
    head: AlignmentHead | None,
    scale: float,
    *,
    first_view: int = 0,
) -> dict[str, Tensor]:
    """Attention of each query over the other views, where it reaches one token of each, `[B, R, Q, V]`.

    The last axis sums to 1. Arguments as of `attention_maps` with N = 1; `first_view` is the view of the first query.
    The query's own view gets probability 0, since the alignment loss leaves it out as well.
    """
    logits = torch.einsum("bkid,bkjd->kbij", query[..., 0, :].float(), key[..., 0, :].float()) * scale
    queries = torch.arange(first_view, first_view + query.shape[2], device=logits.device)
    own_view = queries[:, None] == torch.arange(len(token_grids), device=logits.device)
    return _readouts(logits, own_view, head)


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Logits `[K, B, Q, N, V, N]`; the first N may be fewer query tokens."""
    return torch.einsum("bkind,bkjmd->kbinjm", query.float(), key.float()) * scale


def _padding(token_grids: TokenGrids, logits: Tensor) -> Tensor:
    """Mask of the tokens beyond the grid of each view, bool `[V, N]`."""
    padding = torch.ones(len(token_grids), logits.shape[-1], dtype=torch.bool, device=logits.device)
    for view, (height, width) in enumerate(token_grids):
        padding[view, : height * width] = False
    return padding


def _readouts(logits: Tensor, excluded: Tensor, head: AlignmentHead | None) -> dict[str, Tensor]:
    """Softmax over the last axis of logits `[K, B, ...]`, with the readout axis moved behind B."""
    maps = {"best_head": logits.masked_fill(excluded, -torch.inf).softmax(-1).movedim(0, 1)}
    maps["mean"] = maps["best_head"].mean(1, keepdim=True)
    if head is not None:
        maps["through_head"] = head(logits).masked_fill(excluded, -torch.inf).softmax(-1).movedim(0, 1)
    return maps
