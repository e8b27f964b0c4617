"""Where the tokens of views are in an attention call, and which views they are of.

Axes: as in `cameo.attention.layout`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cameo.attention.layouts.axes import first_position, num_positions, position_of
from cameo.attention.layouts.open_segment import open_length
from cameo.attention.layouts.pattern import Pattern, Segment
from cameo.attention.layouts.view_order import ViewOrder
from cameo.geometry.grids import TokenGrids

__all__ = ["TokenPlaces", "view_axes"]


def view_axes(pattern: Pattern) -> Segment:
    """Return the axes of all views, in the order of the views of a correspondence, slowest first; `v` is the fastest.

    Example:
        >>> view_axes(Pattern("(b v) (f h w)", {"f": 8}, groups=("v",)))
        ('f', 'v')
    """
    return tuple(sorted((*pattern.groups, *pattern.views), key="v".__eq__))


@dataclass(frozen=True)
class TokenPlaces:
    """The queries or keys of one call.

    Attributes:
        of: "query" or "key".
        pattern: its pattern.
        axes: of all views, see `view_axes`.
        extra: segments of the keys that are one more view with its own grid.
        order: the order of the views.
        lengths: length of every axis.
        token_grids: token grid of each view of the correspondence.
    """

    of: str
    pattern: Pattern
    axes: Segment
    extra: Sequence[Segment]
    order: ViewOrder
    lengths: dict[str, int]
    token_grids: TokenGrids

    def of_call(self, given: Mapping[str, int | None], tokens: int | None) -> TokenPlaces:
        """Return those of a call of so many tokens, whose open length follows from it.

        Args:
            given: the lengths of the layout, None for the one that is open.
            tokens: L of the call.

        Raises:
            ValueError: `tokens` is needed and not given, or is too small.
        """
        return replace(self, lengths=self.lengths | open_length(self.pattern, given, self.lengths, tokens))

    def all(self, views: Sequence[int]) -> Tensor:
        """Return sample, view, row and column of every position of the call, [AB, L, 4]; -1 for tokens of other views.

        Args:
            views: those of the correspondence that the call holds.
        """
        length = sum(num_positions(segment, self.lengths) for segment in self.pattern.segments)
        places = torch.full((num_positions(self.pattern.batch, self.lengths), length, 4), -1)
        copies = self.lengths["u"] if "u" in self.pattern.batch else 1
        for view in views:
            axes = [torch.arange(length) for length in (self.lengths["b"], copies, *self.token_grids[view])]
            place = dict(zip("buhw", torch.meshgrid(*axes, indexing="ij"), strict=True))
            here = [place["b"], torch.full_like(place["b"], view), place["h"], place["w"]]
            places[self.position(view, place)] = torch.stack(here, dim=-1)
        return places

    def position(self, view: int, place: dict[str, Any]) -> tuple[Any, Any]:
        """Return attention batch index and token index of tokens of a view; a place has a number or tensor per axis."""
        num_views, place = len(self.token_grids), dict(place)
        main_views = num_views - len(self.extra)
        view = self.order.place(view, num_views, self.of)
        if view < main_views:
            segment = self.pattern.main
            for name in reversed(self.axes):
                view, place[name] = divmod(view, self.lengths[name])
        else:
            segment = self.extra[view - main_views]
            place |= {name: place[name[0]] for name in segment}
        start = first_position(segment, self.pattern, self.lengths)
        lengths = self.lengths
        return position_of(self.pattern.batch, place, lengths), start + position_of(segment, place, lengths)
