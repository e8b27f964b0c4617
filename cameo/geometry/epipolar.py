"""Two and more views of a point: epipolar distance, and the point itself by triangulation.

Axes: B samples, V views, M pairs of pixels, S sightings, P points. Conventions as in :mod:`cameo.geometry`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cameo.geometry.cameras import full_precision, invert_extrinsics, most_exact

__all__ = ["epipolar_distance", "triangulate"]

# Least angle in radians between two rays of a point, so that its depth is known: about a degree.
LEAST_ANGLE = 0.02


@full_precision
def epipolar_distance(xy: Tensor, other: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> Tensor:
    """Return how far pairs of pixels of two views are from showing one point, in pixels, `[M]`.

    Example:
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).repeat(2, 1, 1)
        >>> extrinsics = torch.eye(4).repeat(2, 1, 1)
        >>> extrinsics[1, 0, 3] = -1.0  # the second camera stands one unit to the right: points keep their row
        >>> epipolar_distance(torch.tensor([[4.0, 4.0]]), torch.tensor([[2.0, 6.0]]), intrinsics, extrinsics).tolist()
        [1.4142135381698608]

    It is the distance by which both pixels together have to move, to first order, to fit the cameras: Sampson's.
    Cameras that stand at one place tell nothing: the distance is 0.

    Args:
        xy: `[M, 2]` in the first view, in pixels.
        other: `[M, 2]` in the second view.
        intrinsics: `[2, 3, 3]` in pixels.
        extrinsics: `[2, 4, 4]` world-to-camera.

    Source: Hartley and Zisserman, Multiple View Geometry, section 11.4.3.
    """
    exact = most_exact(extrinsics)
    pose = exact[1] @ invert_extrinsics(exact[None, None, 0])[0, 0]
    inverse = torch.linalg.inv_ex(intrinsics.to(exact)).inverse
    cross = torch.zeros_like(pose[:3, :3])
    for row, column, axis in ((2, 1, 0), (0, 2, 1), (1, 0, 2)):
        cross[row, column], cross[column, row] = pose[axis, 3], -pose[axis, 3]
    fundamental = inverse[1].mT @ cross @ pose[:3, :3] @ inverse[0]
    here, there = (torch.nn.functional.pad(places.to(exact), (0, 1), value=1.0) for places in (xy, other))
    line_there, line_here = here @ fundamental.mT, there @ fundamental
    slope = line_there[:, :2].square().sum(-1) + line_here[:, :2].square().sum(-1)
    miss = (there * line_there).sum(-1).abs()
    return torch.where(slope > 0, miss / slope.sqrt().clamp(min=torch.finfo(exact.dtype).tiny), 0).to(xy.dtype)


@full_precision
def triangulate(point: Tensor, view: Tensor, xy: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> Tensor:
    """Return the world point of each sighting, `[S, 3]`: the one that is nearest to the rays of all its sightings.

    Example:
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).repeat(2, 1, 1)
        >>> extrinsics = torch.eye(4).repeat(2, 1, 1)
        >>> extrinsics[1, 0, 3] = -1.0
        >>> xy = torch.tensor([[4.0, 4.0], [2.0, 4.0]])
        >>> triangulate(torch.tensor([7, 7]), torch.tensor([0, 1]), xy, intrinsics, extrinsics)[0].round(decimals=4)
        tensor([0., 0., 4.])

    Args:
        point: number of the point that is seen, `[S]`.
        view: the view that shows it, `[S]`.
        xy: where, `[S, 2]` in pixels.
        intrinsics: `[V, 3, 3]` in pixels.
        extrinsics: `[V, 4, 4]` world-to-camera.

    Returns:
        The same point for all its sightings; NaN where its rays are less than about a degree apart.
    """
    exact = most_exact(extrinsics)
    pose = invert_extrinsics(exact[None])[0]
    rays = torch.nn.functional.pad(xy.to(exact), (0, 1), value=1.0)
    inverse = torch.linalg.inv_ex(intrinsics.to(exact)).inverse
    rays = ((pose[:, :3, :3] @ inverse)[view] @ rays[..., None])[..., 0]
    rays = rays / rays.norm(dim=-1, keepdim=True)
    center = pose[:, :3, 3][view]
    _, number = torch.unique(point, return_inverse=True)
    count = int(number.max()) + 1 if len(number) else 0
    # What is left of a vector beside the ray; the sum over the rays of a point is singular where they are parallel.
    beside = torch.eye(3).to(exact) - rays[:, :, None] * rays[:, None]
    normal = beside.new_zeros(count, 3, 3).index_add_(0, number, beside)
    right = beside.new_zeros(count, 3).index_add_(0, number, (beside @ center[..., None])[..., 0])
    solved = torch.linalg.solve_ex(normal, right[..., None]).result[..., 0]
    # For two rays at an angle the least eigenvalue is 1 - cos(angle).
    known = torch.linalg.eigvalsh(normal)[:, 0] > 1 - torch.cos(torch.tensor(LEAST_ANGLE)).item()
    return torch.where(known[:, None], solved, torch.nan)[number].to(xy.dtype)
