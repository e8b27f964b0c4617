"""The poses of Zero123++'s views, and their places in the canvas."""

from __future__ import annotations

import warnings

import pytest
import torch

from cameo.adapters.zero123plus.cameras import from_canvas, pose_error, same_poses, to_canvas
from cameo.errors import ShapeError
from tests.helpers.batches import make_batch
from tests.helpers.zero123plus_models import SIZE, batch, pipeline


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


def test_poses_of_no_release_are_warned_about_once() -> None:
    built = pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built.training_inputs(batch())
    built = pipeline()
    with pytest.warns(UserWarning, match="learns the poses of its data"):
        built.training_inputs(make_batch(views=7, size=SIZE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built.training_inputs(make_batch(views=7, size=SIZE))
