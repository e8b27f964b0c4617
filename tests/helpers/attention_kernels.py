"""Every form of the attention kernel that models call, with the same arguments and the same result.

Each kernel takes queries, keys and values `[A, L, HEADS * DIMENSION]` and returns the output in the same form."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

HEADS, DIMENSION = 4, 6
SCALE = DIMENSION**-0.5


def heads_apart(x: Tensor) -> Tensor:
    return rearrange(x, "b n (k d) -> b k n d", k=HEADS)


def rows(x: Tensor) -> Tensor:
    return rearrange(x, "b n (k d) -> (b k) n d", k=HEADS)


def from_rows(x: Tensor) -> Tensor:
    return rearrange(x, "(b k) n d -> b n (k d)", k=HEADS)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return rearrange(F.scaled_dot_product_attention(*map(heads_apart, (q, k, v))), "b k n d -> b n (k d)")


def sdpa_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return from_rows(F.scaled_dot_product_attention(*map(rows, (q, k, v)), scale=SCALE))


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(rows, (q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1])
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return from_rows(torch.bmm(scores.softmax(dim=-1), v))


def bmm_then_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(rows, (q, k, v))
    return from_rows(torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * SCALE, -1), v))


def operator_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads_apart, (q, k, v))
    logits = q @ k.mT
    logits *= SCALE
    return rearrange(F.softmax(logits, dim=-1, dtype=torch.float32) @ v, "b k n d -> b n (k d)")


def einsum_ldm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(rows, (q, k, v))
    sim = torch.einsum("b i d, b j d -> b i j", q, k) * SCALE
    return from_rows(torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v))


def einsum_heads_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (rearrange(x, "b n (k d) -> b n k d", k=HEADS) for x in (q, k, v))
    sim = torch.einsum("bihd,bjhd->bhij", [q, k]) * SCALE
    return rearrange(torch.einsum("bhij,bjhd->bihd", sim.softmax(-1), v), "b n k d -> b n (k d)")


def matmul_by_keyword(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads_apart, (q, k, v))
    logits = torch.matmul(input=q, other=k.mT) / DIMENSION**0.5
    return rearrange(torch.softmax(input=logits, dim=-1) @ v, "b k n d -> b n (k d)")


def xformers_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import xformers.ops

    return from_rows(xformers.ops.memory_efficient_attention(*map(rows, (q, k, v)), attn_bias=None, op=None))


def xformers_bmhk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import xformers.ops

    q, k, v = (rearrange(x, "b n (k d) -> b n k d", k=HEADS) for x in (q, k, v))
    return rearrange(xformers.ops.memory_efficient_attention(q, k, v, scale=SCALE), "b n k d -> b n (k d)")


def in_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SGM feeds the kernel in portions of rows; 5 rows are not whole samples."""
    import xformers.ops

    q, k, v = map(rows, (q, k, v))
    call = xformers.ops.memory_efficient_attention
    parts = [call(q[i : i + 5], k[i : i + 5], v[i : i + 5]) for i in range(0, len(q), 5)]
    return from_rows(torch.cat(parts))


PLAIN = [
    sdpa_rows,
    baddbmm,
    bmm_then_scale,
    operator_in_place,
    einsum_ldm,
    einsum_heads_inside,
    matmul_by_keyword,
]
WITH_XFORMERS = [xformers_rows, xformers_bmhk, in_slices]


def install_xformers(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for xformers whose kernel is PyTorch's."""

    def memory_efficient_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: Any = None,
        *,
        op: Any = None,
    ) -> Tensor:
        if query.ndim == 3:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias, scale=scale)
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*parts, attn_mask=attn_bias, scale=scale).transpose(1, 2)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops = ops  # type: ignore[attr-defined]
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return ops


class _Unseen(torch.autograd.Function):
    """Like flash-attn's: what it computes passes through no function of torch that can be watched."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with torch._C.DisableTorchFunction():
            weights = ((q @ k.mT) * scale).softmax(-1)
            ctx.save_for_backward(q, k, v, weights)
            ctx.scale = scale
            return weights @ v

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        of_weights = gradient @ v.mT
        of_logits = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * ctx.scale
        return of_logits @ k, of_logits.mT @ q, weights.mT @ gradient, None


def opaque_attention(q: Tensor, k: Tensor, v: Tensor, scale: float = SCALE) -> Tensor:
    """Attention of `[A, K, L, D]` by a kernel that no watcher sees."""
    return _Unseen.apply(q, k, v, scale)


def unseen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of `[A, L, HEADS * DIMENSION]`."""
    return rearrange(opaque_attention(*map(heads_apart, (q, k, v))), "b k n d -> b n (k d)")


def beside_unseen(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attention half of which an unseen kernel computes."""
    return lambda q, k, v: unseen(q, k, v) + kernel(q, k, v)
