"""RGB-D sequences in the layouts of 7-Scenes and of TUM RGB-D.

Conventions: the pages of the two data sets, microsoft.com/en-us/research/project/rgb-d-dataset-7-scenes and
cvg.cit.tum.de/data/datasets/rgbd-dataset/file_formats. Poses are camera-to-world with OpenCV axes, in meters.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from cameo.data.readers.files import StoredFile, inside, read_numbers, read_text
from cameo.data.readers.frames import DepthImage, Format, Frame, Listing, ReadOptions, SceneFiles, one_scene
from cameo.data.readers.images import image_size
from cameo.data.readers.lenses import Lens
from cameo.data.readers.poses import from_quaternion, rigid
from cameo.errors import DataError

__all__ = ["LAYOUTS"]

Array = np.ndarray

# Calibrations published with the TUM RGB-D benchmark per freiburg number: fx, fy, cx, cy, and the distortion k1, k2,
# p1, p2, k3. They count pixel centers from 0; half a pixel is added where they are used.
TUM_CALIBRATIONS = {
    "1": ((517.3, 516.5, 318.6, 255.3), (0.2624, -0.9531, -0.0054, 0.0026, 1.1633)),
    "2": ((520.9, 521.0, 325.1, 249.7), (0.2312, -0.7849, -0.0033, -0.0001, 0.9172)),
    "3": ((535.4, 539.2, 320.1, 247.6), (0.0, 0.0, 0.0, 0.0, 0.0)),
}
# The archives unpack to a folder of this name.
TUM_FOLDER = re.compile(r"rgbd_dataset_freiburg([123])(_|$)")
TUM_TEXTS = ("rgb", "depth", "groundtruth")
NO_INTRINSICS = (
    "pass intrinsics= as a 3x3 matrix in pixels of the full color image, for example "
    "[[585, 0, 320], [0, 585, 240], [0, 0, 1]] for a 640x480 Kinect"
)


def _seven_scenes_frames(scene: SceneFiles, options: ReadOptions) -> Listing:
    folder, listing = scene.path, Listing(metric=True)
    lens: Lens | None = None
    stems = sorted({path.name.split(".")[0] for path in folder.glob("frame-*.*")})
    for stem in stems:
        colors = [path for kind in ("png", "jpg", "jpeg") if (path := folder / f"{stem}.color.{kind}").exists()]
        depth, pose_path = folder / f"{stem}.depth.png", folder / f"{stem}.pose.txt"
        if not colors or not depth.exists() or not pose_path.exists():
            missing = "color" if not colors else "depth" if not depth.exists() else "pose"
            listing.dropped.append((stem, f"no {missing} file"))
            continue
        try:
            pose = rigid(read_numbers(inside(folder, pose_path.name, stated_in=folder)))
        except DataError:  # no numbers, or a folder of this name
            pose = None
        if pose is None:
            listing.dropped.append((stem, "its pose is not a finite rigid 4x4 matrix with the last row 0 0 0 1"))
            continue
        color = StoredFile(inside(folder, colors[0].name, stated_in=folder))
        if lens is None:  # the intrinsics are those of all frames, which are of one size
            lens = _seven_scenes_lens(folder, image_size(color), options)
        numbers = DepthImage(
            StoredFile(inside(folder, depth.name, stated_in=folder)), options.depth_scale or 1000.0, invalid=(65535,)
        )
        listing.frames.append(Frame(stem, color, np.linalg.inv(pose), lens, numbers))
    return listing


def _seven_scenes_lens(folder: Path, size: tuple[int, int], options: ReadOptions) -> Lens:
    if (given := options.lens(size)) is not None:
        return given
    path = folder / "camera-intrinsics.txt"
    if not path.exists():
        raise DataError(f"{folder}: no camera intrinsics ({path.name} not found); {NO_INTRINSICS}")
    matrix = read_numbers(inside(folder, path.name, stated_in=folder))
    if matrix.shape == (4, 4) and (matrix[3] == (0, 0, 0, 1)).all() and (matrix[:3, 3] == 0).all():
        matrix = matrix[:3, :3]  # as ScanNet writes them
    if matrix.shape != (3, 3):
        shape = "x".join(map(str, matrix.shape))
        raise DataError(f"{path}: expected a 3x3 matrix in pixels, got {shape}; write fx 0 cx, 0 fy cy, 0 0 1")
    return _checked_lens(path, matrix, size)


def _checked_lens(path: Path, matrix: Array, size: tuple[int, int]) -> Lens:
    """The lens of a matrix; a matrix that is no camera's is kept from looking like one."""
    import torch

    from cameo.geometry import check_cameras

    try:
        check_cameras(torch.from_numpy(matrix)[None, None], torch.eye(4, dtype=torch.float64)[None, None])
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return Lens.of_matrix(matrix, size)


