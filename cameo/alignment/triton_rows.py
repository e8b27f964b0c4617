# Compile-time constants of Triton are written in capitals, and its functions have no type annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Add the gradients of rows to those of their queries in one launch, in Triton.

Axes: B samples, K heads, L tokens of a sample, D head dimension, C comparisons: the softmaxes that a query may have,
one per key view or one alone; R rows of a portion.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_to_queries"]

MOST_AT_ONCE, WARPS = 1024, 4


@triton.jit(do_not_specialize=["first", "count"])  # which differ from portion to portion
def add_to_queries_kernel(
    rows, slots, factor, sums, first, count, tokens, comparisons, row_stride, head_stride, factor_stride,
    ENTRIES: tl.constexpr, DIMENSION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the rows of one query in the order of its comparisons, and add the sum, times the factor, to its gradient.

    rows: float32, R rows of ENTRIES = K * D; slots: int64 [B, C, L], number of each row among those of several
    portions; first, count: those that are in this portion; factor: one number, or one per entry; sums: float32
    [B, K, L, D].
    """
    sample = tl.program_id(0).to(tl.int64) // tokens
    token = tl.program_id(0).to(tl.int64) % tokens
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, dimension = entry // DIMENSION, entry % DIMENSION
    inside = entry < ENTRIES
    source = rows + head.to(tl.int64) * head_stride + dimension
    total = tl.zeros([BLOCK], tl.float32)
    found = sample < 0
    for comparison in range(comparisons):
        slot = tl.load(slots + (sample * comparisons + comparison) * tokens + token) - first
        here = (slot >= 0) & (slot < count)
        total += tl.load(source + slot * row_stride, mask=inside & here, other=0.0)
        found = found | here
    # A query without a row here is left alone: its gradient is neither read nor written.
    written = inside & found
    total *= tl.load(factor + entry * factor_stride, mask=written, other=0.0).to(tl.float32)
    target = sums + ((sample * (ENTRIES // DIMENSION) + head) * tokens + token) * DIMENSION + dimension
    tl.store(target, tl.load(target, mask=written, other=0.0) + total, mask=written)


def add_to_queries(rows: Tensor, slots: Tensor, first: int, factor: Tensor, sums: Tensor) -> None:
    """Add the gradients of the rows of a portion to `sums`; the same bits on every run.

    Example:
        >>> add_to_queries(d_rows, slots, first=0, factor=torch.ones((), device="cuda"), sums=d_query) # doctest: +SKIP

    Args:
        rows: float32 [K, R, D] or, with all heads in a row, [1, R, K * D]; contiguous.
        slots: int64 [B, C, L], the row of each query and comparison, counted over several portions; -1 for none.
        first: what the rows of this portion are counted from.
        factor: of all rows: one number, or [K * D].
        sums: float32 [B, K, L, D], contiguous; what is added to.
    """
    batch, comparisons, tokens = slots.shape
    _, heads, _, dimension = sums.shape
    channels, count, width = rows.shape
    entries = heads * dimension
    block = min(triton.next_power_of_2(entries), MOST_AT_ONCE)
    with torch.cuda.device_of(rows):
        add_to_queries_kernel[(batch * tokens, triton.cdiv(entries, block))](
            rows,
            slots,
            factor,
            sums,
            first,
            count,
            tokens,
            comparisons,
            width,
            count * width if channels > 1 else dimension,
            int(factor.ndim > 0),
            ENTRIES=entries,
            DIMENSION=dimension,
            BLOCK=block,
            num_warps=WARPS,
        )
