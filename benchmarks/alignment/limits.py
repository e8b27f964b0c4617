"""What no implementation of the alignment loss can do without, timed alone: its matrix products and its GELUs.

Axes: K heads, R rows of a chunk, M keys of a view, D head dimension, m hidden width of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.alignment.cases import Case

__all__ = ["Limit", "limits"]

# R * M: on a CPU the fastest of 2**13 to 2**17 on the processor of docs/performance.md; on CUDA so many that launching
# takes no time beside them.
CHUNK_PAIRS = {"cpu": 1 << 15, "cuda": 1 << 23}
CHUNKS = {"cpu": 48, "cuda": 4}  # timed; more rows take proportionally longer


@dataclass(frozen=True)
class Limit:
    """Something to time, and how many times its seconds the whole needs."""

    run: Callable[[], object]
    factor: float


def limits(case: Case, selection: str) -> dict[str, Limit]:
    """The parts that are timed alone, each in buffers that are there; together they are the limit.

    On a CPU the matrix products of queries, keys and head, forward and backward, GELU and its derivative. On CUDA
    the products of queries and keys, and the GELUs as one kernel that evaluates as many and touches no memory; the
    products of the head are none of the limit there, since a kernel can take them without writing one.
    """
    rows, keys, device = case.rows(selection), case.setting.tokens**2, case.query.device.type
    chunk = max(1, min(rows, CHUNK_PAIRS[device] // keys))
    timed = min(CHUNKS[device], math.ceil(rows / chunk))
    factor = rows / (chunk * timed)
    parts = _ChunkParts(case, chunk)

    def times(part: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(timed):
                part()

        return run

    found = {"products": Limit(times(partial(parts.products, of_head=device != "cuda")), factor)}
    if not case.head.hidden:
        return found
    if device == "cuda":
        from benchmarks.alignment.gelu_kernel import gelu_sums

        hidden = len(parts.weight_in)
        return found | {"gelu": Limit(lambda: gelu_sums(rows * keys, hidden, case.query.device), 1.0)}
    return found | {
        "gelu": Limit(times(parts.gelu), factor),
        "gelu backward": Limit(times(parts.gelu_backward), factor),
    }


class _ChunkParts:
    """The work of one chunk of R rows against M keys, cut into its parts."""

    def __init__(self, case: Case, rows: int) -> None:
        heads, keys, dimension = case.setting.heads, case.setting.tokens**2, case.setting.dimension
        options = {"device": case.query.device, "dtype": case.query.dtype}
        self.query, self.grad_query = (torch.randn(heads, rows, dimension, **options) for _ in range(2))
        self.key, self.grad_key = (torch.randn(heads, keys, dimension, **options) for _ in range(2))
        self.logits = torch.empty(heads, rows, keys, **options)
        hidden = case.head.hidden[0].weight.shape[0] if case.head.hidden else 0
        self.weight_in = torch.randn(hidden, heads, **options)
        self.weight_out = torch.randn(hidden, **options)
        self.bias = torch.randn(hidden, 1, **options)
        self.hidden, self.activated, self.grad_hidden = (torch.randn(hidden, rows * keys, **options) for _ in range(3))
        self.joined = torch.randn(rows * keys, **options)
        self.grad_in = torch.empty_like(self.weight_in)
        self.grad_out = torch.empty_like(self.weight_out)

    def products(self, *, of_head: bool) -> None:
        """The products of queries and keys, and of the head, forward and backward, of a chunk."""
        torch.bmm(self.query, self.key.mT, out=self.logits)
        if of_head and len(self.weight_in):
            flat = self.logits.view(len(self.logits), -1)
            torch.addmm(self.bias, self.weight_in, flat, out=self.hidden)
            torch.mv(self.activated.T, self.weight_out, out=self.joined)
            torch.mv(self.activated, self.joined, out=self.grad_out)
            torch.mm(self.grad_hidden, flat.T, out=self.grad_in)
            torch.mm(self.weight_in.T, self.grad_hidden, out=flat)
        torch.bmm(self.logits, self.key, out=self.grad_query)
        torch.bmm(self.logits.mT, self.query, out=self.grad_key)

    def gelu(self) -> Tensor:
        """GELU of the hidden activations of a chunk."""
        return torch.ops.aten.gelu.out(self.hidden, out=self.activated)

    def gelu_backward(self) -> Tensor:
        """GELU's derivative times a gradient."""
        return torch.ops.aten.gelu_backward.grad_input(self.grad_hidden, self.hidden, grad_input=self.activated)
