"""Where RGB-D sequences keep their frames: the folder layouts of 7-Scenes and TUM RGB-D."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cameo.errors import DataError

__all__ = ["LAYOUTS", "Frame", "Layout", "detect_layout"]

Array = np.ndarray

# Calibrations published with the TUM RGB-D benchmark per freiburg number (fx, fy, cx, cy). They count pixel
# centers from 0; half a pixel is added where they are used. Lens distortion of freiburg 1 and 2 stays in.
TUM_CALIBRATIONS = {
    "1": (517.3, 516.5, 318.6, 255.3),
    "2": (520.9, 521.0, 325.1, 249.7),
    "3": (535.4, 539.2, 320.1, 247.6),
}


@dataclass(frozen=True)
class Frame:
    """One frame: its files and its camera-to-world matrix `[4, 4]` (OpenCV axes, meters)."""

    name: str
    color: Path
    depth: Path
    pose: Array


@dataclass
class Listing:
    """Frames in order, and the names of those left out with the reason."""

    frames: list[Frame] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Layout:
    """One way to lay out a sequence: what to look for, how to list it, what its depth values mean."""

    name: str
    wanted: str
    matches: Callable[[Path], bool]
    frames: Callable[[Path, float], Listing]
    intrinsics: Callable[[Path], Array | None]
    depth_scale: float
    invalid_depth: tuple[int, ...]


def detect_layout(folder: Path, layout: str | None) -> Layout:
    """Return the layout named, or the one that the folder's files fit.

    Raises `DataError` that names the folder and what was looked for.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise DataError(f"{folder}: expected a folder with an RGB-D sequence, found {found}")
    for candidate in LAYOUTS.values():
        if layout in (None, candidate.name) and candidate.matches(folder):
            return candidate
    wanted = "; or ".join(f"{one.wanted} ({one.name})" for one in LAYOUTS.values() if layout in (None, one.name))
    raise DataError(f"{folder}: no RGB-D frames found; looked for {wanted}")


def _rigid(pose: Array) -> Array | None:
    """Return the pose with an exact rotation, or None where it is not a pose of a camera."""
    if pose.shape != (4, 4) or not (np.abs(pose) <= np.finfo(np.float32).max).all():
        return None
    if np.abs(pose[3] - (0.0, 0.0, 0.0, 1.0)).max() > 1e-3:
        return None
    left, stretch, right = np.linalg.svd(pose[:3, :3])
    if np.abs(stretch - 1.0).max() > 0.02 or np.linalg.det(left @ right) < 0:
        return None
    exact = np.eye(4)
    exact[:3, :3], exact[:3, 3] = left @ right, pose[:3, 3]
    return exact


def _seven_scenes_frames(folder: Path, _: float) -> Listing:
    listing = Listing()
    stems = sorted({path.name.split(".")[0] for path in folder.glob("frame-*.*")})
    for stem in stems:
        colors = [path for kind in ("png", "jpg", "jpeg") if (path := folder / f"{stem}.color.{kind}").exists()]
        depth, pose_path = folder / f"{stem}.depth.png", folder / f"{stem}.pose.txt"
        if not colors or not depth.exists() or not pose_path.exists():
            missing = "color" if not colors else "depth" if not depth.exists() else "pose"
            listing.dropped.append((stem, f"no {missing} file"))
            continue
        try:
            pose = _rigid(np.loadtxt(pose_path, ndmin=2))
        except (ValueError, OSError):  # no numbers, or a folder of this name
            pose = None
        if pose is None:
            listing.dropped.append((stem, "its pose is not a finite rigid 4x4 matrix with the last row 0 0 0 1"))
        else:
            listing.frames.append(Frame(stem, colors[0], depth, pose))
    return listing


def _seven_scenes_intrinsics(folder: Path) -> Array | None:
    path = folder / "camera-intrinsics.txt"
    if not path.exists():
        return None
    try:
        matrix = np.loadtxt(path, ndmin=2)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: expected a 3x3 matrix in pixels ({error})") from error
    if matrix.shape != (3, 3):
        raise DataError(f"{path}: expected a 3x3 matrix in pixels, got {matrix.shape[0]}x{matrix.shape[1]}")
    return matrix


