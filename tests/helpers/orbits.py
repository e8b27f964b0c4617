"""Cameras on an orbit, written out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cameo.data import RoomRig
from cameo.scenes.room_rigs import rigged_room
from cameo.scenes.rooms import bare_room


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


def views_in_a_room(seed: int) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Views of a rig in a room at poses of their own: extrinsics `[1, 4, 4, 4]`, centers `[4, 3]`, and where they look.

    The point is where the optical axes of the first two views cross, by hand: the foot of the common perpendicular.
    """
    rig = RoomRig.fan(4, azimuths=(0, -30, 25, 50), elevations=(0, 8, -4, 0), jitter=(8, 5))
    extrinsics = rigged_room(rig, np.random.default_rng(seed), bare_room, (32, 32))[2]
    centers = np.linalg.inv(extrinsics)[:, :3, 3]
    first, second = extrinsics[0, 2, :3], extrinsics[1, 2, :3]
    across = np.cross(first, second)
    along = np.linalg.solve(np.stack([first, -second, across], axis=1), centers[1] - centers[0])[0]
    return torch.from_numpy(extrinsics).float()[None], centers, centers[0] + along * first
