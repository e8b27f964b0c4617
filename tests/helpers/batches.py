"""Hand-made batches."""

from __future__ import annotations

from typing import Any

import torch


def make_batch(samples: int = 2, views: int = 3, size: int = 64, seed: int = 0) -> dict[str, Any]:
    """A wall seen by cameras that stand side by side, with random pictures and exact depth."""
    generator = torch.Generator().manual_seed(seed)
    intrinsics = torch.tensor([[float(size), 0, size / 2], [0, float(size), size / 2], [0, 0, 1]])
    extrinsics = torch.eye(4).repeat(samples, views, 1, 1)
    extrinsics[:, :, 0, 3] = -0.25 * torch.arange(views)
    return {
        "images": torch.rand(samples, views, 3, size, size, generator=generator),
        "intrinsics": intrinsics.expand(samples, views, 3, 3).clone(),
        "extrinsics": extrinsics,
        "depth": torch.full((samples, views, 1, size, size), 2.0),
        "num_reference_views": 1,
        "key": [f"wall-{index}" for index in range(samples)],
    }
