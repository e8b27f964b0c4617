"""Cameras around a center: the point that they look at, and their azimuth and elevation.

Axes: B samples, V views, H W image pixels. Conventions as in :mod:`cameo.geometry`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cameo.errors import ShapeError
from cameo.geometry.cameras import at_least_float32, camera_centers, check_matrices, full_precision, most_exact
from cameo.geometry.depth import is_measured

__all__ = ["estimate_up", "orbit_centre", "spherical_angles"]

# Root mean square angle between the optical axes and a direction, in degrees: up to the first value the axes do not
# determine where along that direction they meet, from the second value on they do.
VAGUE, CLEAR = 1.0, 3.0
# Least distance of the center in front of each camera, as a share of its median depth.
LEAST_DISTANCE = 0.1


@torch.no_grad()
@full_precision
def orbit_centre(extrinsics: Tensor, depth: Tensor | None = None) -> Tensor:
    """Return the point that the cameras of a sample look at, ``[B, 3]`` in world coordinates.

    Example:
        >>> extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
        >>> extrinsics[0, 1, :3, :3] = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])  # looks along x
        >>> extrinsics[0, :, 2, 3] = 2.0  # both are two units in front of the origin
        >>> orbit_centre(extrinsics).tolist()
        [[0.0, 0.0, 0.0]]

    This is the least-squares point of the optical axes, as far as the axes determine it. Along a direction from which
    the axes deviate by less than 1 degree (root mean square) they do not determine it, and the mean of the points at
    each camera's median depth is taken; from 3 degrees on the axes alone determine it, and in between the two are
    mixed without a jump. One camera, or parallel cameras, thus give a point straight ahead. A least-squares point that
    is not in front of every camera, by a tenth of its median depth where depth is given, is not a point that the
    cameras look at (for example if a camera rotates about its center); then only the median depth is used.

    Args:
        extrinsics: ``[B, V, 4, 4]`` world-to-camera.
        depth: ``[B, V, 1, H, W]`` z-depth; for a view without measurements the median of the sample's other views is
            taken. None, or a sample without any measurement, means distance 1.

    Raises:
        ShapeError, ValueError: a tensor has another shape or dtype.
    """
    check_matrices("extrinsics", extrinsics, 4)
    ahead = _median_depth(extrinsics, depth)
    exact = most_exact(extrinsics)
    centre, axis = camera_centers(exact), exact[..., 2, :3]
    prior = (centre + ahead.to(exact)[..., None] * axis).mean(1)
    across = torch.eye(3, dtype=exact.dtype, device=exact.device) - axis[..., :, None] * axis[..., None, :]
    # The mean squared distance of a point from the axes is quadratic in the point. Its curvature has, along a
    # direction, the mean squared sine of the angle between that direction and the axes as eigenvalue.
    curvature = across.mean(1)
    pull = (across @ (centre - prior[:, None])[..., None]).mean(1)[..., 0]
    # On the CPU, since not every device supports eigh and the matrices are tiny.
    squared_sine, direction = (part.to(curvature) for part in torch.linalg.eigh(curvature.cpu()))
    low, high = (math.sin(math.radians(angle)) ** 2 for angle in (VAGUE, CLEAR))
    trust = ((squared_sine - low) / (high - low)).clamp(0, 1)
    shift = trust / squared_sine.clamp_min(low) * (direction.mT @ pull[..., None])[..., 0]
    point = prior + (direction @ shift[..., None])[..., 0]
    in_front = ((point[:, None] - centre) * axis).sum(-1)
    least = LEAST_DISTANCE * ahead.to(exact) if depth is not None else torch.zeros_like(in_front)
    looked_at = (in_front > least).all(1, keepdim=True)
    return torch.where(looked_at, point, prior).to(at_least_float32(extrinsics))


@full_precision
def spherical_angles(extrinsics: Tensor, centre: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the positions of cameras around a center: azimuth, elevation (degrees) and distance, ``[B, V]`` each.

    Example:
        >>> extrinsics = torch.eye(4).repeat(1, 1, 1, 1)
        >>> extrinsics[0, 0, :3, 3] = torch.tensor([0.0, -3.0, -3.0])  # camera centre (0, 3, 3)
        >>> angles = spherical_angles(extrinsics, torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]]))
        >>> [round(value.item(), 3) for value in angles]
        [90.0, 45.0, 4.243]

    Azimuth lies in [0, 360) and increases counter-clockwise, seen from above, about ``up``. Azimuth 0 is the direction
    of the world's x axis, made orthogonal to ``up``, or of its y axis if ``up`` is within 26 degrees of the x axis. So,
    with z up, 0 is x and 90 is y, as in :mod:`cameo.scenes.rigs`. Elevation lies in [-90, 90] and is positive
    towards ``up``. A camera straight above the center has an arbitrary azimuth; one at the center has angles 0.

    Args:
        extrinsics: ``[B, V, 4, 4]`` world-to-camera.
        centre: ``[B, 3]`` in world coordinates, see :func:`orbit_centre`.
        up: ``[B, 3]`` of any length except 0.

    Raises:
        ShapeError: a tensor has another shape.
        ValueError: ``up`` has length 0 or is not finite.
    """
    check_matrices("extrinsics", extrinsics, 4)
    for name, tensor in (("centre", centre), ("up", up)):
        if tuple(tensor.shape) != (extrinsics.shape[0], 3):
            raise ShapeError(name, expected=f"[{extrinsics.shape[0]}, 3]", got=tensor.shape)
    exact = most_exact(extrinsics)
    up = up.to(exact)
    length = up.norm(dim=-1, keepdim=True)
    if not ((length > 0) & length.isfinite()).all():
        raise ValueError(f"up: expected finite vectors with a length, got {up.tolist()}. Cure: see estimate_up")
    up = up / length
    x_axis, y_axis = torch.eye(3, dtype=exact.dtype, device=exact.device)[:2]
    zero = torch.where((up[:, :1].abs() > 0.9), y_axis, x_axis)
    zero = zero - (zero * up).sum(-1, keepdim=True) * up
    zero = zero / zero.norm(dim=-1, keepdim=True)
    frame = torch.stack([zero, torch.linalg.cross(up, zero), up], dim=1)
    offset = camera_centers(exact) - centre.to(exact)[:, None]
    x, y, z = (offset @ frame.mT).unbind(-1)
    azimuth = torch.rad2deg(torch.atan2(y, x)) % 360
    elevation = torch.rad2deg(torch.atan2(z, torch.hypot(x, y)))
    dtype = at_least_float32(extrinsics)
    azimuth = azimuth.to(dtype)
    # Rounding to float32 may give 360 itself.
    azimuth = torch.where(azimuth >= 360, torch.zeros_like(azimuth), azimuth)
    return azimuth, elevation.to(dtype), offset.norm(dim=-1).to(dtype)


