"""Random furnished rooms and the camera paths through them. World: meters, z up, floor at z = 0."""

from __future__ import annotations

import numpy as np

from cameo.scenes.rendering import TriangleScene, cast_views
from cameo.scenes.shapes import SceneBuilder
from cameo.scenes.textures import Texture, random_texture

__all__ = ["bare_room", "clearance", "look_at", "random_cameras", "random_intrinsics", "random_room"]

Array = np.ndarray
BOLD_PATTERNS = ("waves", "checker", "mosaic", "stripes", "bands")
SMOOTH_SHAPES = ("sphere", "cylinder", "capsule", "torus", "cone")


def random_room(rng: np.random.Generator) -> tuple[TriangleScene, Array]:
    """Build a furnished room; returns the scene and the room's extent `[3]` (x, y, z) in meters.

    Walls, floor and ceiling, furniture along the walls, a table or pile in the middle, things on top of them,
    pictures on the walls and a rug: every surface carries a texture.

    Example:
        >>> scene, extent = random_room(np.random.default_rng(0))
        >>> bool((extent[:2] >= 3).all() and (extent[:2] <= 5).all())
        True
    """
    build = SceneBuilder(rng)
    extent = np.array([rng.uniform(3.0, 5.0), rng.uniform(3.0, 5.0), rng.uniform(2.4, 3.0)])
    _add_shell(build, extent)
    tops = _add_furniture(build, extent)
    _add_things(build, tops)
    return build.scene(_lamp(rng, extent)), extent


def bare_room(rng: np.random.Generator) -> tuple[TriangleScene, Array]:
    """Build an empty room with bold patterns and one or two solids on the floor; `(scene, extent [3])` in meters.

    Each surface has colors of its own and cells of about a meter, so that at 32 pixels another view of the room is
    the only way to know a color. Room, solids, cameras and lamp differ from scene to scene.

    Example:
        >>> scene, extent = bare_room(np.random.default_rng(0))
        >>> bool((extent[:2] >= 3).all() and (extent[:2] <= 5).all())
        True
    """
    build = SceneBuilder(rng)
    extent = np.array([rng.uniform(3.0, 5.0), rng.uniform(3.0, 5.0), rng.uniform(2.4, 3.2)])
    middle = np.array([0.0, 0.0, extent[2] / 2])
    for axis in range(3):
        for side in (-1.0, 1.0):
            center, slab = middle.copy(), extent + 0.4
            center[axis] += side * (extent[axis] / 2 + 0.1)
            slab[axis] = 0.2
            build.add("box", center, slab, texture=_bold(rng, (0.8, 1.8)))
    for _ in range(int(rng.integers(1, 3))):
        size = rng.uniform(0.5, 1.0, 3)
        spot = np.array([*(rng.uniform(-0.25, 0.25, 2) * extent[:2]), size[2] / 2])
        shape = str(rng.choice(["box", "sphere", "cylinder"]))
        build.add(shape, spot, size, turn=rng.uniform(0, np.pi), texture=_bold(rng, (0.3, 0.7)))
    return build.scene(_lamp(rng, extent)), extent


def _bold(rng: np.random.Generator, cell: tuple[float, float]) -> Texture:
    return random_texture(rng, rng.random((5, 3)), patterns=BOLD_PATTERNS, cell=cell)


def _lamp(rng: np.random.Generator, extent: Array) -> Array:
    """Draw a place under the ceiling `[3]`."""
    return np.array([*(rng.uniform(-0.25, 0.25, 2) * extent[:2]), extent[2] - 0.3])


