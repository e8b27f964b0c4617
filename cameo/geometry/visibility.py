"""Test whether a view sees a point of the scene, for matches and warped views.

Axes: B samples, V views, M points. Arguments are not checked here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from cameo.geometry.cameras import full_precision
from cameo.geometry.projection import to_pixels

__all__ = ["DEPTH_TOLERANCE", "Sighting", "check_tolerance", "look_up"]

# Share of the depth by which a projected point may miss the depth seen there; its choice is measured in
# benchmarks/correspondence/accuracy.md.
DEPTH_TOLERANCE = 0.02


def check_tolerance(depth_tolerance: float) -> None:
    """Raise `ValueError` unless this is a share of the depth, in (0, 1)."""
    if not 0 < depth_tolerance < 1:
        raise ValueError(f"depth_tolerance: expected a share between 0 and 1, got {depth_tolerance}")


class Sighting(NamedTuple):
    """Where views see points, and whether they see them.

    - `xy`: position `[B, V, M, 2]` in pixels, NaN for points that are not in front of the camera.
    - `z`: z-depth of the points, `[B, V, M]`.
    - `surface`: z-depth of the surface that the view shows there, NaN for none.
    - `visible`: whether the point lies on that surface, bool.
    """

    xy: Tensor
    z: Tensor
    surface: Tensor
    visible: Tensor


@full_precision
def look_up(
    points: Tensor, intrinsics: Tensor, surface_at: Callable[[Tensor, Tensor], Tensor], tolerance: float
) -> Sighting:
    """Look up points in views: where they are in the image, and whether the view sees them there.

    Example:
        >>> import torch
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 1, 3, 3)
        >>> points = torch.tensor([[0.0, 0.0, 2.01], [0.0, 0.0, 2.5]]).expand(1, 1, 2, 3)
        >>> look_up(points, intrinsics, lambda xy, z: torch.full_like(z, 2.0), tolerance=0.02).visible.tolist()
        [[[True, False]]]

    Args:
        points: `[B, V, M, 3]`, each in the frame of its view's camera.
        intrinsics: `[B, V, 3, 3]` in pixels.
        surface_at: reads the z-depth of the visible surface, `surface_at(xy, z) -> [B, V, M]`; NaN outside the image
            and without measurement.
        tolerance: share of the surface's depth by which the point may lie in front of it or behind it, in (0, 1).
    """
    xy, z = to_pixels(points, intrinsics)
    surface = surface_at(xy, z)
    return Sighting(xy, z, surface, (z - surface).abs() <= tolerance * surface)
