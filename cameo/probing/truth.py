"""What the attention of a layer should find: true matches, sorted by sample and by the angle between the views.

Axes: B samples, V views, N tokens per view, A groups of view pairs (such as angle bins), P visible pairs. A layer that
attends by row, column or cell has samples of its own for each of them: B' = B, B h, B w or B h w.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence
from cameo.geometry import camera_rays, cell_centres
from cameo.geometry.cameras import at_least_float32, full_precision, invert_extrinsics
from cameo.geometry.depth import read_depth
from cameo.geometry.grids import TokenGrids

__all__ = ["ANGLE_BINS", "Pairs", "TrueMatches", "angle_bins", "surface_points", "token_distance", "view_angles"]

# Degrees between the optical axes of two views; an angle on a limit belongs to the bin above.
ANGLE_BINS = ((0.0, 15.0), (15.0, 30.0), (30.0, 60.0), (60.0, 180.0))
# Rigs place their views at exactly such limits: what is this near to one, in degrees, is on it.
ROUNDING = 1e-3
# Distances between points that are held at once.
BLOCK_ENTRIES = 1 << 22

Block = tuple[slice, slice, slice]


@full_precision
def view_angles(extrinsics: Tensor) -> Tensor:
    """Angle in degrees between the optical axes of every two views, `[B, V, V]` in float64.

    Example:
        >>> extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
        >>> extrinsics[0, 1, :3, :3] = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])  # turned to the side
        >>> view_angles(extrinsics)[0].round(decimals=6).tolist()
        [[0.0, 90.0], [90.0, 0.0]]

    Args:
        extrinsics: `[B, V, 4, 4]` world-to-camera, OpenCV axes.
    """
    axis = extrinsics[..., 2, :3].double().cpu()  # the camera's z axis in the world
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
    """Surface points at the token centres in the world's frame, `[B, V, N, 3]`; NaN without measurement.

    Example:
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 1, 3, 3)
        >>> depth = torch.full((1, 1, 1, 8, 8), 2.0)
        >>> surface_points(depth, intrinsics, torch.eye(4).expand(1, 1, 4, 4), ((1, 2),)).tolist()
        [[[[-0.5, 0.0, 2.0], [0.5, 0.0, 2.0]]]]

    Args:
        depth: `[B, V, 1, H, W]` z-depth.
        intrinsics: `[B, V, 3, 3]` in pixels of the depth image.
        extrinsics: `[B, V, 4, 4]` world-to-camera.
        token_grids: token grid `(h, w)` of each view; views with fewer than N tokens end in NaN.
    """
    depth = depth.to(at_least_float32(depth))
    points = depth.new_full((*depth.shape[:2], max(h * w for h, w in token_grids), 3), math.nan)
    poses = invert_extrinsics(extrinsics.to(depth))
    for view, (height, width) in enumerate(token_grids):
        here = slice(view, view + 1)
        image_size = (depth.shape[-2], depth.shape[-1])
        centres = cell_centres((height, width), image_size, dtype=depth.dtype, device=depth.device).flatten(0, 1)
        z = read_depth(depth[:, here], centres.expand(len(depth), 1, -1, -1))
        in_camera = camera_rays(centres, intrinsics[:, here].to(depth)) * z[..., None]
        world = in_camera @ poses[:, here, :3, :3].mT + poses[:, here, None, :3, 3]
        points[:, view, : height * width] = world[:, 0]
    return points


def token_distance(token: Tensor, other: Tensor, width: Tensor) -> Tensor:
    """Distance in tokens of a grid `width` tokens wide: the larger of the row and the column difference.

    Example:
        >>> token_distance(torch.tensor([0, 5]), torch.tensor([6, 5]), torch.tensor(4)).tolist()
        [2, 0]
    """
    return torch.maximum((token // width - other // width).abs(), (token % width - other % width).abs())


@dataclass(frozen=True, eq=False)
class Pairs:
    """Visible pairs, each field `[P]`.

    Attributes:
        sample, query, key, token: where a pair stands in the index `[B', V, V, N]` of its matches.
        target: the matched token of the key view.
        height, width: token grid of the key view.
        bin: number of its sample and group, `sample * A + group`.
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
    """The true matches of one layer, with the group of each view pair.

    Example:
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1] = torch.tensor([0, 1, 2, 3])
        >>> truth = TrueMatches.plain(Correspondence(index, ((2, 2), (2, 2))))
        >>> truth.pairs.tolist(), truth.chance((0, 1)).tolist()
        ([[4]], [[[1.0, 4.0]]])

    Attributes:
        match: matches in the form of the core, `TokenLayout.localize`: index `[B', V, V, N]`.
        groups: group of each ordered view pair, `[B, V, V]`, 0 to A - 1.
        num_groups: A.
        points: surface points at the token centres `[B', V, N, 3]` in world units, or None.
    """

    match: Correspondence
    groups: Tensor
    num_groups: int
    points: Tensor | None = None

    @classmethod
    def plain(cls, match: Correspondence) -> TrueMatches:
        """Matches in one group, every B' a sample of its own."""
        return cls(match, match.index.new_zeros(match.index.shape[:3]), 1)

    @classmethod
    def of_layer(
        cls, layout: TokenLayout, match: Correspondence, groups: Tensor, num_groups: int, points: Tensor | None = None
    ) -> TrueMatches:
        """Matches `[B, V, V, N]` as a layer can find them; the other arguments in the views and tokens of `match`.

        Views that the layer does not supervise are left out, matches beyond its reach are none.
        """
        local = layout.localize(match)
        known = slice(match.num_views - local.num_views, None)
        if points is not None:
            points = fold_tokens(
                points[:, known, : max(h * w for h, w in match.token_grids[known])], layout, match.token_grids[-1]
            )
        return cls(local, groups[:, known, known].to(match.device), num_groups, points)

    @property
    def one_token(self) -> bool:
        """Whether a query reaches one token of each view, so that it chooses among views instead of tokens."""
        return all(size == (1, 1) for size in self.match.token_grids)

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.groups)

    @property
    def num_bins(self) -> int:
        """B A."""
        return self.num_samples * self.num_groups

    @cached_property
    def pairs(self) -> Tensor:
        """Number of visible pairs by sample and group, int64 `[B, A]`; queries that some view shows for `one_token`."""
        everything = slice(0, None)
        block = (everything, everything, everything)
        bins = self.queries_in(block)[2] if self.one_token else self.pairs_in(block).bin
        return torch.bincount(bins, minlength=self.num_bins).view(self.num_samples, -1).cpu()

    def chance(self, within: tuple[int, ...], near: float | None = None) -> Tensor:
        """Expected hits of uniform attention, float64 `[B, A, W]`; arguments and W as of `count_hits`."""
        everything = slice(0, None)
        block = (everything, everything, everything)
        if self.one_token:
            shown, _, bins = self.queries_in(block)
            shares = [shown.sum(1) / (shown.shape[1] - 1)]
        else:
            pairs = self.pairs_in(block)
            bins = pairs.bin
            shares = [_neighbours(pairs, limit) / (pairs.height * pairs.width) for limit in within]
            if near is not None:
                shares.append(self._share_near(pairs, near))
        return self._sum(bins, torch.stack(shares, dim=-1))

    def ceiling(self, near: float) -> Tensor:
        """Pairs whose true token itself has its centre's point within `near`, float64 `[B, A]`.

        Tokens are wide: where one covers 10 cm of a wall, no token but by luck lies within 2 cm.
        """
        everything = slice(0, None)
        pairs = self.pairs_in((everything, everything, everything))
        return self._sum(pairs.bin, (self.distance_to(pairs, pairs.target[:, None]) <= near).double())[..., 0]

    def pairs_in(self, block: Block) -> Pairs:
        """Visible pairs of some samples, query views and query tokens."""
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
            bin=sample // self._folds * self.num_groups + group,
        )

    def queries_in(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """For `one_token`: views that show the point of each query `[P, V]`, where the queries are, and their bins.

        The second is a mask `[B', Q]` of the block's queries. A query's group is the lowest of the views that show
        its point: with angle bins that of the nearest one.
        """
        samples, views, _ = block
        index = self.match.index[samples, views, :, 0]
        rows = (index >= 0).any(-1)
        sample, query = rows.nonzero(as_tuple=True)
        shown = index[sample, query] >= 0
        sample = (sample + samples.start) // self._folds
        groups = self.groups[sample, query + views.start].masked_fill(~shown, self.num_groups)
        return shown, rows, sample * self.num_groups + groups.amin(-1)

    def distance_to(self, pairs: Pairs, tokens: Tensor) -> Tensor:
        """Distance in the world from each pair's true point to that of tokens `[P, R]` of its key view, or NaN."""
        if self.points is None:
            raise ValueError("points: distances in the world need the surface points of the tokens, got None")
        true = self.points[pairs.sample, pairs.query, pairs.token]
        found = self.points[pairs.sample[:, None], pairs.key[:, None], tokens]
        return (found - true[:, None]).norm(dim=-1)

    def _share_near(self, pairs: Pairs, near: float) -> Tensor:
        """Share of the key view's tokens whose points lie within `near` of each pair's true point, `[P]`."""
        everything = torch.arange(self.match.index.shape[-1], device=pairs.sample.device)
        step, counts = max(1, BLOCK_ENTRIES // len(everything)), []
        for start in range(0, len(pairs.sample), step):
            part = Pairs(*(value[start : start + step] for value in vars(pairs).values()))
            tokens = everything.expand(len(part.sample), -1)
            counts.append((self.distance_to(part, tokens) <= near).sum(1))  # padding is NaN
        total = torch.cat(counts) if counts else pairs.sample
        return total / (pairs.height * pairs.width)

    def _sum(self, bins: Tensor, values: Tensor) -> Tensor:
        """Add up values `[P, W]` by bin, `[B, A, W]`."""
        total = torch.zeros(self.num_bins, values.shape[1], dtype=torch.float64)
        return total.index_add_(0, bins.cpu(), values.cpu().double()).unflatten(0, (self.num_samples, -1))

    @property
    def _folds(self) -> int:
        """Rows, columns or cells of one sample that have become samples."""
        return self.match.batch_size // max(1, self.num_samples)


def fold_tokens(tokens: Tensor, layout: TokenLayout, size: tuple[int, int]) -> Tensor:
    """Bring `[B, V, N, C]` to the samples and tokens of a layer that attends by row, column or cell."""
    height, width = size
    folds = {"all": None, "row": "(b h) v w c", "column": "(b w) v h c", "cell": "(b h w) v 1 c"}
    fold = folds[layout.reach]
    return tokens if fold is None else rearrange(tokens, f"b v (h w) c -> {fold}", h=height, w=width)


def _neighbours(pairs: Pairs, limit: int) -> Tensor:
    """Number of tokens of the key view within `limit` of the target, the target included, `[P]`."""
    counts = []
    for at, length in ((pairs.target // pairs.width, pairs.height), (pairs.target % pairs.width, pairs.width)):
        last = torch.minimum(at + limit, length - 1)
        counts.append(last - (at - limit).clamp(min=0) + 1)
    return counts[0] * counts[1]