def _add_shell(build: SceneBuilder, extent: Array) -> None:
    """Floor, ceiling and walls as thick slabs outside the room, then pictures and a rug."""
    rng = build.rng
    floor = build.texture(
        patterns=("mosaic", "checker", "grain", "bricks", "dots"), cell=(0.25, 0.6), upright=True, bleach=0.2
    )
    build.add("box", np.array([0, 0, -0.1]), np.array([extent[0] + 0.4, extent[1] + 0.4, 0.2]), texture=floor)
    ceiling = np.array([extent[0] + 0.4, extent[1] + 0.4, 0.2])
    build.add("box", np.array([0, 0, extent[2] + 0.1]), ceiling, texture=build.texture(cell=(0.4, 0.9), bleach=0.5))
    for axis in (0, 1):
        for side in (-1.0, 1.0):
            center, slab = np.array([0.0, 0.0, extent[2] / 2]), extent + 0.4
            center[axis], slab[axis], slab[2] = side * (extent[axis] / 2 + 0.1), 0.2, extent[2]
            wall = build.texture(cell=(0.3, 0.8), upright=bool(rng.random() < 0.7), bleach=rng.uniform(0.1, 0.5))
            build.add("box", center, slab, texture=wall)
            for _ in range(int(rng.integers(1, 4))):
                frame = np.array([rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.9), rng.uniform(0.3, 0.8)])
                frame[axis] = rng.uniform(0.02, 0.06)
                spot = rng.uniform(-0.4, 0.4, 3) * extent
                spot[axis] = side * (extent[axis] - frame[axis]) / 2
                spot[2] = rng.uniform(1.0, extent[2] - 0.5)
                build.add("box", spot, frame, texture=build.texture(cell=(0.1, 0.3)))
    rug = np.array([rng.uniform(0.9, 2.0), rng.uniform(0.9, 2.0), 0.02])
    spot = np.array([*rng.uniform(-0.4, 0.4, 2), 0.01])
    build.add("box", spot, rug, turn=rng.uniform(0, np.pi), texture=build.texture(cell=(0.15, 0.35)))


def _add_furniture(build: SceneBuilder, extent: Array) -> list[Array]:
    """Cupboards along the walls and tables in the room; returns their tops (x, y, z, width, depth, turn)."""
    rng = build.rng
    tops = []
    for axis in (0, 1):
        for side in (-1.0, 1.0):
            for along in rng.permutation([-0.3, 0.0, 0.3])[: int(rng.integers(1, 3))]:
                body = np.array([rng.uniform(0.5, 1.1), rng.uniform(0.5, 1.1), rng.uniform(0.4, 1.3)])
                body[axis] = rng.uniform(0.3, 0.6)
                center = np.array([0.0, 0.0, body[2] / 2])
                center[axis] = side * (extent[axis] - body[axis]) / 2
                center[1 - axis] = along * extent[1 - axis] + rng.uniform(-0.1, 0.1)
                build.add("box", center, body)
                tops.append(np.array([center[0], center[1], body[2], body[0], body[1], 0.0]))
    for _ in range(int(rng.integers(1, 3))):
        top = np.array([rng.uniform(0.6, 1.2), rng.uniform(0.5, 0.9), rng.uniform(0.03, 0.08)])
        height, turn = rng.uniform(0.4, 0.8), rng.uniform(0, np.pi)
        spot = rng.uniform(-0.18, 0.18, 2) * extent[:2]
        build.add("box", np.array([*spot, height]), top, turn=turn)
        legs = build.texture()
        for corner in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            x, y = np.array(corner) * (top[:2] / 2 - 0.06)
            at = spot + np.array([np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y])
            build.add("box", np.array([*at, height / 2]), np.array([0.06, 0.06, height]), turn=turn, texture=legs)
        tops.append(np.array([*spot, height + top[2] / 2, top[0], top[1], turn]))
    for _ in range(int(rng.integers(3, 7))):
        tops.append(np.array([*(rng.uniform(-0.38, 0.38, 2) * extent[:2]), 0.0, 0.3, 0.3, 0.0]))
    return tops


def _add_things(build: SceneBuilder, tops: list[Array]) -> None:
    """Stand one to three things on every top, sometimes one on the other."""
    rng = build.rng
    for x, y, z, width, depth, turn in tops:
        for _ in range(int(rng.integers(1, 4))):
            u, v = rng.uniform(-0.35, 0.35) * width, rng.uniform(-0.35, 0.35) * depth
            spot = np.array([x + np.cos(turn) * u - np.sin(turn) * v, y + np.sin(turn) * u + np.cos(turn) * v])
            base = z
            for _ in range(2 if rng.random() < 0.3 else 1):
                shape = str(rng.choice(["box", *SMOOTH_SHAPES]))
                size = rng.uniform(0.14, 0.45)
                extent = size * rng.uniform(0.6, 1.3, 3)
                if shape != "box":
                    extent[1] = extent[0]
                if shape == "torus":
                    extent[2] = 0.35 * extent[0]
                center = np.array([*spot, base + extent[2] / 2])
                texture = build.texture(cell=(0.08, 0.25))
                build.add(shape, center, extent, turn=rng.uniform(0, np.pi), texture=texture)
                base += extent[2]
                if shape not in ("box", "cylinder"):
                    break


