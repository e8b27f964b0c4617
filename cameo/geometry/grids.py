"""Token grids: the number of rows and columns of tokens, or of other cells, of an image."""

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
    """Return a grid size, given as an int or as ``(h, w)``, as two integers of at least 1.

    Example:
        >>> as_grid("token_grid", 4)
        (4, 4)

    Raises:
        ValueError: the size is neither; the message begins with `name`.
    """
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
