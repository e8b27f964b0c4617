"""Camera rigs of object-centric multi-view diffusion models: which poses each one generates.

The object stands at the origin, world z points up. Azimuth and elevation are in degrees: azimuth 0 is the camera
on the x axis, it grows counter-clockwise seen from above (90 is on the y axis); elevation is positive above the
object. Axes: F views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cameo.errors import unknown_name
from cameo.scenes.rooms import look_at

__all__ = ["RIGS", "Rig", "rig_angles", "rig_cameras", "rig_views"]

Array = np.ndarray
# Room between the object's bounding sphere and the image border. With it a camera of 30 degrees stands 4 radii from
# the object, the distance of the public Zero123++ training code (InstantMesh).
MARGIN = 1.0353


@dataclass(frozen=True)
class Rig:
    """The views that a model generates at once, as data.

    - `azimuths`: degrees relative to view 0, one per view; None = all views evenly round the object.
    - `elevations`: degrees, absolute, one per view; None in a view's place is the elevation drawn for the sample.
      None altogether gives all views that elevation.
    - `elevation_range`: from which the sample's elevation is drawn, uniformly.
    - `field_of_view`: range in degrees across the narrower side of the image, drawn once per sample.
    - `num_views`: number of views, with `azimuths=None` the default number.
    - `dynamic`: disturb the orbit, see `rig_angles`.
    """

    num_views: int
    azimuths: tuple[float, ...] | None
    elevation_range: tuple[float, float]
    field_of_view: tuple[float, float]
    elevations: tuple[float | None, ...] | None = None
    dynamic: bool = False


def _zero123plus(upper: float, lower: float) -> Rig:
    return Rig(
        num_views=7,
        azimuths=(0, 30, 90, 150, 210, 270, 330),
        elevations=(None, *(upper, lower) * 3),
        elevation_range=(-10, 40),
        field_of_view=(30, 30),
    )


# Sources: zero123plus README (poses; a field of view of 30 degrees is stated for v1.2 only, v1.1 takes the same
# here, and so does the input view, which either release takes at any field of view); MVDream paper and camera_utils.py
# (elevation 0 to 30, field of view 15 to 60); ImageDream's demo (prompt image at the elevation of the others, the
# first generated view in front); SV3D paper (field of view 33.8, elevation -5 to 30, static and dynamic orbits).
# Ranges that a source leaves open are choices of this module.
RIGS: dict[str, Rig] = {
    "zero123plus-v1.1": _zero123plus(30, -20),
    "zero123plus-v1.2": _zero123plus(20, -10),
    "mvdream": Rig(4, (0, 90, 180, 270), elevation_range=(0, 30), field_of_view=(15, 60)),
    "imagedream": Rig(5, (0, 0, 90, 180, 270), elevation_range=(0, 30), field_of_view=(15, 60)),
    "sv3d-orbit": Rig(21, None, elevation_range=(-5, 30), field_of_view=(33.8, 33.8)),
    "sv3d-dynamic": Rig(21, None, elevation_range=(-5, 30), field_of_view=(33.8, 33.8), dynamic=True),
}


def rig_views(name: str, num_views: int | None = None) -> int:
    """Return how many views a rig has; `num_views` is what is asked for, None = the rig's own number.

    Example:
        >>> rig_views("zero123plus-v1.2"), rig_views("sv3d-orbit"), rig_views("sv3d-orbit", 5)
        (7, 21, 5)

    Raises:
        ValueError: unknown rig, or a number of views that it does not have.
    """
    if name not in RIGS:
        raise unknown_name("rig", name, RIGS)
    rig = RIGS[name]
    if num_views is None:
        return rig.num_views
    if rig.azimuths is not None and num_views != rig.num_views:
        raise ValueError(f"rig={name!r}: has {rig.num_views} views, got {num_views} views; ask for {rig.num_views}")
    if num_views < 2:
        raise ValueError(f"rig={name!r}: expected 2 views or more, got {num_views}")
    return num_views


def rig_angles(name: str, rng: np.random.Generator, num_views: int | None = None) -> tuple[Array, Array]:
    """Draw the azimuths and elevations of one sample in degrees, `[F]` each; azimuths lie in [0, 360).

    The azimuth of view 0 is uniform. In a dynamic orbit the other azimuths move by up to a quarter of the step
    between views, and the elevations by up to 15 degrees along a sum of three sines of the azimuth, which is zero at
    view 0 and again after a full turn.

    Example:
        >>> azimuth, elevation = rig_angles("zero123plus-v1.1", np.random.default_rng(0))
        >>> ((azimuth - azimuth[0]) % 360).round(6).tolist(), elevation[1:].tolist()
        ([0.0, 30.0, 90.0, 150.0, 210.0, 270.0, 330.0], [30.0, -20.0, 30.0, -20.0, 30.0, -20.0])

    Raises:
        ValueError: see `rig_views`.
    """
    count, rig = rig_views(name, num_views), RIGS[name]
    start, base = rng.uniform(0.0, 360.0), rng.uniform(*rig.elevation_range)
    azimuth = np.arange(count) * (360.0 / count) if rig.azimuths is None else np.array(rig.azimuths, dtype=float)
    elevation = np.array([base if fixed is None else fixed for fixed in rig.elevations or (None,) * count])
    if rig.dynamic:
        azimuth[1:] += rng.uniform(-0.25, 0.25, count - 1) * (360.0 / count)
        elevation = elevation + _swing(rng)(np.radians(azimuth))
    return (start + azimuth) % 360.0, elevation


def rig_cameras(
    name: str, rng: np.random.Generator, size: tuple[int, int], num_views: int | None = None, *, radius: float = 1.0
) -> tuple[Array, Array]:
    """Draw the cameras of one sample: `(intrinsics [F, 3, 3], extrinsics [F, 4, 4])`, all at one distance.

    They look at the origin from where a sphere of `radius` (world units) about it fits into the narrower side of the
    image of `size` (H, W).

    Example:
        >>> intrinsics, extrinsics = rig_cameras("zero123plus-v1.2", np.random.default_rng(0), (64, 64))
        >>> np.linalg.norm(extrinsics[:, :3, 3], axis=-1).round(2).tolist()  # in radii of the object
        [4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]

    Raises:
        ValueError: see `rig_views`.
    """
    azimuth, elevation = (np.radians(angles) for angles in rig_angles(name, rng, num_views))
    half_angle = np.radians(rng.uniform(*RIGS[name].field_of_view)) / 2
    distance = MARGIN * radius / np.sin(half_angle)
    flat = np.cos(elevation)
    directions = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1)
    height, width = size
    focal = 0.5 * min(size) / np.tan(half_angle)
    matrix = np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])
    extrinsics = look_at(distance * directions, np.zeros((len(azimuth), 3)))
    return np.tile(matrix, (len(azimuth), 1, 1)), extrinsics


def _swing(rng: np.random.Generator) -> Callable[[Array], Array]:
    """Elevation offset in degrees of an azimuth in radians: three sines, at most 15, zero at azimuth 0."""
    waves = np.arange(1, 4)
    weights, phases = rng.uniform(-1.0, 1.0, 3) / waves, rng.uniform(0.0, 2 * np.pi, 3)

    def raw(azimuth: Array) -> Array:
        angles = np.asarray(azimuth)[..., None] * waves + phases
        return ((np.sin(angles) - np.sin(phases)) * weights).sum(-1)

    peak = np.abs(raw(np.linspace(0.0, 2 * np.pi, 720))).max()
    scale = rng.uniform(5.0, 15.0) / max(peak, 1e-9)
    return lambda azimuth: scale * raw(azimuth)
