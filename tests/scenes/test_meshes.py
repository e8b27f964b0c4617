"""Mesh files in their own colors, framed by their own surface, with holes where their alpha says so."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from cameo.data import EmbeddedScenes
from cameo.errors import DataError
from cameo.scenes.meshes import LIGHT_DIRECTION, find_meshes, load_mesh
from cameo.scenes.rendering import TriangleScene

UV = np.array([[0.01, 0.01], [0.99, 0.01], [0.99, 0.99], [0.01, 0.99]])


def board(material: Any = None, *, x: float = 0.0, z: float = 0.0, uv: np.ndarray | None = UV) -> trimesh.Trimesh:
    """A square of side 1 that faces the camera, in the axes of glTF and OBJ: x right, y up, z toward the viewer."""
    corners = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]]) + np.array([x, 0, z])
    mesh = trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)
    if material is not None:
        mesh.visual = TextureVisuals(uv=uv, material=material)
    return mesh


def loaded(folder: Path, *meshes: trimesh.Trimesh, name: str = "mesh.glb") -> TriangleScene:
    folder.mkdir(exist_ok=True)
    trimesh.Scene(list(meshes)).export(folder / name)
    return load_mesh(folder / name, np.random.default_rng(0))


def seen(scene: TriangleScene, *places: tuple[float, float]) -> list[list[int] | None]:
    """Colors without their shading, in 8 bits, of what is seen at places (x, z) from the front; None for nothing."""
    found: list[list[int] | None] = []
    for x, z in places:
        met, surface = scene.surface(np.array([[x, -3.0, z]]), np.array([[0.0, 1.0, 0.0]]))
        if not met[0]:
            found.append(None)
            continue
        shade = 0.6 + 0.4 * abs(float(surface.normals[0] @ LIGHT_DIRECTION))
        found.append(np.rint(scene.color(surface)[0] / shade * 255).astype(int).tolist())
    return found


CENTER = (0.1, 0.05)


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        ([255, 0, 0, 255], [255, 0, 0]),
        ([0, 0, 0, 255], [0, 0, 0]),
        # Half the light: 1.055 * 0.502 ** (1 / 2.4) - 0.055 = 0.7367 of the encoded range.
        ([128, 128, 128, 255], [188, 188, 188]),
        (None, [255, 255, 255]),  # glTF's default
    ],
)
def test_a_plain_material_without_coordinates(tmp_path: Path, factor: Any, expected: list[int]) -> None:
    assert seen(loaded(tmp_path, board(PBRMaterial(baseColorFactor=factor), uv=None)), CENTER) == [expected]


def test_a_base_color_multiplies_the_texture_in_linear_light(tmp_path: Path) -> None:
    texture = Image.new("RGB", (4, 4), (188, 188, 188))  # 0.5028 of the light
    halved = board(PBRMaterial(baseColorFactor=[255, 128, 0, 255], baseColorTexture=texture))
    # 0.5028 * 0.502 = 0.2524 of the light is 0.5394 encoded.
    assert seen(loaded(tmp_path, halved), CENTER) == [[188, 138, 0]]
    assert seen(loaded(tmp_path, board(PBRMaterial(baseColorTexture=texture))), CENTER) == [[188, 188, 188]]


def test_each_part_keeps_its_own_kind_of_color(tmp_path: Path) -> None:
    textured = board(PBRMaterial(baseColorTexture=Image.new("RGB", (4, 4), (10, 200, 30))), x=-2)
    painted = board(x=0)
    painted.visual.vertex_colors = np.tile([0, 0, 255, 255], (4, 1))
    plain = board(PBRMaterial(baseColorFactor=[255, 0, 0, 255]), x=2, uv=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scene = loaded(tmp_path, textured, painted, plain)
    assert seen(scene, (-0.4, 0.02), (0.02, 0.02), (0.4, 0.02)) == [[10, 200, 30], [0, 0, 255], [255, 0, 0]]


def test_vertex_colors_multiply_a_material(tmp_path: Path) -> None:
    mesh = board(PBRMaterial(baseColorFactor=[255, 255, 0, 255]))
    mesh.visual.vertex_attributes["color"] = np.tile([0, 255, 255, 255], (4, 1)).astype(np.uint8)
    assert seen(loaded(tmp_path, mesh), CENTER) == [[0, 255, 0]]


def test_face_and_vertex_colors_of_a_ply_are_as_they_stand_there(tmp_path: Path) -> None:
    for kind in ("face_colors", "vertex_colors"):
        mesh = board()
        setattr(mesh.visual, kind, [128, 64, 32, 255])
        mesh.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))  # z up
        mesh.export(tmp_path / f"{kind}.ply")
        scene = load_mesh(tmp_path / f"{kind}.ply", np.random.default_rng(0))
        assert seen(scene, CENTER) == [[128, 64, 32]], kind


def test_obj_materials(tmp_path: Path) -> None:
    lines = "mtllib two.mtl\nv -1 0 0\nv 0 0 0\nv 0 1 0\nv 1 0 0\nusemtl red\nf 1 2 3\nusemtl black\nf 2 4 3\n"
    (tmp_path / "two.obj").write_text(lines)
    (tmp_path / "two.mtl").write_text("newmtl red\nKd 1 0 0.502\nnewmtl black\nKd 0 0 0\n")
    scene = load_mesh(tmp_path / "two.obj", np.random.default_rng(0))
    assert seen(scene, (-0.1, -0.1), (0.1, -0.1)) == [[255, 0, 128], [0, 0, 0]]
    (tmp_path / "two.mtl").unlink()
    with pytest.warns(UserWarning, match=r"two.obj: 2 of 2 parts are shown in a made-up pattern, since the materials"):
        load_mesh(tmp_path / "two.obj", np.random.default_rng(0))


def test_a_part_without_colors_beside_others_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"mesh.glb: 1 of 2 parts are shown in a made-up pattern, since no colors"):
        loaded(tmp_path, board(PBRMaterial(baseColorFactor=[255, 0, 0, 255])), board(x=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(tmp_path, board())  # a mesh without any colors is meant to have a pattern


def half_clear(alpha: int) -> Image.Image:
    """A texture whose left half is green and opaque, and whose right half is red with another alpha."""
    image = Image.new("RGBA", (4, 4), (0, 255, 0, 255))
    image.paste((255, 0, 0, alpha), (2, 0, 4, 4))
    return image


@pytest.mark.parametrize(
    ("mode", "cutoff", "alpha", "right"),
    [
        ("MASK", None, 120, [0, 0, 255]),  # below 0.5: what stands behind is seen
        ("MASK", 0.4, 120, [255, 0, 0]),
        ("BLEND", None, 120, [0, 0, 255]),
        ("OPAQUE", None, 0, [255, 0, 0]),
        (None, None, 0, [255, 0, 0]),
    ],
)
def test_alpha_cuts_holes_into_color_and_depth(
    tmp_path: Path, mode: str | None, cutoff: float | None, alpha: int, right: list[int]
) -> None:
    front = PBRMaterial(baseColorTexture=half_clear(alpha), alphaMode=mode, alphaCutoff=cutoff)
    behind = PBRMaterial(baseColorFactor=[0, 0, 255, 255])
    scene = loaded(tmp_path, board(front), board(behind, z=-0.25, uv=None))
    assert seen(scene, (-0.2, 0.05), (0.2, 0.05)) == [[0, 255, 0], right]
    origins = np.array([[-0.2, -3.0, 0.05], [0.2, -3.0, 0.05]])
    depth = scene.depth(origins, np.array([[0.0, 1.0, 0.0]] * 2))
    # The box is 1 x 0.25 x 1 about the origin: the front stands at -0.125, the back at 0.125.
    np.testing.assert_allclose(depth, [2.875, 3.125 if right == [0, 0, 255] else 2.875], atol=1e-6)


def test_a_ray_through_many_holes_meets_nothing(tmp_path: Path) -> None:
    clear = PBRMaterial(baseColorFactor=[255, 0, 0, 0], alphaMode="MASK")
    frame = board(PBRMaterial(baseColorFactor=[0, 0, 255, 255]), x=3, uv=None)
    scene = loaded(tmp_path, *[board(clear, z=z, uv=None) for z in np.linspace(0, 2, 5)], frame)
    assert seen(scene, (-0.3, 0.02), (0.4, 0.02)) == [None, [0, 0, 255]]


def test_parts_stand_where_the_scene_of_the_file_has_them(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    mesh = board(PBRMaterial(baseColorFactor=[255, 0, 0, 255]), uv=None)
    for x, turn in ((-2.0, 0.0), (2.0, np.pi / 4)):
        pose = trimesh.transformations.rotation_matrix(turn, [0, 1, 0])
        pose[:3, :3] *= [1, 2, 1]
        pose[0, 3] = x
        scene.add_geometry(mesh, transform=pose)
    scene.export(tmp_path / "two.glb")
    found = load_mesh(tmp_path / "two.glb", np.random.default_rng(0))
    size = 4 + 0.5 + 0.5**0.5 / 2  # from the left edge of the first to the right edge of the second
    np.testing.assert_allclose(np.ptp(found.corners.reshape(-1, 3), axis=0), [1, 0.5**0.5 / size, 2 / size], atol=1e-6)
    left = found.corners[..., 0].mean(1) < 0
    np.testing.assert_allclose(found.corner_normals[left], [[[0, -1, 0]] * 3] * 2, atol=1e-6)
    np.testing.assert_allclose(found.corner_normals[~left], [[[0.5**0.5, -(0.5**0.5), 0]] * 3] * 2, atol=1e-6)


def test_an_unused_vertex_far_away_changes_nothing(tmp_path: Path) -> None:
    vertices = [[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1]]
    for name, more in (("plain", []), ("stray", [[500.0, 500.0, 500.0]])):
        mesh = trimesh.Trimesh(vertices + more, [[0, 1, 2], [1, 3, 2]], process=False)
        (tmp_path / f"{name}.ply").write_bytes(mesh.export(file_type="ply"))
    plain, stray = (load_mesh(tmp_path / f"{name}.ply", np.random.default_rng(0)) for name in ("plain", "stray"))
    np.testing.assert_array_equal(plain.corners, stray.corners)
    np.testing.assert_allclose(np.ptp(stray.corners.reshape(-1, 3), axis=0), [1, 0, 1])


def test_a_speck_far_away_is_left_out_and_told(tmp_path: Path) -> None:
    speck = trimesh.creation.box((0.001, 0.001, 0.001))
    speck.apply_translation([300, 0, 0])
    trimesh.util.concatenate([trimesh.creation.box((1, 1, 0.5)), speck]).export(tmp_path / "speck.ply")
    with pytest.warns(UserWarning, match=r"speck.ply: 12 of 24 triangles lie far from all others, and are left out"):
        scene = load_mesh(tmp_path / "speck.ply", np.random.default_rng(0))
    np.testing.assert_allclose(np.ptp(scene.corners.reshape(-1, 3), axis=0), [1, 1, 0.5])
    # A speck three sizes away is part of what is shown, and a thin pole on the box belongs to it.
    speck.apply_translation([-297, 0, 0])
    trimesh.util.concatenate([trimesh.creation.box((1, 1, 0.5)), speck]).export(tmp_path / "near.ply")
    pole = trimesh.creation.box((0.001, 0.001, 3))
    pole.apply_translation([0, 0, 1.5])
    trimesh.util.concatenate([trimesh.creation.box((1, 1, 1)), pole]).export(tmp_path / "pole.ply")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scene = load_mesh(tmp_path / "pole.ply", np.random.default_rng(0))
        near = load_mesh(tmp_path / "near.ply", np.random.default_rng(0))
    np.testing.assert_allclose(np.ptp(scene.corners.reshape(-1, 3), axis=0), [1 / 3.5, 1 / 3.5, 1])
    np.testing.assert_allclose(np.ptp(near.corners.reshape(-1, 3), axis=0), np.array([3.5005, 1, 0.5]) / 3.5005)


def scenes(folder: Path, **options: Any) -> EmbeddedScenes:
    settings = {"num_scenes": 1, "views_per_scene": 3, "size": (16, 16), "progress": False}
    return EmbeddedScenes(mesh_dir=folder, cache_dir=folder / "cache", **{**settings, **options})


def test_a_mesh_of_which_nothing_is_seen_is_named_and_not_cached(tmp_path: Path) -> None:
    trimesh.creation.box((1e-5, 1e-5, 1)).export(tmp_path / "needle.ply")
    with pytest.raises(DataError, match=r"needle.ply: nothing of the mesh is seen in any of its 3 views of 16x16"):
        scenes(tmp_path)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_nearly_empty_views_are_told(tmp_path: Path) -> None:
    trimesh.creation.box((0.004, 0.004, 1)).export(tmp_path / "wire.ply")
    with pytest.warns(UserWarning, match=r"wire.ply: the mesh covers 0\.\d+% of its views, which are nearly empty"):
        scenes(tmp_path, size=(128, 128))


def test_hidden_files_are_no_meshes(tmp_path: Path) -> None:
    (tmp_path / "__MACOSX").mkdir()
    for name in ("o0.glb", "._o0.glb", ".hidden.ply", "__MACOSX/._o0.glb"):
        (tmp_path / name).touch()
    assert find_meshes(tmp_path) == [tmp_path / "o0.glb"]
