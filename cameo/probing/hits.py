"""How often the attention of a layer finds the token that shows the same surface point.

Axes: B samples, V views, Q of them whose queries are looked at, N tokens per view, K heads, D head dimension,
R readouts of one kind, A groups of view pairs (such as angle bins), W distances. A layer that attends by row, column
or cell has samples of its own for each of them: B' = B, B h, B w or B h w.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cameo.alignment import AlignmentHead
from cameo.errors import ShapeError
from cameo.geometry.grids import TokenGrids
from cameo.probing.truth import Pairs, TrueMatches, token_distance

__all__ = ["READOUTS", "attention_maps", "count_hits", "view_maps"]

READOUTS = ("mean", "best_head", "through_head")
# Entries of the logits that are held at once; the alignment head needs several times as many.
BLOCK_ENTRIES = 1 << 24

Block = tuple[slice, slice, slice]


def count_hits(
    query: Tensor,
    key: Tensor,
    truth: TrueMatches,
    head: AlignmentHead | None,
    scale: float,
    within: tuple[int, ...],
    *,
    near: float | None = None,
) -> dict[str, Tensor]:
    """Count the hits of one captured call by sample and group of view pairs, in bounded memory.

    Example:
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1] = torch.tensor([0, 1, 2, 3])
        >>> query = 9 * torch.eye(4).expand(1, 1, 2, 4, 4)  # each token looks at the token of its own place
        >>> from cameo import Correspondence
        >>> truth = TrueMatches.plain(Correspondence(index, ((2, 2), (2, 2))))
        >>> count_hits(query, query, truth, None, 1.0, within=(0, 1))["mean"].tolist()
        [[[[4.0, 4.0]]]]

    Args:
        query, key, head, scale: as of `attention_maps`, with the queries of all views: Q = V.
        truth: what the queries should find.
        within: distances in tokens of the key view, the larger of the row and the column difference.
        near: a distance in world units as the last one; needs `truth.points`.

    Returns:
        Hits `[R, B, A, W]` per readout, on the CPU. Where a query reaches one token of each view W is 1: queries whose
        most-attended view shows the same surface point.

    Raises:
        ShapeError: if the matches are not those of the views and samples of the call.
    """
    expected = (query.shape[0], query.shape[2], key.shape[2], query.shape[3])
    if tuple(truth.match.index.shape) != expected:
        raise ShapeError("truth.match.index", expected=f"{list(expected)} as the call", got=truth.match.index.shape)
    columns = 1 if truth.one_token else len(within) + (near is not None)
    totals: dict[str, Tensor] = {}
    for block in _blocks(query):
        samples, views, tokens = block
        index = truth.match.index[samples, views, :, tokens]
        if not bool((index >= 0).any()):
            continue
        call = query[samples, :, views, tokens], key[samples], truth.match.token_grids, head, scale
        if truth.one_token:
            bins, found = _view_hits(view_maps(*call, first_view=views.start), truth, block)
        else:
            pairs = truth.pairs_in(block)
            maps = _pair_maps(*call, pairs, block)
            bins, found = pairs.bin, _token_hits(maps, truth, pairs, within, near)
        for name, hits in found.items():
            flat = hits.new_zeros(truth.num_bins, *hits.shape[1:]).index_add_(0, bins, hits)
            totals[name] = totals.get(name, 0) + flat.cpu()
    shape = (truth.num_samples, truth.num_groups, -1, columns)
    return {name: total.unflatten(0, shape[:2]).permute(2, 0, 1, 3) for name, total in totals.items()}


def _blocks(query: Tensor) -> Iterator[Block]:
    """Samples, views and tokens of the queries whose logits are held at once."""
    samples, heads, views, tokens = query.shape[:4]
    of_token = heads * views * tokens
    of_view, of_sample = of_token * tokens, of_token * tokens * views
    together = (
        max(1, BLOCK_ENTRIES // of_sample),
        views if of_sample <= BLOCK_ENTRIES else max(1, BLOCK_ENTRIES // of_view),
        tokens if of_view <= BLOCK_ENTRIES else max(1, BLOCK_ENTRIES // of_token),
    )
    for sample in range(0, samples, together[0]):
        for view in range(0, views, together[1]):
            for token in range(0, tokens, together[2]):
                starts = (sample, view, token)
                yield tuple(slice(at, at + step) for at, step in zip(starts, together, strict=True))  # type: ignore[misc]


def _pair_maps(
    query: Tensor,
    key: Tensor,
    token_grids: TokenGrids,
    head: AlignmentHead | None,
    scale: float,
    pairs: Pairs,
    block: Block,
) -> dict[str, Tensor]:
    """Attention of the queries of a block's P visible pairs over the view that shows their point, `[P, R, N]`."""
    sample, view, token = (
        at - part.start for at, part in zip((pairs.sample, pairs.query, pairs.token), block, strict=True)
    )
    logits = _logits(query, key, scale)[:, sample, view, token, pairs.key]
    return _readouts(logits, _beyond(token_grids, logits)[pairs.key], head)


