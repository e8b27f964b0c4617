"""Cameras and depth for the tests of geometry."""

from __future__ import annotations

import torch
from torch import Tensor


def random_cameras(batch: int = 2, views: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, views)
    rotation, _ = torch.linalg.qr(torch.randn(*shape, 3, 3, generator=generator, dtype=torch.float64))
    rotation[..., 0] *= torch.linalg.det(rotation)[..., None]
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(*shape, 1, 1)
    extrinsics[..., :3, :3] = rotation
    extrinsics[..., :3, 3] = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    intrinsics = torch.tensor([[40.0, 0, 10], [0, 44, 7], [0, 0, 1]], dtype=torch.float64).repeat(*shape, 1, 1)
    intrinsics[..., 0, 2] += torch.rand(shape, generator=generator, dtype=torch.float64)
    return intrinsics, extrinsics


def random_depth(batch: int = 2, views: int = 3, height: int = 6, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 1 + torch.rand(batch, views, 1, height, width, generator=generator, dtype=torch.float64)


def camera_towards_x() -> tuple[Tensor, Tensor]:
    """Camera at (1, 2, 3) that looks along world +x, with world y down: its right is world -z."""
    intrinsics = torch.tensor([[100.0, 0, 32], [0, 100, 24], [0, 0, 1]])
    extrinsics = torch.tensor([[0.0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]])
    return intrinsics[None, None], extrinsics[None, None]


def looking_at(positions: list[list[float]], target: list[float]) -> Tensor:
    """Upright cameras (z up) at `positions` that look at `target`, `[1, V, 4, 4]` float64."""
    centre = torch.tensor(positions, dtype=torch.float64)
    forward = torch.nn.functional.normalize(torch.tensor(target, dtype=torch.float64) - centre, dim=-1)
    right = torch.linalg.cross(forward, torch.tensor([0.0, 0, 1], dtype=torch.float64).expand_as(forward))
    right = torch.nn.functional.normalize(right, dim=-1)
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(len(positions), 1, 1)
    extrinsics[:, :3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=1)
    extrinsics[:, :3, 3:] = -extrinsics[:, :3, :3] @ centre[..., None]
    return extrinsics[None]


def flat_depth(*metres: float) -> Tensor:
    return torch.tensor(metres, dtype=torch.float64)[None, :, None, None, None].expand(1, len(metres), 1, 4, 4).clone()
