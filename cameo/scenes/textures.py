"""Procedural solid textures: color as a deterministic function of the surface point.

Patterns live in three dimensions, so that no mesh needs texture coordinates and every view sees the same
color at the same point. Axes: M surface points, P palette colors.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["PATTERNS", "Texture", "random_palette", "random_texture"]

Array = np.ndarray


def _hash(cells: Array, seed: int) -> Array:
    """Pseudo-random float32 in [0, 1) per integer lattice cell `[M, 3]`."""
    cells = cells.astype(np.int32).astype(np.uint32)
    mixed = cells[:, 0] * np.uint32(73856093) ^ cells[:, 1] * np.uint32(19349663)
    mixed ^= cells[:, 2] * np.uint32(83492791) ^ np.uint32(seed & 0xFFFFFFFF)
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return (mixed ^ (mixed >> np.uint32(16))).astype(np.float32) * np.float32(2.0**-32)


def _column(index: Array) -> Array:
    """Lattice cells `[M, 3]` that depend on one index only."""
    zero = np.zeros_like(index)
    return np.stack([index, zero, zero], axis=-1)


@dataclass(frozen=True)
class Texture:
    """One material: a pattern over `points @ frame + offset`, with coarse and fine variation on top.

    - `frame` `[3, 3]`: rotation times frequency (pattern units per meter).
    - `palette` `[P, 3]` RGB in [0, 1].
    - `directions` `[K, 3]`, `phases` `[K]`: plane waves that the patterns share.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> texture = random_texture(rng, random_palette(rng))
        >>> texture(np.zeros((5, 3))).shape
        (5, 3)
    """

    pattern: str
    frame: Array
    offset: Array
    palette: Array
    directions: Array
    phases: Array
    seed: int

    def __call__(self, points: Array) -> Array:
        """Return RGB `[M, 3]` float32 in [0, 1] at points `[M, 3]`."""
        local = points.astype(np.float32) @ self.frame + self.offset
        color = PATTERNS[self.pattern](self, local)
        # Coarse and fine tone keep equal cells of a pattern apart and give every scale something to match.
        tone = 1.0 + 0.22 * self.wave(local, 0, 0.35) * self.wave(local, 1, 0.5) + 0.07 * self.wave(local, 2, 1.3)
        return np.clip(color * tone[:, None], 0.0, 1.0)

    def wave(self, local: Array, index: int, frequency: float) -> Array:
        """Plane wave number `index` in [-1, 1] at `local` `[M, 3]`, about `frequency` periods per unit."""
        return np.sin(local @ (self.directions[index] * np.float32(2 * np.pi * frequency)) + self.phases[index])

    def waves(self, local: Array, *parts: tuple[int, float, float]) -> Array:
        """Sum of plane waves given as (index, frequency, weight)."""
        total = np.zeros(len(local), dtype=np.float32)
        for index, frequency, weight in parts:
            total += self.wave(local, index, frequency) * np.float32(weight)
        return total

    def gradient(self, value: Array) -> Array:
        """Color `[M, 3]` at `value` `[M]` in [0, 1] along the palette, linear in between."""
        scaled = np.clip(value, 0.0, 1.0) * np.float32(len(self.palette) - 1)
        lower = np.minimum(scaled.astype(np.int64), len(self.palette) - 2)
        share = (scaled - lower)[:, None]
        return self.palette.take(lower, 0) * (1.0 - share) + self.palette.take(lower + 1, 0) * share

    def pick(self, chance: Array) -> Array:
        """Palette color `[M, 3]` chosen by `chance` `[M]` in [0, 1), with a shade of its own."""
        color = self.palette.take((chance * len(self.palette)).astype(np.int64), 0)
        return color * (0.8 + 0.35 * np.mod(chance * 97.0, 1.0))[:, None]


def _waves(texture: Texture, local: Array) -> Array:
    warped = local + 0.18 * np.stack([texture.wave(local, k, 0.7) for k in (5, 6, 7)], axis=-1)
    total = texture.waves(warped, (3, 0.45, 1.0), (4, 0.8, 0.7), (8, 1.4, 0.45))
    return texture.gradient(0.5 + 0.3 * total)


def _bands(texture: Texture, local: Array) -> Array:
    height = texture.waves(local, (3, 0.3, 1.0), (4, 0.55, 0.7), (5, 0.9, 0.4))
    level = np.floor(height * 2.2)
    color = texture.pick(_hash(_column(level), texture.seed))
    return color * np.where(height * 2.2 - level < 0.14, 0.45, 1.0)[:, None]


def _mosaic(texture: Texture, local: Array) -> Array:
    cell = np.floor(local)
    inside = np.abs(local - cell - 0.5)
    grout = np.sort(inside, axis=-1)[:, 1] > 0.46
    return texture.pick(_hash(cell, texture.seed)) * np.where(grout, 0.55, 1.0)[:, None]


def _checker(texture: Texture, local: Array) -> Array:
    cell = np.floor(local)
    odd = np.mod(cell.sum(-1), 2.0) > 0.5
    shade = 0.8 + 0.4 * _hash(cell, texture.seed)
    return np.where(odd[:, None], texture.palette[0], texture.palette[-1]) * shade[:, None]


def _stripes(texture: Texture, local: Array) -> Array:
    position = local[:, 0] * 1.6 + 0.35 * texture.wave(local, 3, 0.4)
    return texture.pick(_hash(_column(np.floor(position)), texture.seed))


def _dots(texture: Texture, local: Array) -> Array:
    cell = np.floor(local)
    jitter = np.stack([_hash(cell, texture.seed + k) for k in (1, 2, 3)], axis=-1) - 0.5
    radius = 0.2 + 0.25 * _hash(cell, texture.seed + 4)
    distance = np.linalg.norm(local - cell - 0.5 - 0.3 * jitter, axis=-1)
    ground = texture.gradient(0.25 + 0.25 * texture.wave(local, 3, 0.3))
    return np.where((distance < radius)[:, None], texture.pick(_hash(cell, texture.seed)), ground)


def _bricks(texture: Texture, local: Array) -> Array:
    rows = local * np.array([1.0, 1.0, 2.2], dtype=np.float32)
    rows[:, :2] += 0.5 * np.mod(np.floor(rows[:, 2:]), 2.0)
    cell = np.floor(rows)
    inside = np.abs(rows - cell - 0.5)
    mortar = (np.sort(inside[:, :2], axis=-1)[:, 0] > 0.45) | (inside[:, 2] > 0.42)
    shade = 0.65 + 0.5 * _hash(cell, texture.seed)
    brick = texture.palette[0] * shade[:, None] + 0.15 * texture.pick(_hash(cell, texture.seed + 1))
    return np.where(mortar[:, None], texture.palette[-1] * 0.9, brick)


def _grain(texture: Texture, local: Array) -> Array:
    stretched = local * np.array([0.25, 1.6, 1.6], dtype=np.float32)
    rings = np.linalg.norm(stretched[:, 1:] + 0.25 * texture.wave(local, 3, 0.3)[:, None], axis=-1)
    plank = np.floor(local[:, 1] * 0.9)
    fine = 0.5 + 0.5 * np.sin(rings * 9.0 + 2.0 * texture.wave(stretched, 4, 1.0))
    shade = 0.7 + 0.45 * _hash(_column(plank), texture.seed)
    base = texture.palette[0] * 0.75 + texture.palette[1] * 0.25
    dark = base * 0.55
    return (dark + (base - dark) * fine[:, None]) * shade[:, None]


PATTERNS: dict[str, Callable[[Texture, Array], Array]] = {
    "waves": _waves,
    "bands": _bands,
    "mosaic": _mosaic,
    "checker": _checker,
    "stripes": _stripes,
    "dots": _dots,
    "bricks": _bricks,
    "grain": _grain,
}


def random_palette(rng: np.random.Generator, count: int = 7) -> Array:
    """Draw the colors of one scene `[count, 3]`: vivid, pastel, earthy, or one hue with accents.

    Example:
        >>> random_palette(np.random.default_rng(0)).shape
        (7, 3)
    """
    style = rng.choice(["vivid", "pastel", "earthy", "accent"])
    hue = rng.random()
    colors = []
    for index in range(count):
        if style == "vivid":
            hsv = (rng.random(), rng.uniform(0.5, 0.95), rng.uniform(0.45, 1.0))
        elif style == "pastel":
            hsv = (rng.random(), rng.uniform(0.15, 0.45), rng.uniform(0.7, 1.0))
        elif style == "earthy":
            hsv = (rng.uniform(0.02, 0.17), rng.uniform(0.2, 0.75), rng.uniform(0.3, 0.95))
        elif index < 2:
            hsv = ((hue + 0.5) % 1.0, rng.uniform(0.6, 0.95), rng.uniform(0.6, 1.0))
        else:
            hsv = ((hue + rng.uniform(-0.12, 0.12)) % 1.0, rng.uniform(0.05, 0.6), rng.uniform(0.2, 1.0))
        colors.append(colorsys.hsv_to_rgb(*(float(value) for value in hsv)))
    return np.array(colors, dtype=np.float32)


def random_rotation(rng: np.random.Generator) -> Array:
    """Draw an orthogonal matrix `[3, 3]`; half of them mirror."""
    matrix, triangle = np.linalg.qr(rng.normal(size=(3, 3)))
    return matrix * np.sign(np.diag(triangle))


def random_texture(
    rng: np.random.Generator,
    palette: Array,
    *,
    patterns: tuple[str, ...] = tuple(PATTERNS),
    cell: tuple[float, float] = (0.15, 0.45),
    upright: bool | None = None,
    bleach: float = 0.0,
) -> Texture:
    """Draw a texture with 3 to 5 colors of `palette` and pattern cells of `cell` meters.

    `upright=True` keeps the pattern's axes along the world's, False turns them at random, None draws either.
    `bleach` mixes the colors with a pale wall color by that share.
    """
    turned = rng.random() < 0.4 if upright is None else not upright
    rotation = random_rotation(rng) if turned else np.eye(3)
    directions = rng.normal(size=(9, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    chosen = rng.permutation(len(palette))[: int(rng.integers(3, 6))]
    colors = palette[chosen] * (1.0 - bleach) + np.array([0.85, 0.82, 0.76]) * bleach
    return Texture(
        pattern=str(rng.choice(patterns)),
        frame=(rotation / rng.uniform(*cell)).astype(np.float32),
        offset=rng.uniform(10.0, 90.0, size=3).astype(np.float32),
        palette=np.clip(colors * rng.uniform(0.8, 1.1), 0.02, 1.0).astype(np.float32),
        directions=directions.astype(np.float32),
        phases=rng.uniform(0.0, 2 * np.pi, size=9).astype(np.float32),
        seed=int(rng.integers(2**31)),
    )
