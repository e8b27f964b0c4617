"""Embedded scenes: furnished rooms, objects or the user's meshes, ray-cast with exact depth, cached on disk."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cameo.errors import DataError, unknown_name
from cameo.files import only_writer
from cameo.scenes.cache import default_cache_dir, fingerprint, read_views, write_views
from cameo.scenes.parallel import render_scenes
from cameo.scenes.rendering import TriangleScene, render
from cameo.scenes.rigs import rig_cameras, rig_views
from cameo.scenes.room_rig import RoomRig
from cameo.scenes.room_rigs import rigged_room
from cameo.scenes.views import Views

__all__ = ["EmbeddedScenes"]

CONTENTS = ("rooms", "bare_rooms", "objects")
# Number of views per scene without a rig.
DEFAULT_VIEWS = 8
# An object of radius 1 beside a mesh in a unit box, for whose corners the orbit leaves less room than it may need.
OBJECT_SCALE = 1.4
SPLITS = {"train": 0, "validation": 1, "test": 2}
# Part of every cache key; to be raised whenever the same settings give other pixels.
FORMAT_VERSION = 1
# The same for meshes alone.
MESH_FORMAT_VERSION = 2
# A mesh that covers less of its views on average is told.
LEAST_SEEN = 0.002


class EmbeddedScenes:
    """Scenes that need no download: textured rooms seen by a hand-held camera, objects, or a folder of meshes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     settings = {"views_per_scene": 2, "size": (8, 8), "cache_dir": folder, "progress": False}
        ...     views = EmbeddedScenes(num_scenes=1, **settings).views(0)
        >>> views.images.shape, views.images.dtype, views.key
        (torch.Size([2, 3, 8, 8]), torch.uint8, 'train-00000')

    Rooms are boxes of 3 to 5 m with furniture and things on it; the unit is the meter. Objects are textured solids
    grown together inside the unit sphere, seen from an orbit on a white background without depth. Bare rooms are empty
    but for a solid or two, with bold patterns: small models learn something on them within minutes. World z points up,
    and `Views.up` says so. Scene number i of a split is the same whatever `num_scenes` is; splits never share a scene.

    - `split`: "train", "validation" or "test".
    - `views_per_scene`: None = the views of the rig, 8 without one.
    - `size`: height and width in pixels.
    - `cache_dir`: where rendered scenes are kept; None = `$CAMEO_CACHE` or `~/.cache/cameo`. Missing scenes
      are rendered at once, with a progress bar unless `progress=False`; a damaged file is rendered again with a
      warning. Processes that share the folder divide the scenes among them, and none is rendered twice.
    - `mesh_dir`: a folder with .glb, .obj or .ply files (searched recursively) to show instead of rooms, each
      scaled to a unit box and seen from an orbit on a white background without depth. Eight of ten meshes
      are train, one validation, one test; scenes go round the meshes with new cameras each time.
    - `content`: "rooms", "bare_rooms" or "objects"; without `mesh_dir`.
    - `rig`: cameras in the poses that a model generates; the views of a scene are those of the rig, in its order. For
      objects and meshes a name of `cameo.data.RIGS`, from where the object just fits into the image; for rooms a
      `cameo.data.RoomRig`, about a point of the room.
    - `processes`: how many render missing scenes at a time, this one included; the files are the same. None = as many
      as there are cores for this process, where they save more time than it takes to start them.

    Raises `ValueError` on a wrong setting, `DataError` on an unusable mesh folder, mesh file or cache folder.
    """

    def __init__(
        self,
        split: str = "train",
        num_scenes: int = 512,
        views_per_scene: int | None = None,
        size: tuple[int, int] = (64, 64),
        seed: int = 0,
        cache_dir: str | Path | None = None,
        mesh_dir: str | Path | None = None,
        progress: bool = True,
        content: str = "rooms",
        rig: str | RoomRig | None = None,
        processes: int | None = None,
    ) -> None:
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        _check_content(content, rig, mesh_dir)
        views_per_scene = _number_of_views(rig, views_per_scene)
        counts = {"num_scenes": num_scenes, "views_per_scene": views_per_scene}
        counts |= {"processes": 1 if processes is None else processes, "size[0]": size[0], "size[1]": size[1]}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        self.split, self.num_scenes, self.views_per_scene = split, num_scenes, views_per_scene
        self.size, self.seed = (int(size[0]), int(size[1])), seed
        self.content, self.rig = content, rig
        self.meshes = _split_meshes(Path(mesh_dir), split) if mesh_dir is not None else None
        settings: dict[str, object] = {
            "format": FORMAT_VERSION,
            "split": split,
            "views": views_per_scene,
            "size": self.size,
            "seed": seed,
        }
        if self.meshes is not None:
            settings["meshes"] = [(str(path.resolve()), path.stat().st_mtime_ns) for path in self.meshes]
            settings["mesh_format"] = MESH_FORMAT_VERSION
        # Added only if they differ from the default, so that scenes rendered without these settings stay valid.
        if content != "rooms":
            settings["content"] = content
        if rig is not None:
            settings["rig"] = asdict(rig) if isinstance(rig, RoomRig) else rig
        root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        self.folder = root / "scenes" / fingerprint(settings)
        self._render_missing(progress, processes)

    def __len__(self) -> int:
        return self.num_scenes

    def views(self, scene: int) -> Views:
        """Return the views of one scene: uint8 images, float32 depth and cameras."""
        if not 0 <= scene < self.num_scenes:
            raise IndexError(f"scene: expected 0 to {self.num_scenes - 1}, got {scene}")
        cached = read_views(self._path(scene))
        # The cache has no field for it, since it is the same in all scenes.
        return replace(cached if cached is not None else self._render(scene), up=torch.tensor([0.0, 0.0, 1.0]))

    def _path(self, scene: int) -> Path:
        return self.folder / f"{scene:05d}.safetensors"

    def _render_missing(self, progress: bool, processes: int | None) -> None:
        from tqdm import tqdm

        missing = [scene for scene in range(self.num_scenes) if not self._path(scene).exists()]
        shown = bool(progress and missing)
        with tqdm(total=len(missing), desc=f"rendering {self.split} scenes", disable=not shown) as bar:
            render = partial(self._render_once, wait=False)
            render_scenes(render, missing, processes=processes, done=bar.update)
        for scene in missing:  # what another process has begun: it finishes it, or has ended
            self._render_once(scene, wait=True)

    def _render_once(self, scene: int, *, wait: bool) -> None:
        """Render a scene that is missing; one that another process is rendering is waited for, or left to it."""
        path = self._path(scene)
        if path.exists():
            return
        with only_writer(path, wait=wait) as may_write:
            if may_write and not path.exists():
                self._render(scene)

    def _render(self, scene: int) -> Views:
        rng = np.random.default_rng((self.seed, SPLITS[self.split], scene))
        key = f"{self.split}-{scene:05d}"
        if self.meshes is not None:
            key = f"{key}-{self.meshes[scene % len(self.meshes)].stem}"
        try:
            geometry, intrinsics, extrinsics = self._build(scene, rng)
        except DataError as error:
            raise DataError(f"scene {key}: {error}") from error
        # Cameras are rounded before rendering, so that depth is exact for the cameras handed over.
        intrinsics, extrinsics = intrinsics.astype(np.float32), extrinsics.astype(np.float32)
        images, depth = render(geometry, intrinsics.astype(float), extrinsics.astype(float), self.size)
        if self.meshes is not None:
            _check_seen(depth, self.meshes[scene % len(self.meshes)])
        views = Views(
            images=torch.from_numpy(images),
            depth=torch.from_numpy(depth),
            intrinsics=torch.from_numpy(intrinsics),
            extrinsics=torch.from_numpy(extrinsics),
            key=key,
        )
        write_views(self._path(scene), views)
        return views

    def _build(self, scene: int, rng: np.random.Generator) -> tuple[TriangleScene, np.ndarray, np.ndarray]:
        """Geometry, then cameras: `(scene, intrinsics [F, 3, 3], extrinsics [F, 4, 4])`."""
        from cameo.scenes.meshes import load_mesh, random_orbit
        from cameo.scenes.objects import random_object
        from cameo.scenes.rooms import bare_room, random_cameras, random_room

        count = self.views_per_scene
        if self.meshes is None and self.content != "objects":
            make_room = random_room if self.content == "rooms" else bare_room
            if isinstance(self.rig, RoomRig):
                return rigged_room(self.rig, rng, make_room, self.size)
            geometry, extent = make_room(rng)
            return geometry, *random_cameras(rng, geometry, extent, count, self.size)
        geometry = load_mesh(self.meshes[scene % len(self.meshes)], rng) if self.meshes else random_object(rng)
        if isinstance(self.rig, str):
            # The sphere about the origin that holds it: 1 for an object, 0.5 to 0.87 for a mesh in its unit box.
            radius = float(np.linalg.norm(geometry.corners, axis=-1).max())
            return geometry, *rig_cameras(self.rig, rng, self.size, count, radius=radius)
        return geometry, *random_orbit(rng, count, self.size, scale=1.0 if self.meshes else OBJECT_SCALE)


def _check_seen(depth: np.ndarray, path: Path) -> None:
    """Refuse views `[F, 1, H, W]` in which nothing is seen of a mesh, and warn of views that are nearly empty."""
    seen = float((depth > 0).mean())
    if not seen:
        raise DataError(
            f"{path}: nothing of the mesh is seen in any of its {len(depth)} views of {depth.shape[-1]}x"
            f"{depth.shape[-2]} pixels; it is thinner than a pixel, or cut out by its alpha. Remove the file, or "
            "render larger views"
        )
    if seen < LEAST_SEEN:
        warnings.warn(
            f"{path}: the mesh covers {seen:.2%} of its views, which are nearly empty; remove the file, or render "
            "larger views",
            stacklevel=2,
        )


def _check_content(content: str, rig: str | RoomRig | None, mesh_dir: str | Path | None) -> None:
    if content not in CONTENTS:
        raise unknown_name("content", content, CONTENTS)
    if content != "rooms" and mesh_dir is not None:
        raise ValueError(f"content={content!r} and mesh_dir={str(mesh_dir)!r}: expected one of them; leave one out")
    in_room = content != "objects" and mesh_dir is None
    if isinstance(rig, str) and in_room:
        raise ValueError(
            f"rig={rig!r}: expected an object in the middle, got content={content!r}; "
            "pass content='objects' or mesh_dir=, or a cameo.data.RoomRig, or leave rig out"
        )
    if isinstance(rig, RoomRig) and not in_room:
        raise ValueError(
            f"{rig}: stands in a room, got {f'content={content!r}' if mesh_dir is None else f'{mesh_dir=}'}; pass "
            "content='rooms' or 'bare_rooms', or a name of cameo.data.RIGS as rig"
        )


def _number_of_views(rig: str | RoomRig | None, views_per_scene: int | None) -> int:
    if isinstance(rig, RoomRig):
        if views_per_scene not in (None, rig.num_views):
            raise ValueError(f"views_per_scene: expected {rig.num_views}, the views of the rig, got {views_per_scene}")
        return rig.num_views
    if rig is not None:
        return rig_views(rig, views_per_scene)
    return DEFAULT_VIEWS if views_per_scene is None else views_per_scene


def _split_meshes(folder: Path, split: str) -> list[Path]:
    """Meshes of a folder in this split: of each ten by name the 9th is validation, the 10th test."""
    from cameo.scenes.meshes import find_meshes

    found = find_meshes(folder)
    place = {"validation": (8,), "test": (9,)}.get(split, tuple(range(8)))
    meshes = [path for index, path in enumerate(found) if index % 10 in place]
    if not meshes:
        raise DataError(
            f"{folder}: {len(found)} meshes leave none for split={split!r} (of each ten the 9th is "
            "validation, the 10th test); put held-out meshes into a folder of their own and read it with "
            "split='train'"
        )
    return meshes
