"""A small model whose attention calls its kernel in each of the forms in use, and how its calls are captured."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cameo.attention.capture import AttentionCapture, AttentionLayer
from cameo.attention.layout import TokenLayout

HEADS, DIMENSION, TOKENS, SAMPLES = 4, 6, 10, 3
WIDTH = HEADS * DIMENSION
SCALE = DIMENSION**-0.5
LAYOUT = TokenLayout("b (v h w)")


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


class Attention(nn.Module):
    def __init__(self, kernel: Callable[..., Any] = sdpa) -> None:
        super().__init__()
        self.kernel = kernel
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(self.to_q(x), self.to_k(x), self.to_v(x))


class Model(nn.Module):
    """Two attentions of the same shape, one after the other."""

    def __init__(self, kernel: Callable[..., Any] = sdpa) -> None:
        super().__init__()
        self.first, self.second = Attention(kernel), Attention(kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def layer(path: str = "second", heads: int = HEADS) -> AttentionLayer:
    return AttentionLayer(0, path, heads, LAYOUT)


def make_model(kernel: Callable[..., Any] = sdpa) -> Model:
    torch.manual_seed(0)
    return Model(kernel)


def xformers_modules() -> dict[str, types.ModuleType]:
    """A stand-in for xformers, for `sys.modules`: its kernel is PyTorch's."""

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
    return {"xformers": package, "xformers.ops": ops}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def capture(model: nn.Module, x: Tensor, where: AttentionLayer | None = None) -> tuple[Tensor, Any]:
    where = where or layer()
    with AttentionCapture(model, [where]) as captured:
        output = model(x)
        seen = captured[where.path]
    assert hooks(model) == 0
    return output, seen


def expected_query_and_key(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of the second attention, by the definition of the model."""
    inside = x + model.first(x)
    return heads_apart(model.second.to_q(inside)), heads_apart(model.second.to_k(inside))
