"""Decode color and depth, crop and resize them, and move cameras and points along.

Axes: H W pixels of the full image, h w of the image returned, M points.
"""

from __future__ import annotations

import math
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cameo.data.readers.files import MOST_NUMBERS, StoredFile, load_arrays, optional_package
from cameo.data.readers.frames import DepthImage, Frame
from cameo.data.readers.lenses import Lens, rays_to_pixels, straightened, undistort_image, undistort_points
from cameo.errors import DataError
from cameo.geometry import crop_intrinsics, resize_intrinsics
from cameo.images.reading import decode, open_image, to_rgb

__all__ = ["check_image", "image_size", "output_intrinsics", "output_points", "read_color", "read_depth"]

Array = np.ndarray
# Color and depth images may differ in size, but must show the same field of view up to rounding.
ASPECT_TOLERANCE = 0.01
# Renderers write a number such as 1e10 where a ray meets nothing.
NOTHING_THERE = 1e9
# EXIF orientations that exchange width and height.
TURNED = (5, 6, 7, 8)
ORIENTATION = 0x0112


def image_size(file: StoredFile) -> tuple[int, int]:
    """Return (H, W) of an image from its header; `DataError` that names the file where it is none."""
    from PIL import Image

    try:
        with file.open() as stream, open_image(stream) as image:
            return image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot decode the color image ({error}); replace it by the original") from error


def check_image(frame: Frame) -> None:
    """Raise `DataError` unless the color image has the size that its camera states, or has it turned by EXIF."""
    stored, (height, width) = image_size(frame.color), frame.lens.size
    turned = stored == (width, height) and _open(frame.color, "color").getexif().get(ORIENTATION) in TURNED
    if stored != (height, width) and not turned:
        raise DataError(
            f"{frame.color}: is {stored[1]}x{stored[0]}, and its camera is for {width}x{height}; restore the original "
            "image, or scale the intrinsics to this one"
        )
    if not (0 < frame.lens.cx < width and 0 < frame.lens.cy < height):
        raise DataError(
            f"{frame.color}: the principal point ({frame.lens.cx:.1f}, {frame.lens.cy:.1f}) lies outside the "
            f"{width}x{height} image; the intrinsics belong to another image size"
        )


def read_color(frame: Frame, size: tuple[int, int], background: tuple[float, float, float]) -> Tensor:
    """Return the image `[3, h, w]` uint8: undistorted, cropped at the center to the aspect of `size`, and resized.

    Transparent pixels show the `background`; the colors are those of `cameo.images.reading.to_rgb`.
    """
    from PIL import Image, ImageOps

    image = _open(frame.color, "color")
    if (image.height, image.width) != frame.lens.size:
        image = ImageOps.exif_transpose(image)
    if (image.height, image.width) != frame.lens.size:
        raise DataError(f"{frame.color}: has changed since it was opened; expected {frame.lens.size} (H, W)")
    colors = to_rgb(image, str(frame.color), background)
    if frame.lens.model != "pinhole":
        colors = undistort_image(frame.lens, colors)
    box = crop_box(frame.lens.size, size)
    resized = Image.fromarray(colors).resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()


def read_depth(frame: Frame, size: tuple[int, int]) -> Tensor:
    """Return z-depth `[1, h, w]` float32 in units of the world, 0 = no measurement.

    Each value is that of the one pixel that lies under the new pixel's center, so that missing depth stays missing and
    two surfaces are never averaged. A frame without depth has 0 everywhere.
    """
    if frame.depth is None:
        return torch.zeros(1, *size)
    raw = _depth_numbers(frame.depth)
    (height, width), full = raw.shape, frame.lens.size
    if abs(width / height - full[1] / full[0]) > ASPECT_TOLERANCE:
        raise DataError(
            f"{frame.depth.file}: depth of {width}x{height} has another aspect than its color image of "
            f"{full[1]}x{full[0]}; register the depth to the color camera first"
        )
    columns, rows, inside = _source_pixels(frame.lens, size, (height, width))
    picked = raw[rows, columns].astype(np.float64)
    measured: Array = inside & np.isfinite(picked) & (picked > 0) & (picked < NOTHING_THERE)
    if frame.depth.invalid:
        measured &= ~np.isin(picked, frame.depth.invalid)
    if frame.depth.mask is not None:
        mask = np.array(_open(frame.depth.mask, "mask").convert("L"))
        if mask.shape != raw.shape:
            raise DataError(f"{frame.depth.mask}: expected the size of {frame.depth.file}, {raw.shape} (H, W)")
        measured &= mask[rows, columns] > 0
    depth = np.where(measured, picked, 0.0) / frame.depth.per_unit
    return torch.from_numpy(depth.astype(np.float32))[None]


def output_intrinsics(lens: Lens, size: tuple[int, int]) -> Tensor:
    """Return the camera matrix `[3, 3]` float32 of the image that `read_color` returns."""
    left, top, right, bottom = crop_box(lens.size, size)
    cropped = crop_intrinsics(torch.from_numpy(straightened(lens).matrix), top, left)
    return resize_intrinsics(cropped, (bottom - top, right - left), size).float()


def output_points(lens: Lens, size: tuple[int, int], xy: Array) -> Array:
    """Move pixels `[M, 2]` of the original image to the image that `read_color` returns; NaN for those cut off."""
    left, top, right, bottom = crop_box(lens.size, size)
    moved = undistort_points(lens, xy) - (left, top)
    moved = moved * (size[1] / (right - left), size[0] / (bottom - top))
    with np.errstate(invalid="ignore"):
        inside = np.all((moved >= 0) & (moved < (size[1], size[0])), axis=1, keepdims=True)
    return np.where(inside, moved, np.nan)


