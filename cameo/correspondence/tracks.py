"""Points that were seen in several views: what COLMAP's sparse models, point trackers and matchers give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cameo.errors import ShapeError

__all__ = ["Tracks"]


@dataclass(frozen=True)
class Tracks:
    """Sightings of surface points in the views of one scene; N sightings, V views.

    - `point` `[N]` int64: number of the surface point; equal numbers are one point.
    - `view` `[N]` int64: the view that shows it, 0 <= view < `num_views`.
    - `xy` `[N, 2]` float32: where, in pixels of that view's image, x before y, pixel centers at +0.5.
    - `num_views`: V.

    Raises `ShapeError` where the fields do not fit each other, `ValueError` on a view that is not there or a place that
    is not finite.

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
        if self.point.ndim != 1:
            raise ShapeError("point", expected="[N]", got=self.point.shape)
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

    def of_views(self, views: list[int]) -> Tracks:
        """Return the sightings in the given views, which become views 0, 1, ... in that order."""
        number = torch.full((self.num_views,), -1, dtype=torch.int64)
        number[torch.tensor(views, dtype=torch.int64)] = torch.arange(len(views))
        kept = number[self.view] >= 0
        return Tracks(self.point[kept], number[self.view[kept]], self.xy[kept], len(views))
