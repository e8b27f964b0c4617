"""Places camera rigs in rooms: draws them until all cameras stand free and see enough of what the reference sees.

World: meters, z up, floor at z = 0. Axes: F views, N candidates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from cameo.errors import DataError
from cameo.scenes.rendering import TriangleScene, cast_points
from cameo.scenes.room_rig import RoomRig
from cameo.scenes.rooms import clearance, look_at, random_intrinsics

__all__ = ["rigged_room", "view_overlaps"]

Array = np.ndarray
# Distance of the cameras from walls, floor and ceiling, and of the point that they look at.
CAMERA_MARGIN, FOCUS_MARGIN = 0.3, 0.1
# Rigs that are drawn at once, how often before the room is drawn again, and the rooms.
CANDIDATES, DRAWS, ROOMS = 64, 4, 50
# Share of the distance to a surface point by which an occluder must stand in front of it; beyond rounding of float32.
SURFACE = 1e-3
# Rays per side of a view that measure how much of it another view shows.
OVERLAP_RAYS = 12


def rigged_room(
    rig: RoomRig,
    rng: np.random.Generator,
    make_room: Callable[[np.random.Generator], tuple[TriangleScene, Array]],
    size: tuple[int, int],
) -> tuple[TriangleScene, Array, Array]:
    """Draw a room with a rig in it: `(scene, intrinsics [F, 3, 3], extrinsics [F, 4, 4])`.

    All cameras stand inside the room and outside its solids, see the point that they look at, and have the overlap of
    the rig with the reference. A rig that does not is drawn again, and after many that do not, the room as well.

    Example:
        >>> from cameo.scenes.rooms import bare_room
        >>> _, intrinsics, extrinsics = rigged_room(RoomRig.fan(3), np.random.default_rng(0), bare_room, (32, 32))
        >>> intrinsics.shape, extrinsics.shape
        ((3, 3, 3), (3, 4, 4))

    Args:
        rig: the views.
        rng: source of everything that is drawn.
        make_room: draws a room, `(scene, extent [3])`, such as `cameo.scenes.rooms.bare_room`.
        size: height and width of the images in pixels.

    Raises:
        DataError: if no room has a place for the rig; counts what was in the way.
    """
    refused: Counter[str] = Counter()
    overlaps: list[float] = []
    distance = rng.uniform(*rig.distance)  # kept until a place is found, or small ones would be the more frequent
    for _ in range(ROOMS):
        scene, extent = make_room(rng)
        intrinsics = random_intrinsics(rng, rig.num_views, size)
        for _ in range(DRAWS):
            extrinsics = _stand(rig, distance, rng, scene, extent, intrinsics, size, refused, overlaps)
            if extrinsics is not None:
                return scene, intrinsics, extrinsics
    reasons = ", ".join(f"{reason} ({count} times)" for reason, count in refused.most_common() if count)
    found = f"; overlap found: {min(overlaps):.2f} to {max(overlaps):.2f}" if overlaps else ""
    raise DataError(
        f"no place for the camera rig in {ROOMS} rooms: {reasons}{found}. Cure: wider bounds of the overlap, azimuths "
        f"and elevations closer to the reference's, a smaller separation, or another distance, for {rig}"
    )


def view_overlaps(
    scene: TriangleScene, intrinsics: Array, extrinsics: Array, size: tuple[int, int], *, reference: int = 0
) -> Array:
    """Return the share of each view's surface that the reference shows, `[F]`, by ray casting; exact visibility.

    Example:
        >>> from cameo.scenes.rooms import bare_room
        >>> scene, intrinsics, extrinsics = rigged_room(RoomRig.fan(3), np.random.default_rng(0), bare_room, (32, 32))
        >>> bool((view_overlaps(scene, intrinsics, extrinsics, (32, 32))[1:] >= 0.3).all())
        True
    """
    grid = (OVERLAP_RAYS, OVERLAP_RAYS)
    points = cast_points(scene, intrinsics, extrinsics, size, grid=grid).reshape(-1, 3)
    rotation, shift = extrinsics[reference, :3, :3], extrinsics[reference, :3, 3]
    seen = (points @ rotation.T + shift) @ intrinsics[reference].T
    height, width = size
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = seen[:, 0] / seen[:, 2], seen[:, 1] / seen[:, 2]
    shown = (seen[:, 2] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    shown &= np.isfinite(points).all(-1)
    center = -rotation.T @ shift
    rays = points[shown] - center
    shown[shown] = ~scene.occluded(np.broadcast_to(center, rays.shape), (1 - SURFACE) * rays)
    return shown.reshape(len(intrinsics), -1).mean(1)


def _stand(
    rig: RoomRig,
    distance: float,
    rng: np.random.Generator,
    scene: TriangleScene,
    extent: Array,
    intrinsics: Array,
    size: tuple[int, int],
    refused: Counter[str],
    overlaps: list[float],
) -> Array | None:
    """Draw candidates and return the extrinsics of the first that is good; notes what is wrong with the others."""
    focus, centers, apart = _candidates(rig, distance, rng, extent)
    inside = _inside(centers, extent)
    refused["cameras closer together than the separation"] += int((~apart).sum())
    refused["a camera outside of the room"] += int((apart & ~inside).sum())
    for candidate in np.flatnonzero(apart & inside):
        target = np.tile(focus[candidate], (rig.num_views, 1))
        extrinsics = look_at(centers[candidate], target)
        if scene.occluded(centers[candidate], (1 - SURFACE) * (target - centers[candidate])).any():
            refused["the point hidden from a camera"] += 1
        elif clearance(scene, intrinsics, extrinsics, size) <= 1.0:
            refused["a camera in a solid or close to one"] += 1
        else:
            shares = view_overlaps(scene, intrinsics, extrinsics, size)[1:]
            if rig.overlap[0] <= shares.min() and shares.max() <= rig.overlap[1]:
                return extrinsics
            refused["another overlap with the reference"] += 1
            overlaps += shares.tolist()
    return None


def _candidates(rig: RoomRig, distance: float, rng: np.random.Generator, extent: Array) -> tuple[Array, Array, Array]:
    """Draw points to look at `[N, 3]` and the cameras about them `[N, F, 3]`, and say which are `separation` apart."""
    half = np.array([*(extent[:2] / 2 - FOCUS_MARGIN), extent[2] / 2 - FOCUS_MARGIN])
    focus = rng.uniform(-half, half, (CANDIDATES, 3)) + np.array([0.0, 0.0, extent[2] / 2])
    start = rng.uniform(0.0, 360.0, (CANDIDATES, 1))
    height = rng.uniform(*rig.reference_elevation, (CANDIDATES, 1))
    moved = rng.uniform(-1.0, 1.0, (2, CANDIDATES, rig.num_views)) * np.array(rig.jitter)[:, None, None]
    moved[..., 0] = 0.0  # the reference, to which the angles are relative
    azimuth = np.radians(start + np.array(rig.azimuths) + moved[0])
    elevation = np.radians(height + np.array(rig.elevations) + moved[1])
    flat = np.cos(elevation)
    directions = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1)
    cosine = directions @ directions.transpose(0, 2, 1)
    cosine[:, np.arange(rig.num_views), np.arange(rig.num_views)] = -1.0
    apart = cosine.max((1, 2)) <= np.cos(np.radians(rig.separation)) + 1e-12
    return focus, focus[:, None] + distance * directions, apart


def _inside(centers: Array, extent: Array) -> Array:
    """Whether all cameras `[N, F, 3]` of a candidate are inside the room, `[N]`."""
    half = extent / 2 - CAMERA_MARGIN
    offset = np.abs(centers - np.array([0.0, 0.0, extent[2] / 2]))
    return (offset <= half).all((1, 2))
