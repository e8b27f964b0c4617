"""Depth or point maps that another program has estimated for photographs, such as MASt3R, VGGT or Depth Pro.

A folder of photographs may hold one of two folders beside them, with a file for each photograph `NAME.jpg`:

- `depth/NAME.npy` `[h, w]`, or `depth/NAME.npz` with `depth` and optionally `confidence`, both `[h, w]`: z-depth in the
  unit of the camera positions;
- `points/NAME.npy` `[h, w, 3]`, or `points/NAME.npz` with `points` and optionally `confidence` `[h, w]`: the point that
  each pixel shows, in the world of the cameras.

They have any size and show what the photograph shows. 0, a negative or a non-finite value means no measurement.

Axes: F frames, H W pixels of the images that a source gives, h w pixels of a file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cameo.data.readers.files import StoredFile, load_arrays
from cameo.data.readers.source import PosedScenes
from cameo.errors import DataError
from cameo.geometry import pixel_grid, project
from cameo.scenes.views import SceneCameras, Views

__all__ = ["EstimatedDepth", "read_estimated_depth"]

KINDS = ("depth", "points")
# Share of the image's diagonal by which the projected points may miss their pixels; their median is taken.
LARGEST_MISS = 0.02


def read_estimated_depth(
    folder: str | Path,
    names: Sequence[str],
    size: tuple[int, int],
    intrinsics: Tensor,
    extrinsics: Tensor,
    *,
    min_confidence: float = 0.0,
) -> Tensor | None:
    """Read the estimated depth of frames as z-depth, 0 where there is none; None if the folder holds no such files.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "depth").mkdir()
        >>> np.save(folder / "depth" / "photo-1.npy", np.full((4, 6), 2.5))
        >>> cameras = torch.eye(3)[None], torch.eye(4)[None]
        >>> read_estimated_depth(folder, ["photo-1.jpg"], (2, 2), *cameras).flatten().tolist()
        [2.5, 2.5, 2.5, 2.5]

    The files are cropped at the center to the aspect of `size`, as the images are, and read at the pixel that lies
    under each new pixel's center, so that two surfaces are never averaged.

    Args:
        folder: which holds `depth` or `points`.
        names: of the frames' images, of which the last suffix is left out.
        size: `(H, W)` of the images.
        intrinsics: `[F, 3, 3]` in pixels of `size`; point maps are compared with the cameras.
        extrinsics: `[F, 4, 4]` world-to-camera.
        min_confidence: pixels of less confidence have no depth; it is compared where a file has a confidence.

    Returns:
        `[F, 1, H, W]` float32. Frames without a file have no depth, and a warning counts them.

    Raises:
        DataError: a file cannot be read or has another shape, no frame has a file, both kinds are there, or point maps
            are of another world than the cameras.
    """
    kind = _kind_in(Path(folder))
    if kind is None:
        return None
    _check_files(Path(folder), kind, names)
    frames = zip(names, intrinsics, extrinsics, strict=True)
    return torch.stack([_of_frame(Path(folder), kind, name, size, k, e, min_confidence) for name, k, e in frames])


class EstimatedDepth:
    """A scene of photographs as a `LazySource`, with the depth that another program has estimated for them.

    Raises `DataError` if the source has several scenes, depth of its own, or photographs whose lens distortion was
    undone (the estimates are of the photographs as they were: undo it before, as `colmap image_undistorter` does), and
    where `read_estimated_depth` does.

    Args:
        source: the photographs, from `cameo.data.open_views`.
        folder: which holds `depth` or `points`.
        min_confidence: as of `read_estimated_depth`.
    """

    def __init__(self, source: PosedScenes, folder: str | Path, *, min_confidence: float = 0.0) -> None:
        self.source, self.folder, self.min_confidence = source, Path(folder), min_confidence
        self.format = source.format
        if len(source) != 1:
            raise DataError(f"{folder}: estimated depth is for one scene, and the photographs are {len(source)} scenes")
        if source.cameras(0).has_depth:
            raise DataError(f"{folder}: the photographs have depth of their own; leave out the estimated one")
        if source.is_undistorted(0):
            raise DataError(
                f"{folder}: the photographs are distorted by their lens, which is undone here, not in the estimates. "
                "Undistort them first, as `colmap image_undistorter` does, and estimate the depth of the result"
            )
        kind = _kind_in(self.folder)
        if kind is None:
            raise DataError(f"{folder}: expected a folder depth/ or points/ in it, with a file for each photograph")
        self.kind, self.names = kind, source.names(0)
        _check_files(self.folder, kind, self.names)

    def __len__(self) -> int:
        return 1

    def cameras(self, scene: int) -> SceneCameras:
        """Return the cameras of the photographs; no image is decoded."""
        return replace(self.source.cameras(scene), has_depth=True)

    def views(self, scene: int = 0) -> Views:
        """Return all views."""
        return self.select(scene, range(len(self.names)))

    def select(self, scene: int, indices: Sequence[int]) -> Views:
        """Return some views in the given order, with their estimated depth."""
        views = self.source.select(scene, indices)
        depth = [
            _of_frame(self.folder, self.kind, self.names[index], views.size, k, e, self.min_confidence)
            for index, k, e in zip(indices, views.intrinsics, views.extrinsics, strict=True)
        ]
        return replace(views, depth=torch.stack(depth))


def _kind_in(folder: Path) -> str | None:
    found = [kind for kind in KINDS if (folder / kind).is_dir()]
    if len(found) > 1:
        raise DataError(f"{folder}: holds both depth and points; remove one of them, so that it is clear which counts")
    return found[0] if found else None


def _of_frame(
    folder: Path,
    kind: str,
    name: str,
    size: tuple[int, int],
    intrinsics: Tensor,
    extrinsics: Tensor,
    min_confidence: float,
) -> Tensor:
    """Return the depth of one frame, `[1, H, W]`; 0 if it has no file."""
    path = _file(folder / kind, Path(name).stem)
    if path is None:
        return torch.zeros(1, *size)
    values, confidence = _read(path, kind)
    rows, columns = _pixels(values.shape[:2], size)
    values = values[rows[:, None], columns]
    if kind == "points":
        values = _depth_of_points(path, values, intrinsics, extrinsics)
    kept = np.isfinite(values) & (values > 0)
    if confidence is not None:
        kept &= confidence[rows[:, None], columns] >= min_confidence
    return torch.from_numpy(np.where(kept, values, 0).astype(np.float32))[None]


def _check_files(folder: Path, kind: str, names: Sequence[str]) -> None:
    """Raise where no frame has a file, and count those that have none."""
    missing = [name for name in names if _file(folder / kind, Path(name).stem) is None]
    if len(missing) == len(names):
        raise DataError(f"{Path(folder) / kind}: holds no file for any frame, such as {Path(names[0]).stem}.npy")
    if missing:
        warnings.warn(
            f"{Path(folder) / kind}: {len(missing)} of {len(names)} frames have no file and so no depth; first: "
            f"{missing[0]}",
            stacklevel=3,
        )


def _file(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in (".npy", ".npz") if (path := folder / f"{stem}{suffix}").is_file()), None)


def _read(path: Path, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Return depth `[h, w]` or points `[h, w, 3]`, and the confidence `[h, w]` where the file has one."""
    try:
        stored = load_arrays(StoredFile(path))
        values = stored[kind] if isinstance(stored, dict) else stored
        confidence = stored.get("confidence") if isinstance(stored, dict) else None
    except KeyError as error:
        raise DataError(f"{path}: expected an array named {kind}, and maybe confidence ({error})") from error
    if values.ndim == 3 and kind == "depth" and 1 in (values.shape[0], values.shape[-1]):
        values = values.squeeze(0 if values.shape[0] == 1 else -1)
    expected = "[h, w]" if kind == "depth" else "[h, w, 3]"
    if values.ndim != len(expected.split(",")) or (kind == "points" and values.shape[-1] != 3) or not values.size:
        raise DataError(f"{path}: expected {kind} {expected}, got {list(values.shape)}")
    if not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise DataError(f"{path}: expected numbers, got {values.dtype}")
    if confidence is not None and confidence.shape != values.shape[:2]:
        raise DataError(f"{path}: expected confidence {list(values.shape[:2])}, got {list(confidence.shape)}")
    return values.astype(np.float32), confidence


