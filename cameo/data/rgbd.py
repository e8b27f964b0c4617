"""Reader of posed RGB-D sequences: color, 16-bit depth and a pose per frame."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cameo.data.rgbd_layouts import LAYOUTS, Frame, Layout, Listing, detect_layout
from cameo.errors import DataError, ShapeError, unknown_name
from cameo.geometry import check_cameras, crop_intrinsics, resize_intrinsics
from cameo.scenes.views import Views

__all__ = ["RGBDSequence"]

SPLITS = (None, "train", "validation")
# Color and depth images may differ in size, but must show the same field of view up to rounding.
ASPECT_TOLERANCE = 0.01
# In meters; no depth camera measures a sequence in which nothing is farther away.
LEAST_RANGE = 0.1


class RGBDSequence:
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
      seconds. Intrinsics: the argument, or the published ones if the path holds freiburg1, 2 or 3.
      Their lens distortion is not undone.

    Frames are cropped at the center to the aspect of `size` (H, W) and resized: color antialiased, depth by
    the pixel that lies under each new pixel's center, so that missing depth stays missing and two surfaces
    are never averaged. A depth image of another size than its color image is taken to show the same field of
    view; another aspect is an error.

    - `split`: None = all frames; "validation" = the last `holdout` part of the sequence, "train" = the rest.
    - `intrinsics`: `[3, 3]` of the full color image in pixels, pixel centers at +0.5; wins over files.
    - `depth_scale`: depth units per meter; None = the layout's.
    - `stride`: keep every n-th frame.

    Frames without all files or with an unusable pose are left out with a warning. Raises `DataError` that
    names the file or folder: no frames, no intrinsics, an image that cannot be decoded, no depth at all.
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
    ) -> None:
        if split not in SPLITS:
            raise unknown_name("split", split, [str(name) for name in SPLITS])
        if layout is not None and layout not in LAYOUTS:
            raise unknown_name("layout", layout, LAYOUTS)
        if not 0.0 < holdout < 1.0:
            raise ValueError(f"holdout: expected a share between 0 and 1, got {holdout}")
        if min(size) < 1 or stride < 1:
            raise ValueError(f"size, stride: expected at least 1, got {size} and {stride}")
        if depth_scale is not None and not depth_scale > 0:
            raise ValueError(f"depth_scale: expected units per meter > 0, got {depth_scale}")
        self.path, self.size, self.split = Path(path), (int(size[0]), int(size[1])), split
        self.layout = detect_layout(self.path, layout)
        listing = self.layout.frames(self.path, time_tolerance)
        _report_dropped(self.path, listing, self.layout)
        frames = _hold_out(listing.frames, split, holdout)[::stride]
        if not frames:
            raise DataError(
                f"{self.path}: split={split!r}, holdout={holdout} leaves none of {len(listing.frames)} frames"
            )
        self.frame_names = [frame.name for frame in frames]
        calibration = _calibration(self.path, self.layout, intrinsics)
        _check_cameras(self.path, calibration, frames)
        self._views = self._decode(frames, calibration, depth_scale or self.layout.depth_scale)

    def __len__(self) -> int:
        return 1

    def views(self, scene: int = 0) -> Views:
        """Return all frames of the split: uint8 images, float32 depth in meters (0 = none) and cameras."""
        if scene != 0:
            raise IndexError(f"scene: an RGB-D sequence is one scene (0), got {scene}")
        return self._views

    def _decode(self, frames: list[Frame], calibration: Tensor, depth_scale: float) -> Views:
        images, depths, cameras = [], [], []
        for frame in frames:
            image, full, camera = _read_color(frame.color, calibration, self.size)
            images.append(image)
            cameras.append(camera)
            depths.append(_read_depth(frame.depth, full, self.size, self.layout.invalid_depth, depth_scale))
        depth = torch.from_numpy(np.stack(depths))[:, None]
        if not (depth > 0).any():
            raise DataError(
                f"{self.path}: no frame has any depth measurement (first file: {frames[0].depth}); "
                "check that the depth images are the 16-bit originals"
            )
        if depth.max() < LEAST_RANGE:
            warnings.warn(
                f"{self.path}: the largest depth of all frames is {depth.max().item():.3g} m with "
                f"depth_scale={depth_scale:g} units per meter; for depth stored in meters pass depth_scale=1",
                stacklevel=3,
            )
        poses = np.linalg.inv(np.stack([frame.pose for frame in frames]))
        return Views(
            images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
            depth=depth,
            intrinsics=torch.stack(cameras).float(),
            extrinsics=torch.from_numpy(poses).float(),
            key=self.path.resolve().name if self.split is None else f"{self.path.resolve().name}-{self.split}",
        )


def _report_dropped(path: Path, listing: Listing, layout: Layout) -> None:
    if not listing.dropped:
        return
    name, reason = listing.dropped[0]
    total = len(listing.dropped) + len(listing.frames)
    message = f"{path}: {len(listing.dropped)} of {total} frames left out; first: {name} ({reason})"
    if not listing.frames:
        raise DataError(f"{message}. No usable frame is left; layout {layout.name!r} needs {layout.wanted}")
    warnings.warn(message, stacklevel=3)


def _hold_out(frames: list[Frame], split: str | None, holdout: float) -> list[Frame]:
    """Cut the sequence in time: neighboring frames look alike, so single held-out frames would leak."""
    if split is None:
        return frames
    cut = len(frames) - math.ceil(len(frames) * holdout)
    return frames[:cut] if split == "train" else frames[cut:]


def _calibration(path: Path, layout: Layout, intrinsics: Tensor | Sequence[Sequence[float]] | None) -> Tensor:
    if intrinsics is not None:
        matrix = torch.as_tensor(intrinsics, dtype=torch.float64)
        if matrix.shape != (3, 3):
            raise ShapeError("intrinsics", expected="[3, 3]", got=matrix.shape)
        return matrix
    found = layout.intrinsics(path)
    if found is None:
        looked = "camera-intrinsics.txt" if layout.name == "7scenes" else "freiburg1, 2 or 3 in the folder's name"
        raise DataError(
            f"{path}: no camera intrinsics ({looked} not found); pass intrinsics= as a 3x3 matrix in pixels "
            "of the full color image, for example [[585, 0, 320], [0, 585, 240], [0, 0, 1]] for a 640x480 "
            "Kinect"
        )
    return torch.from_numpy(found)


def _check_cameras(path: Path, calibration: Tensor, frames: list[Frame]) -> None:
    poses = torch.from_numpy(np.linalg.inv(np.stack([frame.pose for frame in frames])))[None]
    try:
        check_cameras(calibration.expand(1, len(frames), 3, 3), poses)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def _open_image(path: Path, kind: str) -> Any:
    """Decode an image file; also one that is no image, cut short, or of gigabytes once decoded ends in a DataError."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot decode the {kind} image ({error})") from error


