"""The 16 numbers by which MVDream is told a camera."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cameo.adapters.mvdream.cameras import camera_vectors
from cameo.errors import ShapeError
from tests.helpers.orbits import UP, ring, views_in_a_room


def test_camera_numbers_by_hand() -> None:
    views = camera_vectors(ring(0, 90, elevation=30), UP).reshape(2, 4, 4)
    c, s = math.cos(math.pi / 6), 0.5
    # Right is x; up leans back over the object; the third column points from the object to the camera.
    first = [[1, 0, 0, 0], [0, s, -c, -c], [0, c, s, s], [0, 0, 0, 1]]
    second = [[0, -s, c, c], [1, 0, 0, 0], [0, c, s, s], [0, 0, 0, 1]]
    torch.testing.assert_close(views, torch.tensor([first, second], dtype=torch.float64), atol=1e-7, rtol=0)


def test_camera_vectors_do_not_depend_on_the_worlds_place_and_size() -> None:
    plain = camera_vectors(ring(0, 90, 200, elevation=20), UP)
    moved = camera_vectors(ring(0, 90, 200, elevation=20, distance=3.0, centre=(5, -2, 7)), UP)
    torch.testing.assert_close(moved, plain, atol=1e-6, rtol=0)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:3, :3] = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # a world with y up: y is the old z
    y_up = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    world = ring(0, 90, 200, elevation=20)
    torch.testing.assert_close(camera_vectors(world @ turn, y_up), plain, atol=1e-6, rtol=0)
    upside_down = turn @ turn
    turned = camera_vectors(world @ upside_down, -UP)
    torch.testing.assert_close(turned, plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(camera_vectors(world), plain[:, :, :], atol=0.3, rtol=0)  # up is only estimated
    assert camera_vectors(world.float(), UP.float()).dtype == torch.float32
    batched = camera_vectors(torch.cat([world, world @ turn]), torch.cat([UP, y_up]))
    torch.testing.assert_close(batched[1:], plain, atol=1e-6, rtol=0)


def test_the_front_view_stands_at_azimuth_0() -> None:
    expected = camera_vectors(ring(0, 90, 180, elevation=10), UP)
    for start in (37, 181, 300):
        found = camera_vectors(ring(start, start + 90, start + 180, elevation=10), UP, front=0)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(camera_vectors(ring(37, 127, 217, elevation=10), UP), expected, atol=0.1)
    other = camera_vectors(ring(0, 90, 180, elevation=10), UP, front=1)
    torch.testing.assert_close(other[:, 1], expected[:, 0], atol=1e-6, rtol=0)


def test_what_cameras_are_refused() -> None:
    cameras = ring(0, 90, elevation=10)
    with pytest.raises(ValueError, match=r"front: expected a view in 0\.\.1, got 2"):
        camera_vectors(cameras, UP, front=2)
    with pytest.raises(ShapeError, match=r"up: expected \[1, 3\], got \[3\]"):
        camera_vectors(cameras, UP[0])
    with pytest.raises(ValueError, match="up: expected finite numbers, not all zero"):
        camera_vectors(cameras, 0 * UP)
    with pytest.raises(ShapeError, match=r"extrinsics: expected \[B, V, 4, 4\]"):
        camera_vectors(cameras[0])


@pytest.mark.parametrize("seed", range(4))
def test_views_about_a_point_of_a_room_by_brute_force(seed: int) -> None:
    extrinsics, centers, point = views_in_a_room(seed)
    found = camera_vectors(extrinsics, UP.float(), front=0).reshape(4, 4, 4).numpy()
    offset = centers - point
    turn = -np.pi / 2 - np.arctan2(offset[0, 1], offset[0, 0])  # the first view is to stand at -y
    for view in range(4):
        azimuth = np.arctan2(offset[view, 1], offset[view, 0]) + turn
        elevation = np.arcsin(offset[view, 2] / np.linalg.norm(offset[view]))
        away = np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])
        right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
        expected = np.stack([right, np.cross(away, right), away, away], axis=1)
        np.testing.assert_allclose(found[view, :3], expected, atol=1e-4)
        np.testing.assert_array_equal(found[view, 3], [0, 0, 0, 1])
