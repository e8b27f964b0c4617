"""Scenes in tars that webdataset can stream, in a layout of our own, and the writer of them.

A tar holds for each scene, whose name has no dot:

- `SCENE.cameras.json`: `{"views": [{"name", "intrinsics" 3x3 in pixels with centers at +0.5, "extrinsics" 4x4
  world-to-camera with OpenCV axes, "size" [H, W]}, ...], "depth_per_unit": 1.0, "up": [x, y, z] or null}`
- `SCENE.VIEW.png` (or .jpg, .webp): the image of the view with that name
- `SCENE.VIEW.depth.npz` (or .npy, .png of 16 bit, .tif, .exr): z-depth, optional
- `SCENE.tracks.npz`: `point` [N], `view` [N] and `xy` [N, 2] of `cameo.correspondence.tracks.Tracks`, optional
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cameo.data.readers.files import StoredFile, inside, load_arrays, number, read_json
from cameo.data.readers.frames import DepthImage, Format, Frame, Listing, ReadOptions, SceneFiles, Sightings
from cameo.data.readers.lenses import Lens
from cameo.data.readers.poses import matrix_4x4, rigid
from cameo.errors import DataError
from cameo.files import move_into_place, open_plain
from cameo.scenes.views import SceneSource, Views

__all__ = ["FORMAT", "write_tars"]

COLOR = (".png", ".jpg", ".jpeg", ".webp")
DEPTH = (".depth.npz", ".depth.npy", ".depth.png", ".depth.tif", ".depth.tiff", ".depth.exr")
CAMERAS, TRACKS = ".cameras.json", ".tracks.npz"


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _recognize(folder: Path) -> str | None:
    found = _tars(folder)
    return f"{len(found)} tars, the first {found[0].name}" if found else None


def _scenes(folder: Path) -> list[SceneFiles]:
    scenes = []
    for path in _tars(folder):
        inside(folder, path.name, stated_in=folder)
        names = [
            name.removesuffix(CAMERAS) for name in _members(path, path.stat().st_mtime_ns) if name.endswith(CAMERAS)
        ]
        if not names:
            raise DataError(
                f"{path}: holds no SCENE{CAMERAS}; write it with cameo.data.write_tars, whose layout docs/data.md gives"
            )
        scenes += [SceneFiles(path, name) for name in names]
    return scenes


@lru_cache(maxsize=64)
def _members(path: Path, _: int) -> dict[str, StoredFile]:
    """The files in a tar by name, with their places, so that a view can be read without the ones before it."""
    try:
        with open_plain(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as a tar ({error}); copy it again, and unpack one that is compressed, since views "
            "are read from the middle of it"
        ) from error
    found = {}
    _check_end(path, members)
    for member in members:
        if member.isdir():
            continue
        if not member.isfile():
            raise DataError(f"{path}: {member.name} is a link; store the file itself")
        found[member.name.removeprefix("./")] = StoredFile(path, member.name, member.offset_data, member.size)
    return found


def _check_end(path: Path, members: list[tarfile.TarInfo]) -> None:
    """A tar ends with empty blocks; one that was cut between two members looks like a complete one otherwise."""
    if not members:
        return
    last = members[-1]
    end = last.offset_data + -(-last.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    with open_plain(path) as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(f"{path}: is cut short at or after {last.name}; copy it again")


def _read(scene: SceneFiles, options: ReadOptions) -> Listing:
    members = _members(scene.path, scene.path.stat().st_mtime_ns)
    cameras = members[f"{scene.name}{CAMERAS}"]
    content = read_json(cameras)
    if not isinstance(content, dict) or not isinstance(content.get("views"), list) or not content["views"]:
        raise DataError(f'{cameras}: expected an object with a list "views", as docs/data.md gives it')
    per_unit = options.depth_scale or number(
        content.get("depth_per_unit", 1.0), named="depth_per_unit", stated_in=cameras
    )
    if per_unit <= 0:
        raise DataError(f"{cameras}: depth_per_unit: expected a number > 0, got {per_unit:g}")
    listing = Listing(up=_up(cameras, content.get("up")))
    sightings = _sightings(members.get(f"{scene.name}{TRACKS}"), len(content["views"]))
    for position, view in enumerate(content["views"]):
        where = f"{cameras}: view {position}"
        if not isinstance(view, dict) or not isinstance(view.get("name"), str):
            raise DataError(f'{where}: expected an object with a "name"')
        stem = f"{scene.name}.{view['name']}"
        color = next((members[stem + end] for end in COLOR if stem + end in members), None)
        depth = next((members[stem + end] for end in DEPTH if stem + end in members), None)
        matrix = matrix_4x4(view.get("extrinsics"))
        pose = None if matrix is None else rigid(matrix)
        if pose is None:
            listing.dropped.append((view["name"], "its extrinsics are not a finite rigid 4x4 matrix"))
        elif color is None:
            listing.dropped.append((view["name"], f"no {stem}.png in the tar"))
        else:
            listing.frames.append(
                Frame(
                    name=view["name"],
                    color=color,
                    extrinsics=pose,
                    lens=_lens(where, view, options),
                    depth=None if depth is None else DepthImage(depth, per_unit),
                    sightings=sightings[position],
                )
            )
    return listing


def _lens(where: str, view: dict[str, Any], options: ReadOptions) -> Lens:
    try:
        height, width = (int(side) for side in view["size"])
        matrix = np.array(view["intrinsics"], dtype=float)
        if matrix.shape != (3, 3) or min(height, width) < 1:
            raise ValueError(f"shape {list(matrix.shape)}, size {height}x{width}")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f'{where}: expected "size" [H, W] and "intrinsics" 3x3 in pixels ({error})') from error
    return options.lens((height, width)) or Lens.of_matrix(matrix, (height, width))


def _up(cameras: StoredFile, value: object) -> np.ndarray | None:
    if value is None:
        return None
    up = np.array(value, dtype=float) if isinstance(value, list) and len(value) == 3 else np.zeros(3)
    length = np.linalg.norm(up)
    if not np.isfinite(length) or length < 1e-6:
        raise DataError(f"{cameras}: up: expected a direction of 3 numbers or null, got {value!r}")
    return up / length


def _sightings(file: StoredFile | None, views: int) -> list[Sightings | None]:
    if file is None:
        return [None] * views
    try:
        loaded = load_arrays(file)
        if isinstance(loaded, np.ndarray):
            raise TypeError("one array without a name")
        point, view, xy = (
            loaded["point"].astype(np.int64),
            loaded["view"].astype(np.int64),
            loaded["xy"].astype(float),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: expected arrays point, view and xy written with numpy.savez ({error})") from error
    if point.ndim != 1 or view.shape != point.shape or xy.shape != (len(point), 2) or not np.isfinite(xy).all():
        raise DataError(
            f"{file}: expected point [N], view [N] and finite xy [N, 2], got {point.shape}, {view.shape}, {xy.shape}"
        )
    if len(view) and not (view.min() >= 0 and view.max() < views):
        raise DataError(f"{file}: view: expected numbers from 0 to {views - 1}, got {view.min()} to {view.max()}")
    return [Sightings(point[view == index], xy[view == index]) for index in range(views)]


def write_tars(source: SceneSource, folder: str | Path, *, scenes_per_tar: int = 16) -> list[Path]:
    """Write the scenes of a source into tars that `cameo.data.open_views` and webdataset read.

    Images are written as PNG, depth as float32, both without loss. Each tar is written whole or not at all.

    Example:
        >>> import tempfile, torch
        >>> class Wall:
        ...     def __len__(self):
        ...         return 3
        ...     def views(self, scene):
        ...         intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).repeat(2, 1, 1)
        ...         images, depth, extrinsics = torch.zeros(2, 3, 8, 8), torch.ones(2, 1, 8, 8), torch.eye(4)
        ...         return Views(images, depth, intrinsics, extrinsics.repeat(2, 1, 1), key="wall")
        >>> [path.name for path in write_tars(Wall(), tempfile.mkdtemp(), scenes_per_tar=2)]
        ['scenes-00000.tar', 'scenes-00001.tar']

    Args:
        source: the scenes.
        folder: where the tars go; it is made if it is missing.
        scenes_per_tar: at least 1. Shards of 100 MB to 1 GB suit most storage.

    Raises:
        ValueError: if `scenes_per_tar` is less than 1.
        OSError: if a tar cannot be written.
    """
    if scenes_per_tar < 1:
        raise ValueError(f"scenes_per_tar: expected at least 1, got {scenes_per_tar}")
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(source), scenes_per_tar):
        path = folder / f"scenes-{first // scenes_per_tar:05d}.tar"
        temporary = folder / f".{path.name}.tmp"
        try:
            with tarfile.open(temporary, "w") as archive:
                for scene in range(first, min(first + scenes_per_tar, len(source))):
                    for name, content in _files(f"scene{scene:06d}", source.views(scene)):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
            move_into_place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        written.append(path)
    return written


def _files(scene: str, views: Views) -> list[tuple[str, bytes]]:
    """Names and contents of the members of a scene."""
    from PIL import Image

    names = [f"{view:04d}" for view in range(len(views))]
    entries = [
        {"name": name, "intrinsics": k.tolist(), "extrinsics": e.tolist(), "size": list(views.size)}
        for name, k, e in zip(names, views.intrinsics, views.extrinsics, strict=True)
    ]
    up = None if views.up is None else views.up.tolist()
    content = json.dumps({"views": entries, "depth_per_unit": 1.0, "up": up})
    files = [(f"{scene}{CAMERAS}", content.encode())]
    has_depth = bool((views.depth > 0).any())
    for name, image, depth in zip(names, views.images, views.depth, strict=True):
        stream = io.BytesIO()
        Image.fromarray(_to_bytes(image)).save(stream, "PNG")
        files.append((f"{scene}.{name}.png", stream.getvalue()))
        if has_depth:
            files.append((f"{scene}.{name}.depth.npz", _arrays(depth=depth[0].float().numpy())))
    if views.tracks is not None:
        tracks = views.tracks
        arrays = {"point": tracks.point.numpy(), "view": tracks.view.numpy(), "xy": tracks.xy.numpy()}
        files.append((f"{scene}{TRACKS}", _arrays(**arrays)))
    return files


def _to_bytes(image: Tensor) -> np.ndarray:
    """Return an image `[3, H, W]` as uint8 `[H, W, 3]`."""
    array = image.permute(1, 2, 0).numpy()
    return array if array.dtype == np.uint8 else np.rint(255 * array).astype(np.uint8)


def _arrays(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


FORMAT = Format(
    name="webdataset",
    needs=f"*.tar with SCENE{CAMERAS} and SCENE.VIEW.png, as cameo.data.write_tars writes them",
    recognize=_recognize,
    scenes=_scenes,
    read=_read,
)