def crop_box(full: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the largest centered box of whole pixels in the aspect of `size`.

    Example:
        >>> crop_box((48, 64), (24, 24))
        (8, 0, 56, 48)
    """
    height, width = full
    aspect = size[1] / size[0]
    box_width = min(width, max(1, round(height * aspect)))
    box_height = min(height, max(1, round(width / aspect)))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


@lru_cache(maxsize=8)
def _source_pixels(lens: Lens, size: tuple[int, int], depth_size: tuple[int, int]) -> tuple[Array, Array, Array]:
    """Columns and rows `[h, w]` of the depth image under the new pixels' centers, and which lie in it."""
    left, top, right, bottom = crop_box(lens.size, size)
    x, y = np.meshgrid(
        left + (np.arange(size[1]) + 0.5) * (right - left) / size[1],
        top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0],
    )
    if lens.model != "pinhole":
        straight = straightened(lens)
        rays = np.stack([(x - straight.cx) / straight.fx, (y - straight.cy) / straight.fy], axis=-1)
        x, y = np.moveaxis(rays_to_pixels(lens, rays.reshape(-1, 2)).reshape(*size, 2), -1, 0)
    height, width = lens.size
    inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    x, y = np.where(inside, x, 0.0), np.where(inside, y, 0.0)
    columns = np.minimum((x * depth_size[1] / width).astype(np.int64), depth_size[1] - 1)
    rows = np.minimum((y * depth_size[0] / height).astype(np.int64), depth_size[0] - 1)
    return columns, rows, inside


def _open(file: StoredFile, kind: str) -> Any:
    """Decode an image; one that is none ends in a `DataError`."""
    try:
        with file.open() as stream:
            return decode(stream, str(file), kind)
    except OSError as error:
        raise DataError(f"{file}: cannot read the {kind} image ({error}); replace it by the original") from error


def _depth_numbers(depth: DepthImage) -> Array:
    """Return the numbers `[H, W]` of a depth file as it states them."""
    file, suffix = depth.file, depth.file.suffix
    if suffix in (".npy", ".npz"):
        numbers = _read_numpy(file)
    elif suffix == ".exr":
        numbers = _read_exr(file)
    elif suffix in (".tif", ".tiff"):
        numbers = _read_tiff(file)
    else:
        numbers = np.array(_open(file, "depth"))
        if numbers.ndim != 2 or numbers.dtype not in (np.uint16, np.int32):
            raise DataError(f"{file}: expected a 16-bit gray depth image, got {numbers.dtype} {numbers.shape}")
    shape, numbers = numbers.shape, numbers.squeeze() if numbers.ndim > 2 else numbers
    if numbers.ndim != 2 or numbers.dtype.kind not in "uif" or not numbers.size:
        raise DataError(f"{file}: expected depth as numbers [H, W], got {numbers.dtype} {list(shape)}")
    return numbers.astype(np.uint16).view(np.float16) if depth.half_floats else numbers


def _read_numpy(file: StoredFile) -> Array:
    try:
        loaded = load_arrays(file)
    except DataError as error:
        reason = error.__cause__ or error
        raise DataError(
            f"{file}: cannot read the depth ({reason}); write it with numpy.save, without objects"
        ) from error
    if isinstance(loaded, np.ndarray):
        return loaded
    if len(loaded) != 1 and "depth" not in loaded:
        raise DataError(f"{file}: expected one array or one that is named depth, got {', '.join(loaded)}")
    return loaded["depth"] if "depth" in loaded else next(iter(loaded.values()))


def _read_tiff(file: StoredFile) -> Array:
    try:  # Pillow reads 16-bit integers and 32-bit numbers, tifffile all others
        numbers = np.array(_open(file, "depth"))
        if numbers.dtype != np.uint8 and numbers.ndim == 2:
            return numbers
    except DataError:
        pass
    tifffile = optional_package("tifffile", needed_for=str(file))
    try:
        with file.open() as stream, tifffile.TiffFile(stream) as opened:
            _check_count(math.prod(opened.series[0].shape))
            numbers = np.asarray(opened.asarray())
    except Exception as error:  # tifffile has many errors of its own
        raise DataError(f"{file}: cannot decode the depth image ({error}); replace it by the original") from error
    if numbers.dtype == np.uint8:
        raise DataError(f"{file}: expected depth of 16 bit or more, got 8 bit; replace it by the original")
    return numbers


def _check_count(count: int) -> None:
    if count > MOST_NUMBERS:
        raise ValueError(f"{count:,} pixels; expected at most {MOST_NUMBERS:,}")


def _read_exr(file: StoredFile) -> Array:
    exr = optional_package("OpenEXR", needed_for=str(file))
    with tempfile.TemporaryDirectory() as folder:
        path = file.path
        if file.member:  # OpenEXR opens paths alone
            path = Path(folder) / "depth.exr"
            path.write_bytes(file.read())
        try:
            file.open().close()  # which does not wait for a named pipe, as OpenEXR does
            with exr.File(str(path), header_only=True) as opened:
                low, high = opened.header()["dataWindow"]
                _check_count(math.prod(int(side) + 1 for side in high - low))
            with exr.File(str(path), separate_channels=True) as opened:
                channels = {name: np.array(channel.pixels) for name, channel in opened.channels().items()}
        except Exception as error:  # OpenEXR raises RuntimeError and others
            raise DataError(f"{file}: cannot decode the depth image ({error}); replace it by the original") from error
    for name in ("Z", "depth.Z", "Depth.Z", "V", "Y", "R"):
        if name in channels:
            return channels[name]
    if len(channels) == 1:
        return next(iter(channels.values()))
    raise DataError(f"{file}: expected a channel Z, V, Y or R, got {', '.join(channels) or 'none'}; name the depth Z")
