"""Reading depth images between pixels, without mixing two surfaces.

Axes: B samples, V views, H W image pixels, M positions.
z-depth in world units; 0, a negative or a non-finite value means "no measurement". Inverse depth is used
inside, because that of a plane is linear in the image.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from cameo.errors import ShapeError

__all__ = ["inverse_depth_slopes", "is_measured", "sample_depth", "sample_slopes"]

# Two depth values around one position belong to the same surface if they differ by less than this share.
SAME_SURFACE = 0.01
# A steeper change of inverse depth per pixel (as a share of it) is an edge, not a slanted surface.
STEEPEST_SLOPE = 0.1


def is_measured(depth: Tensor) -> Tensor:
    """Tell which depth values are measurements: finite and positive."""
    return depth.isfinite() & (depth > 0)


def sample_depth(depth: Tensor, xy: Tensor) -> Tensor:
    """Read z-depth at pixel positions without mixing two surfaces; NaN outside or without measurement.

    Of the four pixels around a position, each one continues its own surface to that position by its own
    slope of inverse depth (exact for planes). The surface that most of the position's bilinear weight stands
    on wins, and only its pixels are averaged.

    Example:
        >>> depth = torch.tensor([[1.0, 1.0, 4.0, 4.0]]).expand(1, 1, 1, 4, 4)
        >>> sample_depth(depth, torch.tensor([1.9, 2.0]).expand(1, 1, 1, 2)).item()
        1.0

    Args:
        depth: ``[B, V, 1, H, W]`` z-depth.
        xy: ``[B, V, M, 2]`` in pixels, pixel centres at +0.5.

    Returns:
        ``[B, V, M]`` z-depth.

    Raises:
        ShapeError: a wrong shape.
    """
    if depth.ndim != 5 or depth.shape[2] != 1:
        raise ShapeError("depth", expected="[B, V, 1, H, W]", got=depth.shape)
    if xy.ndim != 4 or xy.shape[-1] != 2 or xy.shape[:2] != depth.shape[:2]:
        raise ShapeError("xy", expected=f"[{depth.shape[0]}, {depth.shape[1]}, M, 2]", got=xy.shape)
    return sample_slopes(inverse_depth_slopes(depth), xy)


def inverse_depth_slopes(depth: Tensor) -> Tensor:
    """Return inverse depth (0 = no measurement) and its x and y slope per pixel, ``[B, V, 3, H, W]``.

    Of the differences to the left and the right neighbour the smaller one is the slope: at a depth edge the
    other one leads to another surface.
    """
    measured = is_measured(depth)
    inverse = torch.where(measured, 1 / torch.where(measured, depth, 1), 0)[:, :, 0]
    slopes = [inverse]
    for axis in (-1, -2):
        length = inverse.shape[axis]
        first, second = inverse.narrow(axis, 0, length - 1), inverse.narrow(axis, 1, length - 1)
        step = torch.where((first > 0) & (second > 0), second - first, math.inf)
        edge = torch.full_like(inverse.narrow(axis, 0, 1), math.inf)
        before, after = torch.cat([edge, step], axis), torch.cat([step, edge], axis)
        slope = torch.where(before.abs() <= after.abs(), before, after)
        slopes.append(torch.where(slope.abs() <= STEEPEST_SLOPE * inverse, slope, 0))
    return torch.stack(slopes, dim=2)


def sample_slopes(slopes: Tensor, xy: Tensor) -> Tensor:
    """Do the work of :func:`sample_depth` on the output of :func:`inverse_depth_slopes`."""
    height, width = slopes.shape[-2:]
    x, y = xy.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    position = torch.where(inside[..., None], xy, 0.5)
    corner = (position - 0.5).floor()
    share = position - 0.5 - corner
    share = torch.stack([1 - share, share], dim=-1)  # [B, V, M, xy, low or high]
    weight = rearrange(share[..., 1, :, None] * share[..., 0, None, :], "b v m y x -> b v m (y x)")
    step = torch.arange(2, device=xy.device)
    columns = (corner[..., 0, None].long() + step).clamp(0, width - 1)[..., None, :]
    rows = (corner[..., 1, None].long() + step).clamp(0, height - 1)[..., :, None]
    columns, rows = (axis.expand(*x.shape, 2, 2).flatten(-2) for axis in (columns, rows))
    pixel = rearrange(rows * width + columns, "b v m k -> b v 1 (m k)").expand(-1, -1, 3, -1)
    found = torch.gather(slopes.flatten(-2), -1, pixel)
    inverse, slope_x, slope_y = rearrange(found, "b v c (m k) -> c b v m k", k=4)
    weight = weight * (inverse > 0)
    offset_x, offset_y = position[..., 0, None] - columns - 0.5, position[..., 1, None] - rows - 0.5
    here = inverse + slope_x * offset_x + slope_y * offset_y
    same = (here[..., :, None] - here[..., None, :]).abs() <= SAME_SURFACE * here[..., :, None].abs()
    support = (same * weight[..., None, :]).sum(-1)
    winner = torch.where(weight > 0, support, -1).argmax(-1, keepdim=True)
    group = weight * torch.gather(same, -2, winner[..., None].expand(*winner.shape, 4)).squeeze(-2)
    total = group.sum(-1)
    value = (group * here).sum(-1)
    return torch.where(inside & (total > 0), total / torch.where(value > 0, value, 1), math.nan)
