"""Orbits: the center that cameras look at, up, azimuth and elevation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cameo.errors import ShapeError
from cameo.geometry import estimate_up, orbit_centre, spherical_angles
from tests.helpers.cameras import flat_depth, looking_at, random_cameras, random_depth


def test_orbit_centre_is_where_the_axes_meet() -> None:
    positions = [[4.0, 0, 1], [0, 5, 2], [-3, -3, 0]]
    extrinsics = looking_at(positions, [1.0, 2.0, 0.5])
    expected = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(orbit_centre(extrinsics), expected)
    # Independent of the depth, as long as the point is in front of the cameras.
    torch.testing.assert_close(orbit_centre(extrinsics, flat_depth(2.0, 9.0, 1.0)), expected)
    # In single precision, and far from the origin of the world.
    far = looking_at([[x + 5000, y, z] for x, y, z in positions], [5001.0, 2.0, 0.5]).float()
    torch.testing.assert_close(orbit_centre(far), torch.tensor([[5001.0, 2.0, 0.5]]), atol=2e-3, rtol=0)
    assert orbit_centre(far).dtype == torch.float32


def test_orbit_centre_of_skew_axes_is_the_nearest_point() -> None:
    """One axis along x at z = 0, one along y at z = 2: the middle between them is at z = 1."""
    along_x, along_y = looking_at([[-5.0, 0, 0]], [0.0, 0, 0]), looking_at([[0.0, -5, 2]], [0.0, 0, 2])
    found = orbit_centre(torch.cat([along_x, along_y], dim=1))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0, 1]], dtype=torch.float64))


def test_orbit_centre_of_parallel_axes_is_at_the_median_depth() -> None:
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(1, 3, 1, 1)
    extrinsics[0, :, 0, 3] = -torch.tensor([0.0, 1.0, 5.0])  # side by side, looking along z
    expected = torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(orbit_centre(extrinsics), expected)  # distance 1 without depth
    depth = flat_depth(3.0, 3.0, 6.0)
    torch.testing.assert_close(orbit_centre(extrinsics, depth), expected * torch.tensor([1.0, 1, 4]))
    depth[0, 0, 0, 0, :] = torch.tensor([0.0, -1.0, math.nan, math.inf])  # no measurements
    depth[0, 1] = 0.0  # a view without any takes the median of the others
    depth[0, 2, 0, 0, 0] = 100.0  # one pixel does not move a median
    torch.testing.assert_close(orbit_centre(extrinsics, depth)[0, 2], torch.tensor(4.0, dtype=torch.float64))
    torch.testing.assert_close(orbit_centre(extrinsics, 0 * depth), expected)
    one = looking_at([[3.0, 0, 0]], [0.0, 0, 0])
    torch.testing.assert_close(orbit_centre(one, flat_depth(2.0)), torch.tensor([[1.0, 0, 0]], dtype=torch.float64))


def test_orbit_centre_goes_over_from_depth_to_axes_without_a_jump() -> None:
    """Two cameras 10 m from a point, ever nearer to each other; the depth is 4 m."""
    found = []
    for degrees in torch.linspace(0.5, 4.0, 36).tolist():  # of each axis from the middle
        side = 10 * math.sin(math.radians(degrees))
        extrinsics = looking_at([[-10.0, side, 0], [-10.0, -side, 0]], [0.0, 0, 0])
        found.append(float(orbit_centre(extrinsics, flat_depth(4.0, 4.0))[0, 0]))
    assert found[0] == pytest.approx(-6.0, abs=0.01)
    assert found[-1] == pytest.approx(0.0, abs=1e-6)
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert min(steps) > -0.01
    assert max(steps) < 0.6  # 6 m over some 2 degrees in steps of a tenth


def test_orbit_centre_of_a_camera_that_turns_on_the_spot_is_ahead() -> None:
    directions = [[math.cos(angle), math.sin(angle), 0.0] for angle in (-0.3, 0.0, 0.3)]
    extrinsics = torch.cat([looking_at([[0.0, 0, 0]], direction) for direction in directions], dim=1)
    found = orbit_centre(extrinsics, flat_depth(3.0, 3.0, 3.0))
    torch.testing.assert_close(found, torch.tensor([[1 + 2 * math.cos(0.3), 0, 0]], dtype=torch.float64))
    # Outwards from a ring: the axes meet behind the cameras.
    outward = looking_at([[1.0, 0, 0]], [2.0, 0, 0]), looking_at([[0.0, 1, 0]], [0.0, 2, 0])
    found = orbit_centre(torch.cat(outward, dim=1))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 0]], dtype=torch.float64))


def test_orbit_functions_batched_equal_a_loop() -> None:
    _, extrinsics = random_cameras(batch=5)
    depth = random_depth(batch=5)
    centre, up = orbit_centre(extrinsics, depth), estimate_up(extrinsics)
    angles = spherical_angles(extrinsics, centre, up)
    for sample in range(5):
        part = slice(sample, sample + 1)
        torch.testing.assert_close(centre[part], orbit_centre(extrinsics[part], depth[part]))
        torch.testing.assert_close(up[part], estimate_up(extrinsics[part]))
        alone = spherical_angles(extrinsics[part], centre[part], up[part])
        torch.testing.assert_close([one[part] for one in angles], list(alone))


def test_spherical_angles_hand_computed() -> None:
    root = math.sqrt(0.5)
    positions = [[2.0, 0, 0], [0, 2, 0], [-2, 0, 0], [0, -2, 0], [root, root, 1], [2, 0, -2], [-1, -1e-9, 0]]
    extrinsics = looking_at(positions, [0.0, 0, 0])
    up = torch.tensor([[0.0, 0, 5.0]])  # of any length
    azimuth, elevation, distance = spherical_angles(extrinsics, torch.zeros(1, 3), up)
    expected = torch.tensor([0.0, 90, 180, 270, 45, 0, 180], dtype=torch.float64)
    torch.testing.assert_close(azimuth[0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(elevation[0], azimuth.new_tensor([0, 0, 0, 0, 45, -45, 0]), atol=1e-6, rtol=0)
    assert distance[0, :6].tolist() == pytest.approx([2, 2, 2, 2, math.sqrt(2), math.sqrt(8)])
    # y up: azimuth 0 is still x, and it increases counter-clockwise seen from +y, that is, from x towards -z.
    turned = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    rotated = extrinsics.clone()
    rotated[..., :3, :3] = extrinsics[..., :3, :3] @ turned
    again = spherical_angles(rotated, torch.zeros(1, 3), torch.tensor([[0.0, 1, 0]]))
    torch.testing.assert_close(again[0], azimuth, atol=1e-6, rtol=0)
    torch.testing.assert_close(again[1], elevation)
    # x up: azimuth 0 is y.
    azimuth, _, _ = spherical_angles(extrinsics, torch.zeros(1, 3), torch.tensor([[1.0, 0, 0]]))
    assert azimuth[0, 1] == pytest.approx(0.0)
    # From another center: the camera at (2, 0, 0) stands at (0, 2, 0) as seen from (2, -2, 0).
    moved = spherical_angles(extrinsics, torch.tensor([[2.0, -2, 0]]), up)
    assert [float(part[0, 0]) for part in moved] == pytest.approx([90, 0, 2])


def test_azimuth_stays_below_360_in_single_precision_and_poles_have_numbers() -> None:
    extrinsics = looking_at([[1.0, -1e-9, 0], [1.0, 0, 0]], [0.0, 0, 0]).float()
    extrinsics[0, 0, :3, 3] = torch.linalg.solve(torch.eye(3), -extrinsics[0, 0, :3, :3] @ torch.tensor([1, -1e-9, 0]))
    above = torch.eye(4).repeat(1, 2, 1, 1)
    above[0, 0, 2, 3] = -3.0  # center (0, 0, 3)
    for cameras in (extrinsics, above):
        azimuth, elevation, distance = spherical_angles(cameras, torch.zeros(1, 3), torch.tensor([[0.0, 0, 1]]))
        assert ((azimuth >= 0) & (azimuth < 360)).all()
        assert elevation.isfinite().all()
    assert elevation.tolist() == [[90.0, 0.0]]
    assert distance.tolist() == [[3.0, 0.0]]


def test_estimated_up() -> None:
    ring = looking_at([[2.0, 0, 1], [0, 2, 1], [-2, 0, 1], [0, -2, 1]], [0.0, 0, 0])
    up = torch.tensor([[0.0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(estimate_up(ring), up)
    # One camera that looks down by 45 degrees gives a direction that is wrong by 45 degrees, as documented.
    slope = estimate_up(looking_at([[1.0, 0, 1]], [0.0, 0, 0]))
    torch.testing.assert_close(slope, up.new_tensor([[-math.sqrt(0.5), 0, math.sqrt(0.5)]]))
    # Up and down cancel out, so the direction of view 0 is taken.
    opposite = torch.eye(4).repeat(1, 2, 1, 1)
    opposite[0, 1, :2, :2] *= -1
    assert estimate_up(opposite).tolist() == [[0.0, -1.0, 0.0]]


def test_wrong_inputs_of_orbit_functions_are_named() -> None:
    cameras = torch.eye(4).repeat(2, 3, 1, 1)
    with pytest.raises(ShapeError, match=r"depth: expected \[2, 3, 1, H, W\].*got \[2, 2, 1, 4, 4\]"):
        orbit_centre(cameras, torch.ones(2, 2, 1, 4, 4))
    with pytest.raises(ShapeError, match=r"extrinsics: expected \[B, V, 4, 4\]"):
        orbit_centre(cameras[0])
    with pytest.raises(ShapeError, match=r"centre: expected \[2, 3\], got \[3\]"):
        spherical_angles(cameras, torch.zeros(3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"up: expected finite vectors with a length.*estimate_up"):
        spherical_angles(cameras, torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ShapeError, match="extrinsics"):
        estimate_up(torch.eye(4))
