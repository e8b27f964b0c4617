"""How often the attention of a layer finds the token that shows the same surface point."""

from __future__ import annotations

import torch
from torch import Tensor

from cameo.alignment import AlignmentHead
from cameo.correspondence import Correspondence

__all__ = ["READOUTS", "attention_hits", "attention_maps"]

READOUTS = ("mean", "best_head", "through_head")


def attention_maps(
    query: Tensor, key: Tensor, correspondence: Correspondence, head: AlignmentHead | None, scale: float
) -> dict[str, Tensor]:
    """Attention of every query token over the tokens of each view, per readout.

    Args:
        query, key: `[B, K, V, N, D]` as the layer's kernel receives them.
        correspondence: gives the token grids; tokens beyond a view's grid get probability 0.
        head: the trained alignment head, or None to leave its readout out.
        scale: factor of the logits.

    Returns:
        Probabilities `[B, R, V, N, V, N]` (last axis sums to 1 within a view): `"mean"` of the heads' attention
        (R = 1), `"best_head"` all heads apart (R = K), `"through_head"` (R = 1, or K for a head of kind "none").
    """
    logits = torch.einsum("bkind,bkjmd->kbinjm", query.float(), key.float()) * scale
    valid = torch.zeros(logits.shape[-2:], dtype=torch.bool, device=logits.device)
    for view, (height, width) in enumerate(correspondence.sizes):
        valid[view, : height * width] = True
    maps = {"best_head": logits.masked_fill(~valid, -torch.inf).softmax(-1).movedim(0, 1)}
    maps["mean"] = maps["best_head"].mean(1, keepdim=True)
    if head is not None:
        combined = head(logits).masked_fill(~valid, -torch.inf)
        maps["through_head"] = combined.softmax(-1).movedim(0, 1)
    return maps


def attention_hits(
    maps: dict[str, Tensor], correspondence: Correspondence, within: tuple[int, ...] = (0, 1)
) -> tuple[dict[str, Tensor], int]:
    """Count the visible query tokens whose most-attended token lies within some tokens of the true match.

    Example:
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1] = torch.tensor([0, 1, 2, 3])
        >>> match = Correspondence(index, sizes=((2, 2), (2, 2)))
        >>> oracle = torch.eye(4).expand(2, 2, 4, 4).permute(0, 2, 1, 3)[None, None]
        >>> hits, pairs = attention_hits({"mean": oracle}, match)
        >>> hits["mean"].tolist(), pairs
        ([[4.0, 4.0]], 4)

    Args:
        maps: readouts `[B, R, V, N, V, N]` of `attention_maps`.
        correspondence: the true matches.
        within: distances in tokens, the larger of the row and the column difference.

    Returns:
        Hits `[R, len(within)]` per readout, and the number of visible pairs they were counted over.
    """
    samples, query_view, key_view, token = correspondence.visible.nonzero(as_tuple=True)
    target = correspondence.index[samples, query_view, key_view, token]
    widths = torch.tensor([width for _, width in correspondence.sizes], device=target.device)[key_view]
    hits = {}
    for name, attention in maps.items():
        best = attention[samples, :, query_view, token, key_view].argmax(-1)  # [pairs, R]
        rows = (best // widths[:, None] - (target // widths)[:, None]).abs()
        columns = (best % widths[:, None] - (target % widths)[:, None]).abs()
        distance = torch.maximum(rows, columns)
        hits[name] = torch.stack([(distance <= limit).float().sum(0) for limit in within], dim=1)
    return hits, int(samples.numel())
