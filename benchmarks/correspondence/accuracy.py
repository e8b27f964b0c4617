"""Measure correspondence against analytic geometry.

Rooms with one or two spheres, seen by four cameras on an arc of 60 to 90 degrees. The truth is exact: the
surface point on the ray through a token's centre, visible in another view if it lies inside the frame and a
ray from that camera towards it hits nothing before. A match is false if its point is not visible in the other
view, or if it names a token farther than one token from the one in which the point lands.

    python -m benchmarks.correspondence.accuracy    # prints the tables, writes the .md beside this file
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from cameo.correspondence import DEPTH_TOLERANCE, Correspondence
from cameo.files import write_atomically
from cameo.geometry import cell_centres, pixel_grid, project, unproject
from cameo.tables import markdown_table

HALF_ROOM = torch.tensor([3.0, 1.5, 3.0], dtype=torch.float64)
NUM_VIEWS = 4


@dataclass(frozen=True)
class Room:
    """A box room of 6 x 3 x 6 units centred at the origin (y down) with spheres, and cameras inside.

    Attributes:
        spheres: ``[S, 4]`` centre and radius.
        intrinsics: ``[1, V, 3, 3]`` in units of the image side; scale by its pixels.
        extrinsics: ``[1, V, 4, 4]`` world-to-camera.
    """

    spheres: Tensor
    intrinsics: Tensor
    extrinsics: Tensor

    def intrinsics_at(self, pixels: int) -> Tensor:
        """Intrinsics for a square image of this side."""
        return self.intrinsics * torch.tensor([pixels, pixels, 1], dtype=torch.float64)[:, None]

    def hit(self, origin: Tensor, direction: Tensor) -> Tensor:
        """How many lengths of ``direction [..., 3]`` it is from ``origin`` to the first surface."""
        # From inside a box the way out is the nearest of the three walls ahead.
        ahead = torch.where(direction >= 0, HALF_ROOM, -HALF_ROOM)
        steps = torch.where(direction.abs() > 1e-12, (ahead - origin) / direction, torch.inf)
        first = steps.amin(-1)
        for sphere in self.spheres:
            centre, radius = sphere[:3], sphere[3]
            a = direction.square().sum(-1)
            b = (direction * (origin - centre)).sum(-1)
            c = (origin - centre).square().sum(-1) - radius**2
            root = b.square() - a * c
            near = (-b - root.clamp(min=0).sqrt()) / a
            first = torch.where((root > 0) & (near > 0) & (near < first), near, first)
        return first

    def trace(self, xy: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
        """Surface points ``[1, V, M, 3]`` and z-depth ``[1, V, M]`` seen at pixel positions ``[M, 2]``."""
        homogeneous = torch.cat([xy, torch.ones_like(xy[:, :1])], dim=-1)
        in_camera = torch.linalg.solve(self.intrinsics_at(pixels)[:, :, None], homogeneous[None, None, ..., None])
        rotation = self.extrinsics[..., :3, :3]
        origin = self.origins()[:, :, None]
        direction = (rotation.mT[:, :, None] @ in_camera).squeeze(-1)
        depth = self.hit(origin, direction)  # the camera-frame ray has z = 1
        return origin + depth[..., None] * direction, depth

    def origins(self) -> Tensor:
        """Camera centres ``[1, V, 3]``."""
        return -(self.extrinsics[..., :3, :3].mT @ self.extrinsics[..., :3, 3:]).squeeze(-1)

    def depth(self, pixels: int) -> Tensor:
        """Exact z-depth at the pixel centres, ``[1, V, 1, H, W]``."""
        grid = pixel_grid(pixels, pixels, dtype=torch.float64, device="cpu").flatten(0, 1)
        return self.trace(grid, pixels)[1].unflatten(-1, (pixels, pixels))[:, :, None]


def make_room(seed: int) -> Room:
    """Build a random room.

    Example:
        >>> make_room(0).extrinsics.shape
        torch.Size([1, 4, 4, 4])
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, dtype=torch.float64, generator=generator)

    spheres = []
    for number in range(1 + seed % 2):
        radius = uniform(0.3, 0.7, 1)
        # The first one stands near the middle, so that it hides something from every view.
        reach = 0.4 if number == 0 else 1.0
        spheres.append(torch.cat([uniform(-reach, reach, 1), uniform(-0.5, 0.8, 1), uniform(-reach, reach, 1), radius]))
    span, start = uniform(60, 90, 1).deg2rad(), uniform(0, 360, 1).deg2rad()
    angle = start + span * torch.linspace(0, 1, NUM_VIEWS, dtype=torch.float64)
    distance = uniform(2.0, 2.8, NUM_VIEWS)
    origin = torch.stack([distance * angle.sin(), uniform(-1.1, 0.5, NUM_VIEWS), -distance * angle.cos()], dim=-1)
    target = uniform(-0.3, 0.3, NUM_VIEWS, 3)
    forward = torch.nn.functional.normalize(target - origin, dim=-1)
    down = torch.tensor([0.0, 1, 0], dtype=torch.float64).expand(NUM_VIEWS, 3)
    right = torch.nn.functional.normalize(torch.linalg.cross(down, forward), dim=-1)
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=-2)
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(1, NUM_VIEWS, 1, 1)
    extrinsics[0, :, :3, :3] = rotation
    extrinsics[0, :, :3, 3] = -(rotation @ origin[..., None]).squeeze(-1)
    intrinsics = torch.tensor([[0.9, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]], dtype=torch.float64)
    return Room(torch.stack(spheres), intrinsics.expand(1, NUM_VIEWS, 3, 3), extrinsics)


