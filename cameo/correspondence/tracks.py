"""Points that were seen in several views: what COLMAP's sparse models, point trackers and matchers give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cameo.errors import ShapeError

__all__ = ["PixelPairs", "Tracks"]

# For two views (i, j) the places [M, 2] in view i, and those in view j that show the same points.
PixelPairs = Mapping[tuple[int, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Tracks:
    """Sightings of surface points in the views of one scene; N sightings, V views.

    - `point` `[N]` int64: number of the surface point; equal numbers are one point.
    - `view` `[N]` int64: the view that shows it, 0 <= view < `num_views`.
    - `xy` `[N, 2]` float32: where, in pixels of that view's image, x before y, pixel centers at +0.5. A place outside
      the image is no sighting of it: an image may have been cropped after its points were found.
    - `num_views`: V.

    Raises `ShapeError` where the fields do not fit each other, `TypeError` where one is no tensor, `ValueError` on
    another kind of number, a view that is not there or a place that is not finite.

    Example:
        >>> tracks = Tracks(point=torch.tensor([7, 7]), view=torch.tensor([0, 1]),
        ...                 xy=torch.tensor([[3.5, 2.5], [4.0, 2.5]]), num_views=2)
        >>> len(tracks)
        2
    """

    point: Tensor
    view: Tensor
    xy: Tensor
    num_views: int

    def __post_init__(self) -> None:
        for name in ("point", "view", "xy"):
            tensor = getattr(self, name)
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}. Cure: torch.as_tensor")
            if tensor.is_floating_point() != (name == "xy"):
                raise ValueError(f"{name}: expected {'floats' if name == 'xy' else 'int64'}, got {tensor.dtype}")
        if self.point.ndim != 1:
            raise ShapeError("point", expected="[N]", got=self.point.shape)
        if self.num_views < 1:
            raise ValueError(f"num_views: expected at least 1, got {self.num_views}")
        count = self.point.shape[0]
        for name, tensor, expected in (("view", self.view, (count,)), ("xy", self.xy, (count, 2))):
            if tuple(tensor.shape) != expected:
                raise ShapeError(name, expected=str(list(expected)), got=tensor.shape)
        if count and not (int(self.view.min()) >= 0 and int(self.view.max()) < self.num_views):
            raise ValueError(
                f"view: expected numbers from 0 to {self.num_views - 1}, "
                f"got {int(self.view.min())} to {int(self.view.max())}"
            )
        if not torch.isfinite(self.xy).all():
            raise ValueError("xy: expected finite pixel coordinates, got NaN or infinity")

    def __len__(self) -> int:
        return self.point.shape[0]

    @classmethod
    def from_pairs(cls, pairs: PixelPairs, num_views: int) -> Tracks:
        """Take each pair of pixels as a point of its own that two views show.

        Example:
            >>> tracks = Tracks.from_pairs({(0, 2): (torch.tensor([[1.5, 0.5]]), torch.tensor([[2.0, 0.5]]))}, 3)
            >>> tracks.point.tolist(), tracks.view.tolist(), tracks.xy.tolist()
            ([0, 0], [0, 2], [[1.5, 0.5], [2.0, 0.5]])

        Args:
            pairs: for two different views `(i, j)` the places `[M, 2]` in view i and in view j.
            num_views: V.

        Raises:
            ShapeError: the places of two views differ in number, or are not `[M, 2]`.
            ValueError: two views are the same or not there, or a place is not finite.
        """
        views, places = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, 2)]
        for (i, j), both in pairs.items():
            if i == j or not (0 <= i < num_views and 0 <= j < num_views):
                raise ValueError(f"matches: expected two different views from 0 to {num_views - 1}, got ({i}, {j})")
            for number, xy in zip((i, j), both, strict=True):
                if xy.ndim != 2 or xy.shape != both[0].shape or xy.shape[1] != 2:
                    got = f"{list(both[0].shape)} and {list(both[1].shape)}"
                    raise ShapeError(f"matches of views ({i}, {j})", expected="[M, 2] twice", got=got)
                if not torch.isfinite(xy).all():
                    raise ValueError(
                        f"matches of views ({i}, {j}): expected finite pixel coordinates, got NaN or infinity in view "
                        f"{number}. Cure: leave those matches out"
                    )
            views.append(torch.tensor([i, j]).repeat(len(both[0])))
            places.append(torch.stack(both, dim=1).flatten(0, 1).float().cpu())
        view = torch.cat(views)
        return cls(torch.arange(len(view)) // 2, view, torch.cat(places), num_views)

    def of_views(self, views: Sequence[int]) -> Tracks:
        """Return the sightings in the given views, which become views 0, 1, ... in that order; one may stand twice.

        Raises:
            ValueError: there is no view, or one that is not there.
        """
        if not views or not all(0 <= view < self.num_views for view in views):
            raise ValueError(f"views: expected numbers from 0 to {self.num_views - 1}, got {list(views)}")
        wanted = torch.tensor(views, dtype=torch.int64)
        sighting = torch.isin(self.view, wanted).nonzero().flatten()
        of_sighting, view = (self.view[sighting, None] == wanted).nonzero().T
        sighting = sighting[of_sighting]
        return Tracks(self.point[sighting], view, self.xy[sighting], len(views))