def _read_color(path: Path, calibration: Tensor, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int], Tensor]:
    """Return the image `[H, W, 3]` uint8, its full size (H, W) on disk, and its intrinsics at `size`."""
    from PIL import Image

    image = _open_image(path, "color").convert("RGB")
    full = (image.height, image.width)
    cx, cy = calibration[0, 2].item(), calibration[1, 2].item()
    if not (0 < cx < full[1] and 0 < cy < full[0]):
        raise DataError(
            f"{path}: the principal point ({cx:.1f}, {cy:.1f}) lies outside the {full[1]}x{full[0]} image; "
            "the intrinsics belong to another image size"
        )
    left, top, right, bottom = _crop_box(full, size)
    resized = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    cropped = crop_intrinsics(calibration, top, left)
    return np.array(resized), full, resize_intrinsics(cropped, (bottom - top, right - left), size)


def _crop_box(full: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the largest centered box of whole pixels in the aspect of `size`."""
    height, width = full
    aspect = size[1] / size[0]
    box_width = min(width, max(1, round(height * aspect)))
    box_height = min(height, max(1, round(width / aspect)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _read_depth(
    path: Path, color_size: tuple[int, int], size: tuple[int, int], invalid: tuple[int, ...], scale: float
) -> np.ndarray:
    """Return z-depth `[H, W]` float32 in meters, 0 = none, at the pixels under the new pixel centers."""
    raw = np.array(_open_image(path, "depth"))
    if raw.ndim != 2 or raw.dtype not in (np.uint16, np.int32):
        raise DataError(f"{path}: expected a 16-bit gray depth image, got {raw.dtype} {raw.shape}")
    height, width = raw.shape
    if abs(width / height - color_size[1] / color_size[0]) > ASPECT_TOLERANCE:
        raise DataError(
            f"{path}: depth of {width}x{height} has another aspect than its color image of "
            f"{color_size[1]}x{color_size[0]}; register the depth to the color camera first"
        )
    left, top, right, bottom = _crop_box(color_size, size)
    x = left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]
    y = top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]
    columns = np.minimum((x * width / color_size[1]).astype(np.int64), width - 1)
    rows = np.minimum((y * height / color_size[0]).astype(np.int64), height - 1)
    picked = raw[rows[:, None], columns]
    return np.where(np.isin(picked, invalid), 0.0, picked / scale).astype(np.float32)
