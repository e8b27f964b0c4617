"""The colors of a mesh's triangles: textures, plain colors, vertex and face colors, and what is cut out of them.

Axes: T triangles of a part, M points on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cameo.images.reading import to_rgba

__all__ = ["Material", "Spots", "material_of"]

Array = np.ndarray
# Of glTF: alpha from which on a point of a material with holes is there. It also divides materials that blend, since a
# point has one depth.
CUTOFF = 0.5


class Spots(Protocol):
    """Points on a part: `triangles [M]` and the weights `barycentric [M, 3]` of their corners."""

    @property
    def triangles(self) -> Array:
        """Number of the triangle of each point."""

    @property
    def barycentric(self) -> Array:
        """Weights of its corners."""


@dataclass(frozen=True)
class Material:
    """How a part looks: `color` gives sRGB `[M, 3]` in [0, 1] and `opaque` bool `[M]`, False where it is cut out.

    `opaque` is None where nothing is cut out.
    """

    color: Callable[[Any], Array]
    opaque: Callable[[Any], Array] | None = None


def material_of(mesh: Any, *, name: str, linear: bool) -> Material | None:
    """Return the material of a mesh of trimesh; None if it has no colors.

    Example:
        >>> import trimesh
        >>> box = trimesh.creation.box()
        >>> print(material_of(box, name="box", linear=False))
        None
        >>> box.visual.face_colors = [255, 0, 51, 255]
        >>> spots = type("Spots", (), {"triangles": np.array([0]), "barycentric": np.full((1, 3), 1 / 3)})
        >>> material_of(box, name="box", linear=False).color(spots).astype(float).round(2).tolist()
        [[1.0, 0.0, 0.2]]

    - A base color and vertex colors multiply a texture in linear light, as glTF has it. A texture of an OBJ file counts
      alone, since exporters write any diffuse color beside it. A texture without coordinates counts with its mean.
    - The numbers of a glTF file are linear light (`linear=True`); those of OBJ and PLY are sRGB.
    - `alphaMode` of glTF: OPAQUE ignores alpha; MASK cuts out what is below `alphaCutoff`; BLEND does so below 0.5,
      since each pixel has one depth. Alpha of OBJ and of vertex colors is ignored: it is often not meant.
    - The texel that a point falls into is taken, and coordinates are repeated beyond 0 and 1.

    Args:
        mesh: a `trimesh.Trimesh`.
        name: what errors call it.
        linear: whether plain colors are linear light.

    Raises:
        DataError: if a texture has no 8-bit colors.
    """
    visual, faces = mesh.visual, np.asarray(mesh.faces)
    kind = visual.kind if visual.defined else None
    if kind == "vertex":
        corners = _light(visual.vertex_colors, linear)[faces]
        return Material(lambda spots: _srgb(_interpolated(corners, spots)))
    if kind == "face":
        plain = _srgb(_light(visual.face_colors, linear))
        return Material(lambda spots: plain[spots.triangles])
    if kind == "texture":
        return _textured(visual, faces, name, linear)
    return None


def _textured(visual: Any, faces: Array, name: str, linear: bool) -> Material:
    material = visual.material
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    base = getattr(material, "baseColorFactor", None) if linear else material.main_color
    factor = np.ones(4, dtype=np.float32) if base is None else _numbers(base)
    if image is not None and not linear:
        factor = np.ones(4, dtype=np.float32)
    texels = np.full((1, 1, 4), 255, dtype=np.uint8) if image is None else to_rgba(image, f"{name}: its texture")
    corners = None if visual.uv is None else np.asarray(visual.uv, dtype=np.float32)[faces]
    if corners is None and image is not None:
        texels = np.rint(texels.reshape(1, -1, 4).mean(1, keepdims=True)).astype(np.uint8)
    colors = getattr(visual, "vertex_attributes", {}).get("color")
    shades = None if colors is None else _light(colors, linear)[faces]
    light = factor[:3] if linear else _linear(factor[:3])

    def texel(spots: Spots) -> Array:
        if corners is None or image is None:
            return np.broadcast_to(texels[0, 0], (len(spots.triangles), 4))
        return _nearest(texels, _interpolated(corners, spots))

    def color(spots: Spots) -> Array:
        found = texel(spots)[:, :3].astype(np.float32) / 255
        if shades is None and (light == 1).all():  # the texture's own bits
            return found
        product = _linear(found) * light
        return _srgb(product if shades is None else product * _interpolated(shades, spots))

    mode = getattr(material, "alphaMode", None)
    if mode not in ("MASK", "BLEND"):
        return Material(color)
    given = getattr(material, "alphaCutoff", None)
    cutoff = CUTOFF if mode == "BLEND" or given is None else float(given)
    return Material(color, lambda spots: texel(spots)[:, 3] / 255 * factor[3] >= cutoff)


def _nearest(texels: Array, uv: Array) -> Array:
    """Texels `[M, C]` under texture coordinates `[M, 2]`, v up, repeated beyond 0 and 1."""
    height, width = texels.shape[:2]
    uv = np.mod(uv, 1.0)
    column = np.minimum((uv[:, 0] * width).astype(np.int64), width - 1)
    row = np.minimum(((1.0 - uv[:, 1]) * height).astype(np.int64), height - 1)
    return texels[row, column]


def _interpolated(corners: Array, spots: Spots) -> Array:
    """Values `[M, C]` at points, of values at the corners of each triangle, `[T, 3, C]`."""
    return (spots.barycentric[:, None] @ corners[spots.triangles])[:, 0]


def _numbers(color: Any) -> Array:
    """A color as numbers in [0, 1], RGBA or RGB, float32."""
    color = np.asarray(color)
    return (color / np.iinfo(color.dtype).max if color.dtype.kind in "ui" else color).astype(np.float32)


def _light(colors: Any, linear: bool) -> Array:
    """Linear light `[..., 3]` of colors that are linear already, or sRGB."""
    numbers = _numbers(colors)[..., :3]
    return numbers if linear else _linear(numbers)


def _linear(srgb: Array) -> Array:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _srgb(light: Array) -> Array:
    light = np.clip(light, 0.0, 1.0)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055).astype(np.float32)
