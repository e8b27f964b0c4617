"""Which tokens of different views show the same surface point.

Axes: B samples, V views, H W image pixels, h w token grid, N = h*w tokens per view (row-major).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cameo.correspondence.fields import check_fields, check_threshold, check_tracks
from cameo.correspondence.matching import match_depth, match_features, match_point_maps
from cameo.correspondence.track_matching import match_tracks
from cameo.correspondence.tracks import PixelPairs, Tracks
from cameo.errors import ShapeError
from cameo.geometry.cameras import check_depth, check_image_size
from cameo.geometry.grids import GridSize, TokenGrids, as_grid, grid_per_view
from cameo.geometry.visibility import DEPTH_TOLERANCE, check_tolerance
from cameo.renamed import KEYWORDS, old_attributes, old_fields, old_keywords

__all__ = ["Correspondence", "GridSize", "one_per_layer"]


@old_attributes
@old_fields(KEYWORDS["Correspondence"])
@dataclass(frozen=True, eq=False)
class Correspondence:
    """For each token of each view, the token of each other view that shows the same surface point.

    Example:
        >>> depth = torch.full((1, 2, 1, 64, 64), 2.0)
        >>> intrinsics = torch.tensor([[64.0, 0, 32], [0, 64, 32], [0, 0, 1]]).expand(1, 2, 3, 3)
        >>> extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
        >>> extrinsics[0, 1, 0, 3] = -1.0  # the second camera stands one unit to the right
        >>> match = Correspondence.from_depth(depth, intrinsics, extrinsics, token_grid=2)
        >>> match.index[0, 0, 1].tolist()  # what both see lies one token further left in the second view
        [-1, 0, -1, 2]

    Attributes:
        index: int64 ``[B, V, V, N]``: token of view j that shows what token x of view i shows, or -1 for
            none. It is always -1 where ``i == j``. N is the largest ``h * w``; smaller views are padded with -1.
        token_grids: token grid ``(h, w)`` of each view.
        match_weight: ``[B, V, V, N]``, at least 0: the weight of each match in the loss; None weights all alike.
        distance: ``[B, V, V, N]``, 3D distance in world units between the surface points of the two tokens,
            also for pairs that are not matched; ``inf`` where there is no measurement.

    Raises:
        ShapeError: the tensors and ``token_grids`` do not fit together.
        TypeError: a field is no tensor, for example a NumPy array.
        ValueError: an index is outside the target view's grid, a view is matched with itself, a match weight is
            negative or not finite, or a distance is negative or NaN. Values are read on the CPU only: reading them on
            a GPU would make the host wait in every training step.
    """

    index: Tensor
    token_grids: TokenGrids
    match_weight: Tensor | None = None
    distance: Tensor | None = None

    def __post_init__(self) -> None:
        token_grids = check_fields(self.index, self.token_grids, self.match_weight, self.distance)
        object.__setattr__(self, "token_grids", token_grids)

    @property
    def matched(self) -> Tensor:
        """Where there is a match, bool ``[B, V, V, N]``."""
        return self.index >= 0

    @property
    def batch_size(self) -> int:
        """Number of samples, B."""
        return self.index.shape[0]

    @property
    def num_views(self) -> int:
        """Number of views, V."""
        return self.index.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.index.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Correspondence:
        """Return this correspondence on ``device``; ``non_blocking`` as of `torch.Tensor.to`."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking), self.token_grids)

    def pin_memory(self) -> Correspondence:
        """Return this correspondence in pinned memory, from which a GPU copies in the background."""
        return self._mapped(Tensor.pin_memory, self.token_grids)

    def select(self, sample: int) -> Correspondence:
        """Return one sample of the batch, as a batch of one."""
        if not -self.batch_size <= sample < self.batch_size:
            raise ValueError(f"sample: expected 0..{self.batch_size - 1}, got {sample}")
        return self._mapped(lambda tensor: tensor[[sample % self.batch_size]], self.token_grids)

    def take_views(self, views: Sequence[int]) -> Correspondence:
        """Return the correspondence among these views only, in this order.

        Example:
            >>> index = torch.tensor([[[-1], [0]], [[-1], [-1]]])[None]
            >>> Correspondence(index, ((1, 1), (1, 1))).take_views([1, 0]).index.flatten().tolist()
            [-1, -1, 0, -1]

        Raises:
            ValueError: there is no view, an unknown view, or the same view twice.
        """
        views = [int(view) for view in views]
        if not views or len(set(views)) < len(views) or not all(0 <= v < self.num_views for v in views):
            raise ValueError(f"views: expected different views of 0..{self.num_views - 1}, got {views}")
        token_grids = tuple(self.token_grids[view] for view in views)
        tokens = max(h * w for h, w in token_grids)
        return self._mapped(lambda tensor: tensor[:, views][:, :, views, :tokens], token_grids)

    def _mapped(self, change: Callable[[Tensor], Tensor], token_grids: TokenGrids) -> Correspondence:
        weight, distance = (None if tensor is None else change(tensor) for tensor in (self.match_weight, self.distance))
        return Correspondence(change(self.index), token_grids, weight, distance)

    @classmethod
    def cat(cls, parts: Sequence[Correspondence]) -> Correspondence:
        """Join samples along the batch axis.

        Raises:
            ValueError: there is nothing to join, the token grids differ, or only some parts have distances.
        """
        if not parts:
            raise ValueError("parts: expected at least one correspondence, got none")
        if len({part.token_grids for part in parts}) > 1:
            shown = sorted({part.token_grids for part in parts})
            raise ValueError(f"parts: expected the same token grids, got {shown}. Cure: join samples of equal grids")
        distances = [part.distance for part in parts if part.distance is not None]
        if 0 < len(distances) < len(parts):
            raise ValueError("parts: some have distances and some have none. Cure: build them all alike")
        weights = [part.match_weight for part in parts]
        dtype = next((weight.dtype for weight in weights if weight is not None), None)
        match_weight = None
        if dtype is not None:
            ones = (torch.ones(part.index.shape, dtype=dtype, device=part.device) for part in parts)
            pairs = zip(weights, ones, strict=True)
            match_weight = torch.cat([one if weight is None else weight for weight, one in pairs])
        index = torch.cat([part.index for part in parts])
        return cls(index, parts[0].token_grids, match_weight, torch.cat(distances) if distances else None)

    @classmethod
    @old_keywords
    def from_point_maps(
        cls,
        points: Tensor,
        *,
        token_grid: GridSize,
        cycle_threshold: float = 1.5,
        max_distance: float | None = None,
    ) -> Correspondence:
        """Match tokens by nearest neighbors in 3D that are cycle-consistent (the paper).

        Example:
            >>> points = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"))
            >>> points = torch.cat([points, torch.ones(1, 4, 4)]).expand(1, 2, 3, 4, 4)
            >>> Correspondence.from_point_maps(points, token_grid=2).index[0, 0, 1].tolist()
            [0, 1, 2, 3]

        Args:
            points: ``[B, V, 3, H, W]`` world coordinates; non-finite = no measurement. They are resampled to
                the token grid (bilinear, half-pixel centers, not antialiased); a token has a measurement only if
                all pixels that its interpolation reads have one.
            token_grid: ``(h, w)`` or an int for all views, or one ``(h, w)`` per view.
            cycle_threshold: a match is kept if the nearest neighbor of the nearest neighbor lies less than
                this many tokens from the start.
            max_distance: drop matches whose points lie farther apart than this, in world units. The cycle check
                alone also keeps points that the other view does not show.

        Raises:
            ShapeError: the points have another shape.
            ValueError: the token grid, the threshold or the distance is out of range.

        Source: CAMEO (arXiv 2512.03045), correspondence from point maps.
        """
        if not isinstance(points, Tensor) or points.ndim != 5 or points.shape[2] != 3:
            got = points.shape if isinstance(points, Tensor) else type(points).__name__
            raise ShapeError("points", expected="[B, V, 3, H, W]", got=got)
        check_threshold(cycle_threshold)
        if max_distance is not None and not max_distance > 0:
            raise ValueError(f"max_distance: expected more than 0 world units or None, got {max_distance}")
        token_grids = grid_per_view(token_grid, points.shape[1])
        index, distance = match_point_maps(points, token_grids, cycle_threshold, max_distance)
        return cls(index, token_grids, distance=distance)

    @classmethod
    @old_keywords
    def from_depth(
        cls,
        depth: Tensor,
        intrinsics: Tensor,
        extrinsics: Tensor,
        *,
        token_grid: GridSize,
        depth_tolerance: float = DEPTH_TOLERANCE,
        check_values: bool = True,
    ) -> Correspondence:
        """Match tokens by projecting their surface points and comparing depth.

        The surface point of a token is the one at the token's center. It matches the token of the other view onto
        which it is projected, if it lies inside that image, the depth there is the same, and that token has a
        measurement.

        Example:
            >>> intrinsics = torch.tensor([[64.0, 0, 32], [0, 64, 32], [0, 0, 1]]).expand(1, 2, 3, 3)
            >>> extrinsics = torch.eye(4).expand(1, 2, 4, 4)
            >>> depth = torch.full((1, 2, 1, 64, 64), 2.0)
            >>> depth[0, 1, 0, :, :32] = 1.0  # something near hides the left half from the second view
            >>> Correspondence.from_depth(depth, intrinsics, extrinsics, token_grid=2).index[0, 0, 1].tolist()
            [-1, 1, -1, 3]

        Args:
            depth: ``[B, V, 1, H, W]`` z-depth in world units; 0, negative or non-finite = no measurement.
            intrinsics: ``[B, V, 3, 3]`` in pixels of the depth image.
            extrinsics: ``[B, V, 4, 4]`` world-to-camera.
            token_grid: ``(h, w)`` or an int for all views, or one ``(h, w)`` per view.
            depth_tolerance: how far the point's depth may be from the depth that the view shows there, as a share of
                it, in (0, 1).
            check_values: whether to check that the cameras are usable. On a GPU the host waits for this check; pass
                False where the cameras were checked before, for example by a loader. Shapes are always checked.

        Returns:
            A correspondence whose ``distance`` is that between the token's surface point and the surface point that
            the other view shows at its projection.

        Raises:
            ShapeError: a tensor has another shape.
            ValueError: a camera is missing or unusable (see :func:`cameo.geometry.check_cameras`), its principal point
                lies far outside the depth image, or the token grid or the tolerance is out of range.
        """
        check_depth(depth, intrinsics, extrinsics, check_values=check_values)
        if check_values:
            check_image_size(intrinsics, depth.shape[-2:], stacklevel=3)  # `old_keywords` is in between
        check_tolerance(depth_tolerance)
        token_grids = grid_per_view(token_grid, depth.shape[1])
        index, distance = match_depth(depth, intrinsics, extrinsics, token_grids, depth_tolerance)
        return cls(index, token_grids, distance=distance)

    @classmethod
    @old_keywords
    def from_features(
        cls,
        features: Tensor,
        *,
        token_grid: GridSize | None = None,
        cycle_threshold: float = 1.5,
        min_similarity: float | None = None,
    ) -> Correspondence:
        """Match tokens by image features, where no geometry is known: nearest neighbors that are cycle-consistent.

        Example:
            >>> features = torch.randn(1, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
            >>> features = torch.cat([features, features.flip(-1)], dim=1)  # the second view is mirrored
            >>> Correspondence.from_features(features).index[0, 0, 1, :4].tolist()
            [3, 2, 1, 0]

        Args:
            features: ``[B, V, C, h, w]`` of any scale, such as `cameo.correspondence.features.FeatureExtractor`
                returns them; a vector of zeros or with a non-finite value = no measurement.
            token_grid: as in `from_point_maps`; the features are resampled to it (bilinear, half-pixel centers,
                antialiased). A token has a measurement only if all features that its interpolation reads are
                measurements. None takes the grid of the features.
            cycle_threshold: a match is kept if the nearest neighbor (by cosine similarity) of the nearest neighbor
                lies less than this many tokens from the start.
            min_similarity: drop matches with a smaller cosine similarity.

        Returns:
            A correspondence without `distance`, since features contain no lengths.

        Raises:
            ShapeError: the features have another shape.
            ValueError: the token grid, the threshold or the similarity is out of range.
        """
        if not isinstance(features, Tensor) or features.ndim != 5 or not all(features.shape[1:]):
            got = features.shape if isinstance(features, Tensor) else type(features).__name__
            raise ShapeError("features", expected="[B, V, C, h, w], none of which is 0", got=got)
        check_threshold(cycle_threshold)
        if min_similarity is not None and not -1 <= min_similarity <= 1:
            raise ValueError(f"min_similarity: expected a cosine in [-1, 1] or None, got {min_similarity}")
        height, width = features.shape[-2:]
        token_grids = grid_per_view((height, width) if token_grid is None else token_grid, features.shape[1])
        return cls(match_features(features, token_grids, cycle_threshold, min_similarity), token_grids)

    @classmethod
    def from_tracks(
        cls,
        tracks: Sequence[Tracks],
        *,
        image_size: tuple[int, int],
        token_grid: GridSize,
        cycle_threshold: float = 1.5,
    ) -> Correspondence:
        """Match the tokens in which the same points were seen: tracks of COLMAP, or of a point tracker.

        Example:
            >>> point, view = torch.tensor([5, 5]), torch.tensor([0, 1])
            >>> tracks = Tracks(point, view, xy=torch.tensor([[2.0, 2.0], [6.0, 3.0]]), num_views=2)
            >>> match = Correspondence.from_tracks([tracks], image_size=(8, 8), token_grid=2)
            >>> match.index[0, 0, 1].tolist(), match.match_weight[0, 0, 1].tolist()
            ([1, -1, -1, -1], [0.75, 0.0, 0.0, 0.0])

        A track counts by its *nearness* to the centers of its two tokens: for each view the share
        `(1 - |dx|) (1 - |dy|)` of the token in a bilinear interpolation at the place of the sighting, which lies
        `(dx, dy)` tokens from the token's center, and the product of both. It is 1 between two centers and 1/16 between
        two corners: the token that it names is then hardly more right than its neighbors.

        Tracks that start in one token may lead to several tokens of another view. Those within one token of each other
        agree, since a surface that is seen larger there fills several tokens. The token to which most weight agrees is
        matched if this is more than half of the weight. Otherwise there is no match, since the token shows several
        surfaces, or a track is wrong, and it is not known which.

        Args:
            tracks: those of each sample, B; all have V views. Sightings outside the image are left out.
            image_size: `(H, W)` in pixels of the images that `xy` of the tracks is in.
            token_grid: as in `from_point_maps`.
            cycle_threshold: a match is kept if the match of the matched token lies less than this many tokens from the
                start.

        Returns:
            A correspondence whose `match_weight` is the largest nearness of the tracks behind each match, 0 without a
            match. It has no `distance`.

        Raises:
            ShapeError: the tracks have different numbers of views.
            TypeError: `tracks` is no list of tracks.
            ValueError: there is no sample, or the image size, token grid or threshold is out of range.
        """
        check_threshold(cycle_threshold)
        token_grids = grid_per_view(token_grid, check_tracks(tracks))
        index, match_weight = match_tracks(tracks, as_grid("image_size", image_size), token_grids, cycle_threshold)
        return cls(index, token_grids, match_weight)

    @classmethod
    def from_matches(
        cls,
        matches: Sequence[PixelPairs],
        *,
        num_views: int,
        image_size: tuple[int, int],
        token_grid: GridSize,
        cycle_threshold: float = 1.5,
    ) -> Correspondence:
        """Match the tokens that hold the pixels which a matcher has paired.

        Example:
            >>> pairs = {(0, 1): (torch.tensor([[2.0, 2.0]]), torch.tensor([[6.0, 2.0]]))}
            >>> match = Correspondence.from_matches([pairs], num_views=2, image_size=(8, 8), token_grid=2)
            >>> match.index[0, 0, 1].tolist(), match.index[0, 1, 0].tolist()
            ([1, -1, -1, -1], [-1, 0, -1, -1])

        Each pair of pixels is a track of its own, see `from_tracks`; it counts in both directions.

        Args:
            matches: of each sample, for pairs of different views `(i, j)` the places `[M, 2]` in view i and those in
                view j, in pixels, x before y, pixel centers at +0.5. Views that are not paired have no match.
            num_views: V.
            image_size, token_grid, cycle_threshold: as in `from_tracks`.

        Raises:
            ShapeError: the places of two views differ in number, or are not `[M, 2]`.
            ValueError: two views are the same or not there, a place is not finite, or as in `from_tracks`.
        """
        tracks = [Tracks.from_pairs(pairs, num_views) for pairs in matches]
        return cls.from_tracks(tracks, image_size=image_size, token_grid=token_grid, cycle_threshold=cycle_threshold)


def one_per_layer(correspondence: Correspondence | Sequence[Correspondence], layers: int) -> list[Correspondence]:
    """Return one correspondence for each of a number of supervised layers, which may share one.

    Example:
        >>> match = Correspondence(torch.full((1, 2, 2, 4), -1), ((2, 2), (2, 2)))
        >>> [each is match for each in one_per_layer(match, 2)]
        [True, True]

    Raises:
        TypeError: it is neither a correspondence nor a list of them.
        ValueError: the list has another length.
    """
    if isinstance(correspondence, Correspondence):
        return [correspondence] * layers
    matches = list(correspondence) if isinstance(correspondence, Sequence) else [correspondence]
    for match in matches:
        if not isinstance(match, Correspondence):
            raise TypeError(
                "correspondence: expected a cameo.Correspondence or a list of them, got "
                f"{type(match).__name__}; build one with Correspondence.from_depth or from_point_maps"
            )
    if len(matches) != layers:
        raise ValueError(
            f"correspondence: expected one Correspondence or a list of {layers}, one per supervised layer, got a list "
            f"of {len(matches)}"
        )
    return matches