@full_precision
def estimate_up(extrinsics: Tensor) -> Tensor:
    """Return the mean up direction of a sample's images, unit ``[B, 3]``, for data that does not define up.

    Example:
        >>> estimate_up(torch.eye(4).expand(1, 3, 4, 4)).tolist()  # OpenCV: y points down
        [[0.0, -1.0, 0.0]]

    The result is exact for level cameras, and for a full orbit of upright cameras at one elevation. Cameras that all
    look down by an angle from one side give a direction that is wrong by that angle. Where the directions cancel out,
    the result is the direction of view 0.

    Args:
        extrinsics: ``[B, V, 4, 4]`` world-to-camera.

    Raises:
        ShapeError, ValueError: the extrinsics have another shape or dtype.
    """
    check_matrices("extrinsics", extrinsics, 4)
    ups = -extrinsics.to(at_least_float32(extrinsics))[..., 1, :3]
    mean = ups.mean(1)
    length = mean.norm(dim=-1, keepdim=True)
    direction = torch.where(length > 1e-3, mean, ups[:, 0])
    return direction / direction.norm(dim=-1, keepdim=True)


def _median_depth(extrinsics: Tensor, depth: Tensor | None) -> Tensor:
    """Median of the measured depth of each view, ``[B, V]``, taken on about 64 x 64 pixels."""
    if depth is None:
        return torch.ones_like(extrinsics[..., 0, 0])
    if depth.ndim != 5 or depth.shape[2] != 1 or depth.shape[:2] != extrinsics.shape[:2]:
        expected = f"[{extrinsics.shape[0]}, {extrinsics.shape[1]}, 1, H, W] (B and V of the extrinsics)"
        raise ShapeError("depth", expected=expected, got=depth.shape)
    rows, columns = (max(1, side // 64) for side in depth.shape[-2:])
    pixels = depth[..., ::rows, ::columns].flatten(2).to(at_least_float32(depth))
    pixels = torch.where(is_measured(pixels), pixels, math.nan)
    of_view = pixels.nanmedian(dim=-1).values
    of_sample = of_view.nanmedian(dim=-1, keepdim=True).values
    return torch.where(of_view.isnan(), of_sample, of_view).nan_to_num(nan=1.0)