def _token_hits(
    maps: dict[str, Tensor], truth: TrueMatches, pairs: Pairs, within: tuple[int, ...], near: float | None
) -> dict[str, Tensor]:
    """Hits `[P, R, W]` of the tokens that the queries of P pairs look at, per readout."""
    found = {}
    for name, attention in maps.items():
        best = attention.argmax(-1)  # [P, R]
        distance = token_distance(best, pairs.target[:, None], pairs.width[:, None])
        hits = [distance <= limit for limit in within]
        if near is not None:
            hits.append(truth.distance_to(pairs, best) <= near)
        found[name] = torch.stack(hits, dim=-1).float()
    return found


def _view_hits(maps: dict[str, Tensor], truth: TrueMatches, block: Block) -> tuple[Tensor, dict[str, Tensor]]:
    """Bin `[P]` and hits `[P, R, 1]` per readout of the P queries of a block whose point some view shows."""
    shown, rows, bins = truth.queries_in(block)
    best = {name: attention.movedim(1, -1)[rows].argmax(1) for name, attention in maps.items()}  # [P, R]
    return bins, {name: shown.gather(1, view)[..., None].float() for name, view in best.items()}


def attention_maps(
    query: Tensor, key: Tensor, token_grids: TokenGrids, head: AlignmentHead | None, scale: float
) -> dict[str, Tensor]:
    """Attention of query tokens over the tokens of each view, per readout.

    Args:
        query: `[B, K, Q, N, D]` as the layer's kernel receives them; of the tokens any part.
        key: `[B, K, V, N, D]`.
        token_grids: token grid of each view of the keys; tokens beyond a view's grid get probability 0.
        head: the trained alignment head, or None to leave its readout out.
        scale: factor of the logits.

    Returns:
        Probabilities `[B, R, Q, N, V, N]` (last axis sums to 1 within a view): `"mean"` of the heads' attention
        (R = 1), `"best_head"` all heads apart (R = K), `"through_head"` (R = 1, or K for a head of kind "none").
    """
    logits = _logits(query, key, scale)
    return _readouts(logits, _beyond(token_grids, logits), head)


def view_maps(
    query: Tensor,
    key: Tensor,
    token_grids: TokenGrids,
    head: AlignmentHead | None,
    scale: float,
    *,
    first_view: int = 0,
) -> dict[str, Tensor]:
    """Attention of each query over the other views, where it reaches one token of each: `[B, R, Q, V]`, sums to 1.

    Arguments as of `attention_maps` with N = 1; `first_view` is the view of the first query. Its own view gets
    probability 0: the alignment loss leaves it out as well.
    """
    logits = torch.einsum("bkid,bkjd->kbij", query[..., 0, :].float(), key[..., 0, :].float()) * scale
    queries = torch.arange(first_view, first_view + query.shape[2], device=logits.device)
    own = queries[:, None] == torch.arange(len(token_grids), device=logits.device)
    return _readouts(logits, own, head)


def _logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Logits `[K, B, Q, N, V, N]`; of the query tokens, the first N, any part."""
    return torch.einsum("bkind,bkjmd->kbinjm", query.float(), key.float()) * scale


def _beyond(token_grids: TokenGrids, logits: Tensor) -> Tensor:
    """Tokens beyond the grid of each view, `[V, N]`."""
    beyond = torch.ones(len(token_grids), logits.shape[-1], dtype=torch.bool, device=logits.device)
    for view, (height, width) in enumerate(token_grids):
        beyond[view, : height * width] = False
    return beyond


def _readouts(logits: Tensor, excluded: Tensor, head: AlignmentHead | None) -> dict[str, Tensor]:
    """Softmax over the last axis of logits `[K, B, ...]` with the readout axis moved behind B."""
    maps = {"best_head": logits.masked_fill(excluded, -torch.inf).softmax(-1).movedim(0, 1)}
    maps["mean"] = maps["best_head"].mean(1, keepdim=True)
    if head is not None:
        maps["through_head"] = head(logits).masked_fill(excluded, -torch.inf).softmax(-1).movedim(0, 1)
    return maps
