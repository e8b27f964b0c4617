"""How SV3D is told the cameras."""

from __future__ import annotations

import math

import pytest
import torch

from cameo.adapters.sv3d.cameras import orbit_angles
from tests.helpers.orbits import views_in_a_room
from tests.helpers.sv3d_models import batch, orbit, pipeline


def test_angles_of_an_orbit() -> None:
    given = orbit([30, 90, 20, 30], [10, -5, 60, 10])
    numbers = pipeline().camera_numbers(given)[0]
    polar, azimuth = numbers[:, 1].rad2deg(), numbers[:, 2].rad2deg()
    torch.testing.assert_close(polar, torch.tensor([95.0, 30.0, 80.0, 80.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(azimuth, torch.tensor([60.0, 350.0, 0.0, 0.0]), atol=1e-3, rtol=0)
    assert numbers[:, 0].tolist() == pytest.approx([1e-5] * 4)
    assert azimuth[-1] == 0  # the reference, exactly


def test_up_is_estimated_where_the_batch_has_none() -> None:
    given = orbit([0, 120, 240], [20, 20, 20])  # a whole turn: the estimate is exact
    expected = pipeline().camera_numbers(given)
    del given["up"]
    torch.testing.assert_close(pipeline().camera_numbers(given), expected, atol=1e-4, rtol=0)


def test_sv3d_u_is_not_told_the_cameras() -> None:
    built, given = pipeline(camera=False), batch()
    assert built.training_inputs(given).args[3].shape == (2, 3, 1)
    elsewhere = {**given, "extrinsics": orbit([0, 90, 180], [0, 0, 0])["extrinsics"].expand(2, -1, -1, -1)}
    first, second = (
        built.sample(one, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
        for one in (given, elsewhere)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("seed", range(4))
def test_views_about_a_point_of_a_room_by_brute_force(seed: int) -> None:
    extrinsics, centers, point = views_in_a_room(seed)
    polar, azimuth = orbit_angles(extrinsics, torch.tensor([[0.0, 0.0, 1.0]]))
    for view, (x, y, z) in enumerate(centers - point):
        turn = math.atan2(y, x) - math.atan2(*(centers - point)[0, 1::-1])
        assert polar[0, view].item() == pytest.approx(math.acos(z / math.sqrt(x * x + y * y + z * z)), abs=1e-4)
        assert math.cos(azimuth[0, view].item() - turn) == pytest.approx(1, abs=1e-7)
        assert 0 <= azimuth[0, view] < 2 * math.pi
