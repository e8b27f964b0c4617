"""The verdict on right data and on each common mistake, and where nothing can be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cameo.data import Views
from cameo.errors import DataError
from cameo.inspection import check_views
from tests.helpers import data_faults as faults

# The mistake, what it is called, and a part of the cure.
MISTAKES: dict[str, tuple[Callable[[Views], Views], tuple[str, ...], str]] = {
    "OpenGL": (faults.in_opengl_axes, ("OpenGL axes",), r"camera_to_world\[..., :3, 1:3\] \*= -1"),
    "direction": (faults.camera_to_world, ("camera-to-world",), r"torch.linalg.inv\(extrinsics\)"),
    "OpenGL camera-to-world": (
        lambda views: faults.camera_to_world(faults.in_opengl_axes(views)),
        ("OpenGL axes", "camera-to-world"),
        "camera-to-world poses given as world-to-camera",
    ),
    "millimeters": (
        lambda views: replace(views, depth=views.depth * 1000),
        ("unit of depth",),
        "depth 1000 times too large.*divide it by 1000",
    ),
    "kilometers": (
        lambda views: replace(views, depth=views.depth / 1000),
        ("unit of depth",),
        "depth 1000 times too small.*multiply it by 1000",
    ),
    "poses": (
        lambda views: faults.late(views, "extrinsics", 1),
        ("poses of another frame",),
        "poses 1 frame late",
    ),
    "images": (
        lambda views: faults.late(views, "images", -2),
        ("images of another frame",),
        "images 2 frames early",
    ),
    "larger image": (
        lambda views: faults.with_rows(views, 2, 2),
        ("intrinsics of another image",),
        "resize_intrinsics",
    ),
    "normalized": (
        lambda views: faults.with_rows(views, 1 / 48, 1 / 48),
        ("normalized intrinsics",),
        "multiply the first row by the width",
    ),
    "rays": (faults.along_rays, ("ray length",), "divide by the length of inv"),
    "registration": (
        lambda views: faults.depth_moved(views, 3),
        ("depth not registered",),
        "6% of the image's width too far right",
    ),
}


@pytest.mark.parametrize("scene", ["room", "thing"])
def test_right_data_agrees(scene: str, request: pytest.FixtureRequest) -> None:
    check = check_views(request.getfixturevalue(scene), pairs=15)
    assert (check.verdict, check.exit_status, check.mistakes) == ("agrees", 0, ())
    assert check.token_error <= 0.5
    assert "tokens have a match" in check.words


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_in_a_room_is_named_with_its_cure(mistake: str, room: Views) -> None:
    change, names, cure = MISTAKES[mistake]
    check = check_views(change(room), pairs=15)
    assert (check.verdict, check.exit_status) == ("wrong", 1)
    assert check.mistakes == names
    with pytest.raises(AssertionError, match=cure):
        raise AssertionError(check.words)


@pytest.mark.parametrize("mistake", ["OpenGL", "direction", "millimeters", "poses", "larger image"])
def test_mistakes_around_an_object_are_named(mistake: str, thing: Views) -> None:
    change, names, _ = MISTAKES[mistake]
    assert check_views(change(thing), pairs=15).mistakes == names


def test_two_mistakes_at_once_are_both_named(room: Views) -> None:
    views = faults.in_opengl_axes(replace(room, depth=room.depth * 1000))
    assert check_views(views, pairs=15).mistakes == ("OpenGL axes", "unit of depth")


def test_two_views_are_enough_for_a_verdict(room: Views) -> None:
    two = room.select([0, 1])
    assert check_views(two).verdict == "agrees"
    assert check_views(faults.in_opengl_axes(two)).mistakes == ("OpenGL axes",)


def test_a_flat_wall_cannot_tell() -> None:
    wall = faults.flat_wall()
    check = check_views(wall)
    assert (check.verdict, check.exit_status) == ("cannot tell", 3)
    assert "OpenGL axes" in check.words
    # Sideways motion along a wall is the same in OpenGL axes: the very same tokens match.
    again = check_views(faults.in_opengl_axes(wall))
    assert [pair.matched for pair in again.pairs] == [pair.matched for pair in check.pairs]


def test_views_that_show_different_things_cannot_tell(room: Views) -> None:
    apart = room.select([0, 1])
    turned = apart.extrinsics.clone()
    turned[1] = torch.diag(torch.tensor([-1.0, 1.0, -1.0, 1.0])) @ turned[0]  # looks the other way
    check = check_views(replace(apart, extrinsics=turned))
    assert check.verdict == "cannot tell"
    assert "hardly overlap" in check.words


def test_without_depth_tracks_are_compared_with_epipolar_lines(room: Views) -> None:
    views = faults.tracked(room)
    check = check_views(views)
    assert check.verdict == "agrees"
    assert all(pair.matched != pair.matched for pair in check.pairs)  # NaN: there is no depth
    measured = [pair.epipolar for pair in check.pairs if pair.epipolar == pair.epipolar]
    assert measured
    assert max(measured) < 1e-2  # tokens; the tracks are exact up to float32
    for change, names in (
        (faults.in_opengl_axes, ("OpenGL axes",)),
        (faults.camera_to_world, ("camera-to-world",)),
        (lambda v: faults.late(v, "extrinsics", 1), ("poses of another frame",)),
    ):
        assert check_views(change(views)).mistakes == names


def test_neither_depth_nor_tracks_cannot_tell(room: Views) -> None:
    check = check_views(replace(room, depth=torch.zeros_like(room.depth)))
    assert check.verdict == "cannot tell"
    assert "neither depth nor a track" in check.words


def test_wrong_input_is_refused(room: Views) -> None:
    with pytest.raises(DataError, match=r"train-00000: has 1 view; expected at least 2"):
        check_views(room.select([0]))
    mirrored = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])) @ room.extrinsics
    with pytest.raises(DataError, match=r"scene train-00000: extrinsics: .*determinant -1"):
        check_views(replace(room, extrinsics=mirrored))
    with pytest.raises(ValueError, match="pairs: expected at least 1, got 0"):
        check_views(room, pairs=0)
    with pytest.raises(ValueError, match="token_grid: expected a positive int"):
        check_views(room, token_grid=0)
