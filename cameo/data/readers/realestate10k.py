"""RealEstate10K: a text file for each clip, and its frames as images that are named by their time stamps.

Conventions: google.github.io/realestate10k/download.html. The first line is the address of the video; each other line
is `timestamp fx fy cx cy 0 0` and a 3x4 matrix by rows, world-to-camera with OpenCV axes. fx and cx are shares of the
width, fy and cy of the height. ACID and what pixelSplat converts from have the same form.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cameo.data.readers.files import StoredFile, inside, read_text
from cameo.data.readers.frames import Format, Frame, Listing, ReadOptions, SceneFiles
from cameo.data.readers.images import image_size
from cameo.data.readers.lenses import Lens
from cameo.data.readers.poses import matrix_4x4, rigid
from cameo.errors import DataError
from cameo.files import open_plain

__all__ = ["FORMAT"]

# Where the text files are, and for a clip NAME where its frames are, relative to the folder.
TEXTS = (".", "cameras", "poses", "RealEstate10K")
FRAMES = ("{}", "frames/{}", "images/{}", "{}/images")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
COLUMNS = 19


def _clips(folder: Path) -> list[Path]:
    places = [folder / place for place in TEXTS if (folder / place).is_dir()]
    found = [path for place in places for path in sorted(place.glob("*.txt"))]
    return [path for path in found if path.is_file() and not path.name.startswith(".")]


def _recognize(folder: Path) -> str | None:
    for path in _clips(folder)[:8]:
        with open_plain(path) as file:
            lines = file.read(4096).decode("utf-8", errors="replace").splitlines()
        if any(len(line.replace(",", " ").split()) == COLUMNS and _are_numbers(line) for line in lines[:3]):
            return f"{path.relative_to(folder)} with {COLUMNS} numbers in each line"
    return None


def _are_numbers(line: str) -> bool:
    try:
        return bool([float(word) for word in line.replace(",", " ").split()])
    except ValueError:
        return False


def _scenes(folder: Path) -> list[SceneFiles]:
    """The clips that have frames; a text file without frames is no scene, since most downloads lack some videos."""
    clips = [path for path in _clips(folder) if _frames_folder(folder, path.stem) is not None]
    if not clips:
        wanted = ", ".join(place.format("CLIP") for place in FRAMES)
        raise DataError(
            f"{folder}: {len(_clips(folder))} clips, and no frames of any; put those of CLIP.txt into one of the "
            f"folders {wanted}, named by their time stamps"
        )
    return [SceneFiles(folder, str(path.relative_to(folder))) for path in clips]


def _frames_folder(folder: Path, clip: str) -> Path | None:
    return next((path for place in FRAMES if (path := folder / place.format(clip)).is_dir()), None)


def _read(scene: SceneFiles, options: ReadOptions) -> Listing:
    path = inside(scene.path, scene.name, stated_in=scene.path)
    frames = _frames_folder(scene.path, path.stem)
    if frames is None:
        raise DataError(f"{path}: the folder with its frames is gone; restore it")
    listing = Listing()
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.replace(",", " ").split()
        if not words or (number == 1 and len(words) == 1):  # the address of the video
            continue
        if len(words) != COLUMNS:
            raise DataError(f"{path}, line {number}: expected {COLUMNS} columns, time stamp first, got {len(words)}")
        name = words[0]
        try:
            values = np.array([float(word) for word in words[1:]])
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected numbers ({error})") from error
        matrix = matrix_4x4(values[6:])
        pose = None if matrix is None else rigid(matrix)
        image = next(
            (
                found
                for end in ENDINGS
                if (found := inside(frames, f"{name}{end}", stated_in=f"{path}, line {number}")).is_file()
            ),
            None,
        )
        if pose is None:
            listing.dropped.append((name, "its pose is not a finite rigid 3x4 matrix"))
        elif image is None:
            listing.dropped.append((name, f"no image of this time stamp in {frames}"))
        else:
            color = StoredFile(image)
            size = image_size(color)
            lens = options.lens(size) or _lens(f"{path}, line {number}", values[:4], size)
            listing.frames.append(Frame(name, color, pose, lens))
    return listing


def _lens(where: str, values: np.ndarray, size: tuple[int, int]) -> Lens:
    fx, fy, cx, cy = values
    if not np.isfinite(values).all() or min(fx, fy) <= 0 or not (0 < cx < 1 and 0 < cy < 1):
        raise DataError(
            f"{where}: expected fx fy cx cy as shares of the image, cx and cy between 0 and 1, got "
            f"{', '.join(f'{value:g}' for value in values)}; divide intrinsics in pixels by the width and the height"
        )
    height, width = size
    return Lens(size, fx * width, fy * height, cx * width, cy * height)


FORMAT = Format(
    name="realestate10k",
    needs="CLIP.txt with 19 numbers in each line, and a folder CLIP/ (or frames/CLIP/) of images named by time stamp",
    recognize=_recognize,
    scenes=_scenes,
    read=_read,
)
