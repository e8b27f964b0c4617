"""Cameras, rays, depth and orbits."""

from __future__ import annotations

from cameo.geometry.cameras import check_cameras
from cameo.geometry.orbits import estimate_up, orbit_centre, spherical_angles
from cameo.geometry.projection import (
    as_grid,
    camera_rays,
    cell_centres,
    crop_intrinsics,
    invert_extrinsics,
    pixel_grid,
    plucker_rays,
    project,
    relative_extrinsics,
    resize_intrinsics,
    to_pixels,
    unproject,
)

__all__ = [
    "as_grid",
    "camera_rays",
    "cell_centres",
    "check_cameras",
    "crop_intrinsics",
    "estimate_up",
    "invert_extrinsics",
    "orbit_centre",
    "pixel_grid",
    "plucker_rays",
    "project",
    "relative_extrinsics",
    "resize_intrinsics",
    "spherical_angles",
    "to_pixels",
    "unproject",
]
