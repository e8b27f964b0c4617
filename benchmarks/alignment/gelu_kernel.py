"""A Triton kernel that does nothing but evaluate GELU, the floor under any fused alignment loss on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["gelu_sums"]

BLOCK = 1024


@triton.jit
def _gelu_only(sums, hidden, BLOCK: tl.constexpr):  # noqa: N803
    # The values differ in every step, so no evaluation can be left out.
    start = tl.arange(0, BLOCK).to(tl.float32) * (4.0 / BLOCK) - 2.0
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(hidden):
        value = start + step * 0.01
        total += value * (0.5 + 0.5 * tl.erf(value * 0.7071067811865476))
    for step in range(hidden):
        value = start - step * 0.01
        density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
        total += 0.5 + 0.5 * tl.erf(value * 0.7071067811865476) + value * density
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


def gelu_sums(pairs: int, hidden: int, device: torch.device | str) -> torch.Tensor:
    """Evaluate exact GELU and its derivative `pairs * hidden` times each; one sum per block of 1024 pairs."""
    sums = torch.empty(triton.cdiv(pairs, BLOCK), device=device)
    _gelu_only[(len(sums),)](sums, hidden, BLOCK=BLOCK, num_warps=4)
    return sums
