"""What the alignment loss takes inside, which the matches of a batch decide: about, and where every token has one.

Axes: B samples, K heads, V views, N tokens per view, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cameo.alignment.heads import CPU_HIDDEN, MOST_WORKSPACE_BYTES, WORKSPACE_BYTES
from cameo.alignment.sweep import CPU_PRODUCTS, KEYS_AT_ONCE

__all__ = ["alignment_flops", "alignment_workspace"]

BYTES = 4  # of a number in float32, in which the sums are kept
PRODUCTS = 3  # logits, the gradient of the queries and that of the keys


def alignment_workspace(
    query: Tensor,
    index: Tensor,
    head: Sequence[Tensor],
    kind: str,
    normalize: str = "per_view",
    *,
    max_queries: int | None = None,
    on_gpu: bool,
) -> int:
    """Return about the bytes that a sweep holds at its peak: the sums of both gradients, and its portions.

    Example:
        >>> import torch
        >>> query = torch.empty(1, 4, 2, 256, 32)
        >>> index = torch.empty(1, 2, 2, 256)
        >>> alignment_workspace(query, index, [], "mean", on_gpu=False) > 2 * 4 * query.numel()
        True

    Args:
        query, index, head, kind, normalize: arguments of the operator `cameo::alignment_loss`.
        max_queries: see `cameo.alignment_loss`.
        on_gpu: whether the portions are those of a GPU, which fill the workspace, or those of a CPU, which fit into its
            caches.
    """
    sums = 2 * query.numel() * BYTES
    _, num_heads, views, tokens, width = query.shape
    hidden = list(head[:-1:2])
    channels = num_heads if kind == "none" or hidden else 1
    pairs = _most_pairs(index.numel() * tokens, query.shape, normalize, max_queries)
    matches = pairs // tokens
    if on_gpu:
        portions = min(MOST_WORKSPACE_BYTES, pairs * (channels + bool(hidden)) * BYTES * 2)
    else:
        held = min(pairs, CPU_PRODUCTS)
        portions = (channels + 1) * held * BYTES + (0 if hidden else channels * held * BYTES)
        portions += 2 * sum(len(weight) for weight in hidden) * min(pairs, CPU_HIDDEN) * BYTES
    operands = num_heads * width * (min(views * tokens, KEYS_AT_ONCE) + views * tokens) * BYTES
    # Each match is listed with its sample, views, token, query and weight.
    lists = 6 * matches * 8
    return sums + portions + min(operands, WORKSPACE_BYTES // 2) + lists


def alignment_flops(query: Tensor, normalize: str = "per_view", *, max_queries: int | None = None) -> int:
    """Return the FLOPs of loss and gradient if each token has a match in every other view.

    Example:
        >>> import torch
        >>> alignment_flops(torch.empty(1, 4, 2, 256, 32))
        100663296

    Args:
        query, normalize: see `alignment_workspace`.
        max_queries: see `cameo.alignment_loss`.
    """
    samples, num_heads, views, tokens, width = query.shape
    pairs = _most_pairs(samples * views * (views - 1) * tokens * tokens, query.shape, normalize, max_queries)
    return PRODUCTS * 2 * pairs * num_heads * width


def _most_pairs(pairs: int, query: Sequence[int], normalize: str, max_queries: int | None) -> int:
    """Of so many pairs of a query with a key, return how many are computed."""
    _, _, views, tokens, _ = query
    keys = tokens if normalize == "per_view" else views * tokens
    return pairs if max_queries is None else min(pairs, max_queries * keys)
