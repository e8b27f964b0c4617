"""Epipolar distance and triangulation, against cameras worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cameo.geometry import project
from cameo.geometry.epipolar import epipolar_distance, triangulate

INTRINSICS = torch.tensor([[50.0, 0, 32], [0, 40, 24], [0, 0, 1]]).repeat(3, 1, 1)


def poses() -> Tensor:
    """Three cameras, of which the second stands to the right and the third is also turned."""
    extrinsics = torch.eye(4).repeat(3, 1, 1)
    extrinsics[1, 0, 3] = -1.0
    angle = 0.2
    extrinsics[2, 0, 0] = extrinsics[2, 2, 2] = math.cos(angle)
    extrinsics[2, 0, 2], extrinsics[2, 2, 0] = math.sin(angle), -math.sin(angle)
    extrinsics[2, :3, 3] = torch.tensor([-0.5, 0.3, 0.1])
    return extrinsics


def seen(points: Tensor) -> Tensor:
    xy, _ = project(points.expand(1, 3, -1, -1), INTRINSICS[None], poses()[None])
    return xy[0]  # [3, M, 2]


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (0, 2), (2, 1)])
def test_pixels_of_one_point_are_at_distance_zero(first: int, second: int) -> None:
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) * 2 + torch.tensor([-1.0, -1.0, 3.0])
    xy = seen(points)
    cameras = INTRINSICS[[first, second]], poses()[[first, second]]
    assert epipolar_distance(xy[first], xy[second], *cameras).max() < 1e-3
    beside = epipolar_distance(xy[first], xy[second] + torch.tensor([0.0, 6.0]), *cameras)
    assert beside.min() > 2


def test_along_a_row_only_the_row_counts() -> None:
    here, there = torch.tensor([[10.0, 8.0], [10.0, 8.0]]), torch.tensor([[3.0, 8.0], [3.0, 11.0]])
    distance = epipolar_distance(here, there, INTRINSICS[:2], poses()[:2])
    # Three rows apart: each of the two pixels moves by half of it, so together by 3 / sqrt(2).
    torch.testing.assert_close(distance, torch.tensor([0.0, 3 / math.sqrt(2)]))


def test_cameras_at_one_place_tell_nothing() -> None:
    same = poses()[[0, 0]]
    distance = epipolar_distance(torch.rand(4, 2) * 40, torch.rand(4, 2) * 40, INTRINSICS[:2], same)
    assert torch.equal(distance, torch.zeros(4))


def test_points_are_where_they_are() -> None:
    points = torch.rand(20, 3, generator=torch.Generator().manual_seed(1)) * 2 + torch.tensor([-1.0, -1.0, 3.0])
    xy = seen(points)
    number, view = torch.arange(20), torch.arange(3)
    point, view = number.repeat(3), view.repeat_interleave(20)
    kept = ~((point == 4) & (view > 0))  # the fourth is seen once: it has no depth
    found = triangulate(point[kept], view[kept], xy.flatten(0, 1)[kept], INTRINSICS, poses())
    known = point[kept] != 4
    torch.testing.assert_close(found[known], points[point[kept]][known], rtol=1e-4, atol=1e-4)
    assert found[~known].isnan().all()


def test_rays_that_are_almost_parallel_have_no_point() -> None:
    far = torch.tensor([[0.0, 0.0, 1000.0]])
    xy = seen(far)[:2, 0]
    found = triangulate(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1]), xy, INTRINSICS, poses())
    assert found.isnan().all()
    nothing = torch.zeros(0, dtype=torch.int64)
    assert triangulate(nothing, nothing, torch.zeros(0, 2), INTRINSICS, poses()).shape == (0, 3)
