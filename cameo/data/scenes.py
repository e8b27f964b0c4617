"""Embedded scenes: furnished rooms or the user's meshes, ray-cast with exact depth, cached on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cameo.data.cache import default_cache_dir, fingerprint, read_views, write_views
from cameo.data.rendering import render
from cameo.data.views import Views
from cameo.errors import DataError, unknown_name

__all__ = ["EmbeddedScenes"]

SPLITS = {"train": 0, "validation": 1, "test": 2}
# Part of every cache key: raise it whenever the same settings give other pixels.
FORMAT_VERSION = 1


class EmbeddedScenes:
    """Scenes that need no download: textured rooms seen by a hand-held camera, or a folder of meshes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     settings = {"views_per_scene": 2, "size": (8, 8), "cache_dir": folder, "progress": False}
        ...     views = EmbeddedScenes(num_scenes=1, **settings).views(0)
        >>> views.images.shape, views.images.dtype, views.key
        (torch.Size([2, 3, 8, 8]), torch.uint8, 'train-00000')

    Rooms are boxes of 3 to 5 m with furniture and things on it; world z points up, the unit is the metre.
    Scene number i of a split is the same whatever `num_scenes` is; splits never share a scene.

    - `split`: "train", "validation" or "test".
    - `size`: height and width in pixels.
    - `cache_dir`: where rendered scenes are kept; None = `$CAMEO_CACHE` or `~/.cache/cameo`. Missing scenes
      are rendered now, with a progress bar unless `progress=False`; a damaged file is rendered again with a
      warning.
    - `mesh_dir`: a folder with .glb, .obj or .ply files (searched recursively) to show instead of rooms, each
      scaled to a unit box and seen from an orbit on a white background without depth. Eight of ten meshes
      are train, one validation, one test; scenes go round the meshes with new cameras each time.

    Raises `ValueError` on a wrong setting, `DataError` on an unusable mesh folder, mesh file or cache folder.
    """

    def __init__(
        self,
        split: str = "train",
        num_scenes: int = 512,
        views_per_scene: int = 8,
        size: tuple[int, int] = (64, 64),
        seed: int = 0,
        cache_dir: str | Path | None = None,
        mesh_dir: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        counts = {"num_scenes": num_scenes, "views_per_scene": views_per_scene}
        counts |= {"size[0]": size[0], "size[1]": size[1]}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        self.split, self.num_scenes, self.views_per_scene = split, num_scenes, views_per_scene
        self.size, self.seed = (int(size[0]), int(size[1])), seed
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
        root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        self.folder = root / "scenes" / fingerprint(settings)
        self._render_missing(progress)

    def __len__(self) -> int:
        return self.num_scenes

    def views(self, scene: int) -> Views:
        """Return the views of one scene: uint8 images, float32 depth and cameras."""
        if not 0 <= scene < self.num_scenes:
            raise IndexError(f"scene: expected 0 to {self.num_scenes - 1}, got {scene}")
        cached = read_views(self._path(scene))
        return cached if cached is not None else self._render(scene)

    def _path(self, scene: int) -> Path:
        return self.folder / f"{scene:05d}.safetensors"

    def _render_missing(self, progress: bool) -> None:
        from tqdm import tqdm

        missing = [scene for scene in range(self.num_scenes) if not self._path(scene).exists()]
        for scene in tqdm(missing, desc=f"rendering {self.split} scenes", disable=not (progress and missing)):
            self._render(scene)

    def _render(self, scene: int) -> Views:
        rng = np.random.default_rng((self.seed, SPLITS[self.split], scene))
        count = self.views_per_scene
        key = f"{self.split}-{scene:05d}"
        if self.meshes is None:
            from cameo.data.rooms import random_cameras, random_room

            geometry, extent = random_room(rng)
            intrinsics, extrinsics = random_cameras(rng, geometry, extent, count, self.size)
        else:
            from cameo.data.meshes import load_mesh, random_orbit

            path = self.meshes[scene % len(self.meshes)]
            geometry = load_mesh(path, rng)
            intrinsics, extrinsics = random_orbit(rng, count, self.size)
            key = f"{key}-{path.stem}"
        # Cameras are rounded before rendering, so that depth is exact for the cameras handed over.
        intrinsics, extrinsics = intrinsics.astype(np.float32), extrinsics.astype(np.float32)
        images, depth = render(geometry, intrinsics.astype(float), extrinsics.astype(float), self.size)
        views = Views(
            images=torch.from_numpy(images),
            depth=torch.from_numpy(depth),
            intrinsics=torch.from_numpy(intrinsics),
            extrinsics=torch.from_numpy(extrinsics),
            key=key,
        )
        write_views(self._path(scene), views)
        return views


def _split_meshes(folder: Path, split: str) -> list[Path]:
    """Meshes of a folder in this split: of each ten by name the 9th is validation, the 10th test."""
    from cameo.data.meshes import find_meshes

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
