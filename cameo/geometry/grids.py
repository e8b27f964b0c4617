"""Token grids: the number of rows and columns of tokens, or of other cells, of an image."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cameo.errors import ShapeError, as_integer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GridSize",
    "TokenGrid",
    "TokenGrids",
    "as_grid",
    "as_grids",
    "grid_per_view",
    "token_distance",
    "tokens_near",
]

# Rows and columns (h, w) of one view.
TokenGrid = tuple[int, int]
# Those of each view of a sample.
TokenGrids = tuple[TokenGrid, ...]
# No image has more pixels on a side; a larger grid is a mistake that would only end when the memory does.
LONGEST_SIDE = 1 << 14
# One (h, w) or int for all views, or one (h, w) per view.
GridSize = int | tuple[int, int] | Sequence[tuple[int, int]]


def as_grid(name: str, size: object) -> tuple[int, int]:
    """Return a grid size, given as an int or as ``(h, w)``, as two integers from 1 to 16,384.

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
    if max(height, width) > LONGEST_SIDE:
        raise ValueError(f"{name}: expected at most {LONGEST_SIDE} rows and columns, got {size!r}")
    return height, width


def as_grids(name: str, sizes: Iterable[object]) -> TokenGrids:
    """Read the grid sizes of several views, each given as an int or as ``(h, w)``.

    Example:
        >>> as_grids("token_grids", [(2, 3), 4])
        ((2, 3), (4, 4))
    """
    if not isinstance(sizes, Iterable):
        raise TypeError(f"{name}: expected a sequence of grid sizes, one for each view, got {sizes!r}")
    return tuple(map(functools.partial(as_grid, name), sizes))


def grid_per_view(token_grid: GridSize, views: int) -> TokenGrids:
    """Return the token grid of each of a number of views.

    Example:
        >>> grid_per_view(2, views=2), grid_per_view([(1, 2), (3, 4)], views=2)
        (((2, 2), (2, 2)), ((1, 2), (3, 4)))

    Raises:
        ShapeError: there are several grids, but not one for each view.
        ValueError: a size is neither a positive int nor `(h, w)`.
    """
    one_each = isinstance(token_grid, (tuple, list)) and all(isinstance(grid, (tuple, list)) for grid in token_grid)
    if not token_grid or not one_each:
        return (as_grid("token_grid", token_grid),) * views
    grids = as_grids("token_grid", token_grid)  # type: ignore[arg-type]
    if len(grids) != views:
        raise ShapeError("token_grid", expected=f"(h, w), or one (h, w) for each of {views} views", got=str(token_grid))
    return grids


def token_distance(token: Tensor, other: Tensor, width: Tensor) -> Tensor:
    """Distance in tokens of a grid `width` tokens wide: the larger of the row and the column difference.

    Example:
        >>> import torch
        >>> token_distance(torch.tensor([0, 5]), torch.tensor([6, 5]), torch.tensor(4)).tolist()
        [2, 0]
    """
    return (token // width - other // width).abs().maximum((token % width - other % width).abs())


def tokens_near(token: Tensor, limit: int, height: Tensor, width: Tensor) -> Tensor:
    """Return how many tokens of a grid lie within `limit` tokens (`token_distance`) of a token, itself included.

    Example:
        >>> import torch
        >>> tokens_near(torch.tensor([0, 5]), 1, torch.tensor(3), torch.tensor(4)).tolist()
        [4, 9]
    """

    def reached(center: Tensor, length: Tensor) -> Tensor:
        return (center + limit).minimum(length - 1) - (center - limit).clamp(min=0) + 1

    return reached(token // width, height) * reached(token % width, width)
