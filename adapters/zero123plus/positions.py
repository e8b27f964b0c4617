"""The map of positions of Zero123++: its first convolution runs over the reference, and over a canvas of six views.

Axes: C channels, h w cells of one view; the canvas is [3h, 2w], the reference has a grid of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cameo.adapters.common.positions import PositionMap, set_position, sincos
from cameo.adapters.zero123plus.layers import unet_name
from cameo.errors import ShapeError

__all__ = ["TilePositionMap", "set_tile_position", "view_code"]

ROWS, COLUMNS = 3, 2
NUM_VIEWS = 1 + ROWS * COLUMNS


def view_code(view: int, channels: int) -> Tensor:
    """Return the constant of one view, `[C]`, by which tiles are told apart; view 0 is the reference.

    Cosines and sines of the multiples of the view's seventh of a turn: over seven successive multiples the codes of any
    two views are orthogonal.

    Example:
        >>> codes = torch.stack([view_code(view, 14) for view in range(7)])
        >>> torch.allclose(codes @ codes.T, 7 * torch.eye(7, dtype=torch.float64))
        True
    """
    angles = 2 * math.pi * view / NUM_VIEWS * torch.arange(channels // 2, dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()])


class TilePositionMap(PositionMap):
    """`PositionMap` that begins anew in each tile of the canvas, plus the constant of the view (`view_code`).

    Views are square, so a grid of three to two is the canvas, and a square one the reference. Both are measured in
    cells of a tile of `tile_size` cells, so that the same place of a view has the same coordinates in the reference and
    in a tile, at any image size.

    Example:
        >>> built = TilePositionMap(tile_size=8)
        >>> canvas, reference = built.build(16, 24, 16), built.build(16, 8, 8)
        >>> torch.equal(canvas[:, 8:16, :8] - view_code(3, 16)[:, None, None], reference - view_code(0, 16)[:, None, None])
        True

    Args:
        tile_size: cells per side of a tile, at the image size that the U-Net was made for.
    """

    def __init__(self, tile_size: int) -> None:
        super().__init__()
        self.tile_size = tile_size

    def build(self, channels: int, height: int, width: int) -> Tensor:
        """Map `[C, 3h, 2h]` of a canvas or `[C, h', h']` of a reference, in float64 on the CPU.

        Raises:
            ShapeError: for another aspect.
        """
        if height == width:
            return self._view(0, channels, height)
        if height * COLUMNS != width * ROWS or height % ROWS:
            raise ShapeError(
                "sample", expected=f"[B, C, {ROWS}h, {COLUMNS}h] or [B, C, h, h]", got=(channels, height, width)
            )
        views = [self._view(1 + tile, channels, height // ROWS) for tile in range(ROWS * COLUMNS)]
        rows = [torch.cat(views[start : start + COLUMNS], dim=2) for start in range(0, len(views), COLUMNS)]
        return torch.cat(rows, dim=1)

    def _view(self, view: int, channels: int, cells: int) -> Tensor:
        centres = (torch.arange(cells, dtype=torch.float64) + 0.5) * self.tile_size / cells - 0.5
        return sincos(centres, centres, channels) + view_code(view, channels)[:, None, None]


def set_tile_position(model: nn.Module, position: str) -> None:
    """Call `set_position` with a `TilePositionMap` for a U-Net, or for the one in the published wrapper, in place.

    Example:
        >>> from cameo.adapters.common.positions import get_position
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("zero123plus").build("tiny").unet
        >>> set_tile_position(unet, "none")
        >>> get_position(unet)
        'none'
    """
    unet = model.get_submodule(unet_name(model))
    size = unet.config.sample_size  # type: ignore[union-attr]
    side = size[1] // COLUMNS if isinstance(size, tuple | list) else size
    set_position(unet, position, TilePositionMap(int(side or 1)))  # type: ignore[arg-type]
