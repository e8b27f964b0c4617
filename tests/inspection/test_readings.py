"""Readings undo mistakes exactly, and the search takes as few of them as it can."""

from __future__ import annotations

import math

import pytest
import torch

from cameo.data import Views
from cameo.inspection.readings import AS_GIVEN, AXES, Reading, combinations, true_cameras, variations
from cameo.inspection.scenes import inspected_scenes
from cameo.inspection.search import Search, advantage, is_better

PINHOLE = torch.tensor([[40.0, 0, 32], [0, 30, 24], [0, 0, 1]])
SIZE = (48, 64)


def test_each_reading_undoes_its_mistake(room: Views) -> None:
    right = room.extrinsics.double()
    given: dict[Reading, torch.Tensor] = {Reading(camera_to_world=True): torch.linalg.inv(right)}
    for axes, rows in AXES.items():
        turn = torch.eye(4, dtype=torch.float64)
        turn[:3, :3] = torch.tensor(rows, dtype=torch.float64)
        world_to_camera = torch.linalg.inv(turn) @ right  # in the other axes
        given[Reading(axes=axes)] = world_to_camera
        given[Reading(axes=axes, camera_to_world=True)] = torch.linalg.inv(world_to_camera)
    for reading, pose in given.items():
        found = true_cameras(reading, room.intrinsics, pose, room.size)[1]
        torch.testing.assert_close(found, right)


def test_axes_are_what_their_names_say() -> None:
    """A point in front, to the right and above: (forward, right, up) = (5, 2, 1)."""
    opencv = torch.tensor([2.0, -1.0, 5.0])
    for axes, point in {"OpenGL": (2.0, 1.0, -5.0), "PyTorch3D": (-2.0, 1.0, 5.0), "ROS": (5.0, -2.0, 1.0)}.items():
        assert torch.equal(torch.tensor(AXES[axes], dtype=torch.float32) @ torch.tensor(point), opencv)


@pytest.mark.parametrize(
    ("reading", "focal", "center"),
    [
        (Reading(), (40, 30), (32, 24)),
        (Reading(focal=2.0), (20, 15), (32, 24)),
        (Reading(intrinsics="fx"), (40, 40), (32, 24)),
        (Reading(intrinsics="fy"), (30, 30), (32, 24)),
        (Reading(intrinsics="normalized"), (40 * 64, 30 * 48), (32 * 64, 24 * 48)),
    ],
)
def test_intrinsics_of_a_reading(reading: Reading, focal: tuple[float, ...], center: tuple[float, ...]) -> None:
    (found,), _ = true_cameras(reading, PINHOLE[None], torch.eye(4)[None], SIZE)
    expected = torch.tensor([[focal[0], 0, center[0]], [0, focal[1], center[1]], [0, 0, 1]], dtype=torch.float32)
    torch.testing.assert_close(found, expected)


def test_intrinsics_of_another_image_are_tried_where_they_differ() -> None:
    def tried(intrinsics: torch.Tensor) -> set[str]:
        return {reading.intrinsics for reading in variations(AS_GIVEN, intrinsics[None], SIZE, frames=False)}

    square = torch.tensor([[40.0, 0, 32], [0, 40, 24], [0, 0, 1]])
    assert tried(square) == {"given"}
    assert tried(PINHOLE) == {"given", "fx", "fy"}
    assert tried(2 * square - torch.diag(torch.tensor([0.0, 0, 1]))) == {"given", "resized", "cropped"}
    assert tried(square / torch.tensor([[64.0], [48.0], [1.0]])) == {"given", "normalized"}


def test_depth_in_millimeters_scales_the_positions() -> None:
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    _, (found,) = true_cameras(Reading(unit=1000.0), PINHOLE[None], pose[None], SIZE)
    assert found[:3, 3].tolist() == [1000.0, 2000.0, 3000.0]
    assert torch.equal(found[:3, :3], torch.eye(3, dtype=torch.float64))


def test_words_name_mistake_and_cure() -> None:
    assert AS_GIVEN.words == ""
    assert Reading(unit=0.2).words.startswith("depth 5 times too small")
    assert Reading(late="depth", shift=-2).words.startswith("depth 2 frames early")
    for reading in combinations(PINHOLE[None], SIZE):
        assert (reading.words == "") == (not reading.names)
        assert reading.words.count("cure: ") == len(reading.names)


def test_a_reading_is_better_only_by_enough_and_with_certainty() -> None:
    base = torch.full((16,), 0.5)
    noise = 0.01 * torch.arange(16).sub(7.5)
    assert is_better(base + 0.1 + noise, base)
    assert not is_better(base + 0.02 + noise, base)  # too little
    assert not is_better(base + 0.1 + 100 * noise, base)  # not certain
    assert not is_better(base - 0.47 + 0.01 * noise, base - 0.6)  # neither explains anything
    assert advantage(base, torch.full((16,), math.nan)) == (0.0, 0.0)


def test_the_search_drops_a_mistake_that_it_can_do_without(room: Views) -> None:
    """With the other axes, which are found first, the direction explains all; so it does alone with the unit."""

    def quality(reading: Reading) -> torch.Tensor:
        if reading.camera_to_world and reading.unit == 1000.0:
            return torch.full((8,), 1.0)
        return torch.full((8,), 0.4 if reading.axes == "OpenGL" else 0.1)

    scenes = inspected_scenes(room, scenes=1, pairs=1, token_grid=(2, 2), neighbors=False)
    search = Search(scenes, quality, fits=lambda reading: quality(reading)[0] > 0.9, applies=lambda _: True)
    assert search.best() == Reading(camera_to_world=True, unit=1000.0)
