"""MVDream's camera condition: 16 numbers per view, a camera-to-world matrix on the unit sphere of a z-up world.

Axes: B samples, V views. Extrinsics are OpenCV world-to-camera, as everywhere in `cameo`.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from cameo.errors import ShapeError
from cameo.geometry import estimate_up, invert_extrinsics, orbit_centre
from cameo.geometry.cameras import at_least_float32, check_matrices, full_precision

__all__ = ["CAMERA_CHANNELS", "camera_vectors"]

CAMERA_CHANNELS = 16


@full_precision
def camera_vectors(
    extrinsics: Tensor, up: Tensor | None = None, *, centre: Tensor | None = None, front: int | None = None
) -> Tensor:
    """Flatten the cameras into the numbers that MVDream was trained on.

    Example:
        >>> extrinsics = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 3], [0, 0, 0, 1]])  # from y = -3
        >>> up, origin = torch.tensor([[0.0, 0, 1]]), torch.zeros(1, 3)
        >>> views = camera_vectors(extrinsics.expand(1, 1, 4, 4), up, centre=origin)
        >>> views.reshape(4, 4).tolist()[1]  # second row: world y of the axes, and of the centre
        [0.0, 0.0, -1.0, -1.0]

    The world is moved so that the point the cameras look at is the origin, and turned so that up is z; where it has
    that form already, as for one object at the origin, nothing changes. Each camera centre is then scaled onto
    the unit sphere, so its distance is not part of the condition: this is the published form, made for cameras on a
    sphere around an object.

    Args:
        extrinsics: `[B, V, 4, 4]` world-to-camera, OpenCV axes.
        up: `[B, 3]` direction that points up in the world; default that of the cameras, on average.
        centre: `[B, 3]` point to look at; default the one nearest to all optical axes.
        front: view that is to stand at azimuth 0, in direction -y of the centre. ImageDream turns the world like
            this for the view of its image prompt. Default: the world's own azimuth, as in MVDream.

    Returns:
        `[B, V, 16]`: 4 x 4 camera-to-world matrices with OpenGL camera axes (x right, y up, looking along -z), row by
        row.

    Raises:
        ShapeError: a wrong shape.
        ValueError: `front` is not a view, or `up` has no length.

    Source: arXiv 2308.16512, section 3.1, and `mvdream/camera_utils.py` of the release; ImageDream, arXiv 2312.02201,
    section 3.1.
    """
    check_matrices("extrinsics", extrinsics, 4)
    samples, views = extrinsics.shape[:2]
    if front is not None and not 0 <= front < views:
        raise ValueError(f"front: expected a view in 0..{views - 1}, got {front}")
    extrinsics = extrinsics.to(at_least_float32(extrinsics))
    up = estimate_up(extrinsics) if up is None else _vectors("up", up, samples).to(extrinsics)
    centre = orbit_centre(extrinsics) if centre is None else _vectors("centre", centre, samples).to(extrinsics)
    camera_to_world = invert_extrinsics(extrinsics)
    rotation = camera_to_world[..., :3, :3] * camera_to_world.new_tensor([1.0, -1.0, -1.0])  # OpenCV to OpenGL axes
    turn = _up_to_z(up)
    position = (turn[:, None] @ (camera_to_world[..., :3, 3] - centre[:, None])[..., None])[..., 0]
    if front is not None:
        about_z = _about_z(-math.pi / 2 - torch.atan2(position[:, front, 1], position[:, front, 0]))
        position, turn = (about_z[:, None] @ position[..., None])[..., 0], about_z @ turn
    cameras = torch.zeros_like(extrinsics)
    cameras[..., :3, :3] = turn[:, None] @ rotation
    cameras[..., :3, 3] = position / (position.norm(dim=-1, keepdim=True) + 1e-8)
    cameras[..., 3, 3] = 1
    return rearrange(cameras, "b v r c -> b v (r c)")


def _vectors(name: str, vectors: Tensor, samples: int) -> Tensor:
    if vectors.shape != (samples, 3):
        raise ShapeError(name, expected=f"[{samples}, 3]", got=vectors.shape)
    if not bool(vectors.isfinite().all()) or (name == "up" and not bool(vectors.norm(dim=-1).gt(0).all())):
        raise ValueError(f"{name}: expected finite numbers{', not all zero' if name == 'up' else ''}, got {vectors}")
    return vectors


def _up_to_z(up: Tensor) -> Tensor:
    """Smallest rotations `[B, 3, 3]` that take the directions `[B, 3]` to z."""
    x, y, z = (up / up.norm(dim=-1, keepdim=True)).unbind(-1)
    upside_down = z < -1 + 1e-6  # any half turn about a horizontal axis will do; take the one about x
    share = 1 / torch.where(upside_down, torch.ones_like(z), 1 + z)
    rows = [1 - share * x * x, -share * x * y, -x, -share * x * y, 1 - share * y * y, -y, x, y, z]
    smallest = rearrange(torch.stack(rows, dim=-1), "b (r c) -> b r c", r=3)
    half_turn = torch.diag(up.new_tensor([1.0, -1.0, -1.0]))
    return torch.where(upside_down[:, None, None], half_turn, smallest)


def _about_z(angle: Tensor) -> Tensor:
    """Rotations `[B, 3, 3]` about z by angles `[B]` in radians."""
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero, zero, zero, one]
    return rearrange(torch.stack(rows, dim=-1), "b (r c) -> b r c", r=3)
