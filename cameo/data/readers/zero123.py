"""Renders as zero123 and its successors have them: `000.png` with transparency and `000.npy`, for each view.

Conventions: cvlab-columbia/zero123, objaverse-rendering/scripts/blender_script.py. The pose is 3x4, from Blender's
world (z up) to a camera with OpenGL axes; the camera has a 35 mm lens on a 32 mm sensor, a field of view of 49.13
degrees.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from cameo.data.readers.files import StoredFile, inside, load_arrays
from cameo.data.readers.frames import Format, Frame, Listing, ReadOptions, SceneFiles, one_scene
from cameo.data.readers.images import image_size
from cameo.data.readers.lenses import Lens
from cameo.data.readers.poses import OPENGL_TO_OPENCV, matrix_4x4, rigid
from cameo.errors import DataError

__all__ = ["FORMAT"]

# Focal length in image widths.
FOCAL_LENGTH = 35.0 / 32.0
ENDINGS = (".png", ".webp", ".jpg")
NUMBERED = re.compile(r"\d{3,}")


def _names(folder: Path) -> list[str]:
    """Numbers of the views that have a pose or an image."""
    found = {path.stem for path in folder.iterdir() if path.suffix in (".npy", *ENDINGS)}
    return sorted(name for name in found if NUMBERED.fullmatch(name))


def _recognize(folder: Path) -> str | None:
    poses = sorted(path.stem for path in folder.glob("[0-9][0-9][0-9]*.npy"))
    name = next((name for name in poses if NUMBERED.fullmatch(name) and _image(folder, name) is not None), None)
    return None if name is None else f"{name}.npy beside its image"


def _image(folder: Path, name: str) -> Path | None:
    return next((path for end in ENDINGS if (path := folder / f"{name}{end}").is_file()), None)


def _read(scene: SceneFiles, options: ReadOptions) -> Listing:
    listing = Listing(up=np.array([0.0, 0.0, 1.0]))
    for name in _names(scene.path):
        path, pose_path = _image(scene.path, name), scene.path / f"{name}.npy"
        if path is None or not pose_path.is_file():
            listing.dropped.append((name, f"no {'image' if path is None else 'pose'} file"))
            continue
        pose = _pose(inside(scene.path, pose_path.name, stated_in=scene.path))
        if pose is None:
            listing.dropped.append((name, "its pose is not a finite rigid 3x4 matrix"))
            continue
        color = StoredFile(inside(scene.path, path.name, stated_in=scene.path))
        size = image_size(color)
        lens = options.lens(size) or Lens(
            size, FOCAL_LENGTH * size[1], FOCAL_LENGTH * size[1], size[1] / 2, size[0] / 2
        )
        listing.frames.append(Frame(name, color, OPENGL_TO_OPENCV @ pose, lens))
    return listing


def _pose(path: Path) -> np.ndarray | None:
    try:
        loaded = load_arrays(StoredFile(path))
    except DataError as error:
        reason = error.__cause__ or error
        raise DataError(
            f"{path}: expected a 3x4 matrix written with numpy.save ({reason}); render the view again"
        ) from error
    matrix = matrix_4x4(loaded) if isinstance(loaded, np.ndarray) and loaded.dtype.kind in "fiu" else None
    return None if matrix is None else rigid(matrix)


FORMAT = Format(
    name="zero123",
    needs="000.png and 000.npy (3x4, world to Blender camera), 001.png and so on, in a folder for each object",
    recognize=_recognize,
    scenes=one_scene,
    read=_read,
)
