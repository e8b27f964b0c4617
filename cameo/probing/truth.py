"""The true matches that the attention of a layer should find, counted by sample and by angle between the views.

Axes: B samples, V views, N tokens per view, A groups of view pairs (such as angle bins), P matches, W distances. In a
layer that attends by row, column or cell, each of these is a sample of its own: B' = B, B h, B w or B h w. Where the
tokens of F views stand for those of another view (`TokenLayout(own_view_shows=)`), each of them is one too, with V = 2:
G = B F, elsewhere G = B, and B' is G times the rows, columns or cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence
from cameo.geometry import camera_rays, cell_centres
from cameo.geometry.cameras import at_least_float32, full_precision, invert_extrinsics
from cameo.geometry.depth import read_depth
from cameo.geometry.grids import TokenGrids, tokens_near

__all__ = ["ANGLE_BINS", "Pairs", "TrueMatches", "angle_bins", "surface_points", "view_angles"]

# Degrees between the optical axes of two views; an angle at a limit belongs to the bin above it.
ANGLE_BINS = ((0.0, 15.0), (15.0, 30.0), (30.0, 60.0), (60.0, 180.0))
# Rigs place their views at exactly these limits: an angle that differs by less than this, in degrees, is at the limit.
ROUNDING = 1e-3
# Distances between points that are held in memory at once.
BLOCK_ENTRIES = 1 << 22

Block = tuple[slice, slice, slice]  # samples, query views and query tokens
WHOLE: Block = (slice(0, None), slice(0, None), slice(0, None))


@full_precision
def view_angles(extrinsics: Tensor) -> Tensor:
    """Angle in degrees between the optical axes of every two views, `[B, V, V]` in float64.

    Example:
        >>> extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
        >>> extrinsics[0, 1, :3, :3] = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])  # turned by 90 degrees
        >>> view_angles(extrinsics)[0].round(decimals=6).tolist()
        [[0.0, 90.0], [90.0, 0.0]]

    Args:
        extrinsics: `[B, V, 4, 4]` world-to-camera, OpenCV axes.
    """
    axis = extrinsics[..., 2, :3].double().cpu()  # the camera's z axis in world coordinates
    first, second = torch.broadcast_tensors(axis[:, :, None], axis[:, None])
    sine = torch.linalg.cross(first, second).norm(dim=-1)
    return torch.rad2deg(torch.atan2(sine, (first * second).sum(-1)))


def angle_bins(extrinsics: Tensor) -> Tensor:
    """Number of the bin of `ANGLE_BINS` for every two views, int64 `[B, V, V]`.

    Example:
        >>> angle_bins(torch.eye(4).repeat(1, 2, 1, 1)).tolist()
        [[[0, 0], [0, 0]]]
    """
    limits = torch.tensor([low for low, _ in ANGLE_BINS[1:]], dtype=torch.float64)
    return torch.bucketize(view_angles(extrinsics) + ROUNDING, limits, right=True)


@full_precision
def surface_points(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor, token_grids: TokenGrids) -> Tensor:
    """Surface points at the token centers in world coordinates, `[B, V, N, 3]`; NaN without measurement.

    Example:
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 1, 3, 3)
        >>> depth = torch.full((1, 1, 1, 8, 8), 2.0)
        >>> surface_points(depth, intrinsics, torch.eye(4).expand(1, 1, 4, 4), ((1, 2),)).tolist()
        [[[[-0.5, 0.0, 2.0], [0.5, 0.0, 2.0]]]]

    Args:
        depth: `[B, V, 1, H, W]` z-depth.
        intrinsics: `[B, V, 3, 3]` in pixels of the depth image.
        extrinsics: `[B, V, 4, 4]` world-to-camera.
        token_grids: token grid `(h, w)` of each view; views with fewer than N tokens are padded with NaN.
    """
    depth = depth.to(at_least_float32(depth))
    points = depth.new_full((*depth.shape[:2], max(h * w for h, w in token_grids), 3), math.nan)
    poses = invert_extrinsics(extrinsics.to(depth))
    for view, (height, width) in enumerate(token_grids):
        this = slice(view, view + 1)
        image_size = (depth.shape[-2], depth.shape[-1])
        centres = cell_centres((height, width), image_size, dtype=depth.dtype, device=depth.device).flatten(0, 1)
        z = read_depth(depth[:, this], centres.expand(len(depth), 1, -1, -1))
        in_camera = camera_rays(centres, intrinsics[:, this].to(depth)) * z[..., None]
        world = in_camera @ poses[:, this, :3, :3].mT + poses[:, this, None, :3, 3]
        points[:, view, : height * width] = world[:, 0]
    return points


@dataclass(frozen=True, eq=False)
class Pairs:
    """Matches as pairs of tokens, each field `[P]`.

    Attributes:
        sample, query, key, token: position of a match in the index `[B', V, V, N]` of a `Correspondence`: its sample,
            query view, key view and query token.
        target: the matched token of the key view.
        height, width: token grid of the key view.
        bin: number of the match's sample and group, `sample * A + group`.
    """

    sample: Tensor
    query: Tensor
    key: Tensor
    token: Tensor
    target: Tensor
    height: Tensor
    width: Tensor
    bin: Tensor


@dataclass(frozen=True, eq=False)
class TrueMatches:
    """The true matches of one layer, with the group of each pair of views.

    Example:
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1] = torch.tensor([0, 1, 2, 3])
        >>> truth = TrueMatches.plain(Correspondence(index, ((2, 2), (2, 2))))
        >>> truth.pairs.tolist(), truth.chance((0, 1)).tolist()
        ([[4]], [[[1.0, 4.0]]])

    Attributes:
        match: matches as `TokenLayout.localize` returns them: index `[B', V, V, N]`.
        groups: group of each ordered pair of views, `[G, V, V]`, 0 to A - 1.
        num_groups: A.
        points: surface points at the token centers `[B', V, N, 3]` in world units, or None.
        views_apart: F, or 1 where the views of a sample are together.
    """

    match: Correspondence
    groups: Tensor
    num_groups: int
    points: Tensor | None = None
    views_apart: int = 1

    @classmethod
    def plain(cls, match: Correspondence) -> TrueMatches:
        """Put all matches in one group, and take each of the B' samples for a sample of its own."""
        return cls(match, match.index.new_zeros(match.index.shape[:3]), 1)

    @classmethod
    def of_layer(
        cls, layout: TokenLayout, match: Correspondence, groups: Tensor, num_groups: int, points: Tensor | None = None
    ) -> TrueMatches:
        """Keep of the matches `[B, V, V, N]` those that a layer can find.

        Views without supervision in the layer are left out, as are matches that its queries cannot reach. `groups`,
        `[B, V, V]`, and `points`, `[B, V, N, 3]`, are for the views and tokens of `match`.
        """
        local, local_groups = layout.localize(match), layout.view_order.take_pairs(groups.to(match.device))
        if points is not None:
            points = layout.localize_tokens(points, match.token_grids)
        return cls(local, local_groups, num_groups, points, views_apart=len(local_groups) // max(1, len(groups)))

    @property
    def one_token(self) -> bool:
        """Whether a query reaches only one token of each view, so that it chooses among views instead of tokens."""
        return all(grid == (1, 1) for grid in self.match.token_grids)

    @property
    def num_samples(self) -> int:
        """Number of samples B."""
        return len(self.groups) // self.views_apart

    @property
    def num_bins(self) -> int:
        """Number of bins, `B * A`."""
        return self.num_samples * self.num_groups

    @cached_property
    def pairs(self) -> Tensor:
        """Number of matches by sample and group, int64 `[B, A]`; for `one_token`, of queries with a match."""
        bins = self.queries_in(WHOLE)[2] if self.one_token else self.pairs_in(WHOLE).bin
        return torch.bincount(bins, minlength=self.num_bins).view(self.num_samples, -1).cpu()

    def chance(self, within: tuple[int, ...], near: float | None = None) -> Tensor:
        """Expected hits of uniform attention, float64 `[B, A, W]`; arguments and W as of `count_hits`."""
        if self.one_token:
            shown, _, bins = self.queries_in(WHOLE)
            shares = [shown.sum(1) / (shown.shape[1] - 1)]
        else:
            pairs = self.pairs_in(WHOLE)
            bins = pairs.bin
            shares = [
                tokens_near(pairs.target, limit, pairs.height, pairs.width) / (pairs.height * pairs.width)
                for limit in within
            ]
            if near is not None:
                shares.append(self._share_near(pairs, near))
        return self._sum(bins, torch.stack(shares, dim=-1))

    def ceiling(self, near: float) -> Tensor:
        """Number of matches whose matched token has the point at its own center within `near`, float64 `[B, A]`.

        Tokens cover some area: where a token covers 10 cm of a wall, its center is rarely within 2 cm of the point.
        """
        pairs = self.pairs_in(WHOLE)
        return self._sum(pairs.bin, (self.distance_to(pairs, pairs.target[:, None]) <= near).double())[..., 0]

    def pairs_in(self, block: Block) -> Pairs:
        """Matches of some samples, query views and query tokens."""
        samples, views, tokens = block
        sample, query, key, token = (self.match.index[samples, views, :, tokens] >= 0).nonzero(as_tuple=True)
        sample, query, token = sample + samples.start, query + views.start, token + tokens.start
        token_grids = torch.tensor(self.match.token_grids, device=sample.device)
        group = self.groups[sample // self._folds, query, key]
        return Pairs(
            sample,
            query,
            key,
            token,
            target=self.match.index[sample, query, key, token],
            height=token_grids[key, 0],
            width=token_grids[key, 1],
            bin=self._sample_of(sample) * self.num_groups + group,
        )

    def queries_in(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """For `one_token`: the queries of a block that have a match.

        Returns:
            Which views show the point of each query, bool `[P, V]`; which queries of the block these are, a mask
            `[B', Q]`; and their bins `[P]`. The group of a query is the lowest group of the views that show its point:
            with angle bins, the group of the view at the smallest angle.
        """
        samples, views, _ = block
        index = self.match.index[samples, views, :, 0]
        has_match = (index >= 0).any(-1)
        sample, query = has_match.nonzero(as_tuple=True)
        shown = index[sample, query] >= 0
        sample = sample + samples.start
        groups = self.groups[sample // self._folds, query + views.start].masked_fill(~shown, self.num_groups)
        return shown, has_match, self._sample_of(sample) * self.num_groups + groups.amin(-1)

    def distance_to(self, pairs: Pairs, tokens: Tensor) -> Tensor:
        """Distance in the world from each query's surface point to those of tokens `[P, R]` of the key view, or NaN."""
        if self.points is None:
            raise ValueError("points: distances in the world need the surface points of the tokens, got None")
        of_query = self.points[pairs.sample, pairs.query, pairs.token]
        of_tokens = self.points[pairs.sample[:, None], pairs.key[:, None], tokens]
        return (of_tokens - of_query[:, None]).norm(dim=-1)

    def _share_near(self, pairs: Pairs, near: float) -> Tensor:
        """Share of the key view's tokens whose points lie within `near` of each query's surface point, `[P]`."""
        all_tokens = torch.arange(self.match.index.shape[-1], device=pairs.sample.device)
        block, counts = max(1, BLOCK_ENTRIES // len(all_tokens)), []
        for start in range(0, len(pairs.sample), block):
            part = Pairs(*(value[start : start + block] for value in vars(pairs).values()))
            tokens = all_tokens.expand(len(part.sample), -1)
            counts.append((self.distance_to(part, tokens) <= near).sum(1))  # NaN, as of padding, is not near
        total = torch.cat(counts) if counts else pairs.sample
        return total / (pairs.height * pairs.width)

    def _sum(self, bins: Tensor, values: Tensor) -> Tensor:
        """Add up values `[P, W]` by bin, `[B, A, W]`."""
        total = torch.zeros(self.num_bins, values.shape[1], dtype=torch.float64)
        return total.index_add_(0, bins.cpu(), values.cpu().double()).unflatten(0, (self.num_samples, -1))

    @property
    def _folds(self) -> int:
        """Number of rows, columns or cells that follow each other and share their groups."""
        return self.match.batch_size // max(1, len(self.groups))

    def _sample_of(self, sample: Tensor) -> Tensor:
        """Which of the B samples each of the B' is of."""
        return sample // (self._folds * self.views_apart)
