"""What the alignment loss takes inside, which the matches of a batch decide: about, and where every token has one.

Axes: B samples, K heads, V views, N tokens per view, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cameo.alignment.heads import CPU_HIDDEN, MOST_WORKSPACE_BYTES, WORKSPACE_BYTES
from cameo.alignment.sweep import CPU_PRODUCTS, KEYS_AT_ONCE

__all__ = ["alignment_flops", "alignment_workspace"]

BYTES = 4  # of a number in float32, in which the sums are kept
PRODUCTS = 3  # logits, the gradient of the queries and that of the keys


def alignment_workspace(
    query: Tensor, key: Tensor, index: Tensor, weights: Tensor, head: Sequence[Tensor], kind: str, *, on_gpu: bool
) -> int:
    """Return about the bytes that a sweep holds at its peak: the sums of both gradients, and its portions.

    Example:
        >>> import torch
        >>> query = torch.empty(1, 4, 2, 256, 32)
        >>> index, weights = torch.empty(1, 2, 2, 256), torch.empty(1, 2, 2, 256)
        >>> alignment_workspace(query, query, index, weights, [], "mean", on_gpu=False) > 2 * 4 * query.numel()
        True

    Args:
        query, key, index, weights, head, kind: arguments of the operator `cameo::alignment_loss`.
        on_gpu: whether the portions are those of a GPU, which fill the workspace, or those of a CPU, which fit into its
            caches.
    """
    sums = 2 * query.numel() * BYTES
    _, num_heads, views, tokens, width = query.shape
    hidden = list(head[:-1:2])
    channels = num_heads if kind == "none" or hidden else 1
    matches = index.numel()
    pairs = matches * tokens
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


def alignment_flops(query: Sequence[int], key: Sequence[int], *rest: Any, out_val: Any = None) -> int:
    """Return the FLOPs of loss and gradient if each token has a match in every other view; see `FlopCounterMode`.

    Example:
        >>> alignment_flops([1, 4, 2, 256, 32], [1, 4, 2, 256, 32])
        100663296
    """
    samples, num_heads, views, tokens, width = query
    pairs = samples * views * (views - 1) * tokens * tokens
    return PRODUCTS * 2 * pairs * num_heads * width