def true_match(room: Room, pixels: int, tokens: int) -> Tensor:
    """Exact correspondence ``[1, V, V, N]`` on a grid of ``tokens`` x ``tokens``, -1 where not visible."""
    centres = cell_centres((tokens, tokens), (pixels, pixels), dtype=torch.float64, device="cpu").flatten(0, 1)
    points = room.trace(centres, pixels)[0]
    index = torch.full((1, NUM_VIEWS, NUM_VIEWS, tokens * tokens), -1)
    for i in range(NUM_VIEWS):
        seen = points[:, i : i + 1].expand(-1, NUM_VIEWS, -1, -1)
        xy, z = project(seen, room.intrinsics_at(pixels), room.extrinsics)
        origin = room.origins()[:, :, None]
        reached = room.hit(origin, seen - origin) > 1 - 1e-9
        inside = ((xy >= 0) & (xy < pixels)).all(-1) & (z > 0)
        cell = (torch.where(inside[..., None], xy, 0) * (tokens / pixels)).long()
        index[:, i] = torch.where(inside & reached, cell[..., 1] * tokens + cell[..., 0], -1)
        index[:, i, i] = -1
    return index


@dataclass
class Score:
    """Counts over rooms; shares are properties."""

    visible: int = 0
    found: int = 0
    matches: int = 0
    near: int = 0
    exact: int = 0

    def add(self, index: Tensor, truth: Tensor, tokens: int) -> None:
        """Count one room."""
        rows = (index // tokens - truth // tokens).abs()
        columns = (index % tokens - truth % tokens).abs()
        matched, visible = index >= 0, truth >= 0
        near = matched & visible & (rows <= 1) & (columns <= 1)
        self.visible += int(visible.sum())
        self.found += int((matched & visible).sum())
        self.matches += int(matched.sum())
        self.near += int(near.sum())
        self.exact += int((near & (index == truth)).sum())

    @property
    def recall(self) -> float:
        """Share of the truly visible pairs that are matched to within one token."""
        return self.near / max(self.visible, 1)

    @property
    def false(self) -> float:
        """Share of the matches that are not visible or more than one token off."""
        return 1 - self.near / max(self.matches, 1)

    @property
    def on_token(self) -> float:
        """Share of the matches on exactly the true token."""
        return self.exact / max(self.matches, 1)


# From a room and its exact depth images to a correspondence on a grid of so many tokens squared.
Matcher = Callable[[Room, Tensor, int], Correspondence]


def by_depth(tolerance: float = DEPTH_TOLERANCE, noise: float = 0.0) -> Matcher:
    """Match by depth and cameras in single precision; ``noise`` is relative to the depth, per pixel."""

    def match(room: Room, depth: Tensor, tokens: int) -> Correspondence:
        if noise:
            generator = torch.Generator().manual_seed(1)
            depth = depth * (1 + noise * torch.randn(depth.shape, dtype=depth.dtype, generator=generator))
        return Correspondence.from_depth(
            depth.float(),
            room.intrinsics_at(depth.shape[-1]).float(),
            room.extrinsics.float(),
            token_grid=tokens,
            depth_tolerance=tolerance,
        )

    return match


def by_points(max_distance: float | None = None) -> Matcher:
    """Match by nearest neighbours of point maps in single precision."""

    def match(room: Room, depth: Tensor, tokens: int) -> Correspondence:
        points = unproject(depth, room.intrinsics_at(depth.shape[-1]), room.extrinsics)
        return Correspondence.from_point_maps(points.float(), token_grid=tokens, max_distance=max_distance)

    return match


def measure(matchers: Mapping[str, Matcher], pixels: int, tokens: int, seeds: Iterable[int]) -> dict[str, Score]:
    """Score matchers over the same rooms."""
    scores = {name: Score() for name in matchers}
    for seed in seeds:
        room = make_room(seed)
        truth, depth = true_match(room, pixels, tokens), room.depth(pixels)
        for name, matcher in matchers.items():
            scores[name].add(matcher(room, depth, tokens).index, truth, tokens)
    return scores


METHODS: dict[str, Matcher] = {
    "from_depth": by_depth(),
    "from_point_maps": by_points(),
    "from_point_maps, max_distance=0.2": by_points(0.2),
    "from_point_maps, max_distance=0.1": by_points(0.1),
}
COLUMNS = ("image", "tokens", "truly visible pairs", "found", "false", "on the exact token")


def row(name: str, pixels: int, tokens: int, score: Score) -> list[str]:
    """Return the cells of one row of a table."""
    shares = (f"{share:.2%}" for share in (score.recall, score.false, score.on_token))
    return [name, str(pixels), f"{tokens} x {tokens}", str(score.visible), *shares]


def main() -> None:
    """Print the tables and write them beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rooms", type=int, default=8, help="number of random rooms")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    began = time.perf_counter()
    methods = []
    for pixels, tokens in ((256, 32), (512, 32), (256, 16), (256, 8), (64, 8)):
        for name, score in measure(METHODS, pixels, tokens, range(options.rooms)).items():
            methods.append(row(name, pixels, tokens, score))
    tolerances = []
    settings = [(noise, share) for noise in (0.0, 0.01) for share in (0.005, 0.01, 0.02, 0.03, 0.05)]
    matchers = {f"{share:.1%}, {noise:.1%}": by_depth(share, noise) for noise, share in settings}
    for name, score in measure(matchers, 256, 32, range(options.rooms)).items():
        tolerances.append(row(name, 256, 32, score))
    lines = [
        "# Accuracy of correspondence",
        f"`python -m benchmarks.correspondence.accuracy --rooms {options.rooms}`, {date.today()}, "
        f"{platform.machine()} CPU with {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{time.perf_counter() - began:.0f} s.",
        f"{options.rooms} analytic rooms of 6 x 3 x 6 units with one or two spheres, {NUM_VIEWS} cameras on "
        "an arc of 60 to 90 degrees, all ordered pairs of views. *Found*: truly visible pairs matched "
        "to within one token. *False*: matches whose point the other view does not show, or that are more "
        "than one token off. `max_distance` is in units of the room. Goal for `from_depth`: found >= 95 %, "
        "false <= 1 %.",
        markdown_table(["method", *COLUMNS], methods),
        "`depth_tolerance` on exact depth, and on depth with independent relative noise per pixel (standard "
        f"deviation). The default is {DEPTH_TOLERANCE:.0%}: a larger one finds more on noisy sensors, a "
        "smaller one separates surfaces that nearly touch.",
        markdown_table(["depth_tolerance, noise of the depth", *COLUMNS], tolerances),
    ]
    text = "\n\n".join(lines) + "\n"
    print(text)
    write_atomically(options.out, text)


if __name__ == "__main__":
    main()
