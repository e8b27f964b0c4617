"""CO3Dv2: a category's `frame_annotations.jgz` with the images and depth that it names.

Conventions: facebookresearch/co3d, co3d/dataset/data_types.py and PyTorch3D's implicitron dataset. Cameras are those of
PyTorch3D: x left, y up, z forward, applied from the right, `X_camera = X_world @ R + T`; focal lengths and principal
point in NDC. Depth is a 16-bit PNG with the bits of 16-bit floating-point numbers, times `scale_adjustment`.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cameo.data.readers.files import StoredFile, inside
from cameo.data.readers.frames import DepthImage, Format, Frame, Listing, ReadOptions, SceneFiles
from cameo.data.readers.lenses import Lens
from cameo.data.readers.poses import rigid
from cameo.errors import DataError

__all__ = ["FORMAT"]

ANNOTATIONS = "frame_annotations.jgz"
PYTORCH3D_TO_OPENCV = np.diag([-1.0, -1.0, 1.0])
INTRINSICS_FORMATS = ("ndc_norm_image_bounds", "ndc_isotropic")
# Of the size of packed JSON, to which it is unpacked at most.
MOST_TIMES = 200


def _recognize(folder: Path) -> str | None:
    return ANNOTATIONS if (folder / ANNOTATIONS).is_file() else None


def _scenes(folder: Path) -> list[SceneFiles]:
    return [SceneFiles(folder, name) for name in _sequences(folder)]


def _sequences(folder: Path) -> dict[str, list[dict[str, Any]]]:
    path = inside(folder, ANNOTATIONS, stated_in=folder)
    return _parsed(path, path.stat().st_mtime_ns)


def _unpacked(path: Path) -> bytes:
    """Unpack a file, but not one that is made to fill the memory; JSON is packed to a tenth or so."""
    packed = StoredFile(path).read()
    most = MOST_TIMES * max(len(packed), 1 << 16)
    with gzip.open(io.BytesIO(packed)) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it unpacks to more than {MOST_TIMES} times its size")
    return content


@lru_cache(maxsize=2)
def _parsed(path: Path, _: int) -> dict[str, list[dict[str, Any]]]:
    """The annotations of each sequence by name; kept, since one file holds all sequences of a category."""
    try:
        entries = json.loads(_unpacked(path).decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected JSON packed with gzip ({error}); download it again") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of frames, got {type(entries).__name__}")
    found: dict[str, list[dict[str, Any]]] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("sequence_name"), str):
            raise DataError(f"{path}: frame {position}: expected an object with a sequence_name")
        found.setdefault(entry["sequence_name"], []).append(entry)
    if not found:
        raise DataError(f"{path}: holds no frames; download it again")
    return dict(sorted(found.items()))


def _read(scene: SceneFiles, options: ReadOptions) -> Listing:
    listing = Listing()
    path = scene.path / ANNOTATIONS
    entries = _sequences(scene.path)[scene.name]
    for entry in sorted(entries, key=lambda entry: entry.get("frame_number", 0)):
        name = f"frame {entry.get('frame_number')}"
        where = f"{path}: {scene.name}, {name}"
        try:
            image, viewpoint = entry["image"], entry["viewpoint"]
            color = _file(scene.path, image["path"], where)
            size = (int(image["size"][0]), int(image["size"][1]))
            pose = _pose(viewpoint)
            if pose is None:
                listing.dropped.append((name, "its viewpoint has no finite rotation and translation"))
                continue
            if not color.path.is_file():
                listing.dropped.append((name, f"no image {color}"))
                continue
            lens = options.lens(size) or _lens(where, viewpoint, size)
            listing.frames.append(
                Frame(name, color, pose, lens, _depth(scene.path, where, entry.get("depth"), options))
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{where}: expected image.path, image.size and viewpoint as CO3D has them, failed at {error!r}; "
                "download the annotations again"
            ) from error
    return listing


def _file(folder: Path, name: object, where: str) -> StoredFile:
    """A path of the annotations begins with the category, which is the folder itself, whatever it is called here."""
    path = inside(folder, name, stated_in=where)
    parts = Path(str(name)).parts
    below = folder.joinpath(*parts[1:]) if len(parts) > 1 else path
    return StoredFile(path if path.is_file() else inside(folder, str(below.relative_to(folder)), stated_in=where))


def _pose(viewpoint: dict[str, Any]) -> np.ndarray | None:
    rotation, translation = np.array(viewpoint["R"], dtype=float), np.array(viewpoint["T"], dtype=float)
    if rotation.shape != (3, 3) or translation.shape != (3,):
        return None
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = PYTORCH3D_TO_OPENCV @ rotation.T, PYTORCH3D_TO_OPENCV @ translation
    return rigid(pose)


def _lens(where: str, viewpoint: dict[str, Any], size: tuple[int, int]) -> Lens:
    form = viewpoint.get("intrinsics_format", INTRINSICS_FORMATS[0])
    if form not in INTRINSICS_FORMATS:
        raise DataError(f"{where}: unknown intrinsics_format {form!r}; known: {', '.join(INTRINSICS_FORMATS)}")
    half = np.array([size[1], size[0]]) / 2
    scale = half if form == INTRINSICS_FORMATS[0] else np.full(2, half.min())
    (fx, fy), (cx, cy) = (
        np.array(viewpoint["focal_length"]) * scale,
        half - np.array(viewpoint["principal_point"]) * scale,
    )
    if not np.isfinite([fx, fy, cx, cy]).all() or min(fx, fy) <= 0:
        raise DataError(f"{where}: expected finite focal lengths > 0 in NDC, got {viewpoint['focal_length']}")
    return Lens(size, float(fx), float(fy), float(cx), float(cy))


def _depth(folder: Path, where: str, entry: dict[str, Any] | None, options: ReadOptions) -> DepthImage | None:
    if not entry or not entry.get("path"):
        return None
    file = _file(folder, entry["path"], where)
    if not file.path.is_file():
        return None  # CO3D can be downloaded without its depth
    scale = float(entry.get("scale_adjustment", 1.0))
    if not np.isfinite(scale) or scale <= 0:
        raise DataError(f"{where}: depth.scale_adjustment: expected a factor > 0, got {scale:g}")
    mask = _file(folder, entry["mask_path"], where) if entry.get("mask_path") else None
    if mask is not None and not mask.path.is_file():
        mask = None
    return DepthImage(file, options.depth_scale or 1.0 / scale, half_floats=True, mask=mask)


FORMAT = Format(
    name="co3d",
    needs=f"{ANNOTATIONS} of a category, and the images and depths that it names",
    recognize=_recognize,
    scenes=_scenes,
    read=_read,
)