def _read_table(path: Path, columns: int) -> list[tuple[float, list[str]]]:
    """Read lines `timestamp value...` of a TUM text file, sorted by time stamp."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
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
    return from_quaternion(np.array([qw, qx, qy, qz]), np.array([x, y, z]))


def _tum_frames(scene: SceneFiles, options: ReadOptions) -> Listing:
    folder, tolerance, listing = scene.path, options.time_tolerance, Listing(metric=True)
    lens: Lens | None = None
    colors, depths, poses = (
        _read_table(inside(folder, f"{name}.txt", stated_in=folder), 8 if name == "groundtruth" else 2)
        for name in TUM_TEXTS
    )
    depth_times, pose_times = np.array([t for t, _ in depths]), np.array([t for t, _ in poses])
    for time, (name,) in colors:
        depth = _nearest(depth_times, time, tolerance)
        nearest_pose = _nearest(pose_times, time, tolerance)
        if depth is None or nearest_pose is None:
            what = "depth image" if depth is None else "pose"
            listing.dropped.append((name, f"no {what} within {tolerance} s"))
            continue
        pose = _tum_pose(poses[nearest_pose][1])
        color_path = inside(folder, name, stated_in=folder / "rgb.txt")
        depth_path = inside(folder, depths[depth][1][0], stated_in=folder / "depth.txt")
        if pose is None:
            listing.dropped.append((name, "its pose is not finite or its quaternion is not a rotation"))
        elif not color_path.exists() or not depth_path.exists():
            listing.dropped.append((name, f"no {'color' if not color_path.exists() else 'depth'} file"))
        else:
            color = StoredFile(color_path)
            if lens is None:
                lens = _tum_lens(folder, image_size(color), options)
            numbers = DepthImage(StoredFile(depth_path), options.depth_scale or 5000.0)
            listing.frames.append(Frame(Path(name).stem, color, np.linalg.inv(pose), lens, numbers))
    return listing


def _tum_lens(folder: Path, size: tuple[int, int], options: ReadOptions) -> Lens:
    """The lens of the published calibration, if the folder or the one around it has the name of a published archive."""
    if (given := options.lens(size)) is not None:
        return given
    folder = folder.resolve()
    found = TUM_FOLDER.match(folder.name) or TUM_FOLDER.match(folder.parent.name)
    if found is None:
        raise DataError(
            f"{folder}: no camera intrinsics (the folder is not called rgbd_dataset_freiburg1, 2 or 3 as the published "
            f"ones are); {NO_INTRINSICS}"
        )
    (fx, fy, cx, cy), distortion = TUM_CALIBRATIONS[found.group(1)]
    return Lens(size, fx, fy, cx + 0.5, cy + 0.5).distorted("opencv", distortion)


def _seven_scenes(folder: Path) -> str | None:
    return min((path.name for path in folder.glob("frame-*.*")), default=None)


def _tum(folder: Path) -> str | None:
    return (
        "rgb.txt, depth.txt and groundtruth.txt"
        if all((folder / f"{name}.txt").exists() for name in TUM_TEXTS)
        else None
    )


# By the name of the layout; both are of the format rgbd.
LAYOUTS = {
    "7scenes": Format(
        name="rgbd",
        needs="frame-NNNNNN.color.png (or .jpg), .depth.png and .pose.txt (7scenes)",
        recognize=_seven_scenes,
        scenes=one_scene,
        read=_seven_scenes_frames,
    ),
    "tum": Format(
        name="rgbd",
        needs="rgb.txt, depth.txt and groundtruth.txt (tum)",
        recognize=_tum,
        scenes=one_scene,
        read=_tum_frames,
    ),
}
