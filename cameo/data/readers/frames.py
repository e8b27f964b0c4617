"""What a reader returns: the frames of a scene, not yet decoded, and those that it left out.

Axes: H W pixels of the full image, N sightings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cameo.data.readers.files import StoredFile
from cameo.data.readers.lenses import Lens

__all__ = ["DepthImage", "Format", "Frame", "Listing", "ReadOptions", "SceneFiles", "Sightings", "one_scene"]

Array = np.ndarray


@dataclass(frozen=True)
class DepthImage:
    """A file with z-depth.

    - `per_unit`: its numbers per unit of the world, such as 1000 for millimeters in a world in meters.
    - `invalid`: numbers that mean "no measurement", beside 0, negative and non-finite ones.
    - `half_floats`: a 16-bit PNG holds the bits of 16-bit floating-point numbers.
    - `mask`: an image that is 0 where the depth does not count.
    """

    file: StoredFile
    per_unit: float
    invalid: tuple[int, ...] = ()
    half_floats: bool = False
    mask: StoredFile | None = None


@dataclass(frozen=True)
class Sightings:
    """Surface points that a frame shows: numbers `point` `[N]` int64 and pixels `xy` `[N, 2]` of its original image."""

    point: Array
    xy: Array


@dataclass(frozen=True)
class Frame:
    """One posed image: its files, world-to-camera matrix `[4, 4]` (OpenCV axes) and lens."""

    name: str
    color: StoredFile
    extrinsics: Array
    lens: Lens
    depth: DepthImage | None = None
    sightings: Sightings | None = None


@dataclass
class Listing:
    """Frames of a scene in order, and the names of those left out with the reason.

    - `up` `[3]`: unit vector that points up in the world, where the format says so.
    - `metric`: whether the world's unit is the meter.
    """

    frames: list[Frame] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    up: Array | None = None
    metric: bool = False


@dataclass(frozen=True)
class ReadOptions:
    """How scenes are read; the fields are arguments of `cameo.data.open_views`, which describes them."""

    size: tuple[int, int] = (64, 64)
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    intrinsics: Array | None = None
    depth_scale: float | None = None
    stride: int = 1
    cache_bytes: int = 256 << 20
    time_tolerance: float = 0.02

    def lens(self, size: tuple[int, int]) -> Lens | None:
        """Return the lens of the `intrinsics`, which win over those of files; None without them."""
        return None if self.intrinsics is None else Lens.of_matrix(self.intrinsics, size)


@dataclass(frozen=True)
class SceneFiles:
    """Where a scene is: a folder or file, and its name there where that holds several."""

    path: Path
    name: str = ""

    @property
    def key(self) -> str:
        """Name of the scene for messages."""
        return self.name or self.path.resolve().name


@dataclass(frozen=True)
class Format:
    """A format that can be read.

    - `name`: of `cameo.choices.POSED_FORMATS`.
    - `needs`: the files that it needs, for messages.
    - `recognize(folder)`: what in the folder shows that it is of this format; None where nothing does. It looks at
      names of files, and at no more content than it must.
    - `scenes(folder)`: the scenes of a folder that was recognized.
    - `read(scene, options)`: lists the frames of a scene without decoding them.
    """

    name: str
    needs: str
    recognize: Callable[[Path], str | None]
    scenes: Callable[[Path], list[SceneFiles]]
    read: Callable[[SceneFiles, ReadOptions], Listing]


def one_scene(folder: Path) -> list[SceneFiles]:
    """Return the scene of a format of which a folder holds one.

    Example:
        >>> one_scene(Path("kitchen"))[0].key
        'kitchen'
    """
    return [SceneFiles(folder)]
