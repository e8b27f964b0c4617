"""Queries and keys of `torch.nn.MultiheadAttention`, which projects them out of sight.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension, E = K * D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.attention.kernels.call import KernelCall
from cameo.attention.kernels.known import UnreadableCallError

__all__ = ["read_multihead"]


def read_multihead(given: Mapping[str, Any]) -> KernelCall:
    """Project queries and keys once more, from the arguments of `F.multi_head_attention_forward` by name.

    The projections are those of the module, so a loss on them trains its weights; they cost one matrix product more.

    Raises:
        UnreadableCallError: keys that are no tokens are appended (`bias_k`, `add_zero_attn`, `static_k`).
    """
    for name in ("bias_k", "static_k"):
        if given.get(name) is not None:
            raise UnreadableCallError(f"{name} of torch.nn.MultiheadAttention")
    if given.get("add_zero_attn"):
        raise UnreadableCallError("add_zero_attn=True of torch.nn.MultiheadAttention")
    heads, width = given["num_heads"], given["embed_dim_to_check"]
    if given.get("use_separate_proj_weight"):
        weights = given["q_proj_weight"], given["k_proj_weight"]
    else:
        weights = given["in_proj_weight"].chunk(3)[:2]
    bias = given.get("in_proj_bias")
    biases = (None, None) if bias is None else bias.chunk(3)[:2]
    tokens = given["query"], given["key"]
    projected = [F.linear(*parts) for parts in zip(tokens, weights, biases, strict=True)]
    if projected[0].ndim == 2:  # one sample without a batch axis
        projected = [tensor[:, None] for tensor in projected]
    query, key = (tensor.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for tensor in projected)
    return KernelCall(query, key, (width // heads) ** -0.5, _mask(given, query, key))


def _mask(given: Mapping[str, Any], query: Tensor, key: Tensor) -> Tensor | None:
    """Join its two masks, which are True where a key is hidden, or are added to the logits."""
    rows, heads, queries, _ = query.shape
    masks: list[Tensor] = []
    if (padding := given.get("key_padding_mask")) is not None:
        masks.append(padding.reshape(-1, 1, 1, key.shape[2]))
    if (mask := given.get("attn_mask")) is not None:
        masks.append(mask if mask.ndim == 2 else mask.reshape(rows, heads, queries, key.shape[2]))
    if not masks:
        return None
    added = [
        torch.zeros_like(m, dtype=query.dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m for m in masks
    ]
    return sum(added[1:], added[0])
