"""Positions of tokens in the axes of an attention call, and extracting one segment of its tokens.

Axes: as in `cameo.attention.layout`.
"""

from __future__ import annotations

import math
from typing import Any

from einops import rearrange
from torch import Tensor

from cameo.attention.layouts.pattern import Pattern, Segment

__all__ = ["check_place", "first_position", "num_positions", "position_of", "take_segment"]


def check_place(name: str, value: int, limit: int) -> None:
    """Raise a ValueError unless a place along an axis lies within its length; `name` is the argument."""
    if not 0 <= value < limit:
        raise ValueError(f"{name}: expected 0 to {limit - 1}, got {value}")


def take_segment(
    tensor: Tensor,
    pattern: Pattern,
    segment: Segment,
    lengths: dict[str, int],
    *,
    views: Segment,
    grid: Segment,
) -> Tensor:
    """Return one segment of [AB, K, L, D] as [B', K, views, grid, D], without a copy where possible."""
    tensor = tensor.narrow(2, first_position(segment, pattern, lengths), num_positions(segment, lengths))
    copies = "u" if "u" in pattern.batch else ""
    # The axes of a pattern are lower-case, so K and D are free for heads and channels; einops accepts no primes.
    expression = (
        f"({' '.join(pattern.batch)}) K ({' '.join(segment)}) D -> "
        f"{copies} (b {' '.join((*pattern.groups, *pattern.folded))}) K ({' '.join(views)}) ({' '.join(grid)}) D"
    )
    used = {name.replace("'", "1"): lengths[name] for name in {*pattern.batch, *segment}}
    extracted = rearrange(tensor, expression.replace("'", "1"), **used)
    return extracted[0] if copies else extracted


def num_positions(names: Segment, lengths: dict[str, int]) -> int:
    """Return the number of positions along a product of axes: the product of their lengths."""
    return math.prod(lengths[name] for name in names)


def first_position(segment: Segment, pattern: Pattern, lengths: dict[str, int]) -> int:
    """Return the position on the token axis at which a segment begins."""
    return sum(num_positions(other, lengths) for other in pattern.segments[: pattern.segments.index(segment)])


def position_of(names: Segment, place: dict[str, Any], lengths: dict[str, int]) -> Any:
    """Return the position along a product of axes of a place given by axis; the last axis is the fastest.

    A place is a number, or a tensor of them, per axis.
    """
    position: Any = 0
    for name in names:
        position = position * lengths[name] + place[name]
    return position
