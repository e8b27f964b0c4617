"""Ray casting of triangle meshes: exact z-depth at pixel centers, supersampled color.

Axes: F views, H W pixels, T triangles, M rays or surface points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cameo.geometry.cameras import camera_centers

__all__ = ["Surface", "TriangleScene", "cast_points", "cast_views", "dot", "render"]

Array = np.ndarray
# Rays per call: large enough to hide the call, small enough for the intermediate arrays to stay in cache.
RAYS_PER_CALL = 32768
# A ray goes on behind a hole by this much of its parameter, and gives up after so many holes.
HOLE_STEP = np.float32(1e-4)
MOST_HOLES = 64


@dataclass(frozen=True)
class Surface:
    """The points where rays meet the scene, float32: `points [M, 3]` in the world, unit `normals [M, 3]`.

    `triangles [M]` are the triangles met and `barycentric [M, 3]` the weights of their corners.
    """

    points: Array
    normals: Array
    triangles: Array
    barycentric: Array


@dataclass
class TriangleScene:
    """Triangles of one scene and how they look.

    - `corners` `[T, 3, 3]`: the three corners of each triangle, world units.
    - `corner_normals` `[T, 3, 3]`: unit normals at the corners, interpolated over the triangle.
    - `color`: maps a `Surface` to RGB `[M, 3]` in [0, 1]; it must not depend on the viewing direction, so
      that all views of a scene show the same color at the same point.
    - `opaque`: maps a `Surface` to bool `[M]`: where it is False the surface is cut out, and a ray goes on through it.
      None, the default, is a scene without holes.

    Example:
        >>> corners = np.array([[[-9.0, -9.0, 2.0], [9.0, -9.0, 2.0], [0.0, 9.0, 2.0]]])
        >>> scene = TriangleScene(corners, np.full((1, 3, 3), [0.0, 0.0, -1.0]), lambda s: s.points * 0)
        >>> z = scene.depth(np.zeros((1, 3)), np.array([[0.1, 0.0, 1.0]]))
        >>> float(z[0])
        2.0
    """

    corners: Array
    corner_normals: Array
    color: Callable[[Surface], Array]
    opaque: Callable[[Surface], Array] | None = None

    @cached_property
    def _embree(self) -> Any:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        scene = EmbreeScene()
        vertices = np.ascontiguousarray(self.corners.reshape(-1, 3), dtype=np.float32)
        TriangleMesh(scene, vertices, np.arange(len(vertices), dtype=np.int32).reshape(-1, 3))
        return scene

    @cached_property
    def _normals(self) -> tuple[Array, Array, Array]:
        """Normal at the first corner and its change to the second and to the third, `[T, 3]` each."""
        first, second, third = _single(self.corner_normals.transpose(1, 0, 2))
        return first, second - first, third - first

    @cached_property
    def _planes(self) -> tuple[Array, Array]:
        """Plane normal and its product with a point of the plane, per triangle."""
        edges = self.corners[:, 1:] - self.corners[:, :1]
        normal = np.cross(edges[:, 0], edges[:, 1])
        return normal, (normal * self.corners[:, 0]).sum(-1)

    def depth(self, origins: Array, directions: Array) -> Array:
        """Return the ray parameter `[M]` of the first surface that each ray meets, 0 if it meets none.

        The ray tracer works in float32 and only says which triangle is met; the parameter is the float64
        intersection with that triangle's plane.
        """
        if self.opaque is None:
            hit = np.asarray(self._embree.run(_single(origins), _single(directions)))
        else:
            hit = self._first_opaque(_single(origins), _single(directions))["primID"]
        normal, product = self._planes
        plane = normal.take(hit, 0)
        along = dot(plane, directions)
        along[along == 0.0] = 1e-30
        return np.where(hit >= 0, (product.take(hit) - dot(plane, origins)) / along, 0.0)

    def surface(self, origins: Array, directions: Array) -> tuple[Array, Surface]:
        """Return which rays meet a surface, `[M]` bool, and the surface at those rays."""
        origins, directions = _single(origins), _single(directions)
        hit = self._first_opaque(origins, directions)
        met = hit["primID"] >= 0
        return met, self._surface_at(origins, directions, hit, met)

    def _first_opaque(self, origins: Array, directions: Array) -> dict[str, Array]:
        """Return what the ray tracer says of the first surface that is not cut out, float32 and int32 `[M]` each."""
        hit: dict[str, Array] = self._embree.run(origins, directions, output=True)
        if self.opaque is None:
            return hit
        rays = np.arange(len(origins))
        for _ in range(MOST_HOLES):
            found = {name: hit[name][rays] for name in ("primID", "tfar", "u", "v")}
            met = found["primID"] >= 0
            opaque = self.opaque(self._surface_at(origins[rays], directions[rays], found, met))
            rays = rays[met][~opaque]
            if not len(rays):
                return hit
            begin = hit["tfar"][rays] + HOLE_STEP
            again = self._embree.run(origins[rays] + directions[rays] * begin[:, None], directions[rays], output=True)
            for name in ("primID", "u", "v"):
                hit[name][rays] = again[name]
            hit["tfar"][rays] = begin + again["tfar"]
        hit["primID"][rays] = -1
        return hit

    def _surface_at(self, origins: Array, directions: Array, hit: dict[str, Array], met: Array) -> Surface:
        """Return the surface where the rays `met` `[M]` bool meet it, as the ray tracer says in `hit`."""
        triangles = hit["primID"][met]
        points = origins.compress(met, 0) + directions.compress(met, 0) * hit["tfar"][met, None]
        second, third = hit["u"][met], hit["v"][met]
        barycentric = np.stack([1.0 - second - third, second, third], axis=-1)
        first, edge2, edge3 = self._normals
        # take() is several times faster than indexing with an array.
        normals = edge2.take(triangles, 0) * second[:, None] + edge3.take(triangles, 0) * third[:, None]
        normals += first.take(triangles, 0)
        normals /= np.maximum(np.sqrt(dot(normals, normals)), 1e-12)[:, None]
        return Surface(points, normals, triangles, barycentric)

    def occluded(self, origins: Array, directions: Array) -> Array:
        """Return `[M]` bool: whether anything, cut out or not, stands between each origin and origin + direction."""
        reach = np.ones(len(origins), dtype=np.float32)
        hit = self._embree.run(_single(origins), _single(directions), dists=reach, query="OCCLUDED")
        return np.asarray(hit) >= 0


def dot(first: Array, second: Array) -> Array:
    """Row-wise scalar product of two `[M, 3]` arrays; far faster than a sum over an axis of three."""
    return first[:, 0] * second[:, 0] + first[:, 1] * second[:, 1] + first[:, 2] * second[:, 2]


def _single(rays: Array) -> Array:
    return np.ascontiguousarray(rays, dtype=np.float32)


def _cells(size: tuple[int, int], grid: tuple[int, int]) -> Array:
    """Positions `[P, 3]` (x, y, 1) of the centers of `grid` cells over an image of `size`, row-major."""
    y = (np.arange(grid[0]) + 0.5) * (size[0] / grid[0])
    x = (np.arange(grid[1]) + 0.5) * (size[1] / grid[1])
    columns, rows = np.meshgrid(x, y)
    return np.stack([columns, rows, np.ones_like(rows)], axis=-1).reshape(-1, 3)


def cast_views(
    scene: TriangleScene,
    intrinsics: Array,
    extrinsics: Array,
    size: tuple[int, int],
    *,
    grid: tuple[int, int],
) -> Array:
    """Return the z-depth at the centers of a `grid` (rows, columns) over views of `size`, 0 = none.

    `intrinsics` `[F, 3, 3]`, `extrinsics` `[F, 4, 4]`; the result is `[F, rows, columns]` float64.

    Example:
        >>> corners = np.array([[[-9.0, -9.0, 2.0], [9.0, -9.0, 2.0], [0.0, 9.0, 2.0]]])
        >>> scene = TriangleScene(corners, np.full((1, 3, 3), [0.0, 0.0, -1.0]), lambda s: s.points * 0)
        >>> cast_views(scene, np.eye(3)[None], np.eye(4)[None], (1, 1), grid=(1, 2))
        array([[[2., 2.]]])
    """
    origins, directions = _all_rays(intrinsics, extrinsics, size, grid)
    return scene.depth(origins, directions).reshape(len(intrinsics), *grid)


def cast_points(
    scene: TriangleScene,
    intrinsics: Array,
    extrinsics: Array,
    size: tuple[int, int],
    *,
    grid: tuple[int, int],
) -> Array:
    """Return the surface points in world coordinates, `[F, rows, columns, 3]`, NaN = none; otherwise as `cast_views`.

    Example:
        >>> corners = np.array([[[-9.0, -9.0, 2.0], [9.0, -9.0, 2.0], [0.0, 9.0, 2.0]]])
        >>> scene = TriangleScene(corners, np.full((1, 3, 3), [0.0, 0.0, -1.0]), lambda s: s.points * 0)
        >>> cast_points(scene, np.eye(3)[None], np.eye(4)[None], (1, 1), grid=(1, 2)).tolist()
        [[[[0.5, 1.0, 2.0], [1.5, 1.0, 2.0]]]]
    """
    origins, directions = _all_rays(intrinsics, extrinsics, size, grid)
    depth = scene.depth(origins, directions)
    points = origins + directions * np.where(depth > 0, depth, np.nan)[:, None]
    return points.reshape(len(intrinsics), *grid, 3)


def _all_rays(
    intrinsics: Array, extrinsics: Array, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Array, Array]:
    """Rays of all views through the centers of `grid` cells, view by view, `[M, 3]` each.

    They are scaled so that their parameter is the z-depth.
    """
    pixels = _cells(size, grid)
    directions = [pixels @ (np.linalg.inv(k).T @ e[:3, :3]) for k, e in zip(intrinsics, extrinsics, strict=True)]
    origins = camera_centers(torch.tensor(extrinsics)).numpy()
    return np.repeat(origins, len(pixels), axis=0), np.concatenate(directions)


def render(
    scene: TriangleScene,
    intrinsics: Array,
    extrinsics: Array,
    size: tuple[int, int],
    *,
    supersampling: int = 2,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> tuple[Array, Array]:
    """Render all views of a scene: `(images [F, 3, H, W] uint8, depth [F, 1, H, W] float32)`.

    `intrinsics` `[F, 3, 3]` in pixels of `size` (H, W), `extrinsics` `[F, 4, 4]` world-to-camera. Depth is
    the z-depth of the ray through the pixel center, 0 where it meets nothing. Color is the mean over
    `supersampling`² rays per pixel; it is antialiased, depth never is.

    Example:
        >>> corners = np.array([[[-9.0, -9.0, 2.0], [9.0, -9.0, 2.0], [0.0, 9.0, 2.0]]])
        >>> scene = TriangleScene(corners, np.full((1, 3, 3), [0.0, 0.0, -1.0]), lambda s: s.points * 0)
        >>> intrinsics = np.array([[[4.0, 0.0, 2.0], [0.0, 4.0, 2.0], [0.0, 0.0, 1.0]]])
        >>> images, depth = render(scene, intrinsics, np.eye(4)[None], (4, 4))
        >>> images.shape, bool((depth == 2).all())
        ((1, 3, 4, 4), True)
    """
    height, width = size
    grid = (height * supersampling, width * supersampling)
    origins, directions = map(_single, _all_rays(intrinsics, extrinsics, size, grid))
    colors = np.empty((len(origins), 3), dtype=np.float32)
    colors[:] = background
    for start in range(0, len(origins), RAYS_PER_CALL):
        part = slice(start, start + RAYS_PER_CALL)
        met, surface = scene.surface(origins[part], directions[part])
        colors[part][met] = scene.color(surface)
    samples = colors.reshape(-1, height, supersampling, width, supersampling, 3)
    # One after the other: adding up along two axes of `samples` is slower.
    total = sum(samples[:, :, i, :, j] for i in range(supersampling) for j in range(supersampling))
    mean = total / supersampling**2
    images = np.rint(np.clip(mean, 0.0, 1.0) * 255.0).astype(np.uint8).transpose(0, 3, 1, 2)
    each = max(1, RAYS_PER_CALL // (height * width))  # views at once; float64 takes much memory
    parts = [slice(view, view + each) for view in range(0, len(intrinsics), each)]
    depth = [cast_views(scene, intrinsics[part], extrinsics[part], size, grid=size) for part in parts]
    return np.ascontiguousarray(images), np.concatenate(depth)[:, None].astype(np.float32)
