"""Embedded scenes: exact depth, the same colours in all views, splits, and the cache on disk."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trimesh
from safetensors import safe_open

from cameo.data import EmbeddedScenes, Views
from cameo.errors import DataError, ShapeError
from cameo.geometry import project, unproject
from cameo.scenes.cache import fingerprint, read_views, write_views
from cameo.scenes.rendering import TriangleScene, render
from cameo.scenes.rooms import look_at

INTRINSICS = np.array([[[40.0, 0.0, 20.3], [0.0, 42.0, 15.6], [0.0, 0.0, 1.0]]])
SIZE = (30, 40)


def scene_of(mesh: trimesh.Trimesh) -> TriangleScene:
    """A scene whose colour is the fractional part of the surface point."""
    corners = np.asarray(mesh.vertices)[mesh.faces]
    normals = np.asarray(mesh.vertex_normals)[mesh.faces]
    return TriangleScene(corners, normals, lambda surface: np.mod(surface.points, 1.0))


def pixel_rays(extrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Camera centre and the world ray of every pixel centre of one view; its parameter is the z-depth."""
    height, width = SIZE
    rotation, translation = extrinsics[:3, :3], extrinsics[:3, 3]
    rays = np.empty((height, width, 3))
    for row in range(height):
        for column in range(width):
            x = (column + 0.5 - INTRINSICS[0, 0, 2]) / INTRINSICS[0, 0, 0]
            y = (row + 0.5 - INTRINSICS[0, 1, 2]) / INTRINSICS[0, 1, 1]
            rays[row, column] = rotation.T @ np.array([x, y, 1.0])
    return -rotation.T @ translation, rays