def _pixels(stored: tuple[int, ...], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows `[H]` and columns `[W]` of a file under the centers of the pixels of an image that is cropped from it."""
    aspect = (size[1] / size[0]) / (stored[1] / stored[0])
    places = []
    for length, pixels, share in zip(stored, size, (min(1, 1 / aspect), min(1, aspect)), strict=True):
        place = (1 - share) / 2 + (np.arange(pixels) + 0.5) / pixels * share
        places.append(np.minimum((place * length).astype(np.int64), length - 1))
    return places[0], places[1]


def _depth_of_points(path: Path, points: np.ndarray, intrinsics: Tensor, extrinsics: Tensor) -> np.ndarray:
    """Z-depth `[H, W]` of world points `[H, W, 3]`, which have to lie where the pixels look."""
    height, width = points.shape[:2]
    flat = torch.from_numpy(points).flatten(0, 1)
    known = flat.isfinite().all(dim=-1)
    camera = intrinsics[None, None].float(), extrinsics[None, None].float()
    xy, z = project(torch.where(known[:, None], flat, 0.0)[None, None], *camera)
    wanted = pixel_grid(height, width, dtype=torch.float32, device="cpu").flatten(0, 1)
    apart = (xy[0, 0] - wanted).norm(dim=-1)[known].nan_to_num(nan=torch.inf)  # infinite behind the camera
    if len(apart) and apart.median() > LARGEST_MISS * (height**2 + width**2) ** 0.5:
        raise DataError(
            f"{path}: half of its points are projected more than {apart.median():.1f} pixels away from the pixels of "
            f"{width}x{height} that show them; expected points in the world of the cameras. Align them, or give the "
            "cameras that were estimated with them"
        )
    return torch.where(known, z[0, 0], 0.0).view(height, width).numpy()
