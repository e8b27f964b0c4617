"""Cameras that cannot be used are refused by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cameo.errors import ShapeError
from cameo.geometry import check_cameras
from tests.helpers.cameras import random_cameras


def break_camera(which: str, edit) -> tuple[Tensor, Tensor]:
    cameras = dict(zip(("intrinsics", "extrinsics"), random_cameras(), strict=True))
    edit(cameras[which][1, 2])
    return cameras["intrinsics"], cameras["extrinsics"]


@pytest.mark.parametrize(
    ("which", "edit", "message"),
    [
        ("intrinsics", lambda k: k[0, 2].fill_(math.nan), "non-finite"),
        ("intrinsics", lambda k: k[1, 1].neg_(), "focal length"),
        ("intrinsics", lambda k: k[0, 0].zero_(), "focal length"),
        ("intrinsics", lambda k: k.mul_(2), "0 0 1"),
        ("intrinsics", lambda k: k[1, 0].fill_(7.0), "a value other than 0 below the focal length"),
        ("intrinsics", lambda k: k[0, 1].fill_(1e6), "a skew larger than the focal length"),
        ("intrinsics", lambda k: k[:2].copy_(torch.tensor([[0.9, 0, 0.5], [0, 1.2, 0.5]])), "normalized values"),
        ("extrinsics", lambda e: e[0, 3].fill_(math.inf), "non-finite"),
        ("extrinsics", lambda e: e.copy_(e.mT.clone()), "0 0 0 1"),
        ("extrinsics", lambda e: e[:3, :3].mul_(1.1), "not orthonormal"),
        ("extrinsics", lambda e: e[:3, :3].zero_(), "not orthonormal"),
        ("extrinsics", lambda e: e[0, :3].neg_(), "determinant -1"),
    ],
)
def test_unusable_cameras_are_named(which, edit, message):
    with pytest.raises(ValueError, match=rf"{which}: sample 1, view 2 has .*{message}.*Cure"):
        check_cameras(*break_camera(which, edit))


def test_cameras_of_wrong_shape_or_kind():
    intrinsics, extrinsics = random_cameras()
    with pytest.raises(ValueError, match=r"intrinsics: expected a tensor .* got NoneType"):
        check_cameras(None, extrinsics)
    with pytest.raises(ShapeError, match=r"extrinsics: expected \[B, V, 4, 4\], got \[2, 3, 3, 4\]"):
        check_cameras(intrinsics, extrinsics[..., :3, :])
    with pytest.raises(ShapeError, match=r"extrinsics: expected \[2, 3, 4, 4\]"):
        check_cameras(intrinsics, extrinsics[:, :2])
    with pytest.raises(ShapeError, match=r"intrinsics: expected \[5, V, 3, 3\]"):
        check_cameras(intrinsics, extrinsics, batch=5)
    with pytest.raises(ValueError, match="extrinsics: expected floating point"):
        check_cameras(intrinsics, extrinsics.long())
