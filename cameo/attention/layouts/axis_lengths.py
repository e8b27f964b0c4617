"""The length of every axis of a token layout, for a batch and the token grids of its views.

Axes: as in `cameo.attention.layout`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cameo.attention.layouts.axes import num_positions
from cameo.attention.layouts.pattern import Pattern
from cameo.attention.layouts.view_order import ViewOrder
from cameo.geometry.grids import TokenGrids

__all__ = ["axis_lengths"]


def axis_lengths(
    shown: str,
    query: Pattern,
    key: Pattern,
    given: Mapping[str, int | None],
    order: ViewOrder,
    *,
    of: str,
    batch: int,
    token_grids: TokenGrids,
) -> dict[str, int]:
    """Return the length of every axis for this batch and these token grids, 0 for the one that is open.

    Args:
        shown: the layout, for messages.
        query, key: its patterns.
        given: its lengths.
        order: the order of its views.
        of: "query" or "key".
        batch, token_grids: as in `TokenLayout.split_query`.

    Raises:
        ValueError: the token grids do not fit the patterns.
    """
    extra, axes = key.extra, (*query.groups, *query.views)
    attended = tuple(token_grids[view] for view in order.attended(len(token_grids), of))
    ordered = (*attended[order.references_last :], *attended[: order.references_last])
    main = ordered[: max(0, len(ordered) - len(extra))]
    tiles = math.prod(given[name] or 0 for name in axes if name != "v")
    beside = len(extra) + order.references_absent - order.beyond + order.without_queries
    expected = None if "v" in axes else tiles + beside
    least = max(len(extra), order.least)
    fits = (len(token_grids) - beside) % tiles == 0 if expected is None else len(token_grids) == expected
    if len(token_grids) <= least or not fits:
        multiple = f" and a multiple of {tiles}" if tiles > 1 else ""
        needs = f"more than {least}{multiple}" if expected is None else expected
        raise ValueError(f"token_grids: {shown} needs {needs} views, got {len(token_grids)}: {tuple(token_grids)}")
    if order.own_view_shows is not None and len(set(token_grids)) > 1:
        raise ValueError(
            f"token_grids: the tokens of a view stand for those of view {order.own_view_shows} too, so all views "
            f"have one token grid, got {tuple(token_grids)}"
        )
    if order.reference_keys and query.folded and len(set(token_grids)) > 1:
        raise ValueError(
            f"token_grids: in {shown} a query reaches one {' and one '.join(query.folded)} of the reference views, so "
            f"all views have one token grid, got {tuple(token_grids)}"
        )
    if len(set(main)) > 1:
        raise ValueError(
            f"token_grids: the {len(main)} views of segment {' '.join(key.main)} share one token grid, "
            f"got {main}. A view with its own grid is a segment of its own, as h' w'"
        )
    known = {name: 0 if length is None else length for name, length in given.items()}
    lengths = {**known, "b": batch, "h": main[0][0], "w": main[0][1]}
    if "v" in axes:
        lengths["v"] = (len(main) + order.beyond) // tiles
    lengths["u"] = num_positions(query.views, lengths)
    if order.reference_keys and of == "key":
        lengths |= {"u": len(token_grids) - order.without_queries, "v": order.reference_keys}
    for segment, (height, width) in zip(extra, ordered[len(main) :], strict=True):
        lengths |= {name: height if name.startswith("h") else width for name in segment}
    return lengths
