"""Which views of a correspondence an attention call holds, in which order, and between which it is supervised.

Axes: B samples, V views of the correspondence, V' views in folded form, F views that show another one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cameo.attention.layouts.pattern import Pattern
from cameo.errors import as_integer

__all__ = ["ViewOrder"]

SETTINGS = (
    "unsupervised_views",
    "references_last",
    "own_view_shows",
    "references_absent",
    "reference_keys",
    "reference_queries",
)


@dataclass(frozen=True)
class ViewOrder:
    """The views of a `TokenLayout`; the settings are explained there.

    Example:
        >>> [ViewOrder(references_last=1).place(view, num_views=3) for view in range(3)]
        [2, 0, 1]

    Attributes:
        group_count: number of groups of views that are kept apart, where the views of each follow on each other.
        group_size: number of views of each group, where the groups take turns. Both None: all views are one group.
    """

    unsupervised_views: int = 0
    references_last: int = 0
    own_view_shows: int | None = None
    references_absent: int = 0
    reference_keys: int = 0
    reference_queries: int = 0
    group_count: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        for name in SETTINGS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_integer(name, getattr(self, name), least=0))

    def check(self, key: Pattern) -> None:
        """Raise a ValueError if the settings contradict each other or the pattern of the keys."""
        extra, given = len(key.extra), self.settings()
        if extra and self.unsupervised_views:
            raise key.error("unsupervised_views cannot go with views that have their own grid")
        if extra and self.references_last not in (0, extra):
            raise key.error(f"references_last: expected 0 or the {extra} views that have their own grid")
        if self.references_last and self.unsupervised_views not in (0, self.references_last):
            raise ValueError(
                f"unsupervised_views: expected 0 or references_last={self.references_last}, got "
                f"{self.unsupervised_views}"
            )
        if key.groups and given:
            name = next(iter(given))
            raise key.error(f"{name}={given[name]} cannot go with {' '.join(key.groups)}, which keeps views apart")
        self._check_references(others=given.keys() - {"reference_keys", "reference_queries"})
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

    def _check_references(self, others: set[str]) -> None:
        if self.reference_queries not in (0, self.reference_keys):
            raise ValueError(
                f"reference_queries: expected 0 or reference_keys={self.reference_keys}, got {self.reference_queries}"
            )
        if self.reference_keys and others:
            raise ValueError(
                f"reference_keys cannot go with {', '.join(sorted(others))}: it says itself of which views there are "
                "queries and keys"
            )

    def unsupervised(self, reach: str, normalize: str, num_views: int | None, reduction: str) -> str | None:
        """Return why the attention cannot be supervised, as `TokenLayout.refusal`, or None if it can."""
        if reduction == "released" and (self.group_count or self.group_size):
            return (
                'reduction="released" averages reference and target views apart, and here other views are; use "mean"'
            )
        if self.reference_keys and reach == "cell":
            return "a query reaches one token of each reference view, so a softmax per view is constant"
        if self.reference_keys and normalize == "all_views":
            return 'the keys hold the reference views alone, which are supervised one by one; use normalize="per_view"'
        if reach == "cell" and self.own_view_shows is not None:
            return "a query reaches one token of its own view, so the softmax is constant"
        if reach == "cell" and normalize == "per_view":
            constant = "a query reaches one token per view, so a softmax per view is constant"
            return f'{constant}; use normalize="all_views"'
        together = num_views if not self.group_count or num_views is None else num_views // self.group_count
        if reach == "cell" and (self.group_size or together) == 2:
            return "with 2 views a query reaches one token of other views, so the softmax is constant"
        return None

    def settings(self) -> dict[str, int]:
        """Return the settings that differ from their default, as keywords of a `TokenLayout`."""
        return {name: getattr(self, name) for name in SETTINGS if getattr(self, name) != getattr(ViewOrder, name)}

    @property
    def removed(self) -> int:
        """How many of the first views of the correspondence are in the attention, but are not supervised."""
        return self.references_last if self.unsupervised_views else 0

    @property
    def beyond(self) -> int:
        """How many of the last views of the attention are in no correspondence."""
        return 0 if self.references_last else self.unsupervised_views

    @property
    def without_queries(self) -> int:
        """How many of the first views of the correspondence have keys and no queries, as `reference_keys` says."""
        return 0 if self.reference_queries else self.reference_keys

    @property
    def least(self) -> int:
        """The views of a correspondence must be more than so many."""
        if self.own_view_shows is None:
            return max(self.references_last, self.reference_keys)
        shows_itself = self.own_view_shows >= self.references_absent
        return max(self.references_last, self.own_view_shows, self.references_absent + shows_itself)

    def attended(self, num_views: int, of: str) -> range:
        """Return the views of the correspondence that have queries or keys (`of`) in the main segment or their own.

        Example:
            >>> order = ViewOrder(reference_keys=1)
            >>> order.attended(4, "query"), order.attended(4, "key")
            (range(1, 4), range(0, 1))
        """
        if not self.reference_keys:
            return range(self.references_absent, num_views)
        return range(self.reference_keys) if of == "key" else range(self.without_queries, num_views)

    def place(self, view: int, num_views: int, of: str = "query") -> int:
        """Return the place of a view of the correspondence in the order of the attention."""
        if self.reference_keys:
            return view - self.attended(num_views, of).start
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

    def samples(self, num_views: int) -> Tensor | None:
        """List the views of each of the samples in folded form that one sample becomes, `[F, V']`; None: it stays one.

        Example:
            >>> ViewOrder(group_count=2).samples(6).tolist(), ViewOrder(group_size=2).samples(6).tolist()
            ([[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]])
        """
        if self.own_view_shows is not None:
            return self.pairs(num_views)
        if self.group_count is not None:
            return torch.arange(num_views).reshape(self.group_count, -1)
        if self.group_size is not None:
            return torch.arange(num_views).reshape(self.group_size, -1).T
        return None

    def origin(self, sample: int, view: int, num_views: int) -> tuple[int, int]:
        """Return of which sample and view of the correspondence a view of the folded form is, where reach is "all".

        Example:
            >>> ViewOrder(own_view_shows=0).origin(3, 1, num_views=3)  # each sample has become two
            (1, 2)
        """
        samples = self.samples(num_views)
        if samples is None:
            return sample, view + self.removed
        return sample // len(samples), int(samples[sample % len(samples), view])

    def num_references(self, num_reference_views: int) -> int:
        """Return how many of the first views of the folded form, in its first sample, are reference views."""
        if self.group_size is not None:
            return min(1, num_reference_views)  # of the first frame
        if self.own_view_shows is not None:
            return int(self.own_view_shows < num_reference_views)
        return max(0, num_reference_views - self.removed)

    def take_pairs(self, values: Tensor) -> Tensor:
        """Bring values of ordered pairs of views `[B, V, V, ...]` to the views of the folded form, `[G, V', V', ...]`.

        G is B, or `B F` where a sample becomes several, see `samples`.
        """
        samples = self.samples(values.shape[1])
        if samples is None:
            return values[:, self.removed :, self.removed :]
        samples = samples.to(values.device)
        return values[:, samples[:, :, None], samples[:, None, :]].flatten(0, 1)

    def take_views(self, values: Tensor) -> Tensor:
        """The same for values of single views, `[B, V, ...]` to `[G, V', ...]`."""
        samples = self.samples(values.shape[1])
        if samples is None:
            return values[:, self.removed :]
        return values[:, samples.to(values.device)].flatten(0, 1)

    def showing_views(self, views: Tensor, num_views: int) -> Tensor:
        """Take those of `[B', K, V, N', D]` that show another view, in the order of the correspondence."""
        places = [self.place(view, num_views) for view in self.pairs(num_views)[:, 1].tolist()]
        first, count = places[0], len(places)
        return views.narrow(2, first, count) if places == list(range(first, first + count)) else views[:, :, places]

    def references_first(self, views: Tensor) -> Tensor:
        """Bring the views of `[B', K, V, N', D]` from the order of the attention into that of the correspondence."""
        return views.roll(self.references_last, dims=2) if self.references_last else views
