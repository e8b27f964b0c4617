"""CAT3D's camera condition: ray maps in the first view's frame, beside a mask of the reference views.

Axes: B samples, V views (reference views first), H W image pixels, h w latent cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cameo.geometry import check_cameras, plucker_rays, relative_extrinsics

__all__ = ["CONDITION_CHANNELS", "camera_maps", "without_cameras"]

CONDITION_CHANNELS = 7  # mask, ray direction (3), ray moment (3)


def camera_maps(
    intrinsics: Tensor,
    extrinsics: Tensor,
    num_reference_views: int,
    image_size: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """Build the mask and the ray map (Pluecker coordinates) of each view.

    Example:
        >>> intrinsics = torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(1, 2, 3, 3)
        >>> maps = camera_maps(intrinsics, torch.eye(4).expand(1, 2, 4, 4), 1, (32, 32), (8, 8))
        >>> maps.shape, maps[0, :, 0].amax(dim=(1, 2)).tolist()  # the mask is 1 in reference views
        (torch.Size([1, 2, 7, 8, 8]), [1.0, 0.0])

    Args:
        intrinsics: `[B, V, 3, 3]` in pixels of the image.
        extrinsics: `[B, V, 4, 4]`, OpenCV world-to-camera; the rays are in the frame of the first view's camera.
        num_reference_views: how many of the views, counted from the first, are reference views.
        image_size: height and width in pixels that the intrinsics are for.
        grid: height and width in latent cells.

    Returns:
        `[B, V, 7, h, w]`: mask, ray direction, ray moment.

    Raises:
        ShapeError: for cameras of another shape.

    Source: CAT3D, arXiv 2405.10314, section 3.1.
    """
    check_cameras(intrinsics, extrinsics)
    rays = plucker_rays(intrinsics, relative_extrinsics(extrinsics), image_size, grid)
    mask = torch.zeros_like(rays[:, :, :1])
    mask[:, :num_reference_views] = 1
    return torch.cat([mask, rays], dim=2)


def without_cameras(maps: Tensor) -> Tensor:
    """Return the maps with zeros for the rays and the mask unchanged: classifier-free guidance's other condition."""
    return torch.cat([maps[:, :, :1], torch.zeros_like(maps[:, :, 1:])], dim=2)
