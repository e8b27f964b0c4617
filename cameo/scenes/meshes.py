"""A folder of meshes as scenes: normalized objects seen from an orbit on a white background."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cameo.choices import MESH_SUFFIXES
from cameo.errors import DataError
from cameo.files import open_plain
from cameo.images.materials import Material, material_of
from cameo.scenes.rendering import Surface, TriangleScene
from cameo.scenes.rooms import look_at, random_intrinsics
from cameo.scenes.textures import random_palette, random_texture

__all__ = ["find_meshes", "load_mesh", "random_orbit", "stray_triangles"]

Array = np.ndarray
# Fixed in the world, so that the shading of a point is the same in every view.
LIGHT_DIRECTION = np.array([0.4, -0.3, 0.87])
NO_CORNERS = np.zeros((0, 3, 3))
# Share of the surface at each end of each axis that may be stray, and the distance in sizes of the rest that makes it.
STRAY_SHARE = 0.001
STRAY_DISTANCE = 4.0


def find_meshes(folder: Path) -> list[Path]:
    """Return the .glb, .obj and .ply files below a folder in name order, without hidden ones.

    Hidden files are left out, among them the companions `._NAME` that macOS writes on other file systems.

    Raises `DataError` where the folder is absent or holds none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of meshes, found {'a file' if folder.exists() else 'nothing'}")
    files = (path for path in folder.rglob("*") if path.suffix.lower() in MESH_SUFFIXES)
    found = sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not found:
        raise DataError(f"{folder}: no meshes found; looked for {', '.join(MESH_SUFFIXES)}, also in subfolders")
    return found


def load_mesh(path: Path, rng: np.random.Generator) -> TriangleScene:
    """Load a mesh, centered, with its longest side 1, and each part in its own colors.

    glTF and OBJ have y up by convention, PLY has none and is taken as z up; the result has z up. The box is that of
    the triangles, whatever vertices the file has besides. Triangles far from all others, such as a speck at a hundred
    times the size of the object, are left out with a warning.

    The colors of a part are those of `cameo.images.materials`; a part without any gets a procedural texture drawn from
    `rng`, with a warning where other parts are colored or the file names materials that are not there.

    Raises:
        DataError: that names the file, if it cannot be read, or has no triangles, no extent or corners that are not
            finite.
    """
    placed = _read_parts(path)
    meshes = [mesh for mesh, _ in placed]
    corners = np.concatenate([_placed(mesh.vertices, pose)[mesh.faces] for mesh, pose in placed] or [NO_CORNERS])
    if not len(corners) or not np.isfinite(corners).all() or np.ptp(corners.reshape(-1, 3), axis=0).max() <= 0:
        raise DataError(f"{path}: expected a mesh with faces, finite vertices and an extent, got {len(corners)} faces")
    normals = np.concatenate([_turned(mesh.vertex_normals, pose)[mesh.faces] for mesh, pose in placed])
    if path.suffix.lower() != ".ply":
        turn = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
        corners, normals = corners @ turn, normals @ turn
    materials = [material_of(mesh, name=str(path), linear=path.suffix.lower() == ".glb") for mesh in meshes]
    _report_uncolored(path, materials)
    painted = _Painted.of([material or _pattern(rng) for material in materials], [len(mesh.faces) for mesh in meshes])
    if (stray := stray_triangles(corners)).any():
        warnings.warn(
            f"{path}: {stray.sum()} of {len(stray)} triangles lie far from all others, and are left out, since the "
            "rest of the mesh would be a few pixels beside them; remove them from the file",
            stacklevel=2,
        )
        corners, normals, painted = corners[~stray], normals[~stray], painted.kept(~stray)
    low, high = corners.min((0, 1)), corners.max((0, 1))
    corners = (corners - (low + high) / 2) / (high - low).max()

    def color(surface: Surface) -> Array:
        # Normals of scanned meshes often point inward somewhere, so both sides are lit.
        facing = np.abs(surface.normals @ LIGHT_DIRECTION)
        return (painted.color(surface) * (0.6 + 0.4 * facing)[:, None]).astype(np.float32)

    return TriangleScene(corners, normals, color, painted.opaque if painted.has_holes else None)


def stray_triangles(corners: Array) -> Array:
    """Find triangles `[T, 3, 3]` far from nearly all of the surface, bool `[T]`.

    They begin beyond the box of the others by several times its size, and have less than a hundredth of the surface.

    Example:
        >>> near = np.array([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
        >>> stray_triangles(np.concatenate([near, near + 0.5, near * 1e-3 + 300])).tolist()
        [False, False, True]
    """
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=-1)
    centers = corners.mean(1)
    inside = np.ones(len(corners), dtype=bool)
    for axis in range(3):
        order = np.argsort(centers[:, axis], kind="stable")
        share = np.cumsum(area[order])
        # The triangle on which a share of the surface ends belongs to the inner part, from both sides.
        first, last = np.searchsorted(share, share[-1] * np.array([STRAY_SHARE, 1 - STRAY_SHARE]))
        low, high = centers[order[[first, min(int(last), len(order) - 1)]], axis]
        inside &= (centers[:, axis] >= low) & (centers[:, axis] <= high)
    if not inside.any():
        return inside
    low, high = corners[inside].min((0, 1)), corners[inside].max((0, 1))
    room = STRAY_DISTANCE * (high - low).max()
    return ((corners > high + room) | (corners < low - room)).any(-1).all(-1)


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