def look_at(centers: Array, targets: Array) -> Array:
    """World-to-camera matrices `[F, 4, 4]` (OpenCV axes) at `centers` that look at `targets`, both `[F, 3]`.

    The image is upright: world z points up in it. Looking straight up or down has no defined roll.

    Example:
        >>> matrix = look_at(np.array([[0.0, -2.0, 1.0]]), np.array([[0.0, 0.0, 1.0]]))[0]
        >>> np.round(matrix @ np.array([0.0, 0.0, 1.0, 1.0]), 6) + 0.0
        array([0., 0., 2., 1.])
    """
    forward = targets - centers
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, np.array([0.0, 0.0, 1.0]))
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    rotation = np.stack([right, np.cross(forward, right), forward], axis=1)
    matrix = np.tile(np.eye(4), (len(centers), 1, 1))
    matrix[:, :3, :3] = rotation
    matrix[:, :3, 3] = -np.einsum("fij,fj->fi", rotation, centers)
    return matrix


def random_intrinsics(rng: np.random.Generator, count: int, size: tuple[int, int]) -> Array:
    """One hand-held camera `[count, 3, 3]`: 50 to 65 degrees across, principal point near the center."""
    height, width = size
    focal = 0.5 * width / np.tan(np.radians(rng.uniform(50.0, 65.0)) / 2)
    center = np.array([width, height]) * (0.5 + rng.uniform(-0.015, 0.015, 2))
    matrix = np.array([[focal, 0.0, center[0]], [0.0, focal, center[1]], [0.0, 0.0, 1.0]])
    return np.tile(matrix, (count, 1, 1))


def random_cameras(
    rng: np.random.Generator, scene: TriangleScene, extent: Array, count: int, size: tuple[int, int]
) -> tuple[Array, Array]:
    """Draw a hand-held arc through a room: `(intrinsics [F, 3, 3], extrinsics [F, 4, 4])`.

    The camera moves on a jittered arc of 35 to 110 degrees about a point of the room and looks near it. Paths
    that run through furniture or press against a surface are drawn again.
    """
    intrinsics = random_intrinsics(rng, count, size)
    best, best_clearance = None, -np.inf
    for _ in range(30):
        extrinsics = look_at(*_random_arc(rng, extent, count))
        freely = clearance(scene, intrinsics, extrinsics, size)
        if freely > best_clearance:
            best, best_clearance = extrinsics, freely
        if freely > 1.0:
            break
    assert best is not None
    return intrinsics, best


def _random_arc(rng: np.random.Generator, extent: Array, count: int) -> tuple[Array, Array]:
    half = extent[:2] / 2 - 0.3
    angle, span = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(35.0, 110.0))
    azimuth = angle + span * (np.linspace(-0.5, 0.5, count) + rng.normal(0, 0.25 / count, count))
    side = np.array([np.cos(angle), np.sin(angle)])
    focus = np.array([*(-rng.uniform(0.0, 0.3) * half * side), rng.uniform(0.5, 1.2)])
    radius = rng.uniform(1.5, 2.6) * (1.0 + rng.normal(0, 0.06, count))
    height = rng.uniform(1.0, 1.9) + rng.normal(0, 0.12, count)
    centers = np.stack([focus[0] + radius * np.cos(azimuth), focus[1] + radius * np.sin(azimuth), height], axis=-1)
    centers[:, :2] = np.clip(centers[:, :2], -half, half)
    return centers, focus + rng.normal(0, 0.2, (count, 3))


def clearance(scene: TriangleScene, intrinsics: Array, extrinsics: Array, size: tuple[int, int]) -> float:
    """Return how freely cameras stand: above 1 is good, from the nearest and the median depth of a coarse image.

    A camera inside a solid, or whose view a close surface fills, stays below 1.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> scene, extent = bare_room(rng)
        >>> at_the_wall = look_at(np.array([[extent[0] / 2 - 0.1, 0.0, 1.0]]), np.array([[extent[0] / 2, 0.0, 1.0]]))
        >>> clearance(scene, random_intrinsics(rng, 1, (8, 8)), at_the_wall, (8, 8)) < 1
        True
    """
    coarse = cast_views(scene, intrinsics, extrinsics, size, grid=(6, 6)).reshape(len(intrinsics), -1)
    return float(min(np.quantile(coarse, 0.05, axis=1).min() / 0.45, np.median(coarse, axis=1).min() / 1.1))
