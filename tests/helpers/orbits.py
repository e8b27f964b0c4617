"""Cameras on an orbit, written out by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def orbit(
    azimuth: float, elevation: float, distance: float = 1.0, centre: tuple[float, float, float] = (0, 0, 0)
) -> Tensor:
    """World-to-camera matrix that looks at `centre`; azimuth 0 is -y, 90 is +x, z is up."""
    a, e = math.radians(azimuth), math.radians(elevation)
    backward = torch.tensor([math.sin(a) * math.cos(e), -math.cos(a) * math.cos(e), math.sin(e)], dtype=torch.float64)
    right = torch.tensor([math.cos(a), math.sin(a), 0.0], dtype=torch.float64)
    down = torch.linalg.cross(-backward, right)
    world_to_camera = torch.eye(4, dtype=torch.float64)
    world_to_camera[:3, :3] = torch.stack([right, down, -backward])
    world_to_camera[:3, 3] = -world_to_camera[:3, :3] @ (
        torch.tensor(centre, dtype=torch.float64) + distance * backward
    )
    return world_to_camera


def ring(*azimuths: float, **options: Any) -> Tensor:
    return torch.stack([orbit(azimuth, **options) for azimuth in azimuths])[None]


UP = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
