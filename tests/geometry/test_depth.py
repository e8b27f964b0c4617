"""Depth read between pixels never mixes two surfaces."""

from __future__ import annotations

import math

import pytest
import torch

from cameo.errors import ShapeError
from cameo.geometry import pixel_grid
from cameo.geometry.depth import sample_depth


def test_sample_depth_is_exact_on_planes():
    # z = 1 / (0.5 + 0.01 x - 0.02 y): a slanted plane, read between pixels and up to the image border.
    grid = pixel_grid(8, 10, dtype=torch.float64, device="cpu")
    plane = torch.tensor([0.01, -0.02], dtype=torch.float64)
    depth = 1 / (0.5 + grid @ plane)
    generator = torch.Generator().manual_seed(0)
    xy = torch.rand(1, 1, 50, 2, generator=generator, dtype=torch.float64) * torch.tensor([9.99, 7.99])
    torch.testing.assert_close(sample_depth(depth[None, None, None], xy), 1 / (0.5 + xy @ plane))


def test_sample_depth_takes_one_side_of_an_edge():
    depth = torch.tensor([1.0, 1, 1, 4, 4, 4]).expand(1, 1, 1, 6, 6)
    x = torch.linspace(0.05, 5.95, 60)  # without the edge itself, where either side is right
    xy = torch.stack([x, torch.full_like(x, 3.0)], dim=-1)[None, None]
    assert sample_depth(depth, xy).flatten().tolist() == [1.0 if a < 3 else 4.0 for a in x.tolist()]


def test_sample_depth_follows_the_surface_with_most_weight():
    depth = torch.full((1, 1, 1, 2, 2), 1.0)
    depth[..., 0, 0] = 4.0
    # In the middle all four pixels are equally near and three agree; in the corner the single one has the most weight.
    xy = torch.tensor([[1.0, 1.0], [0.9, 0.9], [0.6, 0.6]])[None, None]
    assert sample_depth(depth, xy).flatten().tolist() == [1.0, 1.0, 4.0]


def test_sample_depth_outside_and_missing():
    depth = torch.full((1, 1, 1, 4, 4), 2.0)
    depth[..., :2, :2] = 0
    xy = torch.tensor([[-0.1, 1], [4.0, 1], [1, 4.5], [math.nan, 1], [0.9, 0.9], [2.0, 2.0]])[None, None]
    sampled = sample_depth(depth, xy).flatten()
    assert sampled[:5].isnan().all()
    assert sampled[5] == 2.0
    with pytest.raises(ShapeError, match="xy: expected"):
        sample_depth(depth, xy[0])
    with pytest.raises(ShapeError, match="depth: expected"):
        sample_depth(depth[0], xy)
