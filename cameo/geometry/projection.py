"""Projection and its inverse, rays, and changes of cameras.

Axes: B samples, V views, H W image pixels, h w token grid, M points. Conventions as in :mod:`cameo.geometry`.
"""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange
from torch import Tensor

from cameo.errors import ShapeError, as_integer
from cameo.geometry.cameras import (
    at_least_float32,
    check_cameras,
    check_depth,
    check_image_size,
    check_matrices,
    full_precision,
    invert_extrinsics,
    same_views,
)
from cameo.geometry.depth import is_measured
from cameo.geometry.grids import as_grid
from cameo.geometry.orbits import estimate_up, orbit_centre, spherical_angles

__all__ = [
    "check_cameras",
    "crop_intrinsics",
    "estimate_up",
    "orbit_centre",
    "pixel_grid",
    "plucker_rays",
    "project",
    "relative_extrinsics",
    "resize_intrinsics",
    "spherical_angles",
    "unproject",
]


def pixel_grid(height: int, width: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return the x, y of every pixel center, ``[H, W, 2]``.

    Example:
        >>> pixel_grid(1, 2, dtype=torch.float32, device="cpu").tolist()
        [[[0.5, 0.5], [1.5, 0.5]]]
    """
    return cell_centres((height, width), (height, width), dtype=dtype, device=device)


def cell_centres(
    size: tuple[int, int],
    image_size: tuple[int, int],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Return the x, y in image pixels of the centers of a grid of ``size`` (h, w) cells, ``[h, w, 2]``.

    Example:
        >>> cell_centres((1, 2), (8, 8), dtype=torch.float32, device="cpu").tolist()
        [[[2.0, 4.0], [6.0, 4.0]]]
    """
    (h, w), (height, width) = as_grid("size", size), as_grid("image_size", image_size)
    y = (torch.arange(h, dtype=dtype, device=device) + 0.5) * (height / h)
    x = (torch.arange(w, dtype=dtype, device=device) + 0.5) * (width / w)
    return torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)


@full_precision
def unproject(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor, *, check_values: bool = True) -> Tensor:
    """Turn z-depth into world points, NaN where there is no measurement.

    Example:
        >>> intrinsics = torch.tensor([[2.0, 0, 1], [0, 2, 1], [0, 0, 1]]).expand(1, 1, 3, 3)
        >>> points = unproject(torch.full((1, 1, 1, 2, 2), 4.0), intrinsics, torch.eye(4).expand(1, 1, 4, 4))
        >>> points[0, 0, :, 0, 0].tolist()
        [-1.0, -1.0, 4.0]

    Args:
        depth: ``[B, V, 1, H, W]`` z-depth in world units.
        intrinsics: ``[B, V, 3, 3]`` in pixels.
        extrinsics: ``[B, V, 4, 4]`` world-to-camera.
        check_values: whether to check that the cameras are usable; on a GPU the host waits for this check.

    Returns:
        Point map ``[B, V, 3, H, W]`` in world coordinates.

    Raises:
        ShapeError, ValueError: see :func:`check_cameras`; also if a principal point lies far outside the depth image.
    """
    check_depth(depth, intrinsics, extrinsics, check_values=check_values)
    if check_values and intrinsics.device.type == "cpu":  # the host would wait for a GPU once more
        check_image_size(intrinsics, depth.shape[-2:], stacklevel=None)
    depth = depth.to(at_least_float32(depth))
    height, width = depth.shape[-2:]
    measured = is_measured(depth)
    # Where depth is missing, 1 keeps NaN out of the gradients of the cameras.
    finite = torch.where(measured, depth, torch.ones_like(depth))
    grid = pixel_grid(height, width, dtype=depth.dtype, device=depth.device)
    ray = camera_rays(rearrange(grid, "h w c -> (h w) c"), intrinsics.to(depth))
    in_camera = ray * rearrange(finite, "b v 1 h w -> b v (h w) 1")
    world = transform(in_camera, invert_extrinsics(extrinsics.to(depth)))
    world = rearrange(world, "b v (h w) c -> b v c h w", h=height)
    return torch.where(measured, world, torch.full_like(world, math.nan))


