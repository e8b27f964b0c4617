"""One test of visibility serves the matches, the overlap of views and the warped views."""

from __future__ import annotations

import pytest
import torch

from cameo import Correspondence
from cameo.data import Views, view_overlap
from cameo.evaluation.consistency import warp_error
from cameo.geometry.visibility import DEPTH_TOLERANCE, look_up
from tests.helpers.batches import make_batch


@pytest.mark.parametrize(("share", "visible"), [(0.9, True), (1.1, False)])
def test_all_three_agree_on_where_the_tolerance_ends(share: float, visible: bool) -> None:
    """Two cameras at one place see the same wall, the second one nearer or farther by a share of the tolerance."""
    batch = make_batch(samples=1, views=2, size=16)
    batch["extrinsics"][:, 1] = batch["extrinsics"][:, 0]
    for sign in (-1, 1):
        depth = batch["depth"].clone()
        depth[:, 1] = 2.0 / (1 + sign * share * DEPTH_TOLERANCE)  # of the depth that is seen
        cameras = batch["intrinsics"], batch["extrinsics"]
        match = Correspondence.from_depth(depth, *cameras, token_grid=16)
        assert bool(match.index[0, 0, 1].ge(0).all()) == bool(match.index[0, 0, 1].ge(0).any()) == visible
        views = Views(batch["images"][0], depth[0], cameras[0][0], cameras[1][0], "wall")
        assert view_overlap(views)[0, 1] == float(visible)
        (pair,) = warp_error(batch["images"], depth, *cameras, pairs=[(0, 1)])
        assert pair.pixels == 16 * 16 * visible


def test_nothing_is_visible_behind_the_camera_or_without_measurement() -> None:
    intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 1, 3, 3)
    points = torch.tensor([[0.0, 0, 2], [0, 0, -2], [0, 0, 2]]).expand(1, 1, 3, 3)
    surface = torch.tensor([[[2.0, 2.0, torch.nan]]])
    found = look_up(points, intrinsics, lambda xy, z: surface, DEPTH_TOLERANCE)
    assert found.visible.tolist() == [[[True, False, False]]]
    assert found.xy[0, 0, 1].isnan().all()
