"""Angles between views, surface points, and the chance of uniform attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from cameo import Correspondence, TokenLayout
from cameo.probing.hits import attention_maps, count_hits
from cameo.probing.truth import TrueMatches, angle_bins, surface_points, view_angles
from tests.helpers.batches import make_batch
from tests.helpers.matches import random_matches


def test_view_angles_are_those_between_the_optical_axes() -> None:
    rotations = Rotation.random(5, random_state=np.random.default_rng(0))
    extrinsics = torch.eye(4).repeat(1, 5, 1, 1)
    extrinsics[0, :, :3, :3] = torch.tensor(rotations.as_matrix(), dtype=torch.float32)
    extrinsics[0, :, :3, 3] = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    axes = rotations.inv().apply([0, 0, 1])  # in the world
    expected = np.degrees(np.arccos(np.clip(axes @ axes.T, -1, 1)))
    torch.testing.assert_close(view_angles(extrinsics)[0], torch.tensor(expected), rtol=0, atol=2e-5)


def test_an_angle_on_a_limit_belongs_to_the_bin_above() -> None:
    degrees = [0, 14.9, 15, 29.9, 30, 60, 180]
    extrinsics = torch.eye(4).repeat(1, len(degrees), 1, 1)
    extrinsics[0, :, :3, :3] = torch.tensor(
        Rotation.from_rotvec([[0, one, 0] for one in degrees], degrees=True).as_matrix()
    )
    assert angle_bins(extrinsics)[0, 0].tolist() == [0, 0, 1, 1, 2, 3, 3]


def loop_chance(match: Correspondence, groups: Tensor, within: tuple[int, ...]) -> Tensor:
    """Share of the key view's tokens within some tokens of each match, one token at a time."""
    total = torch.zeros(match.batch_size, 4, len(within), dtype=torch.float64)
    for b, i, j, x in (match.index >= 0).nonzero().tolist():
        (height, width), target = match.token_grids[j], int(match.index[b, i, j, x])
        away = [
            max(abs(row - target // width), abs(column - target % width))
            for row in range(height)
            for column in range(width)
        ]
        for column, limit in enumerate(within):
            total[b, groups[b, i, j], column] += sum(distance <= limit for distance in away) / (height * width)
    return total


@pytest.mark.parametrize("token_grids", [((3, 4),) * 3, ((2, 5), (3, 3), (3, 3)), ((1, 7),) * 2])
def test_chance_is_that_of_a_plain_loop(token_grids: Any) -> None:
    match = random_matches(2, token_grids)
    views = len(token_grids)
    groups = torch.randint(4, (2, views, views), generator=torch.Generator().manual_seed(1))
    true_matches = TrueMatches(match, groups, 4)
    torch.testing.assert_close(true_matches.chance((0, 1, 2)), loop_chance(match, groups, (0, 1, 2)))
    for b, group in ((0, 0), (1, 3)):
        assert true_matches.pairs[b, group] == int((match.matched[b] & (groups[b] == group)[..., None]).sum())


def test_distances_in_the_world_are_those_of_a_plain_loop() -> None:
    batch = make_batch(samples=2, views=2, size=16)
    batch["depth"] = 1.5 + torch.rand(2, 2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(
        -1, -1, -1, 16, -1
    )
    batch["extrinsics"][:, 1, :3, :3] = torch.tensor(Rotation.from_euler("y", 5, degrees=True).as_matrix())
    token_grids, near = ((8, 8),) * 2, 0.15
    points = surface_points(batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grids)
    match = random_matches(2, token_grids)
    groups = torch.zeros(2, 2, 2, dtype=torch.long)
    true_matches = TrueMatches.of_layer(TokenLayout("b (v h w)"), match, groups, 1, points)
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, 1, 2, 64, 3, generator=generator) for _ in range(2))
    hits = count_hits(query, key, true_matches, None, 3.0, (1,), near=near)["mean"]
    maps = attention_maps(query, key, token_grids, None, 3.0)["mean"]
    expected, chance, ceiling = (torch.zeros(2) for _ in range(3))
    for b, i, j, x in match.matched.nonzero().tolist():
        away = (points[b, j] - points[b, i, x]).norm(dim=-1) <= near
        expected[b] += away[maps[b, 0, i, x, j].argmax()]
        chance[b] += away.float().mean()
        ceiling[b] += away[match.index[b, i, j, x]]
    assert hits[0, :, 0, 1].tolist() == expected.tolist()
    assert 0 < expected.sum() < true_matches.pairs.sum()
    torch.testing.assert_close(true_matches.chance((1,), near)[:, 0, 1], chance.double(), rtol=1e-5, atol=0)
    assert true_matches.ceiling(near)[:, 0].tolist() == ceiling.tolist()


def test_surface_points_are_where_the_camera_sees_them() -> None:
    batch = make_batch(samples=1, views=2, size=8)
    batch["depth"][0, 1, 0, :4] = 0  # not measured
    points = surface_points(batch["depth"], batch["intrinsics"], batch["extrinsics"], ((2, 2), (1, 2)))
    torch.testing.assert_close(points[0, 0, 0], torch.tensor([-0.5, -0.5, 2.0]))
    torch.testing.assert_close(points[0, 0, 3], torch.tensor([0.5, 0.5, 2.0]))
    assert points[0, 1, 2:].isnan().all()  # beyond its two tokens
    # Its camera stands at x = 0.25, and both tokens have their center on the lower, measured half.
    torch.testing.assert_close(points[0, 1, 0], torch.tensor([-0.25, 0.0, 2.0]))
