"""The poses of Zero123++'s views, and their places in the canvas."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from cameo.adapters.zero123plus.cameras import from_canvas, pose_error, same_poses, to_canvas
from cameo.data import RoomRig
from cameo.errors import ShapeError
from cameo.scenes.room_rigs import rigged_room
from cameo.scenes.rooms import bare_room
from tests.helpers.batches import make_batch
from tests.helpers.zero123plus_models import SIZE, batch, pipeline
from tests.helpers.zero123plus_released import released


def test_views_lie_row_by_row_in_the_canvas() -> None:
    views = torch.arange(2 * 6 * 3 * 2 * 2).reshape(2, 6, 3, 2, 2)
    canvas = to_canvas(views)
    assert canvas.shape == (2, 3, 6, 4)
    for view in range(6):
        top, left = 2 * (view // 2), 2 * (view % 2)
        assert torch.equal(canvas[:, :, top : top + 2, left : left + 2], views[:, view])
    assert torch.equal(from_canvas(canvas), views)


@pytest.mark.parametrize(("rig", "other"), [("v1.1", "v1.2"), ("v1.2", "v1.1")])
def test_the_poses_of_the_releases(rig: str, other: str) -> None:
    extrinsics = batch(rig=f"zero123plus-{rig}")["extrinsics"]
    assert pose_error(extrinsics, f"zero123plus-{rig}") < 0.01
    assert pose_error(extrinsics, f"zero123plus-{other}") == pytest.approx(10, abs=0.01)  # of elevation
    assert same_poses(extrinsics) == f"zero123plus-{rig}"
    swapped = extrinsics[:, [0, 2, 1, 3, 4, 5, 6]]
    assert pose_error(swapped, f"zero123plus-{rig}") == pytest.approx(60, abs=0.01)
    assert same_poses(swapped) is None
    mirrored = extrinsics[:, [0, 6, 5, 4, 3, 2, 1]]
    assert same_poses(mirrored) is None
    lying = extrinsics @ torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]).inverse()
    assert same_poses(lying) is None
    assert same_poses(lying, up=torch.tensor([[0.0, -1.0, 0.0]] * 2)) == f"zero123plus-{rig}"


def test_bad_poses_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown rig of zero123plus 'mvdream'"):
        pose_error(torch.eye(4).expand(1, 7, 4, 4), "mvdream")
    with pytest.raises(ShapeError, match=r"extrinsics: expected \[B, 7, 4, 4\], got \[1, 6, 4, 4\]"):
        pose_error(torch.eye(4).expand(1, 6, 4, 4), "zero123plus-v1.2")


def test_a_release_warns_once_about_poses_that_it_was_not_trained_on() -> None:
    built = released()
    given = {**on_fans(0, 1), "images": torch.rand(2, 7, 3, 64, 64)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built.training_inputs({**batch(), "images": given["images"]})
    built = released()
    with pytest.warns(UserWarning, match=r"not the fixed poses of a release. Use .*zero123plus-v1.2"):
        built.training_inputs(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built.training_inputs(given)


def test_from_scratch_any_poses_will_do_that_all_samples_share() -> None:
    built = [pipeline() for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built[0].training_inputs(batch())
        built[1].training_inputs(on_fans(0, 1))
    with pytest.warns(UserWarning, match="differ from sample to sample. Use .*camera_rig=fan without rig_jitter"):
        built[2].training_inputs(on_fans(0, 1, jitter=(5.0, 0.0)))


def on_fans(*seeds: int, jitter: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
    """Random pictures of views on a fan about a point of a room, in another room each."""
    rig = RoomRig.fan(7, jitter=jitter)
    cameras = [rigged_room(rig, np.random.default_rng(seed), bare_room, (SIZE, SIZE))[1:] for seed in seeds]
    intrinsics, extrinsics = (torch.tensor(np.stack(one)).float() for one in zip(*cameras, strict=True))
    return {**make_batch(len(seeds), views=7, size=SIZE), "intrinsics": intrinsics, "extrinsics": extrinsics}
