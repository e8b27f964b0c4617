"""Camera rigs inside rooms: a fan of views about a point of the room.

Azimuth and elevation are in degrees, those of `cameo.scenes.rigs`, about the point that all cameras look at; distances
are in meters. Needs neither numpy nor torch, so that settings can be checked without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["RoomRig"]

# Outermost azimuth and elevation of the targets of a fan whose angles are not given.
FAN_AZIMUTH, FAN_ELEVATION = 24.0, 6.0


@dataclass(frozen=True)
class RoomRig:
    """Views that stand about a point of a room at angles that are the same in all scenes, or vary about them.

    Where in the room that point is, from which side and from which height the reference looks at it, from how far, and
    the field of view are drawn for each scene: the pose of the targets relative to the reference is what scenes have in
    common, up to the scale of the scene.

    - `azimuths`, `elevations`: degrees relative to the reference, one per view; those of view 0 are 0.
    - `distance`: range in meters of the cameras' distance from the point, drawn once per scene.
    - `jitter`: degrees by which azimuth and elevation of each target vary from scene to scene, uniformly to both sides.
    - `separation`: least angle in degrees between the directions in which any two cameras stand.
    - `reference_elevation`: range in degrees of the elevation from which the reference looks at the point, drawn once
      per scene; one value twice fixes it, for a backbone that is told the targets' elevations, not the reference's.
    - `overlap`: range of the share of each target that the reference shows; a rig outside of it is drawn again.

    Example:
        >>> RoomRig.fan(4).azimuths, RoomRig.fan(3, azimuths=(0, -16, 16)).elevations
        ((0.0, -24.0, 12.0, 24.0), (0.0, 6.0, -6.0))

    Raises `ValueError` for angles that do not fit each other, or a range that is none.
    """

    azimuths: tuple[float, ...]
    elevations: tuple[float, ...]
    distance: tuple[float, float] = (1.2, 1.7)
    jitter: tuple[float, float] = (0.0, 0.0)
    separation: float = 0.0
    reference_elevation: tuple[float, float] = (-5.0, 35.0)
    overlap: tuple[float, float] = (0.3, 0.9)

    def __post_init__(self) -> None:
        views = len(self.azimuths)
        if views < 2:
            raise ValueError(f"azimuths: expected 2 views or more, got {views}")
        if len(self.elevations) != views:
            raise ValueError(f"elevations: expected one per view as azimuths, {views}, got {len(self.elevations)}")
        for name, angles, limit in (("azimuths", self.azimuths, 180), ("elevations", self.elevations, 90)):
            if angles[0] != 0:
                raise ValueError(f"{name}: expected angles relative to view 0, whose own is 0, got {angles[0]} for it")
            if not all(abs(angle) <= limit for angle in angles):
                raise ValueError(f"{name}: expected degrees in [-{limit}, {limit}], got {list(angles)}")
        low, high = self.distance
        if not 0 < low <= high:
            raise ValueError(f"distance: expected meters [low, high] with 0 < low <= high, got {[low, high]}")
        if not all(angle >= 0 for angle in self.jitter):
            raise ValueError(f"jitter: expected degrees of azimuth and elevation, 0 or more, got {list(self.jitter)}")
        if not 0 <= self.separation < 180:
            raise ValueError(f"separation: expected degrees in [0, 180), got {self.separation}")
        low, high = self.reference_elevation
        if not -90 < low <= high < 90:
            raise ValueError(f"reference_elevation: expected degrees [low, high] in (-90, 90), got {[low, high]}")
        if not 0 <= self.overlap[0] <= self.overlap[1] <= 1:
            raise ValueError(f"overlap: expected shares [low, high] with 0 <= low <= high <= 1, got {self.overlap}")

    @classmethod
    def fan(
        cls,
        num_views: int,
        *,
        azimuths: Sequence[float] | None = None,
        elevations: Sequence[float] | None = None,
        distance: tuple[float, float] = (1.2, 1.7),
        jitter: tuple[float, float] = (0.0, 0.0),
        separation: float = 0.0,
        reference_elevation: tuple[float, float] = (-5.0, 35.0),
        overlap: tuple[float, float] = (0.3, 0.9),
    ) -> RoomRig:
        """Return a rig of `num_views` views, with the reference in the middle where `azimuths` are not given.

        The targets then stand evenly on both sides of it, out to 24 degrees, and without `elevations` they are 6
        degrees higher and lower in turn.

        Raises:
            ValueError: if there are not `num_views` azimuths or elevations; see the class.
        """
        targets = num_views - 1
        if azimuths is None:
            left, right = targets // 2, targets - targets // 2
            azimuths = [0.0, *(-FAN_AZIMUTH * place / left for place in range(left, 0, -1))]
            azimuths += [FAN_AZIMUTH * place / right for place in range(1, right + 1)]
        if elevations is None:
            elevations = [0.0, *(FAN_ELEVATION * (-1) ** target for target in range(targets))]
        for name, angles in (("azimuths", azimuths), ("elevations", elevations)):
            if len(angles) != num_views:
                raise ValueError(f"{name}: expected one per view, {num_views}, got {len(angles)}: {list(angles)}")
        return cls(
            tuple(map(float, azimuths)),
            tuple(map(float, elevations)),
            distance,
            jitter,
            separation,
            reference_elevation,
            overlap,
        )

    @property
    def num_views(self) -> int:
        """Number of views, the reference included."""
        return len(self.azimuths)
