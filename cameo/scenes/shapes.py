"""Simple solids with textures of their own, joined to a scene for ray casting.

Axes: T triangles, M surface points.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cameo.scenes.rendering import Surface, TriangleScene, dot
from cameo.scenes.textures import Texture, random_palette, random_texture

__all__ = ["SceneBuilder", "unit_shape"]

Array = np.ndarray


@lru_cache(maxsize=16)
def unit_shape(name: str) -> tuple[Array, Array]:
    """Corners and corner normals `[T, 3, 3]` of a shape that fills the box [-0.5, 0.5]^3 as far as it can."""
    import trimesh.creation as creation

    mesh = {
        "box": lambda: creation.box((1, 1, 1)),
        "sphere": lambda: creation.icosphere(subdivisions=2, radius=0.5),
        "cylinder": lambda: creation.cylinder(radius=0.5, height=1.0, sections=28),
        "capsule": lambda: creation.capsule(height=0.5, radius=0.25, count=(12, 16)),
        "torus": lambda: creation.torus(0.35, 0.15, major_sections=24, minor_sections=10),
        "cone": lambda: creation.cone(radius=0.5, height=1.0, sections=28),
    }[name]()
    low, high = mesh.bounds
    corners = ((np.asarray(mesh.vertices) - (low + high) / 2) / (high - low))[np.asarray(mesh.faces)]
    flat = np.repeat(np.asarray(mesh.face_normals)[:, None], 3, axis=1)
    smooth = np.asarray(mesh.vertex_normals)[np.asarray(mesh.faces)]
    # Caps of cylinders keep their edge: corner normals far from the face's are replaced by the face's.
    keep = (smooth * flat).sum(-1, keepdims=True) > 0.8
    return corners, np.where(keep, smooth, flat)


class SceneBuilder:
    """Collects placed shapes, each with its own texture.

    Example:
        >>> build = SceneBuilder(np.random.default_rng(0))
        >>> build.add("box", center=np.zeros(3), extent=np.array([1.0, 2.0, 2.0]))
        >>> build.fit(radius=3.0)  # the corners of the box were 1.5 from its center
        >>> build.scene(light=np.array([0.0, 0.0, 9.0])).corners.reshape(-1, 3).max(0)
        array([1., 2., 2.])
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.palette = random_palette(rng)
        self.corners: list[Array] = []
        self.normals: list[Array] = []
        self.textures: list[Texture] = []

    def add(
        self,
        shape: str,
        center: Array,
        extent: Array,
        *,
        turn: float = 0.0,
        rotation: Array | None = None,
        texture: Texture | None = None,
    ) -> None:
        """Place a unit shape scaled to `extent` at `center`, turned by `rotation` `[3, 3]` if it is given.

        Otherwise it is turned about the vertical by `turn` radians.
        """
        corners, normals = unit_shape(shape)
        if rotation is None:
            cos, sin = np.cos(turn), np.sin(turn)
            rotation = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        self.corners.append((corners * extent) @ rotation.T + center)
        scaled = normals / extent
        scaled /= np.linalg.norm(scaled, axis=-1, keepdims=True)
        self.normals.append(scaled @ rotation.T)
        self.textures.append(texture or self.texture())

    def texture(self, **options: object) -> Texture:
        """Draw a texture from the scene's palette; options as of `random_texture`."""
        return random_texture(self.rng, self.palette, **options)  # type: ignore[arg-type]

    def fit(self, radius: float) -> None:
        """Center the shapes' bounding box at the origin and scale them until the farthest corner is `radius` away."""
        points = np.concatenate(self.corners).reshape(-1, 3)
        center = (points.min(0) + points.max(0)) / 2
        scale = radius / np.linalg.norm(points - center, axis=-1).max()
        self.corners = [(corners - center) * scale for corners in self.corners]

    def scene(self, light: Array) -> TriangleScene:
        """Return the scene of all shapes, lit by a lamp at `light` `[3]`."""
        counts = [len(corners) for corners in self.corners]
        # Sixteen bits, which are sorted several times faster than 64 in `_shade`.
        material = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
        scene = TriangleScene(
            np.concatenate(self.corners), np.concatenate(self.normals), lambda surface: surface.points
        )
        scene.color = lambda surface: _shade(scene, surface, material, self.textures, light)
        return scene


def _shade(scene: TriangleScene, surface: Surface, material: Array, textures: list[Texture], light: Array) -> Array:
    """Texture times mild Lambert shading by a lamp fixed in the world, with shadows: equal in every view."""
    owner = material.take(surface.triangles)
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(len(textures) + 1))
    colors = np.empty((len(owner), 3), dtype=np.float32)
    for index, texture in enumerate(textures):
        rows = order[bounds[index] : bounds[index + 1]]
        if len(rows):
            colors[rows] = texture(surface.points.take(rows, 0))
    start = surface.points + np.float32(2e-3) * surface.normals
    toward = light.astype(np.float32) - start
    facing = dot(surface.normals, toward) / np.sqrt(dot(toward, toward))
    lit = facing > 0.0
    lit[lit] = ~scene.occluded(start[lit], toward[lit])
    return colors * (0.58 + 0.5 * facing * lit)[:, None].astype(np.float32)
