"""The scenes that are inspected: which views are compared, and their colors.

Axes: F views of a scene, P ordered pairs of them, H W image pixels, N tokens of a view.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.errors import DataError
from cameo.geometry import cell_centres
from cameo.geometry.depth import is_measured, read_depth
from cameo.inspection.readings import SHIFTS
from cameo.scenes.views import LazySource, SceneSource, Views, as_lazy, images_to_float

__all__ = ["InspectedScene", "at_grid", "choose_pairs", "inspected_scenes"]

# Fewest views among which one may belong to another frame: with fewer, most pairs would be the same again.
LEAST_FRAMES = 4


@dataclass(frozen=True)
class InspectedScene:
    """The views of a scene that are compared, and their neighbors in time.

    - `views`: those that were loaded, as they were handed over but for depth, which is 0 without a measurement.
    - `pairs` `[P, 2]`: ordered pairs of views, by their numbers in the scene; the second half holds those of the first
      the other way round.
    - `place` `[F]`: where a view of the scene is in `views`; 0 for those that were not loaded.
    - `token_grid`: rows and columns of the tokens.
    - `colors` `[C, 3, h, w]`: the images of `views`, at most two pixels per token along each side.
    - `has_neighbors`: whether `views` holds the neighbors too, so that one of images, depth and poses may be found to
      be of another frame.
    """

    views: Views
    pairs: Tensor
    place: Tensor
    token_grid: tuple[int, int]
    colors: Tensor
    has_neighbors: bool

    @property
    def centers(self) -> Tensor:
        """Token centers in pixels, `[N, 2]`."""
        return cell_centres(self.token_grid, self.views.size, dtype=torch.float32, device="cpu").flatten(0, 1)

    @functools.cached_property
    def token_depth(self) -> Tensor:
        """Depth of `views` at the token centers, `[C, N]`, NaN for none."""
        return read_depth(self.views.depth[None], self.centers.expand(1, len(self.views), -1, -1))[0]

    @functools.cached_property
    def token_colors(self) -> Tensor:
        """Colors of `views` at the token centers, `[C, N, 3]`."""
        return self.color_at(torch.arange(len(self.views)), self.centers.expand(len(self.views), -1, -1))

    def at(self, view: Tensor, shift: int = 0) -> Tensor:
        """Return where views are in `views`, or those which come `shift` later; after the last one comes the first."""
        return self.place[(view + shift) % len(self.place)]

    def color_at(self, view: Tensor, xy: Tensor) -> Tensor:
        """Colors `[P, M, 3]` of `views` number `[P]` at pixels `[P, M, 2]`, averaged over about half a token."""
        height, width = self.views.size
        grid = xy / torch.tensor([width, height]) * 2 - 1
        found = F.grid_sample(
            self.colors[view], grid[:, None].nan_to_num(2.0), align_corners=False, padding_mode="border"
        )
        return found[:, :, 0].mT


def choose_pairs(count: int, most: int) -> Tensor:
    """Return at most `most` pairs of `count` views, `[P, 2]`, neighbors and views far apart alike.

    What the cameras say plays no part, since they may be wrong.

    Example:
        >>> choose_pairs(3, 8).tolist()
        [[0, 1], [0, 2], [1, 2]]
        >>> choose_pairs(100, 4).tolist()
        [[0, 1], [0, 4], [0, 16], [0, 64]]
    """
    if count * (count - 1) // 2 <= most:
        return torch.tensor(list(itertools.combinations(range(count), 2)), dtype=torch.int64).view(-1, 2)
    gaps = [2**power for power in range(count.bit_length()) if 2**power <= 0.7 * count]
    gaps = gaps[:: -(-len(gaps) // most)]
    starts = (torch.linspace(0, count - 1 - gap, most // len(gaps)).long() for gap in gaps)
    pairs = torch.cat([torch.stack([start, start + gap], -1) for start, gap in zip(starts, gaps, strict=True)])
    return pairs.unique(dim=0)


def inspected_scenes(
    data: Views | SceneSource, *, scenes: int, pairs: int, token_grid: tuple[int, int], neighbors: bool
) -> list[InspectedScene]:
    """Choose scenes and pairs evenly from the data, and load their views, with neighboring views or without.

    Raises:
        DataError: if there is no scene, or none with two views.
    """
    source = as_lazy(_OneScene(data) if isinstance(data, Views) else data)
    if not len(source):
        raise DataError("data: expected at least one scene, got none")
    numbers = torch.linspace(0, len(source) - 1, min(scenes, len(source))).long().unique().tolist()
    counts = {number: len(source.cameras(number)) for number in numbers}
    usable = [number for number, count in counts.items() if count > 1]
    if not usable:
        key = source.cameras(numbers[0]).key
        raise DataError(f"scene {key}: has {counts[numbers[0]]} view; expected at least 2 to compare")
    most = max(1, pairs // len(usable))
    return [_inspected(source, number, most, token_grid, neighbors) for number in usable]


class _OneScene:
    """The views of one scene as a source."""

    def __init__(self, views: Views) -> None:
        self._views = views

    def __len__(self) -> int:
        return 1

    def views(self, scene: int) -> Views:
        """Return the views."""
        return self._views


def _inspected(
    source: LazySource, number: int, most: int, token_grid: tuple[int, int], neighbors: bool
) -> InspectedScene:
    count = len(source.cameras(number))
    pairs = choose_pairs(count, most)
    neighbors = neighbors and count >= LEAST_FRAMES
    shifts = torch.tensor([0, *SHIFTS] if neighbors else [0])
    needed = ((pairs.flatten()[:, None] + shifts) % count).unique()
    place = torch.zeros(count, dtype=torch.int64)
    place[needed] = torch.arange(len(needed))
    views = source.select(number, needed.tolist())
    depth = views.depth.float()
    views = replace(views, depth=torch.where(is_measured(depth), depth, 0.0))
    both = torch.cat([pairs, pairs.flip(1)])
    return InspectedScene(views, both, place, token_grid, _colors(views, token_grid), neighbors)


def at_grid(scene: InspectedScene, token_grid: tuple[int, int]) -> InspectedScene:
    """Return the same pairs of a scene at another token grid."""
    return replace(scene, token_grid=token_grid, colors=_colors(scene.views, token_grid))


def _colors(views: Views, token_grid: tuple[int, int]) -> Tensor:
    size = tuple(min(2 * tokens, pixels) for tokens, pixels in zip(token_grid, views.size, strict=True))
    return F.interpolate(images_to_float(views.images), size=size, mode="bilinear", antialias=True)
