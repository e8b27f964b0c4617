"""Reader of one posed RGB-D sequence: color, 16-bit depth and a pose per frame."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from cameo.data.readers.frames import Format, ReadOptions
from cameo.data.readers.rgbd import LAYOUTS
from cameo.data.readers.source import PosedScenes
from cameo.errors import DataError, unknown_name

__all__ = ["RGBDSequence"]


class RGBDSequence(PosedScenes):
    """One hand-held RGB-D sequence as a source with one scene.

    Example:
        >>> RGBDSequence("no/such/folder")
        Traceback (most recent call last):
        ...
        cameo.errors.DataError: no/such/folder: expected a folder with an RGB-D sequence, found nothing

    Layouts (found by their files, or given by `layout`):

    - "7scenes": `frame-NNNNNN.color.png` (or .jpg), `.depth.png` (16 bit, millimeters, 0 and 65535 = none),
      `.pose.txt` (4x4 camera-to-world, OpenCV axes, meters), `camera-intrinsics.txt` (3x3, optional).
    - "tum": `rgb.txt`, `depth.txt`, `groundtruth.txt` (`timestamp tx ty tz qx qy qz qw`, camera-to-world),
      depth in 1/5000 m; images and poses are joined by the nearest time stamp within `time_tolerance`
      seconds. Intrinsics: the argument, or the published ones if the folder, or the one around it, has the name of a
      published archive, `rgbd_dataset_freiburg1_...`. The lens distortion of freiburg 1 and 2 is undone with OpenCV;
      intrinsics that are passed are those of undistorted images.

    Frames are decoded when they are asked for. They are cropped at the center to the aspect of `size` (H, W) and
    resized: color antialiased, depth by the pixel that lies under each new pixel's center, so that missing depth stays
    missing and two surfaces are never averaged. A depth image of another size than its color image is taken to show the
    same field of view; another aspect is an error.

    - `split`: None = all frames; "validation" = the last `holdout` part of the sequence, "train" = the rest.
    - `intrinsics`: `[3, 3]` of the full color image in pixels, pixel centers at +0.5; wins over files.
    - `depth_scale`: depth units per meter; None = the layout's.
    - `stride`: keep every n-th frame.
    - `cache_bytes`: of decoded frames that are kept.

    Frames without all files or with an unusable pose are left out with a warning. Raises `DataError` that names the
    file or folder: no frames, no intrinsics, images of several sizes, a first frame that cannot be decoded; and from
    the methods another one that cannot be decoded, or no depth at all.
    """

    def __init__(
        self,
        path: str | Path,
        size: tuple[int, int] = (64, 64),
        split: str | None = None,
        holdout: float = 0.2,
        layout: str | None = None,
        *,
        intrinsics: Tensor | Sequence[Sequence[float]] | None = None,
        depth_scale: float | None = None,
        time_tolerance: float = 0.02,
        stride: int = 1,
        cache_bytes: int = ReadOptions.cache_bytes,
    ) -> None:
        self.path = Path(path)
        form = _layout(self.path, layout)
        options = ReadOptions(
            size=(int(size[0]), int(size[1])),
            intrinsics=None if intrinsics is None else np.asarray(intrinsics, dtype=np.float64),
            depth_scale=depth_scale,
            stride=stride,
            cache_bytes=cache_bytes,
            time_tolerance=time_tolerance,
        )
        super().__init__(form, form.scenes(self.path), options, split=split, holdout=holdout)
        self.select(0, [0])  # a fault that all frames have is told when the sequence is opened

    @property
    def frame_names(self) -> list[str]:
        """Names of the frames of the split."""
        return self.names(0)


def _layout(folder: Path, layout: str | None) -> Format:
    """Return the layout named, or the one that the folder's files fit."""
    if layout is not None and layout not in LAYOUTS:
        raise unknown_name("layout", layout, LAYOUTS)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: expected a folder with an RGB-D sequence, found {found}")
    candidates = list(LAYOUTS.values()) if layout is None else [LAYOUTS[layout]]
    for candidate in candidates:
        if candidate.recognize(folder) is not None:
            return candidate
    wanted = "; or ".join(candidate.needs for candidate in candidates)
    raise DataError(f"{folder}: no RGB-D frames found; looked for {wanted}")