@pytest.fixture(scope="module")
def bare_rooms(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedScenes:
    settings = {"num_scenes": 3, "views_per_scene": 6, "progress": False, "content": "bare_rooms"}
    return EmbeddedScenes(cache_dir=tmp_path_factory.mktemp("cache"), **settings)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedScenes:
    return EmbeddedScenes(num_scenes=3, views_per_scene=6, cache_dir=tmp_path_factory.mktemp("cache"), progress=False)


def small(folder: Path, **options: object) -> EmbeddedScenes:
    settings: dict[str, object] = {"num_scenes": 1, "views_per_scene": 2, "size": (16, 16), "progress": False}
    return EmbeddedScenes(cache_dir=folder, **{**settings, **options})  # type: ignore[arg-type]


def test_depth_is_the_analytic_plane() -> None:
    plane = trimesh.creation.box((60.0, 60.0, 1.0))
    plane.apply_translation((0.0, 0.0, -0.5))
    extrinsics = look_at(np.array([[0.5, -2.0, 1.7]]), np.array([[0.2, 1.0, 0.1]]))
    center, rays = pixel_rays(extrinsics[0])
    expected = -center[2] / rays[..., 2]
    downward = rays[..., 2] < -0.1
    _, depth = render(scene_of(plane), INTRINSICS, extrinsics, SIZE)
    assert downward.mean() > 0.5
    np.testing.assert_allclose(depth[0, 0][downward], expected[downward], rtol=1e-6)


def test_cameras_may_be_arrays_that_cannot_be_written() -> None:
    scene = scene_of(trimesh.creation.box(extents=(9.0, 9.0, 1.0)))
    extrinsics = look_at(np.array([[0.0, 0.1, 4.0]]), np.zeros((1, 3)))
    extrinsics.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        assert render(scene, INTRINSICS, extrinsics, SIZE)[1].min() > 3


def test_depth_is_the_analytic_sphere_and_zero_beside_it() -> None:
    radius = 0.8
    sphere = trimesh.creation.icosphere(subdivisions=5, radius=radius)
    extrinsics = look_at(np.array([[1.0, -2.0, 0.7]]), np.array([[0.1, 0.0, 0.05]]))
    center, rays = pixel_rays(extrinsics[0])
    squared = (rays**2).sum(-1)
    half = (rays * center).sum(-1) / squared
    root = half**2 - ((center**2).sum() - radius**2) / squared
    _, depth = render(scene_of(sphere), INTRINSICS, extrinsics, SIZE)
    inside, outside = root > 0.02, root < -0.02
    assert inside.sum() > 100
    assert outside.sum() > 100
    # The mesh lies up to radius * (edge / radius)² / 8 = 5e-4 inside the sphere; oblique rays see more.
    np.testing.assert_allclose(depth[0, 0][inside], (-half - np.sqrt(np.maximum(root, 0)))[inside], atol=3e-3)
    assert (depth[0, 0][outside] == 0).all()


def test_colour_is_the_mean_over_the_pixel_and_white_beside_the_mesh() -> None:
    wall = trimesh.creation.box((9.0, 100.0, 0.1))
    wall.apply_translation((-4.5, 0.0, 2.05))
    scene = scene_of(wall)
    scene.color = lambda surface: np.zeros((len(surface.points), 3), dtype=np.float32)
    intrinsics = np.array([[[4.0, 0.0, 2.5], [0.0, 4.0, 2.0], [0.0, 0.0, 1.0]]])
    images, depth = render(scene, intrinsics, np.eye(4)[None], (4, 4))
    assert images[0, 0, 1].tolist() == [0, 0, 128, 255]
    # The edge runs through the pixel's centre, so depth is that of one side, never a mean.
    assert set(np.unique(depth)) <= {np.float32(0.0), np.float32(2.0)}


def test_colour_is_that_of_the_surface_point() -> None:
    wall = trimesh.creation.box((100.0, 100.0, 1.0))
    wall.apply_translation((0.0, 0.0, 2.9))
    scene = scene_of(wall)
    scene.color = lambda surface: 0.5 + 0.2 * surface.points * np.float32([1.0, 1.0, 0.0])
    images, depth = render(scene, INTRINSICS, np.eye(4)[None], SIZE)
    _, rays = pixel_rays(np.eye(4))
    np.testing.assert_allclose(depth, 2.4, rtol=1e-6)
    expected = 255 * (0.5 + 0.2 * rays * 2.4)[..., :2].transpose(2, 0, 1)
    # Rounding to 8 bits, and nothing else: the mean over a pixel of a linear colour is that of its centre.
    np.testing.assert_allclose(images[0, :2], expected, atol=0.51)


@pytest.mark.parametrize("content", ["rooms", "bare_rooms"])
def test_views_agree_on_colour_and_depth(content: str, request: pytest.FixtureRequest) -> None:
    """Colours carried along depth and cameras agree; carried to a wrong place they do not."""
    scenes: EmbeddedScenes = request.getfixturevalue(content)
    for scene in range(len(scenes)):
        views = scenes.views(scene)
        right, wrong = reprojection_errors(views), reprojection_errors(views, shift=0.25)
        assert right < 0.035
        assert wrong > 2.5 * right


def reprojection_errors(views: Views, shift: float = 0.0) -> float:
    """Median absolute colour difference between view 0 and its neighbours at points that both see."""
    images, (height, width) = views.images.float() / 255, views.size
    cameras = views.intrinsics[None], views.extrinsics[None]
    points = unproject(views.depth[None], *cameras)[0, 0].flatten(1).T + shift
    xy, z = (part[0] for part in project(points.expand(1, len(views), -1, 3), *cameras))
    grid = (2 * xy / torch.tensor([width, height]) - 1)[:, None]
    color = F.grid_sample(images, grid, align_corners=False)[:, :, 0]
    seen = F.grid_sample(views.depth, grid, mode="nearest", align_corners=False)[:, 0, 0]
    visible = (grid[:, 0].abs() < 1).all(-1) & (z > 0)
    if not shift:
        visible &= (z - seen).abs() < 0.02 * z
    differences = (color - images[0].flatten(1)).abs().mean(1)
    assert visible[1:4].sum() > 1000
    return differences[1:4][visible[1:4]].median().item()


def test_rooms_are_measured_everywhere_and_metric(rooms: EmbeddedScenes) -> None:
    for scene in range(len(rooms)):
        views = rooms.views(scene)
        assert views.depth.min() > 0.1
        assert views.depth.max() < 8.0
        field = torch.rad2deg(2 * torch.atan(32 / views.intrinsics[:, 0, 0]))
        assert ((field > 49.9) & (field < 65.1)).all()
        # Texture at the scale of pixels: the local contrast is far from a flat toy's.
        contrast = views.images.float().diff(dim=-1).abs().mean() / 255
        assert contrast > 0.02


def test_bare_rooms_tell_more_by_another_view_than_by_the_mean(
    rooms: EmbeddedScenes, bare_rooms: EmbeddedScenes
) -> None:
    """What the mean colour leaves unknown at tokens of 8 pixels is larger than in furnished rooms."""

    def unknown(scenes: EmbeddedScenes) -> float:
        images = torch.stack([scenes.views(scene).images.float() / 255 for scene in range(len(scenes))])
        tokens = F.avg_pool2d(images.flatten(0, 1), 8)
        return float(tokens.flatten(2).var(-1).mean())

    assert unknown(bare_rooms) > 1.5 * unknown(rooms)
    depth = torch.stack([bare_rooms.views(scene).depth for scene in range(3)])
    assert depth.min() > 0.1
    assert depth.max() < 8.0
    extents = [bare_rooms.views(scene).depth.amax() for scene in range(3)]
    assert len({round(float(extent), 3) for extent in extents}) == 3  # the geometry differs from room to room


def test_same_seed_is_bit_identical_and_others_differ(tmp_path: Path) -> None:
    first, again = small(tmp_path / "a").views(0), small(tmp_path / "b").views(0)
    for name in ("images", "depth", "intrinsics", "extrinsics"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name
    others = [small(tmp_path, split="validation"), small(tmp_path, split="test"), small(tmp_path, seed=1)]
    for other in [source.views(0) for source in others] + [small(tmp_path, num_scenes=2).views(1)]:
        assert not torch.equal(other.extrinsics, first.extrinsics)
        assert not torch.equal(other.images, first.images)


def test_scenes_rendered_by_earlier_versions_are_found(tmp_path: Path) -> None:
    """The name of the cache folder of rooms, and what its files hold, are as before objects and rigs came."""
    source = small(tmp_path)
    assert source.folder.name == fingerprint({"format": 1, "split": "train", "views": 2, "size": (16, 16), "seed": 0})
    (path,) = source.folder.iterdir()
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["depth", "extrinsics", "images", "intrinsics"]
    # Without a number of views there are eight, as before.
    options: dict[str, object] = {"num_scenes": 1, "size": (8, 8), "progress": False, "cache_dir": tmp_path}
    assert EmbeddedScenes(**options).folder == EmbeddedScenes(views_per_scene=8, **options).folder  # type: ignore[arg-type]


def test_world_up_is_the_z_axis_fresh_and_cached(tmp_path: Path) -> None:
    for source in (small(tmp_path), small(tmp_path)):
        up = source.views(0).up
        assert up is not None
        assert up.tolist() == [0, 0, 1]
    with pytest.raises(ShapeError, match=r"up of 'train-00000': expected \[3\], got \[1, 3\]"):
        replace(source.views(0), up=torch.zeros(1, 3))


def test_scene_does_not_depend_on_the_number_of_scenes(tmp_path: Path) -> None:
    few, many = small(tmp_path / "a"), small(tmp_path / "b", num_scenes=3)
    assert torch.equal(few.views(0).images, many.views(0).images)


def test_cache_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small(tmp_path).views(0)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr("cameo.scenes.embedded.render", fail)
    cached = small(tmp_path).views(0)
    assert torch.equal(cached.images, first.images)
    assert cached.key == first.key == "train-00000"
    with pytest.raises(AssertionError, match="rendered again"):
        small(tmp_path, size=(8, 8))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "garbage"])
