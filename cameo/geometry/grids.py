"""Token grids: how many rows and columns of tokens, or other cells, an image has."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from cameo.errors import as_integer

__all__ = ["TokenGrid", "TokenGrids", "as_grid", "as_grids"]

# Rows and columns (h, w) of one view.
TokenGrid = tuple[int, int]
# Those of each view of a sample.
TokenGrids = tuple[TokenGrid, ...]


def as_grid(name: str, size: object) -> tuple[int, int]:
    """Read a grid size given as an int or as ``(h, w)``."""
    grid = size if isinstance(size, (tuple, list)) else (size, size)
    try:
        height, width = [as_integer(name, side, least=1) for side in grid]
    except ValueError as error:
        raise ValueError(f"{name}: expected a positive int or (h, w), got {size!r}") from error
    return height, width


def as_grids(name: str, sizes: Iterable[object]) -> TokenGrids:
    """Read the grid sizes of several views, each given as an int or as ``(h, w)``.

    Example:
        >>> as_grids("token_grids", [(2, 3), 4])
        ((2, 3), (4, 4))
    """
    return tuple(map(functools.partial(as_grid, name), sizes))