@full_precision
def project(points: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Project world points into their view.

    Example:
        >>> intrinsics = torch.tensor([[2.0, 0, 1], [0, 2, 1], [0, 0, 1]]).expand(1, 1, 3, 3)
        >>> points = torch.tensor([-1.0, -1.0, 4.0]).expand(1, 1, 1, 3)
        >>> xy, z = project(points, intrinsics, torch.eye(4).expand(1, 1, 4, 4))
        >>> xy.flatten().tolist(), z.item()
        ([0.5, 0.5], 4.0)

    Args:
        points: ``[B, V, M, 3]`` in world coordinates.
        intrinsics: ``[B, V, 3, 3]`` in pixels.
        extrinsics: ``[B, V, 4, 4]`` world-to-camera.

    Returns:
        Pixel position ``xy [B, V, M, 2]``, NaN for points that are not in front of the camera, and z-depth
        ``z [B, V, M]`` in world units.

    Raises:
        ShapeError, ValueError: see :func:`check_cameras`.
    """
    if points.ndim != 4 or points.shape[-1] != 3:
        raise ShapeError("points", expected="[B, V, M, 3]", got=points.shape)
    check_cameras(intrinsics, extrinsics)
    same_views("points", points, intrinsics)
    points = points.to(at_least_float32(points))
    return to_pixels(transform(points, extrinsics.to(points)), intrinsics.to(points))


@full_precision
def plucker_rays(intrinsics: Tensor, extrinsics: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the ray through each cell center as unit direction and moment.

    Example:
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 1, 3, 3)
        >>> rays = plucker_rays(intrinsics, torch.eye(4).expand(1, 1, 4, 4), (8, 8), (1, 1))
        >>> rays.flatten().tolist()
        [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]

    Args:
        intrinsics: ``[B, V, 3, 3]`` in pixels of ``image_size``.
        extrinsics: ``[B, V, 4, 4]`` world-to-camera; the rays are in the same world frame.
        image_size: ``(H, W)`` in pixels, each from 1 to 16,384.
        size: ``(h, w)`` cells, for example the latent grid.

    Returns:
        ``[B, V, 6, h, w]``: unit direction ``d``, then moment ``o x d`` with the camera center ``o``.

    Raises:
        ShapeError, ValueError: see :func:`check_cameras`.

    Source: the ray embedding of light field networks (arXiv 2106.02634), with the direction first.
    """
    check_cameras(intrinsics, extrinsics)
    extrinsics = extrinsics.to(at_least_float32(extrinsics))
    grid = cell_centres(size, image_size, dtype=extrinsics.dtype, device=extrinsics.device)
    ray = camera_rays(rearrange(grid, "h w c -> (h w) c"), intrinsics.to(extrinsics))
    pose = invert_extrinsics(extrinsics)
    direction = einsum(pose[..., :3, :3], ray, "b v r c, b v m c -> b v m r")
    direction = direction / direction.norm(dim=-1, keepdim=True)
    moment = torch.linalg.cross(pose[..., None, :3, 3].expand_as(direction), direction)
    return rearrange(torch.cat([direction, moment], dim=-1), "b v (h w) c -> b v c h w", h=size[0])


@full_precision
def relative_extrinsics(extrinsics: Tensor, reference: int = 0) -> Tensor:
    """Move the world frame into the camera of view ``reference``: ``E_i @ inv(E_reference)``.

    Example:
        >>> extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
        >>> extrinsics[0, :, 0, 3] = torch.tensor([1.0, 3.0])
        >>> relative_extrinsics(extrinsics)[0, :, 0, 3].tolist()
        [0.0, 2.0]

    Args:
        extrinsics: ``[B, V, 4, 4]`` world-to-camera.
        reference: the view whose extrinsics become the identity.

    Raises:
        ShapeError: the extrinsics have another shape.
        ValueError: there is no such view.
    """
    check_matrices("extrinsics", extrinsics, 4)
    views = extrinsics.shape[1]
    if not -views <= as_integer("reference", reference) < views:
        raise ValueError(f"reference: expected a view in 0..{views - 1}, got {reference}")
    return extrinsics @ invert_extrinsics(extrinsics[:, reference])[:, None]


def resize_intrinsics(intrinsics: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """Adapt intrinsics ``[..., 3, 3]`` to an image resized from ``(H, W)`` to another ``(H, W)``.

    Example:
        >>> intrinsics = torch.tensor([[64.0, 0, 32], [0, 64, 16], [0, 0, 1]])
        >>> resize_intrinsics(intrinsics, (32, 64), (16, 32))[:2].tolist()
        [[32.0, 0.0, 16.0], [0.0, 32.0, 8.0]]

    Integer intrinsics become float32, since a focal length in whole pixels becomes a fraction in another image size.

    Raises:
        ShapeError: the intrinsics have another shape.
        ValueError: a size is not two positive integers.
    """
    intrinsics = _floating_intrinsics(intrinsics)
    from_height, from_width = (as_integer("from_size", side, least=1) for side in from_size)
    to_height, to_width = (as_integer("to_size", side, least=1) for side in to_size)
    rows = intrinsics.new_tensor([to_width / from_width, to_height / from_height, 1.0])
    return intrinsics * rows[:, None]


def crop_intrinsics(intrinsics: Tensor, top: float, left: float) -> Tensor:
    """Adapt intrinsics ``[..., 3, 3]`` to an image without its first ``top`` rows and ``left`` columns.

    Example:
        >>> intrinsics = torch.tensor([[64.0, 0, 32], [0, 64, 16], [0, 0, 1]])
        >>> crop_intrinsics(intrinsics, top=4, left=2)[:2, 2].tolist()
        [30.0, 12.0]

    Integer intrinsics become float32, since an image may be cut between two pixels.

    Raises:
        ShapeError: the intrinsics have another shape.
        ValueError: ``top`` or ``left`` is not finite.
    """
    for name, pixels in (("top", top), ("left", left)):
        if not math.isfinite(pixels):
            raise ValueError(f"{name}: expected a finite number of pixels, got {pixels}")
    intrinsics = _floating_intrinsics(intrinsics)
    shift = torch.zeros_like(intrinsics)
    shift[..., 0, 2], shift[..., 1, 2] = left, top
    return intrinsics - shift


def _floating_intrinsics(intrinsics: Tensor) -> Tensor:
    if not isinstance(intrinsics, Tensor) or intrinsics.shape[-2:] != (3, 3):
        got = intrinsics.shape if isinstance(intrinsics, Tensor) else type(intrinsics).__name__
        raise ShapeError("intrinsics", expected="a tensor [..., 3, 3]", got=got)
    return intrinsics if intrinsics.is_floating_point() else intrinsics.to(at_least_float32(intrinsics))


def camera_rays(xy: Tensor, intrinsics: Tensor) -> Tensor:
    """Return camera-frame rays of z = 1 through pixels ``[M, 2]`` or ``[V, M, 2]``, ``[B, V, M, 3]``.

    The cameras are assumed usable: `torch.linalg.inv` would check them, and the host would wait for a GPU.
    """
    homogeneous = torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1)
    return homogeneous @ torch.linalg.inv_ex(intrinsics).inverse.mT


@full_precision
def transform(points: Tensor, pose: Tensor) -> Tensor:
    """Move points ``[B, V, M, 3]`` by rigid transforms ``[B, V, 4, 4]``, such as extrinsics or their inverse."""
    return einsum(pose[..., :3, :3], points, "b v r c, b v m c -> b v m r") + pose[..., None, :3, 3]


def to_pixels(in_camera: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Project camera-frame points ``[B, V, M, 3]``; xy is NaN for points that are not in front of it."""
    z = in_camera[..., 2]
    image = einsum(intrinsics, in_camera, "b v r c, b v m c -> b v m r")
    front = (z > 0)[..., None]
    xy = image[..., :2] / torch.where(front, z[..., None], 1)
    return torch.where(front, xy, math.nan), z