def test_damaged_cache_file_is_rendered_again(tmp_path: Path, damage: str) -> None:
    source = small(tmp_path)
    first = source.views(0)
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    path.write_bytes({"truncated": content[:-100], "flipped": content, "garbage": b"x" * 50}[damage])
    with pytest.warns(UserWarning, match="damaged scene cache"):
        again = source.views(0)
    assert torch.equal(again.images, first.images)
    assert read_views(path) is not None


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = small(tmp_path / "cache").views(0)

    def fail(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(DataError, match=r"target.*no space left.*CAMEO_CACHE"):
        write_views(tmp_path / "target" / "scene.safetensors", views)
    assert list((tmp_path / "target").iterdir()) == []


def test_default_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", str(tmp_path / "here"))
    assert small(None).folder.is_relative_to(tmp_path / "here")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, "unknown split 'valid': did you mean 'validation'"),
        ({"num_scenes": 0}, "num_scenes: expected at least 1"),
        ({"size": (0, 8)}, r"size\[0\]: expected at least 1"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"content": "bare_room"}, "unknown content 'bare_room': did you mean 'bare_rooms'"),
        ({"content": "bare_rooms", "rig": "mvdream"}, "got content='bare_rooms'"),
        ({"content": "bare_rooms", "mesh_dir": "meshes"}, "content='bare_rooms' and mesh_dir='meshes'"),
    ],
)
def test_wrong_settings(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **options)


