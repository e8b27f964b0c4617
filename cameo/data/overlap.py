"""Overlap of views: the share of one view that another view shows, measured by reprojecting depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.geometry import transform, unproject
from cameo.geometry.visibility import DEPTH_TOLERANCE, look_up
from cameo.scenes.views import Views

__all__ = ["view_overlap"]

# Reprojected points per call; bounds the memory for long sequences.
POINTS_PER_CALL = 2**20


@torch.no_grad()
def view_overlap(views: Views, *, grid: int = 16) -> Tensor:
    """Return `[F, F]`: the share of view i's measured surface points that view j shows, in [0, 1].

    Points are taken on a `grid` x `grid` raster of each view; a point counts as shown if it falls inside
    view j and its depth lies in the range of the 3x3 pixels there. This is a coarser test than
    `Correspondence.from_depth`, and fast enough for all pairs of a long sequence. The diagonal is 1; the row
    of a view without any depth is otherwise 0.

    Example:
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).repeat(2, 1, 1)
        >>> extrinsics = torch.eye(4).repeat(2, 1, 1)
        >>> extrinsics[1, 0, 3] = 1.0
        >>> images, depth = torch.zeros(2, 3, 8, 8), torch.full((2, 1, 8, 8), 2.0)
        >>> wall = Views(images, depth, intrinsics, extrinsics, "wall")
        >>> view_overlap(wall, grid=8).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    count, (height, width) = len(views), views.size
    depth = views.depth.float()
    rows = ((torch.arange(grid) + 0.5) * (height / grid)).long()
    columns = ((torch.arange(grid) + 0.5) * (width / grid)).long()
    intrinsics, extrinsics = views.intrinsics[None].float(), views.extrinsics[None].float()
    raster = unproject(depth[None], intrinsics, extrinsics)[0][:, :, rows[:, None], columns].flatten(2).mT
    measured = raster.isfinite().all(-1)
    points = torch.where(measured[..., None], raster, 0.0)

    valid = torch.isfinite(depth) & (depth > 0)
    nearest = -F.max_pool2d(torch.where(valid, -depth, -torch.inf), 3, 1, 1)
    farthest = F.max_pool2d(torch.where(valid, depth, 0.0), 3, 1, 1)
    nearest, farthest = nearest.flatten(1), farthest.flatten(1)

    def surface_at(xy: Tensor, z: Tensor) -> Tensor:
        """The depth in the range of the 3x3 pixels that is nearest to the depth of the point."""
        inside = (z > 0) & (xy >= 0).all(-1) & (xy[..., 0] < width) & (xy[..., 1] < height)
        pixel = torch.where(inside[..., None], xy, 0.0).long()
        index = (pixel[..., 1] * width + pixel[..., 0])[0]
        surface = z.clamp(nearest.gather(1, index), farthest.gather(1, index))
        return torch.where(inside, surface, torch.nan)

    shown = []
    for part in range(0, count, max(1, POINTS_PER_CALL // (count * grid**2))):
        chosen = slice(part, part + max(1, POINTS_PER_CALL // (count * grid**2)))
        flat = points[chosen].flatten(0, 1).expand(1, count, -1, 3)
        sighting = look_up(transform(flat, extrinsics), intrinsics, surface_at, DEPTH_TOLERANCE)
        agrees = sighting.visible[0].unflatten(1, (-1, grid**2)) & measured[chosen]
        shown.append(agrees.sum(-1).T)
    share = torch.cat(shown) / measured.sum(-1, keepdim=True).clamp(min=1)
    return share.float().fill_diagonal_(1.0)
