"""Covisible pixels, against a plain loop."""

from __future__ import annotations

import pytest
import torch

from cameo.errors import DataError
from cameo.probing.denoising import covisible_pixels
from tests.helpers.batches import make_batch


def test_covisible_pixels_are_those_of_a_plain_loop() -> None:
    """A wall at z = 4 with a post at z = 2 before it, seen by three cameras side by side."""
    size, focal = 16, 16.0
    batch = make_batch(samples=1, views=3, size=size)
    shifts = [0.0, 0.5, 1.0]
    batch["extrinsics"][0, :, 0, 3] = -torch.tensor(shifts)
    post = (0.2, 0.8)  # x range in the world, full height
    for view, shift in enumerate(shifts):
        for column in range(size):
            direction = (column + 0.5 - size / 2) / focal
            x = shift + 2 * direction
            batch["depth"][0, view, 0, :, column] = 2.0 if post[0] <= x < post[1] else 4.0
    batch["num_reference_views"] = 2
    seen = covisible_pixels(batch)
    assert seen.shape == (1, 3, 1, size, size)
    assert not seen[0, :2].any()
    for column in range(size):
        z = float(batch["depth"][0, 2, 0, 0, column])
        x = shifts[2] + z * (column + 0.5 - size / 2) / focal
        # The shifts are whole pixels at both depths, so every point lands on the center of a pixel.
        landings = [(r, focal * (x - shifts[r]) / z + size / 2) for r in range(2)]
        expected = any(0 <= at < size and float(batch["depth"][0, r, 0, 0, int(at)]) == z for r, at in landings)
        assert seen[0, 2, 0, :, column].tolist() == [expected] * size, column
    assert 0 < int(seen[0, 2].sum()) < size * size


def test_covisible_pixels_need_depth() -> None:
    batch = make_batch()
    del batch["depth"]
    with pytest.raises(DataError, match=r"sample \['wall-0', 'wall-1'\]: has no depth, and evaluation"):
        covisible_pixels(batch)
