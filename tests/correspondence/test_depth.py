"""Matches of depth maps: surface points projected into the other views."""

from __future__ import annotations

import pytest
import torch

from cameo.correspondence import Correspondence
from tests.helpers.matched_views import two_views, wall


def test_depth_hand_computed_shift_and_out_of_frame():
    # 0.5 units right at depth 2 with focal length 64 is 16 pixels, one token of four, to the left.
    match = Correspondence.from_depth(wall(), *two_views(right=0.5), token_grid=4)
    grid = torch.arange(16).view(4, 4)
    expected = torch.full((4, 4), -1)
    expected[:, 1:] = grid[:, :-1]
    assert torch.equal(match.index[0, 0, 1].view(4, 4), expected)
    expected = torch.full((4, 4), -1)
    expected[:, :-1] = grid[:, 1:]
    assert torch.equal(match.index[0, 1, 0].view(4, 4), expected)
    assert (match.index[0, [0, 1], [0, 1]] == -1).all()
    torch.testing.assert_close(match.distance[match.matched], torch.zeros(24))
    assert match.distance[0, 0, 1].view(4, 4)[:, 0].isinf().all()


def test_occluded_points_do_not_match_but_have_a_distance():
    depth = wall()
    depth[0, 1, :, :32] = 1.0
    match = Correspondence.from_depth(depth, *two_views(), token_grid=2)
    assert match.index[0, 0, 1].tolist() == [-1, -1, 2, 3]
    # Token 0 at (16, 16): the surface that hides the point lies half way to the camera.
    point = torch.tensor([-0.5, -0.5, 2.0])
    torch.testing.assert_close(match.distance[0, 0, 1, 0], (point / 2).norm())


def test_points_behind_the_other_camera_do_not_match():
    match = Correspondence.from_depth(wall(), *two_views(ahead=3.0), token_grid=2)
    assert (match.index[0, 0, 1] == -1).all()
    assert match.distance[0, 0, 1].isinf().all()


def test_a_target_token_needs_a_measurement():
    # The hole is the center of the target token; the points are projected beside it, where there is depth.
    depth = wall()
    depth[0, 1, 0, 7:9, 7:9] = 0
    match = Correspondence.from_depth(depth, *two_views(right=0.125), token_grid=4)
    assert match.index[0, 0, 1, 0] == -1
    assert match.distance[0, 0, 1, 0] == 0
    assert match.index[0, 0, 1, 1] == 1
    assert match.index[0, 1, 0, 0] == -1


def test_depth_edges_are_not_averaged():
    # The centers of the middle tokens lie on the edge between depth 1 and depth 4.
    depth = wall(4.0)
    depth[..., :32] = 1.0
    match = Correspondence.from_depth(depth, *two_views(), token_grid=1)
    assert match.index[0, 0, 1].tolist() == [0]
    assert match.distance[0, 0, 1].item() == 0


@pytest.mark.parametrize(("tolerance", "kept"), [(0.01, False), (0.04, True)])
def test_depth_tolerance(tolerance, kept):
    depth = wall()
    depth[0, 1] = 2.06
    match = Correspondence.from_depth(depth, *two_views(), token_grid=4, depth_tolerance=tolerance)
    assert match.matched[0, 0, 1].all() == kept
    assert match.matched[0, 0, 1].any() == kept


def test_a_distant_world_origin_costs_nothing(benchmark):
    room = benchmark.make_room(0)
    depth, intrinsics = room.depth(64).float(), room.intrinsics_at(64).float()
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = torch.tensor([1e5, -2e5, 3e5])
    here = Correspondence.from_depth(depth, intrinsics, room.extrinsics, token_grid=8)
    there = Correspondence.from_depth(depth, intrinsics, room.extrinsics @ shift, token_grid=8)
    assert torch.equal(here.index, there.index)
    assert here.matched.float().mean() > 0.2


def test_depth_reaches_its_goal_on_analytic_rooms(benchmark):
    matchers = {"depth": benchmark.by_depth(), "points": benchmark.by_points()}
    scores = benchmark.measure(matchers, 256, 32, range(2))
    assert scores["depth"].visible > 5000
    assert scores["depth"].recall >= 0.95
    assert scores["depth"].false <= 0.01
    assert scores["depth"].on_token >= 0.98
    # The wrong matches that the cycle check alone keeps are the reason to offer matching by depth.
    assert scores["points"].false > 0.05
