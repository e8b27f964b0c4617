"""Projection, its inverse, rays and intrinsics: computed by hand, in a round trip, and in a batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cameo.errors import ShapeError
from cameo.geometry import (
    as_grid,
    crop_intrinsics,
    pixel_grid,
    plucker_rays,
    project,
    relative_extrinsics,
    resize_intrinsics,
    unproject,
)
from tests.helpers.cameras import camera_towards_x, random_cameras, random_depth


def test_project_hand_computed():
    # Relative to the camera: (4, 1, -1), so one right, one down, four ahead.
    xy, z = project(torch.tensor([[[[5.0, 3, 2]]]]), *camera_towards_x())
    assert xy.flatten().tolist() == [57.0, 49.0]
    assert z.item() == 4.0


def test_unproject_hand_computed():
    depth = torch.zeros(1, 1, 1, 48, 64)
    depth[..., 24, 32] = 10.0
    points = unproject(depth, *camera_towards_x())
    # The pixel center (32.5, 24.5) is half a pixel right of and below the axis: 10 * 0.5 / 100 units.
    torch.testing.assert_close(points[0, 0, :, 24, 32], torch.tensor([11.0, 2.05, 2.95]))
    assert points.isnan().sum() == 3 * (48 * 64 - 1)


def test_points_behind_the_camera_have_no_pixel():
    xy, z = project(torch.tensor([[[[0.0, 2, 3], [1.0, 2, 3]]]]), *camera_towards_x())
    assert xy.isnan().all()
    assert z.flatten().tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_unproject_marks_missing_depth(value):
    intrinsics, extrinsics = random_cameras()
    depth = random_depth()
    depth[1, 2, 0, 3, 4] = value
    missing = unproject(depth, intrinsics, extrinsics).isnan().nonzero()
    assert missing.tolist() == [[1, 2, c, 3, 4] for c in range(3)]


def test_missing_depth_leaves_gradients_finite():
    intrinsics, extrinsics = (camera.requires_grad_() for camera in random_cameras())
    depth = random_depth()
    depth[0, 0, 0, 0, 0] = math.nan
    depth.requires_grad_()
    unproject(depth, intrinsics, extrinsics).nan_to_num().sum().backward()
    for tensor in (depth, intrinsics, extrinsics):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
    assert depth.grad[0, 0, 0, 0, 0] == 0


def test_round_trip():
    intrinsics, extrinsics = random_cameras()
    depth = random_depth()
    points = unproject(depth, intrinsics, extrinsics)
    xy, z = project(points.flatten(-2).mT, intrinsics, extrinsics)
    expected = pixel_grid(6, 8, dtype=torch.float64, device="cpu").flatten(0, 1).expand_as(xy)
    torch.testing.assert_close(xy, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z, depth.flatten(2), rtol=1e-12, atol=1e-12)


def test_batched_equals_loop():
    intrinsics, extrinsics = random_cameras()
    depth = random_depth()
    points = unproject(depth, intrinsics, extrinsics)
    xy, z = project(points.flatten(-2).mT, intrinsics, extrinsics)
    rays = plucker_rays(intrinsics, extrinsics, (6, 8), (3, 4))
    for b in range(2):
        for v in range(3):
            one = (intrinsics[b : b + 1, v : v + 1], extrinsics[b : b + 1, v : v + 1])
            alone = unproject(depth[b : b + 1, v : v + 1], *one)
            torch.testing.assert_close(alone[0, 0], points[b, v])
            alone_xy, alone_z = project(alone.flatten(-2).mT, *one)
            torch.testing.assert_close(alone_xy[0, 0], xy[b, v])
            torch.testing.assert_close(alone_z[0, 0], z[b, v])
            torch.testing.assert_close(plucker_rays(*one, (6, 8), (3, 4))[0, 0], rays[b, v])


def test_gradcheck():
    intrinsics, extrinsics = (camera.requires_grad_() for camera in random_cameras(1, 2))
    depth = random_depth(1, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(unproject, (depth, intrinsics, extrinsics))
    points = unproject(depth, intrinsics, extrinsics).flatten(-2).mT.detach().requires_grad_()
    assert torch.autograd.gradcheck(project, (points, intrinsics, extrinsics))
    assert torch.autograd.gradcheck(lambda k, e: plucker_rays(k, e, (2, 2), (2, 2)), (intrinsics, extrinsics))


def test_plucker_rays():
    intrinsics, extrinsics = random_cameras()
    rays = plucker_rays(intrinsics, extrinsics, (6, 8), (6, 8))
    direction, moment = rays.split(3, dim=2)
    torch.testing.assert_close(direction.norm(dim=2), torch.ones_like(direction[:, :, 0]))
    torch.testing.assert_close((direction * moment).sum(2), torch.zeros_like(direction[:, :, 0]))
    # The moment is the same from any point of the ray, so it also follows from the unprojected depth.
    points = unproject(random_depth(), intrinsics, extrinsics)
    torch.testing.assert_close(torch.linalg.cross(points, direction, dim=2), moment)


def test_plucker_rays_stand_at_cell_centres():
    intrinsics, extrinsics = random_cameras()
    coarse = plucker_rays(intrinsics, extrinsics, (6, 8), (2, 4))
    resized = resize_intrinsics(intrinsics, (6, 8), (2, 4))
    torch.testing.assert_close(coarse, plucker_rays(resized, extrinsics, (2, 4), (2, 4)))


def test_resize_and_crop_agree_with_projection():
    intrinsics, extrinsics = random_cameras()
    points = unproject(random_depth(), intrinsics, extrinsics).flatten(-2).mT
    xy, _ = project(points, intrinsics, extrinsics)
    resized, _ = project(points, resize_intrinsics(intrinsics, (6, 8), (12, 4)), extrinsics)
    torch.testing.assert_close(resized, xy * torch.tensor([0.5, 2.0], dtype=torch.float64))
    cropped, _ = project(points, crop_intrinsics(intrinsics, top=1, left=3), extrinsics)
    torch.testing.assert_close(cropped, xy - torch.tensor([3.0, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 1"):
        resize_intrinsics(intrinsics, (0, 8), (12, 4))


@pytest.mark.parametrize("reference", [0, 2, -1])
def test_relative_extrinsics_move_the_world_into_the_reference_camera(reference):
    intrinsics, extrinsics = random_cameras()
    relative = relative_extrinsics(extrinsics, reference)
    torch.testing.assert_close(relative[:, reference], torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    points = unproject(random_depth(), intrinsics, extrinsics).flatten(-2).mT
    in_reference = points @ extrinsics[:, reference, None, :3, :3].mT + extrinsics[:, reference, None, None, :3, 3]
    for got, expected in zip(
        project(in_reference, intrinsics, relative), project(points, intrinsics, extrinsics), strict=True
    ):
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match=r"reference: expected a view in 0\.\.2, got 3"):
        relative_extrinsics(extrinsics, 3)


def test_wrong_inputs_are_named():
    cameras = random_cameras()
    with pytest.raises(ShapeError, match=r"depth: expected \[B, V, 1, H, W\]"):
        unproject(random_depth()[:, :, 0], *cameras)
    with pytest.raises(ValueError, match="depth: expected floating point"):
        unproject(random_depth().int(), *cameras)
    with pytest.raises(TypeError, match="depth: expected a tensor"):
        unproject(None, *cameras)
    with pytest.raises(ShapeError, match=r"intrinsics: expected \[2, 2, 3, 3\] \(B and V of depth\)"):
        unproject(random_depth(views=2), *cameras)
    with pytest.raises(ShapeError, match=r"points: expected \[B, V, M, 3\]"):
        project(torch.zeros(2, 3, 3), *cameras)
    with pytest.raises(ValueError, match="size: expected a positive int"):
        as_grid("size", (4, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    intrinsics, extrinsics = camera_towards_x()
    points = unproject(torch.full((1, 1, 1, 48, 64), 2.0, dtype=dtype), intrinsics, extrinsics)
    assert points.dtype == torch.float32
    assert plucker_rays(intrinsics.to(dtype), extrinsics.to(dtype), (2, 2), (2, 2)).dtype == torch.float32


def test_autocast_costs_no_precision():
    intrinsics, extrinsics = (camera.float() for camera in random_cameras())
    depth = random_depth().float()

    def everything() -> list[Tensor]:
        points = unproject(depth, intrinsics, extrinsics)
        return [
            points,
            *project(points.flatten(-2).mT, intrinsics=intrinsics, extrinsics=extrinsics),
            plucker_rays(intrinsics, extrinsics, (6, 8), (3, 4)),
            relative_extrinsics(extrinsics),
        ]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = everything()
    for got, expected in zip(inside, everything(), strict=True):
        assert torch.equal(got, expected)
