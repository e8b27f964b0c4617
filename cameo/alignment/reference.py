"""The alignment loss in its most readable form, group by group, in plain torch; the fast forms are compared with it.

Axes: B samples, V views, K heads, N tokens per view (the largest view; shorter ones are padded), D head
dimension, i query view, j key view, R queries of a group, M keys of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cameo.alignment.head import AlignmentHead
from cameo.alignment.supervision import Window, check_matches

if TYPE_CHECKING:
    from cameo.correspondence import Correspondence

__all__ = ["reference_loss"]

Match = tuple[Tensor, Tensor, Tensor]
Group = tuple[Tensor, Tensor, Tensor, Match, Tensor, Tensor | None]


def reference_loss(
    query: Tensor,
    key: Tensor,
    correspondence: Correspondence,
    weights: Tensor,
    head: AlignmentHead,
    scale: float,
    normalize: str,
    softness: float,
    visible: Tensor | None = None,
) -> Tensor:
    """Compute the alignment loss group by group; the other implementations are compared with this one.

    Args:
        visible: as in `cameo.alignment_loss`; the others too, with `weights` `[B, V, V, N]`.
    """
    check_matches(correspondence.index, correspondence.token_grids)
    dtype = weights.dtype
    groups = _groups_per_view if normalize == "per_view" else _groups_all_views
    window = Window(correspondence.token_grids, softness)
    loss = None
    with torch.autocast(device_type=query.device.type, enabled=False):
        if normalize == "all_views" and set(correspondence.token_grids) == {(1, 1)}:
            loss = _one_token_per_view(query.to(dtype) * scale, key.to(dtype), weights, head, visible)
            return _zero_with_graph(query, key, head, dtype) if loss is None else loss
        for queries, keys, start, match, row, seen in groups(query, key, correspondence, weights, visible):
            view, token, weight = window.spread(*(column[:, None] for column in match))
            column = start[view] + token
            logits = head((queries.to(dtype) * scale) @ keys.to(dtype).transpose(-1, -2))
            if seen is not None:
                logits = logits.masked_fill(~seen, -torch.inf)
                kept = weight.where(seen[row[:, None], column], 0)
                weight = kept * (weight.sum(dim=-1, keepdim=True) / kept.sum(dim=-1, keepdim=True))
            log_sum = logits.logsumexp(dim=-1)[:, row, None]
            nll = (log_sum - logits[:, row[:, None], column].masked_fill(weight == 0, 0)).mean(dim=0)
            group_loss = (weight * nll).sum()
            loss = group_loss if loss is None else loss + group_loss
    return _zero_with_graph(query, key, head, dtype) if loss is None else loss


def _groups_per_view(
    query: Tensor, key: Tensor, correspondence: Correspondence, weights: Tensor, visible: Tensor | None
) -> Iterator[Group]:
    """Rows that share their keys: all supervised queries of a sample against one key view.

    Yields queries [K, R, D], keys [K, M, D], the first key of each view, of each match its view, its token and its
    weight, its query's row, and the keys that each query sees [R, M], or None.
    """
    start = torch.zeros(len(correspondence.token_grids), dtype=torch.int64, device=query.device)
    for b, j in torch.nonzero(weights.any(dim=3).any(dim=1)).tolist():
        height, width = correspondence.token_grids[j]
        view, token = torch.nonzero(weights[b, :, j], as_tuple=True)
        row = torch.arange(len(view), device=query.device)
        target = correspondence.index[b, view, j, token]
        keys = key[b, :, j, : height * width]
        match = torch.full_like(view, j), target, weights[b, view, j, token]
        seen = None if visible is None else visible[b, view, token, j, : height * width]
        yield query[b][:, view, token], keys, start, match, row, seen


def _groups_all_views(
    query: Tensor, key: Tensor, correspondence: Correspondence, weights: Tensor, visible: Tensor | None
) -> Iterator[Group]:
    """The same for one softmax over all other views: the supervised queries of one view of a sample."""
    lengths = [height * width for height, width in correspondence.token_grids]
    for b, i in torch.nonzero(weights.any(dim=3).any(dim=2)).tolist():
        others = [j for j in range(len(lengths)) if j != i]
        keys = torch.cat([key[b, :, j, : lengths[j]] for j in others], dim=1)
        start = torch.zeros(len(lengths), dtype=torch.int64)
        start[others] = torch.tensor([0] + [lengths[j] for j in others[:-1]]).cumsum(0)
        view, token = torch.nonzero(weights[b, i], as_tuple=True)
        tokens, row = torch.unique(token, return_inverse=True)
        match = view, correspondence.index[b, i, view, token], weights[b, i, view, token]
        seen = None
        if visible is not None:
            seen = torch.cat([visible[b, i, tokens, j, : lengths[j]] for j in others], dim=1)
        yield query[b][:, i, tokens], keys, start.to(query.device), match, row, seen


def _one_token_per_view(
    query: Tensor, key: Tensor, weights: Tensor, head: AlignmentHead, visible: Tensor | None
) -> Tensor | None:
    """The loss over all views where each has one token, as in temporal attention; None without a match.

    There is one small softmax per cell of the token grid, so all cells with a match are computed in one batch.
    """
    cells = weights.flatten(1).any(dim=1).nonzero().flatten()
    if not len(cells):
        return None
    queries, keys = (tensor[cells, :, :, 0].transpose(0, 1) for tensor in (query, key))  # [K, cells, V, D]
    logits = head(queries @ keys.transpose(-1, -2))
    left_out = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    if visible is not None:
        left_out = left_out | ~visible[cells, :, 0, :, 0]
    log_sum = logits.masked_fill(left_out, -torch.inf).logsumexp(dim=-1, keepdim=True)
    weight = weights[cells, ..., 0]
    nll = (log_sum - logits).mean(dim=0).masked_fill(weight == 0, 0)
    return (weight * nll).sum()


def _zero_with_graph(query: Tensor, key: Tensor, head: AlignmentHead, dtype: torch.dtype) -> Tensor:
    # Sums of empty slices: 0 * query would be NaN where a query is infinite.
    sources = [query, key, *head.parameters()]
    return torch.stack([source.reshape(-1)[:0].to(dtype).sum() for source in sources]).sum()