def _read_table(path: Path, columns: int) -> list[tuple[float, list[str]]]:
    """Read lines `timestamp value...` of a TUM text file, sorted by time stamp."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: expected a text file with a time stamp in each line ({error})") from error
    for number, line in enumerate(lines, start=1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        try:
            if len(words) < columns:
                raise ValueError(f"{len(words)} columns")
            rows.append((float(words[0]), words[1:columns]))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected {columns} columns, time stamp first ({error})") from error
    return sorted(rows)


def _nearest(times: Array, time: float, tolerance: float) -> int | None:
    if not len(times):
        return None
    index = int(np.abs(times - time).argmin())
    return index if abs(times[index] - time) <= tolerance else None


def _tum_pose(values: list[str]) -> Array | None:
    try:
        x, y, z, qx, qy, qz, qw = (float(value) for value in values)
    except ValueError:
        return None
    quaternion = np.array([qw, qx, qy, qz])
    norm = np.linalg.norm(quaternion)
    if not np.isfinite(norm) or norm < 0.5:
        return None
    w, i, j, k = quaternion / norm
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (j * j + k * k), 2 * (i * j - w * k), 2 * (i * k + w * j)],
        [2 * (i * j + w * k), 1 - 2 * (i * i + k * k), 2 * (j * k - w * i)],
        [2 * (i * k - w * j), 2 * (j * k + w * i), 1 - 2 * (i * i + j * j)],
    ]
    pose[:3, 3] = x, y, z
    return _rigid(pose)


def _tum_frames(folder: Path, tolerance: float) -> Listing:
    listing = Listing()
    colors = _read_table(folder / "rgb.txt", 2)
    depths = _read_table(folder / "depth.txt", 2)
    poses = _read_table(folder / "groundtruth.txt", 8)
    depth_times, pose_times = np.array([t for t, _ in depths]), np.array([t for t, _ in poses])
    for time, (name,) in colors:
        depth = _nearest(depth_times, time, tolerance)
        nearest_pose = _nearest(pose_times, time, tolerance)
        if depth is None or nearest_pose is None:
            what = "depth image" if depth is None else "pose"
            listing.dropped.append((name, f"no {what} within {tolerance} s"))
            continue
        pose = _tum_pose(poses[nearest_pose][1])
        color_path, depth_path = folder / name, folder / depths[depth][1][0]
        if pose is None:
            listing.dropped.append((name, "its pose is not finite or its quaternion is not a rotation"))
        elif not color_path.exists() or not depth_path.exists():
            listing.dropped.append((name, f"no {'color' if not color_path.exists() else 'depth'} file"))
        else:
            listing.frames.append(Frame(Path(name).stem, color_path, depth_path, pose))
    return listing


def _tum_intrinsics(folder: Path) -> Array | None:
    number = re.search(r"freiburg([123])", str(folder.resolve()))
    if number is None:
        return None
    fx, fy, cx, cy = TUM_CALIBRATIONS[number.group(1)]
    return np.array([[fx, 0.0, cx + 0.5], [0.0, fy, cy + 0.5], [0.0, 0.0, 1.0]])


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            name="7scenes",
            wanted="frame-NNNNNN.color.png (or .jpg), .depth.png and .pose.txt",
            matches=lambda folder: any(folder.glob("frame-*.*")),
            frames=_seven_scenes_frames,
            intrinsics=_seven_scenes_intrinsics,
            depth_scale=1000.0,
            invalid_depth=(0, 65535),
        ),
        Layout(
            name="tum",
            wanted="rgb.txt, depth.txt and groundtruth.txt",
            matches=lambda folder: all((folder / f"{name}.txt").exists() for name in ("rgb", "depth", "groundtruth")),
            frames=_tum_frames,
            intrinsics=_tum_intrinsics,
            depth_scale=5000.0,
            invalid_depth=(0,),
        ),
    )
}
