"""How functions on cameras treat integers, invalid cameras, invalid sizes, and cameras of another image size."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from cameo import Correspondence
from cameo.geometry import (
    crop_intrinsics,
    estimate_up,
    orbit_centre,
    pixel_grid,
    plucker_rays,
    project,
    relative_extrinsics,
    resize_intrinsics,
    spherical_angles,
    unproject,
)
from cameo.geometry.depth import sample_depth


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integer_intrinsics_are_resized_and_cropped_as_the_same_numbers(dtype):
    intrinsics = torch.tensor([[65.0, 0, 32], [0, 67, 16], [0, 0, 1]])
    integers = intrinsics.to(dtype)
    assert torch.equal(
        resize_intrinsics(integers, (32, 64), (16, 32)), resize_intrinsics(intrinsics, (32, 64), (16, 32))
    )
    assert resize_intrinsics(integers, (32, 64), (16, 32))[0, 0] == 32.5
    assert torch.equal(crop_intrinsics(integers, 0.5, 0.5), crop_intrinsics(intrinsics, 0.5, 0.5))
    assert crop_intrinsics(integers, 0.5, 0.5)[0, 2] == 31.5


def test_integers_count_as_the_same_numbers_or_are_refused():
    """Each function gives the same result for integer tensors as for floats, or an error that names the argument."""
    cameras = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 2, 3, 3), torch.eye(4).expand(1, 2, 4, 4)
    points = torch.tensor([[[[1.0, 2, 4]]]]).expand(1, 2, 1, 3)
    depth, up = torch.full((1, 2, 1, 4, 4), 3.0), torch.tensor([[0.0, 1, 0]])
    same = [
        lambda kind: project(kind(points), *cameras),
        lambda kind: (sample_depth(kind(depth), torch.full((1, 2, 1, 2), 2.0)),),
        lambda kind: spherical_angles(cameras[1], kind(up), kind(up)),
        lambda kind: (orbit_centre(cameras[1], kind(depth)),),
    ]
    for function in same:
        for got, expected in zip(function(torch.Tensor.long), function(torch.Tensor.float), strict=True):
            assert torch.equal(got, expected)
    refused = [
        lambda: project(points, cameras[0].long(), cameras[1]),
        lambda: unproject(depth, cameras[0].long(), cameras[1]),
        lambda: unproject(depth.long(), *cameras),
        lambda: plucker_rays(cameras[0].long(), cameras[1], (8, 8), (2, 2)),
        lambda: relative_extrinsics(cameras[1].long()),
        lambda: spherical_angles(cameras[1].long(), up, up),
        lambda: orbit_centre(cameras[1].long()),
        lambda: estimate_up(cameras[1].long()),
    ]
    for function in refused:
        with pytest.raises(ValueError, match=r"(depth|intrinsics|extrinsics): expected floating point"):
            function()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda k: resize_intrinsics(k, (32, math.nan), (16, 32)),
            "from_size: expected an integer of at least 1, got nan",
        ),
        (lambda k: resize_intrinsics(k, (32, 64), (16, -32)), "to_size: expected an integer of at least 1, got -32"),
        (lambda k: resize_intrinsics(k[:2], (32, 64), (16, 32)), r"intrinsics: expected a tensor \[..., 3, 3\]"),
        (lambda k: resize_intrinsics(k.numpy(), (32, 64), (16, 32)), r"intrinsics: expected a tensor .*got ndarray"),
        (lambda k: crop_intrinsics(k, math.nan, 0), "top: expected a finite number of pixels, got nan"),
        (lambda k: crop_intrinsics(k, 0, math.inf), "left: expected a finite number of pixels, got inf"),
    ],
)
def test_wrong_sizes_and_cuts_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        change(torch.eye(3))


def test_a_principal_point_far_outside_the_image_is_refused():
    extrinsics = torch.eye(4).expand(1, 2, 4, 4)
    depth = torch.full((1, 2, 1, 8, 16), 2.0)
    right = torch.tensor([[8.0, 0, 8], [0, 8, 4], [0, 0, 1]]).expand(1, 1, 3, 3)
    for row, center, place in ((0, 65.0, "x=65.0, y=4.0"), (0, -49.0, "x=-49.0, y=4.0"), (1, 33.0, "x=8.0, y=33.0")):
        wrong = right.clone()
        wrong[..., row, 2] = center  # more than three widths of 16, or heights of 8, beyond the border
        both = torch.cat([right, wrong], dim=1)
        message = f"intrinsics: sample 0, view 1 has its principal point at {place}, far outside the image of 8 x 16"
        with pytest.raises(ValueError, match=message):
            Correspondence.from_depth(depth, both, extrinsics, token_grid=2)
        with pytest.raises(ValueError, match=message):
            unproject(depth, both, extrinsics)
        wrong[..., row, 2] -= 2 if center > 0 else -2  # a crop may have it so far outside
        both = torch.cat([right, wrong], dim=1)
        with warnings.catch_warnings(action="error"):
            Correspondence.from_depth(depth, both, extrinsics, token_grid=2)
            unproject(depth, both, extrinsics)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k / torch.tensor([[8.0], [8.0], [1.0]]), r"normalized values.*multiply the first row by the width"),
        (lambda k: k * 2, r"a last row other than 0 0 1"),
        (lambda k: k.mT.contiguous(), r"a last row other than 0 0 1"),
    ],
)
def test_matrices_that_are_no_intrinsics_are_refused(change, message):
    intrinsics = change(torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]])).expand(1, 2, 3, 3)
    extrinsics, depth = torch.eye(4).expand(1, 2, 4, 4), torch.full((1, 2, 1, 8, 8), 2.0)
    with pytest.raises(ValueError, match=message):
        Correspondence.from_depth(depth, intrinsics, extrinsics, token_grid=2)
    with pytest.raises(ValueError, match=message):
        unproject(depth, intrinsics, extrinsics)


def test_intrinsics_of_another_image_size_are_noticed():
    extrinsics = torch.eye(4).expand(1, 1, 4, 4)
    depth = torch.full((1, 1, 1, 8, 8), 2.0)
    pixels = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 1, 3, 3)
    with pytest.warns(
        UserWarning, match=r"principal point lies outside the image of 8 x 8 pixels.*resize_intrinsics"
    ) as caught:
        Correspondence.from_depth(depth, resize_intrinsics(pixels, (8, 8), (64, 64)), extrinsics, token_grid=2)
    assert caught[0].filename == __file__  # the line that called, not one of the library
    with warnings.catch_warnings(action="error"):
        Correspondence.from_depth(depth, pixels, extrinsics, token_grid=2)
        # A single view whose principal point lies outside its image is usual for a crop.
        some = torch.cat([pixels, crop_intrinsics(pixels, 0, -20)], dim=1)
        Correspondence.from_depth(depth.expand(1, 2, 1, 8, 8), some, extrinsics.expand(1, 2, 4, 4), token_grid=2)


@pytest.mark.parametrize(
    ("which", "place", "value", "message"),
    [
        ("intrinsics", (0, 0), 1e30, "a focal length that no camera has"),
        ("intrinsics", (1, 1), 1e-3, "a focal length that no camera has"),
        ("intrinsics", (0, 1), 1e6, "a skew larger than the focal length"),
        ("intrinsics", (1, 0), 7.0, "a value other than 0 below the focal length"),
        ("extrinsics", (0, 3), 1e300, "a translation beyond 1e12 units"),
        ("extrinsics", (2, 3), -1e13, "a translation beyond 1e12 units"),
        ("extrinsics", (3, 0), 5.0, "a last row other than 0 0 0 1"),
    ],
)
def test_values_of_no_camera_are_refused(which, place, value, message):
    cameras = {
        "intrinsics": torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).double().repeat(1, 2, 1, 1),
        "extrinsics": torch.eye(4).double().repeat(1, 2, 1, 1),
    }
    depth = torch.full((1, 2, 1, 8, 8), 2.0)
    Correspondence.from_depth(depth, **cameras, token_grid=2)
    cameras[which][0, 1][place] = value
    with pytest.raises(ValueError, match=rf"{which}: sample 0, view 1 has {message}.*Cure"):
        Correspondence.from_depth(depth, **cameras, token_grid=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k, e: plucker_rays(k, e, (0, 8), (2, 2)), "image_size: expected a positive int"),
        (lambda k, e: plucker_rays(k, e, (8, 8), (0, 2)), "size: expected a positive int"),
        (lambda k, e: pixel_grid(-1, 2, dtype=torch.float32, device="cpu"), "size: expected a positive int"),
        (lambda k, e: relative_extrinsics(e, 1.0), "reference: expected an integer, got 1.0"),
        (lambda k, e: relative_extrinsics(e, True), "reference: expected an integer, got True"),
        (
            lambda k, e: Correspondence.from_depth(torch.ones(1, 2, 1, 8, 8), k, e, token_grid=10**9),
            "token_grid: expected at most 16384 rows and columns",
        ),
    ],
)
def test_sizes_and_views_that_are_none_are_named(call, message):
    intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 2, 3, 3)
    with pytest.raises(ValueError, match=message):
        call(intrinsics, torch.eye(4).expand(1, 2, 4, 4))
