# Compile-time constants of Triton are written in capitals, and its functions have no type annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Exact nearest neighbors between the tokens of all pairs of views on CUDA, in Triton.

Axes: B samples, V views, N tokens per view (row-major, padded). There are two launches, and neither stores the
distances between all tokens: the first keeps each token's nearest one in registers, the second follows the nearest
neighbor of the nearest neighbor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["match_tokens"]

# 12 instructions per pair of tokens on sm_80 and sm_90; larger blocks would spill registers.
QUERY_BLOCK, KEY_BLOCK, NEAREST_WARPS = 64, 32, 4
CYCLE_BLOCK, CYCLE_WARPS = 256, 4
NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def nearest_kernel(points, index, distance, views, tokens, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Nearest token of view j for QUERIES tokens of view i: int32 index, -1 for none, and distance, inf for none.

    ``points [B, V, 3, N]``; ``index`` and ``distance`` ``[B, V, V, N]``, of which i == j is not written.
    """
    pair = tl.program_id(1)
    i = pair // views % views
    j = pair % views
    if i == j:
        return
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    row_points = points + (pair // views).to(tl.int64) * 3 * tokens + rows
    key_points = points + (pair // (views * views) * views + j).to(tl.int64) * 3 * tokens
    real = rows < tokens
    x = tl.load(row_points, mask=real)[:, None]
    y = tl.load(row_points + tokens, mask=real)[:, None]
    z = tl.load(row_points + 2 * tokens, mask=real)[:, None]
    least = tl.full([QUERIES, KEYS], float("inf"), x.dtype)
    start_of_least = tl.full([QUERIES, KEYS], -1, tl.int32)
    for start in range(0, tokens, KEYS):
        keys = start + tl.arange(0, KEYS)
        inside = keys < tokens
        step_x = x - tl.load(key_points + keys, mask=inside, other=float("inf"))[None, :]
        step_y = y - tl.load(key_points + tokens + keys, mask=inside, other=float("inf"))[None, :]
        step_z = z - tl.load(key_points + 2 * tokens + keys, mask=inside, other=float("inf"))[None, :]
        squared = step_x * step_x + step_y * step_y + step_z * step_z
        # A NaN, from a token without a measurement, is not closer, nor is an equal distance: the lower index wins ties.
        closer = squared < least
        least = tl.where(closer, squared, least)
        start_of_least = tl.where(closer, start, start_of_least)
    nearest = tl.min(least, axis=1)
    tied = (least == nearest[:, None]) & (start_of_least >= 0)
    first_nearest = tl.min(tl.where(tied, start_of_least + tl.arange(0, KEYS)[None, :], NO_INDEX), axis=1)
    out = pair.to(tl.int64) * tokens + rows
    tl.store(index + out, tl.where(first_nearest == NO_INDEX, -1, first_nearest), mask=real)
    nearest = tl.sqrt_rn(nearest) if nearest.dtype == tl.float32 else tl.sqrt(nearest)
    tl.store(distance + out, nearest, mask=real)


@triton.jit
def cycle_kernel(nearest, kept, widths, views, tokens, squared_threshold, BLOCK: tl.constexpr):
    """Keep the matches whose own match lies less than a threshold of tokens from the start; int64, -1 for the others.

    ``nearest`` int32 and ``kept`` int64 ``[B, V, V, N]``; ``widths`` int64 ``[V]``, columns of each view's grid.
    """
    pair = tl.program_id(1)
    i = pair // views % views
    j = pair % views
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = token < tokens
    out = pair.to(tl.int64) * tokens + token
    neighbor = tl.where(i == j, -1, tl.load(nearest + out, mask=real, other=-1))
    # A neighbor has a neighbor too, since its distance to this token is finite.
    back_pair = (pair // (views * views) * views + j) * views + i
    end = tl.load(nearest + back_pair.to(tl.int64) * tokens + neighbor, mask=neighbor >= 0, other=0)
    width = tl.load(widths + i).to(tl.int32)
    rows = end // width - token // width
    columns = end % width - token % width
    consistent = (neighbor >= 0) & ((rows * rows + columns * columns).to(tl.float32) < squared_threshold)
    tl.store(kept + out, tl.where(consistent, neighbor, -1).to(tl.int64), mask=real)


def match_tokens(tokens: Tensor, widths: tuple[int, ...], cycle_threshold: float) -> tuple[Tensor, Tensor]:
    """Do :func:`cameo.correspondence.neighbors.nearest.match_tokens` in two launches; the host does not wait."""
    batch, views, count, _ = tokens.shape
    points = tokens.transpose(2, 3).contiguous()
    nearest = tokens.new_empty((batch, views, views, count), dtype=torch.int32)
    distance = torch.full_like(nearest, torch.inf, dtype=tokens.dtype)
    index = torch.empty_like(nearest, dtype=torch.int64)
    if not index.numel():
        return index, distance
    pairs = batch * views * views
    # With fused multiply-adds the distances would differ from those of the plain form in the last bit.
    nearest_kernel[(triton.cdiv(count, QUERY_BLOCK), pairs)](
        points,
        nearest,
        distance,
        views,
        count,
        QUERIES=QUERY_BLOCK,
        KEYS=KEY_BLOCK,
        num_warps=NEAREST_WARPS,
        enable_fp_fusion=False,
    )
    cycle_kernel[(triton.cdiv(count, CYCLE_BLOCK), pairs)](
        nearest,
        index,
        _on_device(widths, tokens.device),
        views,
        count,
        cycle_threshold**2,
        BLOCK=CYCLE_BLOCK,
        num_warps=CYCLE_WARPS,
    )
    return index, distance


def _on_device(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the widths as a tensor ``[V]``; created on the device, because the host would wait for a copy."""
    if len(set(widths)) == 1:
        return torch.full((len(widths),), widths[0], device=device)
    return torch.cat([torch.full((1,), width, device=device) for width in widths])
