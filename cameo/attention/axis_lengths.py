"""The length of every axis of a token layout, for a batch and the token grids of its views.

Axes: as in `cameo.attention.layout`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cameo.attention.axes import num_positions
from cameo.attention.pattern import Pattern
from cameo.attention.view_order import ViewOrder
from cameo.geometry.grids import TokenGrids

__all__ = ["axis_lengths"]


def axis_lengths(
    shown: str,
    query: Pattern,
    key: Pattern,
    given: Mapping[str, int | None],
    order: ViewOrder,
    *,
    batch: int,
    token_grids: TokenGrids,
) -> dict[str, int]:
    """Return the length of every axis for this batch and these token grids, 0 for the one that is open.

    Args:
        shown: the layout, for messages.
        query, key: its patterns.
        given: its lengths.
        order: the order of its views.
        batch, token_grids: as in `TokenLayout.split_query`.

    Raises:
        ValueError: the token grids do not fit the patterns.
    """
    extra, views = key.extra, query.views
    attended = token_grids[order.references_absent :]
    ordered = (*attended[order.references_last :], *attended[: order.references_last])
    main = ordered[: max(0, len(ordered) - len(extra))]
    tiles = None if views == ("v",) else math.prod(given[name] or 0 for name in views)
    expected = None if tiles is None else tiles - order.beyond + len(extra) + order.references_absent
    least = max(len(extra), order.least)
    if len(token_grids) <= least or expected not in (None, len(token_grids)):
        needs = f"more than {least}" if expected is None else expected
        raise ValueError(f"token_grids: {shown} needs {needs} views, got {len(token_grids)}: {tuple(token_grids)}")
    if order.own_view_shows is not None and len(set(token_grids)) > 1:
        raise ValueError(
            f"token_grids: the tokens of a view stand for those of view {order.own_view_shows} too, so all views "
            f"have one token grid, got {tuple(token_grids)}"
        )
    if len(set(main)) > 1:
        raise ValueError(
            f"token_grids: the {len(main)} views of segment {' '.join(key.main)} share one token grid, "
            f"got {main}. A view with its own grid is a segment of its own, as h' w'"
        )
    known = {name: 0 if length is None else length for name, length in given.items()}
    lengths = {**known, "b": batch, "h": main[0][0], "w": main[0][1]}
    if tiles is None:
        lengths["v"] = len(main) + order.beyond
    lengths["u"] = num_positions(views, lengths)
    for segment, (height, width) in zip(extra, ordered[len(main) :], strict=True):
        lengths |= {name: height if name.startswith("h") else width for name in segment}
    return lengths