@dataclass(frozen=True)
class _Painted:
    """The materials of all parts: of each triangle the number of its part, and its own number within the part."""

    materials: list[Material]
    part: Array
    within: Array

    @classmethod
    def of(cls, materials: list[Material], counts: list[int]) -> _Painted:
        """Join parts with so many triangles each."""
        within = np.concatenate([np.arange(count) for count in counts])
        return cls(materials, np.repeat(np.arange(len(counts)), counts), within)

    def kept(self, mask: Array) -> _Painted:
        """Leave triangles out, those where `mask` `[T]` is False."""
        return _Painted(self.materials, self.part[mask], self.within[mask])

    @property
    def has_holes(self) -> bool:
        """Whether anything is cut out of a part."""
        return any(material.opaque is not None for material in self.materials)

    def color(self, surface: Surface) -> Array:
        """Colors `[M, 3]` of a surface."""
        colors = np.empty((len(surface.triangles), 3), dtype=np.float32)
        for material, rows, of_part in self._by_part(surface):
            colors[rows] = material.color(of_part)
        return colors

    def opaque(self, surface: Surface) -> Array:
        """Whether a surface is there, bool `[M]`."""
        opaque = np.ones(len(surface.triangles), dtype=bool)
        for material, rows, of_part in self._by_part(surface):
            if material.opaque is not None:
                opaque[rows] = material.opaque(of_part)
        return opaque

    def _by_part(self, surface: Surface) -> Iterator[tuple[Material, Array, Surface]]:
        """Yield each part that is met, the rows of its points, and these with the part's own triangle numbers."""
        part = self.part.take(surface.triangles)
        order = np.argsort(part, kind="stable")
        bounds = np.searchsorted(part[order], np.arange(len(self.materials) + 1))
        for number in np.flatnonzero(np.diff(bounds)):
            rows = order[bounds[number] : bounds[number + 1]]
            of_part = Surface(
                points=surface.points[rows],
                normals=surface.normals[rows],
                triangles=self.within[surface.triangles[rows]],
                barycentric=surface.barycentric[rows],
            )
            yield self.materials[number], rows, of_part


def _pattern(rng: np.random.Generator) -> Material:
    """Draw a procedural texture for a part without colors."""
    texture = random_texture(rng, random_palette(rng), cell=(0.08, 0.25))
    return Material(lambda surface: texture(surface.points))


def _read_parts(path: Path) -> list[tuple[Any, Array]]:
    """Return the triangle meshes of a file, each with the pose `[4, 4]` that its scene gives it."""
    import trimesh
    from trimesh.resolvers import FilePathResolver

    class Beside(FilePathResolver):
        """Finds the materials and textures that a mesh names beside it, and nowhere else."""

        def get(self, name: str) -> bytes:
            root = path.parent.resolve()
            found = (root / name.strip()).resolve()
            if not found.is_relative_to(root):
                raise ValueError(f"names {name!r}, which leaves the folder {root}; put the file beside the mesh")
            with open_plain(found) as file:
                return file.read()

    try:
        with open_plain(path) as file:
            kind = path.suffix.lower().removeprefix(".")
            scene = trimesh.load(file, file_type=kind, resolver=Beside(str(path)), force="scene", process=False)
        # Sorted, since the order of the graph may differ from process to process.
        nodes = [scene.graph[node] for node in sorted(scene.graph.nodes_geometry)]
        # Not scene.dump(), whose copies lack the vertex colors of a part that has a material too.
        parts = [(scene.geometry[name], np.asarray(pose, dtype=float)) for pose, name in nodes]
    except Exception as error:  # trimesh's readers raise whatever their format trips over
        raise DataError(f"{path}: cannot read the mesh ({type(error).__name__}: {error})") from error
    return [(mesh, pose) for mesh, pose in parts if len(getattr(mesh, "faces", ()))]


def _placed(points: Array, pose: Array) -> Array:
    """Points `[N, 3]` at a pose `[4, 4]`."""
    return np.asarray(points, dtype=float) @ pose[:3, :3].T + pose[:3, 3]


def _turned(normals: Array, pose: Array) -> Array:
    """Unit normals `[N, 3]` at a pose; they follow its inverse transpose, and a flattened part keeps its own."""
    normals = np.asarray(normals, dtype=float)
    if abs(np.linalg.det(pose[:3, :3])) > 0:
        normals = normals @ np.linalg.inv(pose[:3, :3])
    return normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)


def _report_uncolored(path: Path, materials: list[Material | None]) -> None:
    """Warn of parts that are shown in a pattern although the file has, or names, colors."""
    without = sum(material is None for material in materials)
    named = path.suffix.lower() == ".obj" and without and b"usemtl" in path.read_bytes()
    if without and (named or without < len(materials)):
        reason = "the materials that it names were not found beside it" if named else "no colors are given for them"
        warnings.warn(
            f"{path}: {without} of {len(materials)} parts are shown in a made-up pattern, since {reason}", stacklevel=3
        )
