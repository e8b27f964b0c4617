"""Read depth images between pixels without mixing two surfaces.

Axes: B samples, V views, H W image pixels, M positions, K = 4 pixels around each.
z-depth in world units; 0, a negative or a non-finite value means "no measurement". The computation uses inverse depth,
since that of a plane is linear in the image.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from cameo.errors import ShapeError

__all__ = ["is_measured", "read_depth", "sample_depth"]

# Two depth values around one position belong to the same surface if they differ by less than this share.
SAME_SURFACE = 0.01
# A steeper change of inverse depth per pixel (as a share of it) is an edge, not a slanted surface.
STEEPEST_SLOPE = 0.1


def is_measured(depth: Tensor) -> Tensor:
    """Tell which depth values are measurements: finite and positive."""
    return (depth > 0) & (depth < math.inf)


def sample_depth(depth: Tensor, xy: Tensor) -> Tensor:
    """Read z-depth at pixel positions without mixing two surfaces; NaN outside or without measurement.

    Each of the four pixels around a position extrapolates its surface to that position by its slope of inverse depth,
    which is exact for planes. The surface that has most of the bilinear weight is chosen, and only its pixels are
    averaged.

    Example:
        >>> depth = torch.tensor([[1.0, 1.0, 4.0, 4.0]]).expand(1, 1, 1, 4, 4)
        >>> sample_depth(depth, torch.tensor([1.9, 2.0]).expand(1, 1, 1, 2)).item()
        1.0

    Args:
        depth: ``[B, V, 1, H, W]`` z-depth.
        xy: ``[B, V, M, 2]`` in pixels, pixel centers at +0.5.

    Returns:
        ``[B, V, M]`` z-depth.

    Raises:
        ShapeError: a tensor has another shape.
    """
    if depth.ndim != 5 or depth.shape[2] != 1:
        raise ShapeError("depth", expected="[B, V, 1, H, W]", got=depth.shape)
    if xy.ndim != 4 or xy.shape[-1] != 2 or xy.shape[:2] != depth.shape[:2]:
        raise ShapeError("xy", expected=f"[{depth.shape[0]}, {depth.shape[1]}, M, 2]", got=xy.shape)
    return read_depth(depth, xy)


def read_depth(depth: Tensor, xy: Tensor) -> Tensor:
    """Do the work of :func:`sample_depth` on arguments whose shapes were checked.

    Only the pixels around the positions are read, so the cost does not depend on the image size.
    """
    height, width = depth.shape[-2:]
    x, y = xy.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = torch.where(inside, x, 0.5), torch.where(inside, y, 0.5)
    columns, weight_x, offset_x = _neighbors(x, width)  # [2, B, V, M]
    rows, weight_y, offset_y = _neighbors(y, height)
    # Axis K = (row, column) comes first, so that what follows is computed on long vectors.
    inverse, slope_x, slope_y = _inverse_depth_slopes(depth, rows, columns)
    weight = (weight_y[:, None] * weight_x[None]).flatten(0, 1) * (inverse > 0)
    offset_x, offset_y = offset_x.repeat(2, 1, 1, 1), offset_y.repeat_interleave(2, dim=0)
    extrapolated = slope_x.mul_(offset_x).add_(inverse).add_(slope_y.mul_(offset_y))
    margin = SAME_SURFACE * extrapolated.abs()
    zero = weight.new_zeros(())
    largest_support, chosen = torch.full_like(weight[0], -1), torch.zeros_like(weight)
    for k in range(4):
        same_surface = torch.where((extrapolated[k] - extrapolated).abs_() <= margin[k], weight, zero)
        support = torch.where(weight[k] > 0, same_surface.sum(0), -1)
        chosen = torch.where(support > largest_support, same_surface, chosen)
        largest_support = torch.maximum(largest_support, support)
    total, value = chosen.sum(0), (chosen * extrapolated).sum(0)
    return torch.where(inside & (total > 0), total / torch.where(value > 0, value, 1), math.nan)


def _neighbors(position: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the two pixels around each position, their weights, and the offsets from their centers."""
    corner = (position - 0.5).floor()
    share = position - 0.5 - corner
    corner = corner.long()
    pixel = torch.stack([corner, corner + 1]).clamp_(0, length - 1)
    return pixel, torch.stack([1 - share, share]), position - pixel - 0.5


def _inverse_depth_slopes(depth: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse depth (0 = no measurement) and its x and y slope at the pixels in two rows and two columns, ``[K, ...]``.

    The slope is the smaller one of the differences to the left and to the right neighbor: at a depth edge the other
    one is the difference to another surface.
    """
    height, width = depth.shape[-2:]
    pixel = (rows[:, None] * width + columns[None]).flatten(0, 1)
    around = torch.stack([pixel, pixel - 1, pixel + 1, pixel - width, pixel + width]).clamp_(0, height * width - 1)
    values = torch.gather(depth.flatten(2), -1, rearrange(around, "s k b v m -> b v (s k m)"))
    values = rearrange(values, "b v (s k m) -> s k b v m", s=5, k=4)
    measured = is_measured(values)
    for side, exists in enumerate((columns > 0, columns < width - 1), start=1):
        measured[side].unflatten(0, (2, 2)).logical_and_(exists[None])
    for side, exists in enumerate((rows > 0, rows < height - 1), start=3):
        measured[side].unflatten(0, (2, 2)).logical_and_(exists[:, None])
    inverse = torch.where(measured, values.reciprocal(), 0)
    here = inverse[0]
    slopes = []
    for before, after in (inverse[1:3], inverse[3:5]):
        behind = torch.where((before > 0) & (here > 0), here - before, math.inf)
        ahead = torch.where((here > 0) & (after > 0), after - here, math.inf)
        smaller = torch.where(behind.abs() <= ahead.abs(), behind, ahead)
        slopes.append(torch.where(smaller.abs() <= STEEPEST_SLOPE * here, smaller, 0))
    return here, slopes[0], slopes[1]
