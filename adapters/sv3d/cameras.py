"""SV3D's camera condition: the angles of each frame on the orbit around the object.

Axes: B samples, V views (reference view first).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cameo.geometry import estimate_up, orbit_centre, spherical_angles

__all__ = ["orbit_angles"]


def orbit_angles(extrinsics: Tensor, up: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Measure the cameras' angles about the point that they look at.

    That the azimuth grows counter-clockwise seen from above is this library's convention and was not compared with the
    released weights.

    Example:
        >>> from cameo.scenes.rigs import rig_cameras
        >>> import numpy as np
        >>> _, extrinsics = rig_cameras("sv3d-orbit", np.random.default_rng(0), (64, 64), num_views=4)
        >>> polar, azimuth = orbit_angles(torch.as_tensor(extrinsics)[None])
        >>> azimuth.rad2deg().round().tolist()
        [[0.0, 90.0, 180.0, 270.0]]

    Args:
        extrinsics: `[B, V, 4, 4]`, OpenCV world-to-camera.
        up: `[B, 3]` direction that points up in the world; default that of the cameras, on average.

    Returns:
        Polar angle (0 above the object, pi below) and azimuth relative to the first view in [0, 2 pi), in radians,
        `[B, V]` each.
    """
    up = estimate_up(extrinsics) if up is None else up
    azimuth, elevation, _ = spherical_angles(extrinsics, orbit_centre(extrinsics), up.to(extrinsics))
    azimuth = (azimuth - azimuth[:, :1]) % 360
    azimuth = torch.where(azimuth > 360 - 1e-3, 0, azimuth)  # no full turn by rounding
    return torch.deg2rad(90 - elevation), torch.deg2rad(azimuth)
