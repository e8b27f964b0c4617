"""Cameras, rays, depth and orbits.

Conventions: OpenCV cameras (x right, y down, z forward), world-to-camera extrinsics, intrinsics in pixels, pixel
centers at +0.5, z-depth in world units where 0, a negative or a non-finite value means "no measurement".
"""

from typing import TYPE_CHECKING

from cameo.lazy import load_on_use

if TYPE_CHECKING:
    from cameo.geometry.cameras import check_cameras, invert_extrinsics
    from cameo.geometry.grids import as_grid
    from cameo.geometry.orbits import estimate_up, orbit_centre, spherical_angles
    from cameo.geometry.projection import (
        camera_rays,
        cell_centres,
        crop_intrinsics,
        pixel_grid,
        plucker_rays,
        project,
        relative_extrinsics,
        resize_intrinsics,
        to_pixels,
        transform,
        unproject,
    )
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        {
            "as_grid": "cameo.geometry.grids",
            "camera_rays": "cameo.geometry.projection",
            "cell_centres": "cameo.geometry.projection",
            "check_cameras": "cameo.geometry.cameras",
            "crop_intrinsics": "cameo.geometry.projection",
            "estimate_up": "cameo.geometry.orbits",
            "invert_extrinsics": "cameo.geometry.cameras",
            "orbit_centre": "cameo.geometry.orbits",
            "pixel_grid": "cameo.geometry.projection",
            "plucker_rays": "cameo.geometry.projection",
            "project": "cameo.geometry.projection",
            "relative_extrinsics": "cameo.geometry.projection",
            "resize_intrinsics": "cameo.geometry.projection",
            "spherical_angles": "cameo.geometry.orbits",
            "to_pixels": "cameo.geometry.projection",
            "transform": "cameo.geometry.projection",
            "unproject": "cameo.geometry.projection",
        },
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
    "transform",
    "unproject",
]
