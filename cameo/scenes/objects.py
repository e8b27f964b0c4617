"""Random objects: a few textured solids grown together, inside the unit sphere. World: z up.

They replace scanned or modeled objects where nothing is to be downloaded. Axes: T triangles.
"""

from __future__ import annotations

import numpy as np

from cameo.scenes.rendering import TriangleScene
from cameo.scenes.shapes import SceneBuilder, unit_shape
from cameo.scenes.textures import PATTERNS, random_palette, random_rotation, random_texture

__all__ = ["random_object"]

Array = np.ndarray
# Convex, so that the distance from the center to the surface is a minimum over planes.
SOLIDS = ("box", "sphere", "cylinder", "capsule", "cone")
# Share of the new part, from its center towards the old one, that lies inside the old one.
SUNK = 0.6


def random_object(rng: np.random.Generator) -> TriangleScene:
    """Build an object of 3 to 7 solids, each in a pattern and colors of its own, centered at the origin.

    Each solid is joined to an earlier one. The farthest corner lies on the unit sphere; the lamp stands above,
    outside it. The color of a point is the same in every view.

    Example:
        >>> scene = random_object(np.random.default_rng(0))
        >>> round(float(np.linalg.norm(scene.corners, axis=-1).max()), 6)
        1.0
    """
    build = SceneBuilder(rng)
    patterns = rng.permutation(list(PATTERNS))
    centers: list[Array] = []
    for part in range(int(rng.integers(3, 8))):
        shape = str(rng.choice(SOLIDS))
        size = rng.uniform(0.7, 1.0) if part == 0 else rng.uniform(0.4, 0.8)
        extent = size * rng.uniform(0.6, 1.3, 3)
        if shape != "box":
            extent[1] = extent[0]
        rotation = random_rotation(rng) if rng.random() < 0.5 else np.eye(3)
        rotation = rotation * np.linalg.det(rotation)  # without a mirror, which would turn the triangles inside out
        center = np.zeros(3)
        if part:
            # Half of the parts grow from the first: neither a chain nor a ball.
            parent = int(rng.integers(part)) if rng.random() < 0.5 else 0
            direction = rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            turned = (unit_shape(shape)[0] * extent) @ rotation.T
            reach = _distance_to_surface(build.corners[parent] - centers[parent], direction)
            center = centers[parent] + direction * (reach + (1 - SUNK) * _distance_to_surface(turned, -direction))
        texture = random_texture(rng, random_palette(rng, 4), patterns=(str(patterns[part]),), cell=(0.15, 0.4))
        build.add(shape, center, extent, rotation=rotation, texture=texture)
        centers.append(center)
    build.fit(radius=1.0)
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(3.0, 6.0)
    return build.scene(light=np.array([4.0 * np.cos(azimuth), 4.0 * np.sin(azimuth), height]))


def _distance_to_surface(corners: Array, direction: Array) -> float:
    """Distance along `direction` from the origin, which is inside, to the surface of a convex solid `[T, 3, 3]`."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    along, offset = normals @ direction, (normals * corners[:, 0]).sum(-1)
    ahead = along > 1e-12
    return float((offset[ahead] / along[ahead]).min())
