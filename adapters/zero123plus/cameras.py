"""Where Zero123++'s six views are: at fixed poses around the object, and at fixed places in a canvas of 3 x 2 views.

The network takes no cameras as input; it has learned the poses of its views, which are in `cameo.scenes.rigs`.

Axes: B samples, C channels, H W image pixels, h w cells of one view.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from cameo.errors import ShapeError, unknown_name
from cameo.geometry import orbit_centre, spherical_angles

__all__ = [
    "NUM_VIEWS",
    "RIG_NAMES",
    "by_canvas",
    "from_canvas",
    "pose_error",
    "pose_problem",
    "same_poses",
    "shared_poses",
    "to_canvas",
]

NUM_VIEWS = 7  # the reference and the six tiles
RIG_NAMES = ("zero123plus-v1.1", "zero123plus-v1.2")


def pose_error(extrinsics: Tensor, rig: str, *, up: Tensor | None = None) -> float:
    """Return the largest deviation in degrees of azimuth or elevation from a rig, over all samples and views.

    Example:
        >>> import numpy as np, torch
        >>> from cameo.scenes.rigs import rig_cameras
        >>> _, extrinsics = rig_cameras("zero123plus-v1.2", np.random.default_rng(0), (64, 64))
        >>> extrinsics = torch.as_tensor(extrinsics)[None]
        >>> pose_error(extrinsics, "zero123plus-v1.2") < 0.01, round(pose_error(extrinsics, "zero123plus-v1.1"), 2)
        (True, 10.0)

    Args:
        extrinsics: world to camera, `[B, 7, 4, 4]`, with the object at the origin; view 0 is the input.
        rig: one of `RIG_NAMES`.
        up: up direction of the world, `[3]` or `[B, 3]`; default z.

    Raises:
        ShapeError: for another number of views.
        ValueError: for an unknown rig.
    """
    from cameo.scenes.rigs import RIGS

    if rig not in RIG_NAMES:
        raise unknown_name("rig of zero123plus", rig, RIG_NAMES)
    known = RIGS[rig]
    assert known.azimuths is not None
    assert known.elevations is not None
    if extrinsics.ndim != 4 or extrinsics.shape[1] != known.num_views:
        raise ShapeError("extrinsics", expected=f"[B, {known.num_views}, 4, 4]", got=extrinsics.shape)
    samples = extrinsics.shape[0]
    up = extrinsics.new_tensor([0.0, 0.0, 1.0]) if up is None else up
    centre = extrinsics.new_zeros(samples, 3)
    azimuth, elevation, _ = spherical_angles(extrinsics.double(), centre, up.to(extrinsics).expand(samples, 3))
    turn = (azimuth - azimuth[:, :1] - azimuth.new_tensor(known.azimuths) + 180) % 360 - 180
    fixed = [view for view, value in enumerate(known.elevations) if value is not None]
    lift = elevation[:, fixed] - elevation.new_tensor([value for value in known.elevations if value is not None])
    return max(float(turn.abs().max()), float(lift.abs().max()))


def same_poses(extrinsics: Tensor, *, up: Tensor | None = None, tolerance: float = 2.0) -> str | None:
    """Name of the release whose poses these cameras have within `tolerance` degrees, or None."""
    return next((rig for rig in RIG_NAMES if pose_error(extrinsics, rig, up=up) <= tolerance), None)


def shared_poses(extrinsics: Tensor, *, up: Tensor | None = None, tolerance: float = 2.0) -> bool:
    """Tell whether the cameras of all samples have the same angles relative to view 0, within `tolerance` degrees.

    Angles are those about the point that a sample's cameras look at, so the cameras of `cameo.data.RoomRig` share them.

    Example:
        >>> import numpy as np, torch
        >>> from cameo.scenes.rigs import rig_cameras
        >>> orbits = [rig_cameras("sv3d-orbit", np.random.default_rng(seed), (64, 64), 7)[1] for seed in (0, 1)]
        >>> shared_poses(torch.as_tensor(np.stack(orbits)))
        True
    """
    samples = extrinsics.shape[0]
    up = extrinsics.new_tensor([0.0, 0.0, 1.0]) if up is None else up
    exact = extrinsics.double()
    azimuth, elevation, _ = spherical_angles(exact, orbit_centre(exact), up.to(exact).expand(samples, 3))
    turn = ((azimuth - azimuth[:, :1]) - (azimuth - azimuth[:, :1])[:1] + 180) % 360 - 180
    lift = (elevation - elevation[:, :1]) - (elevation - elevation[:, :1])[:1]
    return bool(torch.maximum(turn.abs(), lift.abs()).max() <= tolerance)


def pose_problem(extrinsics: Tensor, *, up: Tensor | None = None, released: bool) -> str | None:
    """Say why a model cannot learn from these cameras, or None: a release knows its own poses, others any fixed ones.

    Example:
        >>> import numpy as np, torch
        >>> from cameo.scenes.rigs import rig_cameras
        >>> orbit = torch.as_tensor(rig_cameras("sv3d-orbit", np.random.default_rng(0), (64, 64), 7)[1])[None]
        >>> pose_problem(orbit, released=False) is None, pose_problem(orbit, released=True) is None
        (True, False)
    """
    if same_poses(extrinsics, up=up) is not None or (not released and shared_poses(extrinsics, up=up)):
        return None
    fault = "those of this batch differ from sample to sample"
    cure = "camera_rig=zero123plus-v1.2, or camera_rig=fan without rig_jitter"
    if released:
        fault = "those of this batch are not the fixed poses of a release"
        cure = "a rig of cameo.scenes.rigs (zero123plus-v1.1, zero123plus-v1.2)"
    return (
        f"zero123plus takes no cameras as input and learns the poses of its data; {fault}. Use {cure}, or make sure "
        "that all samples share one set of poses"
    )


def to_canvas(views: Tensor) -> Tensor:
    """Lay six views `[B, 6, C, h, w]` out in three rows of two, `[B, C, 3h, 2w]`.

    Example:
        >>> to_canvas(torch.arange(6).reshape(1, 6, 1, 1, 1))[0, 0].tolist()
        [[0, 1], [2, 3], [4, 5]]
    """
    return rearrange(views, "b (r c) k h w -> b k (r h) (c w)", r=3, c=2)


def from_canvas(canvas: Tensor) -> Tensor:
    """Cut a canvas `[B, C, 3h, 2w]` into its six views `[B, 6, C, h, w]`.

    Example:
        >>> from_canvas(torch.arange(6).reshape(1, 1, 3, 2)).flatten().tolist()
        [0, 1, 2, 3, 4, 5]
    """
    return rearrange(canvas, "b k (r h) (c w) -> b (r c) k h w", r=3, c=2)


def by_canvas(function: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """Apply `function` to `[B, V, ...]`, where the last six of six or seven views are one image."""
    if views.shape[1] not in (6, 7):
        return function(views)
    targets = from_canvas(function(to_canvas(views[:, -6:])[:, None])[:, 0])
    return targets if views.shape[1] == 6 else torch.cat([function(views[:, :1]), targets], dim=1)
