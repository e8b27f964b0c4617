"""How well a reading of cameras and depth explains the views of a scene.

Axes: P ordered pairs of views, N tokens of a view, Q = 4 quarters of a view, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from einops import rearrange
from torch import Tensor

from cameo.geometry import camera_rays, transform
from cameo.geometry.cameras import invert_extrinsics
from cameo.geometry.depth import read_depth
from cameo.geometry.visibility import DEPTH_TOLERANCE, look_up
from cameo.inspection.readings import Reading, true_cameras
from cameo.inspection.scenes import InspectedScene

__all__ = ["Matched", "Score", "match_pairs", "score"]

# Pixels of all images that are in memory at a time.
PIXELS_PER_CALL = 2**22
# Random tokens of two views whose colors (0 to 1) differ by less have no colors to be compared.
LEAST_CONTRAST = 0.02


@dataclass(frozen=True)
class Matched:
    """Where the surface points of the tokens of one view lie in another, by a reading; of P ordered pairs.

    - `xy` `[P, N, 2]`: position in the other view in pixels, NaN behind the camera.
    - `measured`, `compared`, `visible`, `in_front` `[P, N]`: whether the token has depth; the other view has depth
      where the point falls; the point lies on that surface; or in front of it, where the view would show it instead.
    - `difference` `[P, N]`: mean difference of the two colors, in [0, 1].
    - `random` `[P]`: that of random tokens of the two views which have depth, NaN for none.
    """

    xy: Tensor
    measured: Tensor
    compared: Tensor
    visible: Tensor
    in_front: Tensor
    difference: Tensor
    random: Tensor


@dataclass(frozen=True)
class Score:
    """What a reading explains in each quarter of each pair, `[P, Q]` each, as numbers of tokens.

    - `measured`, `compared`, `visible`, `in_front`: as in `Matched`.
    - `agreement`: the sum over visible tokens of 1 minus their color difference in units of that of random tokens; 0 on
      average for matches that are wrong, and where there are no colors to be compared.
    - `difference`, `random`: sums over visible tokens of their color differences, and of those of random tokens.
    """

    measured: Tensor
    compared: Tensor
    visible: Tensor
    in_front: Tensor
    agreement: Tensor
    difference: Tensor
    random: Tensor

    @staticmethod
    def of_all(parts: Sequence[Score]) -> Score:
        """Join the pairs of several scenes."""
        return Score(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Score)))

    @property
    def quality(self) -> Tensor:
        """What a reading explains of each quarter of each pair, in [-1, 2] up to noise; NaN without depth.

        The share of tokens with a match, once for their depth and once for their colors, less the share of tokens
        whose point would hide what the other view shows.
        """
        explained = self.visible + self.agreement - self.in_front
        return torch.where(self.measured > 0, explained / self.measured.clamp(min=1), torch.nan)

    @property
    def matched_share(self) -> float:
        """Share of the tokens with depth that have a match, in [0, 1]; NaN without depth."""
        return _ratio(self.visible, self.measured)

    @property
    def in_front_share(self) -> float:
        """Share of the compared points that lie in front of the surface which the other view shows; NaN for none."""
        return _ratio(self.in_front, self.compared)

    @property
    def color_ratio(self) -> float:
        """Color difference of matches over that of random tokens; about 1 for wrong matches, NaN without contrast."""
        return _ratio(self.difference, self.random)


def _ratio(above: Tensor, below: Tensor) -> float:
    total = below.sum().item()
    return above.sum().item() / total if total else float("nan")


@torch.no_grad()
def match_pairs(scene: InspectedScene, reading: Reading, pairs: Tensor | None = None) -> Matched:
    """Project the surface points of each first view of ordered pairs `[P, 2]` into the second one, by a reading.

    `pairs`: None takes those of the scene.
    """
    pairs = scene.pairs if pairs is None else pairs
    height, width = scene.views.size
    step = max(1, PIXELS_PER_CALL // (2 * height * width))
    parts = [_match(scene, reading, chunk) for chunk in pairs.split(step)]
    return Matched(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Matched)))


def _match(scene: InspectedScene, reading: Reading, pairs: Tensor) -> Matched:
    views = scene.views
    intrinsics, extrinsics = true_cameras(reading, views.intrinsics, views.extrinsics, views.size)
    late = {name: reading.shift if name == reading.late else 0 for name in ("poses", "depth", "images")}
    lens, pose, image, surface = (
        [scene.at(view, shift) for view in pairs.T] for shift in (0, late["poses"], late["images"], late["depth"])
    )

    def z_depth(depth: Tensor, rays: Tensor) -> Tensor:
        return depth / rays.norm(dim=-1) if reading.ray_length else depth

    def surface_at(xy: Tensor, _: Tensor) -> Tensor:
        depth = read_depth(views.depth[surface[1]][:, None], xy)
        return z_depth(depth, camera_rays(xy[:, 0], intrinsics[lens[1]][None])[0][:, None])

    rays = camera_rays(scene.centers, intrinsics[lens[0]][None])[0]
    here = z_depth(scene.token_depth[surface[0]], rays)
    relative = (extrinsics[pose[1]] @ invert_extrinsics(extrinsics[pose[0]])).float()
    points = transform((rays * here[..., None])[:, None], relative[:, None])
    seen = look_up(points, intrinsics[lens[1]][:, None], surface_at, DEPTH_TOLERANCE)
    xy, z, depth, visible = (tensor[:, 0] for tensor in seen)
    colors = scene.token_colors[image[0]]
    # The same order for all pairs and readings, so that differences between readings are not those of the order.
    order = torch.randperm(len(scene.centers), generator=torch.Generator().manual_seed(0))
    both = here.isfinite() & scene.token_depth[surface[1]][:, order].isfinite()
    apart = torch.where(both, (colors - scene.token_colors[image[1]][:, order]).abs().mean(-1), 0.0)
    return Matched(
        xy=xy,
        measured=here.isfinite(),
        compared=depth.isfinite() & z.isfinite(),
        visible=visible,
        in_front=z < (1 - DEPTH_TOLERANCE) * depth,
        difference=(colors - scene.color_at(image[1], xy)).abs().mean(-1),
        random=apart.sum(-1) / both.sum(-1),
    )


def score(scenes: Sequence[InspectedScene], reading: Reading) -> Score:
    """Score a reading on all pairs of some scenes."""
    return Score.of_all([_score(scene, match_pairs(scene, reading)) for scene in scenes])


def _score(scene: InspectedScene, found: Matched) -> Score:
    random = torch.where(found.random > LEAST_CONTRAST, found.random, torch.nan)[:, None]
    with_colors = found.visible & random.isfinite()

    def count(tokens: Tensor, value: Tensor | float = 1.0) -> Tensor:
        values = torch.where(tokens, value, 0.0)
        rows, columns = scene.token_grid
        grid = rearrange(values, "p (h w) -> p h w", h=rows, w=columns)
        parts = [half for rows_half in grid.tensor_split(2, 1) for half in rows_half.tensor_split(2, 2)]
        return torch.stack([part.sum((1, 2)) for part in parts], -1)

    return Score(
        measured=count(found.measured),
        compared=count(found.compared),
        visible=count(found.visible),
        in_front=count(found.in_front & found.compared),
        agreement=count(with_colors, 1 - found.difference / random),
        difference=count(with_colors, found.difference),
        random=count(with_colors, random.expand_as(found.difference)),
    )
