"""Which views of a correspondence an attention call holds, in which order, and between which it is supervised.

Axes: B samples, V views of the correspondence, V' views in folded form, F views that show another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cameo.attention.pattern import Pattern
from cameo.errors import as_integer

__all__ = ["ViewOrder"]


@dataclass(frozen=True)
class ViewOrder:
    """The views of a `TokenLayout`; the settings are explained there.

    Example:
        >>> [ViewOrder(references_last=1).place(view, num_views=3) for view in range(3)]
        [2, 0, 1]
    """

    unsupervised_views: int = 0
    references_last: int = 0
    own_view_shows: int | None = None
    references_absent: int = 0

    def __post_init__(self) -> None:
        for name in ("unsupervised_views", "references_last", "own_view_shows", "references_absent"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_integer(name, getattr(self, name), least=0))

    def check(self, key: Pattern) -> None:
        """Raise a ValueError if the settings contradict each other or the pattern of the keys."""
        extra = len(key.extra)
        if extra and self.unsupervised_views:
            raise key.error("unsupervised_views cannot go with views that have their own grid")
        if extra and self.references_last not in (0, extra):
            raise key.error(f"references_last: expected 0 or the {extra} views that have their own grid")
        if self.references_last and self.unsupervised_views not in (0, self.references_last):
            raise ValueError(
                f"unsupervised_views: expected 0 or references_last={self.references_last}, got "
                f"{self.unsupervised_views}"
            )
        if self.own_view_shows is None:
            if self.references_absent:
                raise ValueError(
                    f"references_absent={self.references_absent}: needs own_view_shows=, the view that all others show"
                )
        elif extra:
            raise key.error("own_view_shows cannot go with views that have their own grid")
        elif self.unsupervised_views:
            raise ValueError("unsupervised_views cannot go with own_view_shows, which supervises matches with one view")
        elif self.references_absent and self.references_last:
            raise ValueError("references_absent cannot go with references_last: the attention holds them or does not")

    def settings(self) -> dict[str, int]:
        """Return the settings that differ from their default, as keywords of a `TokenLayout`."""
        counts = ("unsupervised_views", "references_last", "own_view_shows", "references_absent")
        return {name: getattr(self, name) for name in counts if getattr(self, name) != getattr(ViewOrder, name)}

    @property
    def removed(self) -> int:
        """How many of the first views of the correspondence are in the attention, but are not supervised."""
        return self.references_last if self.unsupervised_views else 0

    @property
    def beyond(self) -> int:
        """How many of the last views of the attention are in no correspondence."""
        return 0 if self.references_last else self.unsupervised_views

    @property
    def least(self) -> int:
        """The views of a correspondence must be more than so many."""
        if self.own_view_shows is None:
            return self.references_last
        shows_itself = self.own_view_shows >= self.references_absent
        return max(self.references_last, self.own_view_shows, self.references_absent + shows_itself)

    def place(self, view: int, num_views: int) -> int:
        """Return the place of a view of the correspondence in the order of the attention."""
        return (view - self.references_last - self.references_absent) % (num_views - self.references_absent)

    def pairs(self, num_views: int) -> Tensor:
        """List the two views of each sample in folded form: the view that is shown, and one that shows it; `[F, 2]`.

        Example:
            >>> ViewOrder(own_view_shows=0).pairs(3).tolist()
            [[0, 1], [0, 2]]
        """
        shown = self.own_view_shows
        views = [view for view in range(self.references_absent, num_views) if view != shown]
        return torch.tensor([[shown, view] for view in views])

    def origin(self, sample: int, view: int, num_views: int) -> tuple[int, int]:
        """Return of which sample and view of the correspondence a view of the folded form is, where reach is "all".

        Example:
            >>> ViewOrder(own_view_shows=0).origin(3, 1, num_views=3)  # each sample has become two
            (1, 2)
        """
        if self.own_view_shows is None:
            return sample, view + self.removed
        pairs = self.pairs(num_views).tolist()
        return sample // len(pairs), pairs[sample % len(pairs)][view]

    def num_references(self, num_reference_views: int) -> int:
        """Return how many of the first views of the folded form are reference views."""
        if self.own_view_shows is not None:
            return int(self.own_view_shows < num_reference_views)
        return max(0, num_reference_views - self.removed)

    def take_pairs(self, values: Tensor) -> Tensor:
        """Bring values of ordered pairs of views `[B, V, V, ...]` to the views of the folded form, `[G, V', V', ...]`.

        G is B, or `B F` where each view that shows another is a sample of its own.
        """
        if self.own_view_shows is None:
            return values[:, self.removed :, self.removed :]
        pairs = self.pairs(values.shape[1]).to(values.device)
        return values[:, pairs[:, :, None], pairs[:, None, :]].flatten(0, 1)

    def take_views(self, values: Tensor) -> Tensor:
        """The same for values of single views, `[B, V, ...]` to `[G, V', ...]`."""
        if self.own_view_shows is None:
            return values[:, self.removed :]
        return values[:, self.pairs(values.shape[1]).to(values.device)].flatten(0, 1)

    def showing_views(self, views: Tensor, num_views: int) -> Tensor:
        """Take those of `[B', K, V, N', D]` that show another view, in the order of the correspondence."""
        places = [self.place(view, num_views) for view in self.pairs(num_views)[:, 1].tolist()]
        first, count = places[0], len(places)
        return views.narrow(2, first, count) if places == list(range(first, first + count)) else views[:, :, places]

    def references_first(self, views: Tensor) -> Tensor:
        """Bring the views of `[B', K, V, N', D]` from the order of the attention into that of the correspondence."""
        return views.roll(self.references_last, dims=2) if self.references_last else views
