"""Name the mistake of a layout from the tokens that moved when single cells of the views were changed.

Every known mistake is a suspect: a rule that says which tokens would move if it were made. The movements decide between
the suspects and the layout as it is.

Axes: B samples, V views, h w token grid of a view, AB attention batch, L tokens of the call.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cameo.attention.layout import TokenLayout
from cameo.attention.layouts.pattern import Pattern, Segment
from cameo.checks.rerun import CannotTell
from cameo.geometry.grids import TokenGrids

__all__ = ["MovedTokens", "Suspect", "find_mistake", "share_at", "shown_in_all", "tokens_at"]

# In the right layout the tokens of a cell have at least this mean share of the largest movement. In U-Nets, where a
# change spreads over the tokens around it, they had 0.57 to 1, and those of a transposed grid of 4 x 4 tokens 0.45; in
# transformers 1 and 0.
LEAST_SHARE = 0.5
# Below this mean share other tokens moved than the layout says; between the two it cannot be told.
STRAY_SHARE = 0.25
# Below this share a cell is not where the layout says, if the tokens of one other cell alone moved half as far as any.
LOST_SHARE = 0.1
# A suspect must have so much more of it than the layout as it is.
MARGIN = 0.1
PACKINGS = (2, 3, 4)

Place = tuple[int, int, int, int]


@dataclass(frozen=True)
class MovedTokens:
    """How far the tokens of a call moved when one cell was changed.

    Attributes:
        place: sample, view, row and column of the cell.
        movement: `[AB, L]`, distance of each query or key from where it was.
    """

    place: Place
    movement: Tensor


@dataclass(frozen=True)
class Suspect:
    """A mistake that may have been made, and where the tokens are if it was.

    Attributes:
        kind: "packed cells", "text at the other end", "order of views", "transposed grid" or "order of axes".
        words: what it looks like, with the cure.
        places: `[AB, L, 4]`, sample, view, row and column of each token; -1 for tokens of no view.
    """

    kind: str
    words: str
    places: Tensor


def find_mistake(
    moved: Sequence[MovedTokens], layout: TokenLayout, of: str, *, batch: int, token_grids: TokenGrids
) -> Suspect | None:
    """Return the suspect that says best which tokens moved; None if the layout as it is does.

    Example:
        >>> layout = TokenLayout("b (v h w)")
        >>> tokens = torch.zeros(6, 1, 24)  # of 2 views of 3 x 4 tokens, in truth "b (v w h)"
        >>> places = [(0, 0, 0, 1), (0, 0, 2, 0), (0, 0, 1, 3), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 0, 2)]
        >>> for number, (_, view, row, column) in enumerate(places):
        ...     tokens[number, 0, view * 12 + column * 3 + row] = 1
        >>> moved = [MovedTokens(*pair) for pair in zip(places, tokens)]
        >>> find_mistake(moved, layout, "query", batch=1, token_grids=((3, 4), (3, 4))).kind
        'transposed grid'

    Raises:
        CannotTell: the movement spreads too far over the tokens.

    Args:
        moved: for each cell that was changed.
        layout: the layout that is checked.
        of: "query" or "key".
        batch: number of samples B.
        token_grids: token grid of each view.
    """
    places = layout.places(of, batch=batch, token_grids=token_grids)
    declared = _mean_share(moved, places, layout)
    suspects = [
        *_other_patterns(layout, of, batch, token_grids),
        *_packed(layout, of, places, token_grids),
        *_other_views(moved, layout, places, len(token_grids)),
    ]
    scores = [_mean_share(moved, suspect.places, layout) for suspect in suspects]
    best = max(range(len(suspects)), key=lambda number: scores[number], default=None)
    if best is not None and scores[best] >= max(LEAST_SHARE, declared + MARGIN):
        return suspects[best]
    lost = any(_is_lost(one, places, layout) for one in moved)
    if declared >= LEAST_SHARE and not lost:
        return None
    if declared >= STRAY_SHARE and not lost:
        raise CannotTell(
            f"the tokens of the changed cells moved {declared:.0%} of the way from most tokens to the farthest, too "
            "little for this layout and too much for another. Pass larger images, which have more tokens"
        )
    return Suspect(
        "other",
        "other tokens moved than the layout says, and no known mistake explains which. Compare the pattern with the "
        "reshapes of the model",
        places,
    )


def _mean_share(moved: Sequence[MovedTokens], places: Tensor, layout: TokenLayout) -> float:
    """Mean of `share_at` over all cells that were changed."""
    return sum(share_at(one, places, layout) for one in moved) / len(moved)


def _is_lost(moved: MovedTokens, places: Tensor, layout: TokenLayout) -> bool:
    """Whether the tokens of one other cell alone moved, so that no spreading explains it."""
    largest, middle = moved.movement.max(), moved.movement.median()
    cells = places[moved.movement > (largest + middle) / 2][:, 2:].unique(dim=0).tolist()
    return share_at(moved, places, layout) < LOST_SHARE and len(cells) == 1 and cells[0] != list(moved.place[2:])


def share_at(moved: MovedTokens, places: Tensor, layout: TokenLayout) -> float:
    """Return how far the tokens at a place moved: 1 as far as any, 0 not farther than most.

    A cell of a view that every view carries in its input channels may be at its place in any of them.
    """
    here = tokens_at(moved.place, places, layout)
    largest, middle = moved.movement.max(), moved.movement.median()
    if not here.any() or largest <= middle:
        return 0.0
    return float(((moved.movement[here].max() - middle) / (largest - middle)).clamp(min=0))


def tokens_at(place: Place, places: Tensor, layout: TokenLayout) -> Tensor:
    """Return which tokens `[AB, L]` have a sample, view, row and column."""
    sample, view, *cell = place
    here = (places[..., 0] == sample) & (places[..., 2:] == torch.tensor(cell)).all(-1)
    return here & (places[..., 1] == view) if not shown_in_all(view, layout) else here


def shown_in_all(view: int, layout: TokenLayout) -> bool:
    """Whether every view of the attention shows this one in its own tokens."""
    return view == layout.own_view_shows or view < layout.view_order.references_absent


def _other_patterns(layout: TokenLayout, of: str, batch: int, token_grids: TokenGrids) -> Iterator[Suspect]:
    """The same axes in another order."""
    shape = layout.shape(of, batch=batch, token_grids=token_grids)
    for kind, words, query, key in _rewritings(layout, of):
        try:
            other = TokenLayout(query, key, **layout.view_order.settings(), **layout.lengths)  # type: ignore[arg-type]
            if other == layout or other.shape(of, batch=batch, token_grids=token_grids) != shape:
                continue
            places = other.places(of, batch=batch, token_grids=token_grids)
        except ValueError:  # the order is no layout, or not for these grids
            continue
        yield Suspect(kind, f"{words}. What moved fits {other!r}", places)


def _rewritings(layout: TokenLayout, of: str) -> Iterator[tuple[str, str, str, str]]:
    """Kind, words, and the patterns of queries and keys."""
    query, key = layout.pattern("query"), layout.pattern("key")
    transposed_query, transposed_key = (
        _text(map(_exchanged, side.batch), [map(_exchanged, names) for names in side.segments]) for side in (query, key)
    )
    words = "the token grid is transposed: columns stand where rows should"
    yield "transposed grid", words, transposed_query, transposed_key
    text = any(segment not in (key.main, *key.extra) for segment in key.segments)
    kind, what = (
        ("text at the other end", "tokens of no view, such as text,") if text else ("order of segments", "tokens")
    )
    for order in itertools.permutations(key.segments):
        of_query, of_key = (
            sorted(side.segments, key=functools.partial(_rank, order, side, key)) for side in (query, key)
        )
        words = f"the {what} stand at another end of the token axis"
        yield kind, words, _text(query.batch, of_query), _text(key.batch, of_key)
    side = query if of == "query" else key
    for names in itertools.permutations(side.main):
        text_of_side = _text(side.batch, [names if segment == side.main else segment for segment in side.segments])
        both = (text_of_side, layout.key) if of == "query" else (layout.query, text_of_side)
        yield "order of axes", "the axes of the tokens stand in another order", *both


def _packed(layout: TokenLayout, of: str, places: Tensor, token_grids: TokenGrids) -> Iterator[Suspect]:
    """Square cells of tokens that stand together, in front of the next cell."""
    pattern = layout.pattern(of)
    if pattern.main[-2:] != ("h", "w"):
        return
    apart = layout.views_with_own_grid(len(token_grids))
    height, width = next(grid for view, grid in enumerate(token_grids) if view not in apart)
    inside = (places[..., 1] >= 0) & ~torch.isin(places[..., 1], torch.tensor(apart, dtype=places.dtype))
    number = places[..., 2] * width + places[..., 3]
    for side in PACKINGS:
        if height % side or width % side or side == width:  # cells as wide as the grid are rows as ever
            continue
        cell, within = number // side**2, number % side**2
        row, column = cell // (width // side) * side + within // side, cell % (width // side) * side + within % side
        packed = torch.stack([places[..., 0], places[..., 1], row, column], dim=-1)
        yield Suspect(
            "packed cells",
            f"the tokens of each {side} x {side} cell stand together, as after a reshape to (v h w p q) with p = q = "
            f"{side}, and not row by row. No layout describes that: reorder them to (v h p w q) before the attention, "
            "or supervise a layer in which they stand row by row",
            torch.where(inside[..., None], packed, places),
        )


def _other_views(
    moved: Sequence[MovedTokens], layout: TokenLayout, places: Tensor, num_views: int
) -> Iterator[Suspect]:
    """The views turned by some places, back to front, or in the order in which each was found."""
    orders = [{view: (view - last) % num_views for view in range(num_views)} for last in range(1, num_views)]
    orders.append({view: num_views - 1 - view for view in range(num_views)})
    orders.append(_found_views(moved, layout, places, num_views))
    for number, order in enumerate(orders):
        if len(set(order.values())) < len(order) or all(view == other for view, other in order.items()):
            continue
        shown = ", ".join(f"view {view} where the layout has view {other}" for view, other in order.items())
        cure = f". That is references_last={(layout.references_last + number + 1) % num_views}"
        words = f"the views stand in another order than in the images, {shown}{cure if number + 1 < num_views else ''}"
        yield Suspect("order of views", words, _moved_to(order, places))


def _found_views(moved: Sequence[MovedTokens], layout: TokenLayout, places: Tensor, num_views: int) -> dict[int, int]:
    """For each view that was changed the view of the layout whose tokens moved farthest."""
    found = {}
    for view in sorted({one.place[1] for one in moved if not shown_in_all(one.place[1], layout)}):
        cells = [one for one in moved if one.place[1] == view]
        shares = [_mean_share(cells, _moved_to({view: other}, places), layout) for other in range(num_views)]
        best = max(range(num_views), key=lambda other: shares[other])
        found[view] = best if shares[best] > shares[view] + MARGIN else view
    return found


def _moved_to(order: dict[int, int], places: Tensor) -> Tensor:
    """Which place each token shows if a view stands where the layout has another; other views are left out."""
    views = torch.full_like(places[..., 1], -1)
    for view, other in order.items():
        views[places[..., 1] == other] = view
    return torch.cat([places[..., :1], views[..., None], places[..., 2:]], dim=-1)


def _rank(order: Sequence[Segment], side: Pattern, key: Pattern, segment: Segment) -> int:
    """The place that an order of the segments of the keys gives to a segment of the queries or keys."""
    return order.index(key.main if segment == side.main else segment)


def _text(batch: Iterable[str], segments: Iterable[Iterable[str]]) -> str:
    parts = " ".join(batch), " + ".join(" ".join(segment) for segment in segments)
    return " ".join(f"({part})" if " " in part else part for part in parts)


def _exchanged(name: str) -> str:
    return {"h": "w", "w": "h"}.get(name[0], name[0]) + name[1:] if name.rstrip("'") in "hw" else name
