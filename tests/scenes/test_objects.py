"""Embedded objects and meshes: recognisable, joined, whole in the image, the same colours in every view."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh

from cameo.correspondence import Correspondence
from cameo.data import EmbeddedScenes, MultiViewDataset, Views, collate
from cameo.geometry import project, unproject
from cameo.scenes.objects import random_object
from cameo.scenes.rendering import RAYS_PER_CALL, TriangleScene
from cameo.scenes.shapes import SceneBuilder


def source(folder: Path, **options: object) -> EmbeddedScenes:
    settings: dict[str, object] = {"num_scenes": 3, "content": "objects", "size": (48, 48), "progress": False}
    return EmbeddedScenes(cache_dir=folder, **{**settings, **options})  # type: ignore[arg-type]


def contains(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether a convex solid `[T, 3, 3]` holds points `[M, 3]`."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return ((points[:, None] - corners[:, 0]) * normals).sum(-1).max(-1) <= 1e-9


def test_parts_are_joined_and_look_different(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[np.ndarray, np.ndarray, str]] = []
    add = SceneBuilder.add

    def record(self: SceneBuilder, shape: str, center: np.ndarray, *args: object, **options: object) -> None:
        add(self, shape, center, *args, **options)  # type: ignore[arg-type]
        parts.append((self.corners[-1], center, self.textures[-1].pattern))

    monkeypatch.setattr(SceneBuilder, "add", record)
    counts = set()
    for seed in range(30):
        parts.clear()
        scene = random_object(np.random.default_rng(seed))
        counts.add(len(parts))
        assert len({pattern for _, _, pattern in parts}) == len(parts)
        steps = np.linspace(0, 1, 60)[:, None]
        for index, (corners, center, _) in enumerate(parts[1:], start=1):
            between = [(other, center * steps + middle * (1 - steps)) for other, middle, _ in parts[:index]]
            assert any((contains(corners, line) & contains(other, line)).any() for other, line in between), seed
        points = scene.corners.reshape(-1, 3)
        assert np.linalg.norm(points, axis=-1).max() == pytest.approx(1.0)
        np.testing.assert_allclose(points.min(0) + points.max(0), 0, atol=1e-12)
    assert counts == {3, 4, 5, 6, 7}


@pytest.mark.parametrize("rig", [None, "zero123plus-v1.1", "mvdream", "sv3d-dynamic"])
def test_object_is_whole_in_the_image_on_white_without_depth(tmp_path: Path, rig: str | None) -> None:
    scenes = source(tmp_path, num_scenes=6, rig=rig)
    for scene in range(6):
        views = scenes.views(scene)
        seen = views.depth[:, 0] > 0
        border = torch.cat([seen[:, 0], seen[:, -1], seen[:, :, 0], seen[:, :, -1]], dim=1)
        assert not border.any()
        assert 0.05 < seen.float().mean() < 0.6
        beside = F.max_pool2d(seen.float(), 3, 1, 1) == 0
        # Not quite all: the tip of a cone may lie between pixel centres, a pixel and more from the next one with depth.
        assert (views.images.movedim(1, -1)[beside] == 255).all(-1).float().mean() > 0.99
        points = unproject(views.depth[None], views.intrinsics[None], views.extrinsics[None])[0].movedim(1, -1)
        assert points[seen].norm(dim=-1).max() < 1.001
        # Colours, and more than one.
        assert views.images.movedim(1, -1)[seen].float().std(dim=0).max() > 15
        assert views.up is not None
        assert views.up.tolist() == [0, 0, 1]


def test_views_agree_on_colour(tmp_path: Path) -> None:
    """Colours carried along depth and cameras agree; carried to a wrong place they do not."""
    views = source(tmp_path, num_scenes=1, rig="sv3d-orbit", size=(96, 96), views_per_scene=18).views(0)
    assert carried(views, 0.0) < 0.03
    assert carried(views, 0.15) > 2 * carried(views, 0.0)


def carried(views: Views, shift: float) -> float:
    """Median colour difference between view 0 and view 1 where both see the same point."""
    images = views.images.float() / 255
    cameras = views.intrinsics[None], views.extrinsics[None]
    points = unproject(views.depth[None], *cameras)[0, 0].flatten(1).T + shift
    xy, z = (part[0, 1] for part in project(points.expand(1, len(views), -1, 3), *cameras))
    grid = (2 * xy / 96 - 1)[None, None]
    color = F.grid_sample(images[1:2], grid, align_corners=False)[0, :, 0]
    seen = F.grid_sample(views.depth[1:2], grid, mode="nearest", align_corners=False)[0, 0, 0]
    visible = (seen > 0) & (z > 0) if shift else (z - seen).abs() < 0.02 * z
    assert visible.sum() > 300
    return float((color - images[0].flatten(1)).abs().mean(0)[visible].median())


def test_rendering_casts_few_rays_in_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the time goes into, about 0.05 s a scene; counted, since the time itself depends on the processor."""
    cast: dict[str, list[int]] = {"surface": [], "occluded": [], "depth": []}

    def counted(name: str) -> Callable[..., Any]:
        method = getattr(TriangleScene, name)

        def call(scene: TriangleScene, origins: np.ndarray, directions: np.ndarray) -> Any:
            cast[name].append(len(origins))
            return method(scene, origins, directions)

        return call

    for name in cast:
        monkeypatch.setattr(TriangleScene, name, counted(name))
    source(tmp_path, num_scenes=1, rig="zero123plus-v1.2", size=(64, 64))
    pixels = 7 * 64 * 64
    assert sum(cast["surface"]) == 4 * pixels  # four samples of the colour
    assert sum(cast["occluded"]) <= 4 * pixels  # and of the light, where they meet something
    assert sum(cast["depth"]) == pixels
    assert sum(map(len, cast.values())) <= 7 + 2 * -(-4 * pixels // RAYS_PER_CALL)


def test_splits_seeds_and_contents_have_scenes_of_their_own(tmp_path: Path) -> None:
    first = source(tmp_path / "a", rig="mvdream").views(1)
    again = source(tmp_path / "b", rig="mvdream", num_scenes=2).views(1)
    assert torch.equal(first.images, again.images)
    others = [source(tmp_path, rig="mvdream", split="validation"), source(tmp_path, rig="mvdream", seed=1)]
    others += [source(tmp_path, rig="sv3d-orbit", views_per_scene=4), source(tmp_path, views_per_scene=4)]
    assert len({other.folder for other in others}) == 4
    for other in others:
        assert not torch.equal(other.views(1).images, first.images)


def test_rig_samples_make_batches_with_matches_and_up(tmp_path: Path) -> None:
    scenes = source(tmp_path, num_scenes=2, rig="zero123plus-v1.2")
    dataset = MultiViewDataset(scenes, num_views=7, selection="in_order")
    batch = collate([dataset[0], dataset[1]])
    assert batch["up"].tolist() == [[0, 0, 1]] * 2  # type: ignore[attr-defined]
    cameras = batch["depth"], batch["intrinsics"], batch["extrinsics"]
    match = Correspondence.from_depth(*cameras, token_grid=((12, 12), *[(8, 8)] * 6))  # type: ignore[arg-type]
    share = match.matched.flatten(3).float().mean((0, 3))
    # Neighbours at 60 degrees and the input's two at 30 degrees share surface, opposite views hardly any.
    assert share[1, 0] > 0.03
    assert share[6, 0] > 0.03
    assert share[1, 4] < 0.01


@pytest.mark.parametrize("rig", ["zero123plus-v1.2", "imagedream", "sv3d-dynamic"])
def test_meshes_fit_into_every_rig(tmp_path: Path, rig: str) -> None:
    folder = tmp_path / "meshes"
    folder.mkdir()
    trimesh.creation.box((1, 1, 1)).export(folder / "cube.ply")
    trimesh.creation.box((0.2, 0.2, 3)).export(folder / "pole.ply")
    scenes = source(tmp_path, content="rooms", mesh_dir=folder, rig=rig, num_scenes=2)
    for scene, least in ((0, 0.2), (1, 0.0)):
        views = scenes.views(scene)
        seen = views.depth[:, 0] > 0
        assert not torch.cat([seen[:, 0], seen[:, -1], seen[:, :, 0], seen[:, :, -1]], dim=1).any()
        # Near enough to fill the image: the pole's ends come close to the border.
        assert seen.float().mean() > least
    rows = seen.any(-1).float().sum(-1)
    assert rows.max() > 0.8 * 48
    assert views.up is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"content": "object"}, "unknown content 'object': did you mean 'objects'"),
        (
            {"content": "rooms", "rig": "mvdream"},
            r"rig='mvdream': .*got content='rooms'; pass content='objects' or mesh",
        ),
        ({"rig": "mvdreem"}, "unknown rig 'mvdreem': did you mean 'mvdream'"),
        ({"rig": "mvdream", "views_per_scene": 8}, "rig='mvdream': has 4 views, got 8 views; ask for 4"),
        ({"rig": "sv3d-orbit", "views_per_scene": 1}, "rig='sv3d-orbit': expected 2 views or more, got 1"),
        ({"mesh_dir": "meshes"}, r"content='objects' and mesh_dir='meshes': expected one of them; leave one out"),
        ({"views_per_scene": 0}, "views_per_scene: expected at least 1, got 0"),
    ],
)
def test_wrong_settings(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(tmp_path, **options)
