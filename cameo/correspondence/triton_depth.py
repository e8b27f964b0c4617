# Compile-time constants of Triton are written in capitals, and its functions have no type annotations.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
"""Matches from depth on CUDA in one launch, in Triton; the twin of `cameo.correspondence.matching.match_depth`.

Axes: B samples, V views, H W image pixels, N tokens per view (row-major, padded). A program computes some tokens of
view i against view j from the depth and the cameras themselves and holds everything in registers, so there is no
workspace. The twin inverts the intrinsics in float32 and sums in another order, so positions differ in the last digits
of float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cameo.geometry.depth import SAME_SURFACE, STEEPEST_SLOPE
from cameo.geometry.grids import TokenGrids
from cameo.memory import sent_to

__all__ = ["match_depth"]

BLOCK, WARPS = 128, 4
SAME, STEEPEST = tl.constexpr(SAME_SURFACE), tl.constexpr(STEEPEST_SLOPE)


@triton.jit
def depth_kernel(
    depth, intrinsics, extrinsics, grids, index, distance, views, tokens, height, width, tolerance, BLOCK: tl.constexpr
):
    """Matches and distances of BLOCK tokens of view i in view j.

    depth: float32 [B, V, H, W]; intrinsics, extrinsics: [B, V, 3, 3] and [B, V, 4, 4]; grids: int64 [V, 2];
    index int64 and distance float32 [B, V, V, N].
    """
    pair = tl.program_id(1)
    sample = pair // (views * views)
    i = pair // views % views
    j = pair % views
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out = pair.to(tl.int64) * tokens + token
    real = token < tokens
    if i == j:
        tl.store(index + out, tl.full([BLOCK], -1, tl.int64), mask=real)
        tl.store(distance + out, tl.full([BLOCK], float("inf"), tl.float32), mask=real)
        return
    here, there = sample * views + i, sample * views + j
    rows, columns = _grid(grids, i)
    own = token < rows * columns
    x, y = _center(token, rows, columns, height, width)
    depth_here = depth + here.to(tl.int64) * height * width
    depth_there = depth + there.to(tl.int64) * height * width
    z = _read_depth(depth_here, x, y, own, height, width)
    # The ray of z = 1 through the token's center: the inverse of the intrinsics, by cofactors.
    a, b, c, d, e, f, g, h, k = _matrix(intrinsics + here * 9, 3)
    determinant = a * (e * k - f * h) - b * (d * k - f * g) + c * (d * h - e * g)
    ray_x = _ray((e * k - f * h) / determinant, (c * h - b * k) / determinant, (b * f - c * e) / determinant, x, y)
    ray_y = _ray((f * g - d * k) / determinant, (a * k - c * g) / determinant, (c * d - a * f) / determinant, x, y)
    ray_z = _ray((d * h - e * g) / determinant, (b * g - a * h) / determinant, (a * e - b * d) / determinant, x, y)
    point_x, point_y, point_z = _move(extrinsics + here * 16, extrinsics + there * 16, ray_x * z, ray_y * z, ray_z * z)
    a, b, c, d, e, f, _, _, _ = _matrix(intrinsics + there * 9, 3)
    front = point_z > 0
    safe_z = tl.where(front, point_z, 1.0)
    to_x, to_y = _ray(a, b, c, point_x, point_y, point_z), _ray(d, e, f, point_x, point_y, point_z)
    x = tl.where(front, tl.div_rn(to_x, safe_z), -1.0)
    y = tl.where(front, tl.div_rn(to_y, safe_z), -1.0)
    surface = _read_depth(depth_there, x, y, own, height, width)
    visible = tl.abs(point_z - surface) <= tolerance * surface
    rows, columns = _grid(grids, j)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column = tl.minimum(tl.div_rn(tl.where(inside, x, 0.0) * columns, width.to(tl.float32)).to(tl.int32), columns - 1)
    row = tl.minimum(tl.div_rn(tl.where(inside, y, 0.0) * rows, height.to(tl.float32)).to(tl.int32), rows - 1)
    target = row * columns + column
    x, y = _center(target, rows, columns, height, width)
    measured = _read_depth(depth_there, x, y, own & inside & visible, height, width) > 0
    factor = tl.div_rn(surface, point_z)
    step_x, step_y, step_z = factor * point_x - point_x, factor * point_y - point_y, factor * point_z - point_z
    apart = tl.sqrt_rn(step_x * step_x + step_y * step_y + step_z * step_z)
    tl.store(index + out, tl.where(own & inside & visible & measured, target, -1).to(tl.int64), mask=real)
    tl.store(distance + out, tl.where(own & (apart < float("inf")), apart, float("inf")), mask=real)


@triton.jit
def _grid(grids, view):
    """Rows and columns of the tokens of a view."""
    return tl.load(grids + view * 2).to(tl.int32), tl.load(grids + view * 2 + 1).to(tl.int32)


@triton.jit
def _center(token, rows, columns, height, width):
    """Position of the center of tokens in pixels."""
    cell_width = (width.to(tl.float64) / columns.to(tl.float64)).to(tl.float32)
    cell_height = (height.to(tl.float64) / rows.to(tl.float64)).to(tl.float32)
    return ((token % columns).to(tl.float32) + 0.5) * cell_width, (
        (token // columns).to(tl.float32) + 0.5
    ) * cell_height


@triton.jit
def _matrix(start, width):
    """The upper left 3 x 3 entries of a matrix with rows of this width, in float64."""
    return (
        tl.load(start).to(tl.float64),
        tl.load(start + 1).to(tl.float64),
        tl.load(start + 2).to(tl.float64),
        tl.load(start + width).to(tl.float64),
        tl.load(start + width + 1).to(tl.float64),
        tl.load(start + width + 2).to(tl.float64),
        tl.load(start + 2 * width).to(tl.float64),
        tl.load(start + 2 * width + 1).to(tl.float64),
        tl.load(start + 2 * width + 2).to(tl.float64),
    )


@triton.jit
def _ray(a, b, c, x, y, z=1.0):
    """A row of a matrix times a vector, in float32."""
    return a.to(tl.float32) * x + b.to(tl.float32) * y + c.to(tl.float32) * z


@triton.jit
def _move(here, there, x, y, z):
    """Move points of the camera `here` to that of `there`; the transform between them is computed in float64."""
    a, b, c, d, e, f, g, h, k = _matrix(here, 4)
    p, q, r, s, t, u, v, w, o = _matrix(there, 4)
    here_x = tl.load(here + 3).to(tl.float64)
    here_y = tl.load(here + 7).to(tl.float64)
    here_z = tl.load(here + 11).to(tl.float64)
    center_x = -(a * here_x + d * here_y + g * here_z)
    center_y = -(b * here_x + e * here_y + h * here_z)
    center_z = -(c * here_x + f * here_y + k * here_z)
    shift_x = p * center_x + q * center_y + r * center_z + tl.load(there + 3).to(tl.float64)
    shift_y = s * center_x + t * center_y + u * center_z + tl.load(there + 7).to(tl.float64)
    shift_z = v * center_x + w * center_y + o * center_z + tl.load(there + 11).to(tl.float64)
    to_x = _ray(p * a + q * b + r * c, p * d + q * e + r * f, p * g + q * h + r * k, x, y, z)
    to_y = _ray(s * a + t * b + u * c, s * d + t * e + u * f, s * g + t * h + u * k, x, y, z)
    to_z = _ray(v * a + w * b + o * c, v * d + w * e + o * f, v * g + w * h + o * k, x, y, z)
    return to_x + shift_x.to(tl.float32), to_y + shift_y.to(tl.float32), to_z + shift_z.to(tl.float32)


@triton.jit
def _read_depth(depth, x, y, wanted, height, width):
    """What `cameo.geometry.depth.read_depth` reads: NaN outside, without measurement and where it is not wanted."""
    inside = wanted & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = tl.where(inside, x, 0.5), tl.where(inside, y, 0.5)
    left, top = tl.floor(x - 0.5), tl.floor(y - 0.5)
    share_x, share_y = x - 0.5 - left, y - 0.5 - top
    # The four pixels around the position are an axis: Triton compiles one load of all four in a fifth of the time.
    pixel = tl.arange(0, 4)[None, :]
    column = tl.minimum(tl.maximum(left.to(tl.int32)[:, None] + pixel % 2, 0), width - 1)
    row = tl.minimum(tl.maximum(top.to(tl.int32)[:, None] + pixel // 2, 0), height - 1)
    share_x, share_y = share_x[:, None], share_y[:, None]
    share = tl.where(pixel // 2 == 0, 1 - share_y, share_y) * tl.where(pixel % 2 == 0, 1 - share_x, share_x)
    inverse, weight = _pixel(depth, x[:, None], y[:, None], row, column, share, inside[:, None], height, width)
    # For each of them those on its surface: their weight together, and the sum of their inverse depths.
    margin = (tl.abs(inverse) * SAME)[:, :, None]
    alike = tl.abs(inverse[:, :, None] - inverse[:, None, :]) <= margin
    shares = tl.where(alike, weight[:, None, :], 0.0)
    support = tl.where(weight > 0, tl.sum(shares, 2), -1.0)
    value = tl.sum(shares * inverse[:, None, :], 2)
    # The first of the surfaces that have the most support.
    total = tl.max(support, 1)
    first = tl.min(tl.where(support == total[:, None], pixel, 4), 1)
    value = tl.sum(tl.where(pixel == first[:, None], value, 0.0), 1)
    return tl.where(inside & (total > 0), tl.div_rn(total, tl.where(value > 0, value, 1.0)), float("nan"))


@triton.jit
def _pixel(depth, x, y, row, column, weight, wanted, height, width):
    """Inverse depth that a pixel extrapolates to the position, and its weight."""
    place = depth + row * width + column
    here = _inverse(place, wanted)
    slope_x = _slope(
        _inverse(place - 1, wanted & (column > 0)), here, _inverse(place + 1, wanted & (column < width - 1))
    )
    slope_y = _slope(
        _inverse(place - width, wanted & (row > 0)), here, _inverse(place + width, wanted & (row < height - 1))
    )
    offset_x, offset_y = x - column.to(tl.float32) - 0.5, y - row.to(tl.float32) - 0.5
    return slope_x * offset_x + here + slope_y * offset_y, tl.where(here > 0, weight, 0.0)


@triton.jit
def _inverse(place, exists):
    """Inverse depth of a pixel, 0 without a measurement."""
    value = tl.load(place, mask=exists, other=0.0)
    measured = (value > 0) & (value < float("inf"))
    return tl.where(measured, tl.div_rn(1.0, tl.where(measured, value, 1.0)), 0.0)


@triton.jit
def _slope(before, here, after):
    """The smaller one of the differences to both neighbors, 0 at an edge."""
    behind = tl.where((before > 0) & (here > 0), here - before, float("inf"))
    ahead = tl.where((here > 0) & (after > 0), after - here, float("inf"))
    smaller = tl.where(tl.abs(behind) <= tl.abs(ahead), behind, ahead)
    return tl.where(tl.abs(smaller) <= here * STEEPEST, smaller, 0.0)


def match_depth(
    depth: Tensor, intrinsics: Tensor, extrinsics: Tensor, token_grids: TokenGrids, depth_tolerance: float
) -> tuple[Tensor, Tensor]:
    """Do :func:`cameo.correspondence.matching.match_depth` in one launch, for depth in float32."""
    batch, views, _, height, width = depth.shape
    tokens = max(rows * columns for rows, columns in token_grids)
    index = torch.empty(batch, views, views, tokens, dtype=torch.int64, device=depth.device)
    distance = torch.empty_like(index, dtype=depth.dtype)
    if not index.numel():
        return index, distance
    with torch.cuda.device_of(depth):
        depth_kernel[(triton.cdiv(tokens, BLOCK), batch * views * views)](
            depth.contiguous(),
            intrinsics.contiguous(),
            extrinsics.contiguous(),
            sent_to(depth.device, torch.tensor(token_grids)),
            index,
            distance,
            views,
            tokens,
            height,
            width,
            depth_tolerance,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return index, distance
