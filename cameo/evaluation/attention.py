"""How often the attention of a layer finds the token that shows the same surface point.

Axes: B samples, V views, Q of them whose queries are looked at, N tokens per view, K heads, D head dimension,
R readouts of one kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cameo.alignment import AlignmentHead
from cameo.correspondence import Correspondence

__all__ = ["READOUTS", "Hits", "attention_hits", "attention_maps", "view_maps"]

READOUTS = ("mean", "best_head", "through_head")
# Entries of the logits that are held at once; the alignment head needs several times as many.
BLOCK_ENTRIES = 1 << 24

Sizes = tuple[tuple[int, int], ...]


@dataclass
class Hits:
    """How often attention looks at the right place, counted over as many calls as one likes.

    Example:
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1] = torch.tensor([0, 1, 2, 3])
        >>> query = 9 * torch.eye(4).expand(1, 1, 2, 4, 4)  # each token looks at the token of its own place
        >>> hits = Hits()
        >>> hits.count(query, query, Correspondence(index, ((2, 2), (2, 2))), head=None, scale=1.0)
        >>> hits.token["mean"].tolist(), hits.pairs
        ([[4.0, 4.0]], 4)

    - `token`: per readout `[R, 2]`, pairs whose most-attended token lies on and within one token of the true match.
    - `view`: per readout `[R]`, queries whose most-attended view shows the same surface point.
    - `pairs`: pairs behind `token`. `queries`: query tokens behind `view`.
    - `chance`: hits that a view drawn at random among the others would have in `view`.
    """

    token: dict[str, Tensor] = field(default_factory=dict)
    view: dict[str, Tensor] = field(default_factory=dict)
    pairs: int = 0
    queries: int = 0
    chance: float = 0.0

    def count(
        self, query: Tensor, key: Tensor, correspondence: Correspondence, head: AlignmentHead | None, scale: float
    ) -> None:
        """Add the hits of one captured call; arguments as of `attention_maps`, a query per view of the keys.

        A layer in which a query reaches one token of each view (SV3D's temporal layers) has no choice of tokens, only
        one of views, and is counted in `view`; every other layer in `token`.
        """
        one_token = all(size == (1, 1) for size in correspondence.sizes)
        heads, views, tokens = query.shape[1:4]
        per_view = heads * tokens * views * tokens
        samples = max(1, BLOCK_ENTRIES // (per_view * views))
        together = views if per_view * views <= BLOCK_ENTRIES else 1
        for first in range(0, len(query), samples):
            for view in range(0, views, together):
                part, these = slice(first, first + samples), slice(view, view + together)
                index = correspondence.index[part, these]
                if not (index >= 0).any():
                    continue
                call = query[part, :, these], key[part], correspondence.sizes, head, scale
                if one_token:
                    self._count_views(view_maps(*call, first_view=view), index)
                else:
                    self._count_tokens(attention_maps(*call), index, correspondence.sizes)

    def _count_tokens(self, maps: dict[str, Tensor], index: Tensor, sizes: Sizes) -> None:
        found, pairs = attention_hits(maps, index, sizes)
        self.token = {name: self.token.get(name, 0) + value.cpu() for name, value in found.items()}
        self.pairs += pairs

    def _count_views(self, maps: dict[str, Tensor], index: Tensor) -> None:
        shown = index[..., 0] >= 0  # [B, Q, V]
        rows = shown.any(-1)
        for name, attention in maps.items():
            best = attention.argmax(-1, keepdim=True)  # [B, R, Q, 1]
            hit = shown[:, None].expand_as(attention).gather(-1, best)[..., 0]
            self.view[name] = self.view.get(name, 0) + (hit & rows[:, None]).sum((0, 2)).cpu()
        self.queries += int(rows.sum())
        self.chance += float((shown.sum(-1)[rows] / (shown.shape[-1] - 1)).sum())


def attention_maps(
    query: Tensor, key: Tensor, sizes: Sizes, head: AlignmentHead | None, scale: float
) -> dict[str, Tensor]:
    """Attention of query tokens over the tokens of each view, per readout.

    Args:
        query: `[B, K, Q, N, D]` as the layer's kernel receives them.
        key: `[B, K, V, N, D]`.
        sizes: token grid of each view of the keys; tokens beyond a view's grid get probability 0.
        head: the trained alignment head, or None to leave its readout out.
        scale: factor of the logits.

    Returns:
        Probabilities `[B, R, Q, N, V, N]` (last axis sums to 1 within a view): `"mean"` of the heads' attention
        (R = 1), `"best_head"` all heads apart (R = K), `"through_head"` (R = 1, or K for a head of kind "none").
    """
    logits = torch.einsum("bkind,bkjmd->kbinjm", query.float(), key.float()) * scale
    valid = torch.zeros(logits.shape[-2:], dtype=torch.bool, device=logits.device)
    for view, (height, width) in enumerate(sizes):
        valid[view, : height * width] = True
    return _readouts(logits, ~valid, head)


def view_maps(
    query: Tensor, key: Tensor, sizes: Sizes, head: AlignmentHead | None, scale: float, *, first_view: int = 0
) -> dict[str, Tensor]:
    """Attention of each query over the other views, where it reaches one token of each: `[B, R, Q, V]`, sums to 1.

    Arguments as of `attention_maps` with N = 1; `first_view` is the view of the first query. Its own view gets
    probability 0: the alignment loss leaves it out as well.
    """
    logits = torch.einsum("bkid,bkjd->kbij", query[..., 0, :].float(), key[..., 0, :].float()) * scale
    queries = torch.arange(first_view, first_view + query.shape[2], device=logits.device)
    own = queries[:, None] == torch.arange(len(sizes), device=logits.device)
    return _readouts(logits, own, head)


def _readouts(logits: Tensor, excluded: Tensor, head: AlignmentHead | None) -> dict[str, Tensor]:
    """Softmax over the last axis of logits `[K, B, ...]` with the readout axis moved behind B."""
    maps = {"best_head": logits.masked_fill(excluded, -torch.inf).softmax(-1).movedim(0, 1)}
    maps["mean"] = maps["best_head"].mean(1, keepdim=True)
    if head is not None:
        maps["through_head"] = head(logits).masked_fill(excluded, -torch.inf).softmax(-1).movedim(0, 1)
    return maps


def attention_hits(
    maps: dict[str, Tensor], index: Tensor, sizes: Sizes, within: tuple[int, ...] = (0, 1)
) -> tuple[dict[str, Tensor], int]:
    """Count the visible query tokens whose most-attended token lies within some tokens of the true match.

    Example:
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1] = torch.tensor([0, 1, 2, 3])
        >>> oracle = torch.eye(4).expand(2, 2, 4, 4).permute(0, 2, 1, 3)[None, None]
        >>> hits, pairs = attention_hits({"mean": oracle}, index, sizes=((2, 2), (2, 2)))
        >>> hits["mean"].tolist(), pairs
        ([[4.0, 4.0]], 4)

    Args:
        maps: readouts `[B, R, Q, N, V, N]` of `attention_maps`.
        index: the true matches `[B, Q, V, N]`, as `Correspondence.index`, -1 = none.
        sizes: token grid of each key view, in which the distance is taken.
        within: distances in tokens of the key view, the larger of the row and the column difference.

    Returns:
        Hits `[R, len(within)]` per readout, and the number of visible pairs they were counted over.
    """
    samples, query_view, key_view, token = (index >= 0).nonzero(as_tuple=True)
    target = index[samples, query_view, key_view, token]
    widths = torch.tensor([width for _, width in sizes], device=target.device)[key_view]
    hits = {}
    for name, attention in maps.items():
        best = attention[samples, :, query_view, token, key_view].argmax(-1)  # [pairs, R]
        rows = (best // widths[:, None] - (target // widths)[:, None]).abs()
        columns = (best % widths[:, None] - (target % widths)[:, None]).abs()
        distance = torch.maximum(rows, columns)
        hits[name] = torch.stack([(distance <= limit).float().sum(0) for limit in within], dim=1)
    return hits, int(samples.numel())
