"""A small model of two attentions with any kernel, and the capture of its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cameo.attention.capture import AttentionCapture, AttentionLayer
from cameo.attention.layout import TokenLayout
from tests.helpers.attention_kernels import DIMENSION, HEADS, heads_apart, sdpa

TOKENS, SAMPLES = 10, 3
WIDTH = HEADS * DIMENSION
LAYOUT = TokenLayout("b (v h w)")


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