def test_scene_out_of_range(rooms: EmbeddedScenes) -> None:
    with pytest.raises(IndexError, match="expected 0 to 2, got 3"):
        rooms.views(3)


def test_mesh_folder(tmp_path: Path) -> None:
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    colored = trimesh.creation.box((0.2, 0.3, 0.5))
    colored.visual.vertex_colors = np.tile([[200, 40, 10, 255]], (len(colored.vertices), 1))
    colored.export(meshes / "colored.ply")
    trimesh.creation.icosphere(radius=30.0).export(meshes / "plain.obj")
    textured = trimesh.creation.box((1, 1, 1))
    from PIL import Image

    image = Image.new("RGB", (4, 4), (10, 20, 220))
    textured.visual = trimesh.visual.TextureVisuals(uv=textured.vertices[:, :2], image=image)
    textured.export(meshes / "textured.glb")

    source = small(tmp_path / "cache", num_scenes=3, views_per_scene=4, size=(32, 32), mesh_dir=meshes)
    for scene, name in enumerate(("colored", "plain", "textured")):
        views = source.views(scene)
        assert views.key == f"train-0000{scene}-{name}"
        empty = views.depth[:, 0] == 0
        assert 0.2 < empty.float().mean() < 0.9
        # Inside the object's box, and the whole object in sight: nothing at the image border.
        points = unproject(views.depth[None], views.intrinsics[None], views.extrinsics[None])[0]
        assert points.nan_to_num().abs().max() < 0.501
        assert empty[:, 0].all()
        assert empty[:, :, 0].all()
        corner = views.images[:, :, 0, 0]
        assert (corner == 255).all()
    red, _, blue = source.views(0).images[:, :, 16, 16].float().mean(0)
    assert red > 3 * blue
    red, _, blue = source.views(2).images[:, :, 16, 16].float().mean(0)
    assert blue > 3 * red
    plain = source.views(1).images.float()
    assert plain.std(dim=(0, 2, 3)).max() > 20


def test_meshes_stand_upright_with_their_texture(tmp_path: Path) -> None:
    """A tall board with y up, as glTF and OBJ have it: z is up in the scene, the picture upright."""
    from PIL import Image

    from cameo.scenes.meshes import load_mesh

    board = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 4, 0], [0, 4, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    image.paste((0, 0, 255), (0, 4, 8, 8))  # lower half blue
    uv = np.array([[0.01, 0.01], [0.99, 0.01], [0.99, 0.99], [0.01, 0.99]])
    board.visual = trimesh.visual.TextureVisuals(uv=uv, image=image)
    for suffix in ("glb", "obj"):
        folder = tmp_path / suffix
        folder.mkdir()
        board.export(folder / f"board.{suffix}")
        scene = load_mesh(folder / f"board.{suffix}", np.random.default_rng(0))
        extent = np.ptp(scene.corners.reshape(-1, 3), axis=0)
        np.testing.assert_allclose(extent, [0.25, 0.0, 1.0], atol=1e-6)
        extrinsics = look_at(np.array([[0.0, -2.0, 0.0]]), np.zeros((1, 3)))
        images, depth = render(scene, INTRINSICS, extrinsics, SIZE)
        upper, lower = images[0, :, 9, 20].astype(float), images[0, :, 22, 20].astype(float)
        assert depth[0, 0, 9, 20] == pytest.approx(2.0)
        assert upper[0] > 100 > 10 > upper[2]
        assert lower[2] > 100 > 10 > lower[0]


def test_bad_mesh_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: expected a folder of meshes, found nothing"):
        small(tmp_path / "cache", mesh_dir=tmp_path / "absent")
    folder = tmp_path / "meshes"
    folder.mkdir()
    with pytest.raises(DataError, match=r"meshes: no meshes found; looked for .glb, .obj, .ply"):
        small(tmp_path / "cache", mesh_dir=folder)
    (folder / "broken.glb").write_bytes(b"not a mesh")
    with pytest.raises(DataError, match=r"broken.glb: cannot read the mesh"):
        small(tmp_path / "cache", mesh_dir=folder)
    with pytest.raises(DataError, match=r"1 meshes leave none for split='validation'"):
        small(tmp_path / "cache", mesh_dir=folder, split="validation")
    (folder / "broken.glb").unlink()
    (folder / "points.ply").write_bytes(trimesh.PointCloud(np.eye(3)).export(file_type="ply"))
    with pytest.raises(DataError, match=r"points.ply: expected a mesh with faces"):
        small(tmp_path / "cache", mesh_dir=folder)
