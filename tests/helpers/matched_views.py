"""Views whose correspondence is made in both ways, from depth and from point maps."""

from __future__ import annotations

import torch
from torch import Tensor

from cameo.correspondence import Correspondence
from cameo.correspondence.correspondence import GridSize
from cameo.geometry import unproject


def two_views(right: float = 0.0, ahead: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two cameras that look along +z; the second is moved."""
    intrinsics = torch.tensor([[64.0, 0, 32], [0, 64, 32], [0, 0, 1]]).repeat(1, 2, 1, 1)
    extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
    extrinsics[0, 1, 0, 3], extrinsics[0, 1, 2, 3] = -right, -ahead
    return intrinsics, extrinsics


def wall(depth: float = 2.0) -> Tensor:
    return torch.full((1, 2, 1, 64, 64), depth)


def both_ways(rooms: dict[str, Tensor], token_grid: GridSize) -> list[Correspondence]:
    """From depth, then from point maps."""
    points = unproject(**rooms)
    return [
        Correspondence.from_depth(**rooms, token_grid=token_grid),
        Correspondence.from_point_maps(points, token_grid=token_grid),
    ]
