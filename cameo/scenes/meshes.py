"""A folder of meshes as scenes: normalized objects seen from an orbit on a white background."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cameo.choices import MESH_SUFFIXES
from cameo.errors import DataError
from cameo.scenes.rendering import Surface, TriangleScene
from cameo.scenes.rooms import look_at, random_intrinsics
from cameo.scenes.textures import random_palette, random_texture

__all__ = ["find_meshes", "load_mesh", "random_orbit"]

Array = np.ndarray
# Fixed in the world, so that the shading of a point is the same in every view.
LIGHT_DIRECTION = np.array([0.4, -0.3, 0.87])


def find_meshes(folder: Path) -> list[Path]:
    """Return the .glb, .obj and .ply files below a folder in name order, without hidden ones.

    Raises `DataError` where the folder is absent or holds none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of meshes, found {'a file' if folder.exists() else 'nothing'}")
    meshes = (path for path in folder.rglob("*") if path.suffix.lower() in MESH_SUFFIXES)
    found = sorted(path for path in meshes if not any(part[0] == "." for part in path.relative_to(folder).parts))
    if not found:
        raise DataError(f"{folder}: no meshes found; looked for {', '.join(MESH_SUFFIXES)}, also in subfolders")
    return found


def load_mesh(path: Path, rng: np.random.Generator) -> TriangleScene:
    """Load a mesh, centered, with its longest side 1, and in the colors of its texture or vertices.

    glTF and OBJ have y up by convention, PLY has none and is taken as z up; the result has z up. A mesh
    without colors gets a procedural texture drawn from `rng`. Raises `DataError` that names the file.
    """
    import trimesh

    try:
        loaded = trimesh.load(path, force="mesh", process=False)
    except Exception as error:  # trimesh's readers raise whatever their format trips over
        raise DataError(f"{path}: cannot read the mesh ({type(error).__name__}: {error})") from error
    faces = np.asarray(getattr(loaded, "faces", np.zeros((0, 3), dtype=np.int64)))
    vertices = np.asarray(loaded.vertices, dtype=float)
    if not len(faces) or not np.isfinite(vertices).all() or np.ptp(vertices, axis=0).max() <= 0:
        raise DataError(f"{path}: expected a mesh with faces, finite vertices and an extent, got {len(faces)} faces")
    normals = np.asarray(loaded.vertex_normals, dtype=float)
    if path.suffix.lower() != ".ply":
        turn = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
        vertices, normals = vertices @ turn, normals @ turn
    low, high = vertices.min(0), vertices.max(0)
    vertices = (vertices - (low + high) / 2) / (high - low).max()
    paint = _painter(loaded, faces, rng)

    def color(surface: Surface) -> Array:
        # Normals of scanned meshes often point inward somewhere, so both sides are lit.
        facing = np.abs(surface.normals @ LIGHT_DIRECTION)
        return (paint(surface) * (0.6 + 0.4 * facing)[:, None]).astype(np.float32)

    return TriangleScene(vertices[faces], normals[faces], color)


def random_orbit(
    rng: np.random.Generator, count: int, size: tuple[int, int], *, scale: float = 1.0
) -> tuple[Array, Array]:
    """Draw cameras on a jittered orbit of a box of side `scale`: `(intrinsics [F, 3, 3], extrinsics [F, 4, 4])`.

    Example:
        >>> intrinsics, extrinsics = random_orbit(np.random.default_rng(0), 4, (64, 64))
        >>> extrinsics.shape
        (4, 4, 4)
    """
    intrinsics = random_intrinsics(rng, count, size)
    azimuth = rng.uniform(0, 2 * np.pi) + 2 * np.pi * (np.arange(count) + rng.uniform(-0.3, 0.3, count)) / count
    elevation = np.radians(rng.uniform(-5.0, 45.0, count))
    # The object's bounding sphere (radius 0.87 at most) fits the narrower side of the image.
    half_angle = np.arctan(0.5 * min(size) / intrinsics[0, 0, 0])
    radius = scale * rng.uniform(0.75, 0.95) / np.sin(half_angle) * rng.uniform(0.95, 1.05, count)
    flat = radius * np.cos(elevation)
    centers = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), radius * np.sin(elevation)], axis=-1)
    return intrinsics, look_at(centers, scale * rng.normal(0, 0.03, (count, 3)))


def _painter(mesh: Any, faces: Array, rng: np.random.Generator) -> Callable[[Surface], Array]:
    """Return what colors a surface: an image texture, vertex or face colors, else a procedural texture."""
    visual = mesh.visual
    if visual.defined and visual.kind == "texture" and visual.uv is not None:
        material = visual.material
        image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
        if image is not None:
            return _image_painter(np.asarray(image.convert("RGB")), np.asarray(visual.uv)[faces])
        plain = np.asarray(material.main_color[:3], dtype=np.float32) / 255.0
        return lambda surface: np.tile(plain, (len(surface.points), 1))
    if visual.defined and visual.kind == "vertex":
        corners = np.asarray(visual.vertex_colors[:, :3], dtype=np.float32)[faces] / 255.0
        return lambda surface: (surface.barycentric[:, None] @ corners[surface.triangles])[:, 0]
    if visual.defined and visual.kind == "face":
        plain_faces = np.asarray(visual.face_colors[:, :3], dtype=np.float32) / 255.0
        return lambda surface: plain_faces[surface.triangles]
    texture = random_texture(rng, random_palette(rng), cell=(0.08, 0.25))
    return lambda surface: texture(surface.points)


def _image_painter(image: Array, corners: Array) -> Callable[[Surface], Array]:
    """Look the nearest texel up; `corners` `[T, 3, 2]` are texture coordinates, v up, wrapped round at 1."""
    height, width = image.shape[:2]
    corners = corners.astype(np.float32)

    def paint(surface: Surface) -> Array:
        uv = np.mod((surface.barycentric[:, None] @ corners[surface.triangles])[:, 0], 1.0)
        column = np.minimum((uv[:, 0] * width).astype(np.int64), width - 1)
        row = np.minimum(((1.0 - uv[:, 1]) * height).astype(np.int64), height - 1)
        return image[row, column].astype(np.float32) / 255.0

    return paint
