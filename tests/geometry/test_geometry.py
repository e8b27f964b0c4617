from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from cameo.errors import ShapeError
from cameo.geometry import (
    as_grid,
    check_cameras,
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


def random_cameras(batch: int = 2, views: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, views)
    rotation, _ = torch.linalg.qr(torch.randn(*shape, 3, 3, generator=generator, dtype=torch.float64))
    rotation[..., 0] *= torch.linalg.det(rotation)[..., None]
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(*shape, 1, 1)
    extrinsics[..., :3, :3] = rotation
    extrinsics[..., :3, 3] = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    intrinsics = torch.tensor([[40.0, 0, 10], [0, 44, 7], [0, 0, 1]], dtype=torch.float64).repeat(*shape, 1, 1)
    intrinsics[..., 0, 2] += torch.rand(shape, generator=generator, dtype=torch.float64)
    return intrinsics, extrinsics


def random_depth(batch: int = 2, views: int = 3, height: int = 6, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 1 + torch.rand(batch, views, 1, height, width, generator=generator, dtype=torch.float64)


def camera_towards_x() -> tuple[Tensor, Tensor]:
    """Camera at (1, 2, 3) that looks along world +x, with world y down: its right is world -z."""
    intrinsics = torch.tensor([[100.0, 0, 32], [0, 100, 24], [0, 0, 1]])
    extrinsics = torch.tensor([[0.0, 0, -1, 3], [0, 1, 0, -2], [1, 0, 0, -1], [0, 0, 0, 1]])
    return intrinsics[None, None], extrinsics[None, None]


def test_project_hand_computed():
    # Relative to the camera: (4, 1, -1), so one right, one down, four ahead.
    xy, z = project(torch.tensor([[[[5.0, 3, 2]]]]), *camera_towards_x())
    assert xy.flatten().tolist() == [57.0, 49.0]
    assert z.item() == 4.0


def test_unproject_hand_computed():
    depth = torch.zeros(1, 1, 1, 48, 64)
    depth[..., 24, 32] = 10.0
    points = unproject(depth, *camera_towards_x())
    # The pixel centre (32.5, 24.5) is half a pixel right of and below the axis: 10 * 0.5 / 100 units.
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
    depth = random_depth(1, 2, 2, 2).requires_grad_()
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
    points = unproject(torch.full((1, 1, 1, 2, 2), 2.0, dtype=dtype), intrinsics, extrinsics)
    assert points.dtype == torch.float32
    assert plucker_rays(intrinsics.to(dtype), extrinsics.to(dtype), (2, 2), (2, 2)).dtype == torch.float32


def test_sample_depth_is_exact_on_planes():
    # z = 1 / (0.5 + 0.01 x - 0.02 y): a slanted plane, read between pixels and up to the image border.
    grid = pixel_grid(8, 10, dtype=torch.float64, device="cpu")
    plane = torch.tensor([0.01, -0.02], dtype=torch.float64)
    depth = 1 / (0.5 + grid @ plane)
    generator = torch.Generator().manual_seed(0)
    xy = torch.rand(1, 1, 50, 2, generator=generator, dtype=torch.float64) * torch.tensor([9.99, 7.99])
    torch.testing.assert_close(sample_depth(depth[None, None, None], xy), 1 / (0.5 + xy @ plane))


def test_sample_depth_takes_one_side_of_an_edge():
    depth = torch.tensor([1.0, 1, 1, 4, 4, 4]).expand(1, 1, 1, 6, 6)
    x = torch.linspace(0.05, 5.95, 60)  # does not hold the edge itself, where either side is right
    xy = torch.stack([x, torch.full_like(x, 3.0)], dim=-1)[None, None]
    assert sample_depth(depth, xy).flatten().tolist() == [1.0 if a < 3 else 4.0 for a in x.tolist()]


def test_sample_depth_follows_the_surface_with_most_weight():
    depth = torch.full((1, 1, 1, 2, 2), 1.0)
    depth[..., 0, 0] = 4.0
    # In the middle all four pixels are equally near and three agree; in the corner the single one prevails.
    xy = torch.tensor([[1.0, 1.0], [0.9, 0.9], [0.6, 0.6]])[None, None]
    assert sample_depth(depth, xy).flatten().tolist() == [1.0, 1.0, 4.0]


def test_sample_depth_outside_and_missing():
    depth = torch.full((1, 1, 1, 4, 4), 2.0)
    depth[..., :2, :2] = 0
    xy = torch.tensor([[-0.1, 1], [4.0, 1], [1, 4.5], [math.nan, 1], [0.9, 0.9], [2.0, 2.0]])[None, None]
    sampled = sample_depth(depth, xy).flatten()
    assert sampled[:5].isnan().all()
    assert sampled[5] == 2.0
    with pytest.raises(ShapeError, match="xy: expected"):
        sample_depth(depth, xy[0])
    with pytest.raises(ShapeError, match="depth: expected"):
        sample_depth(depth[0], xy)


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


def looking_at(positions: list[list[float]], target: list[float]) -> Tensor:
    """Upright cameras (z up) at `positions` that look at `target`, `[1, V, 4, 4]` float64."""
    centre = torch.tensor(positions, dtype=torch.float64)
    forward = torch.nn.functional.normalize(torch.tensor(target, dtype=torch.float64) - centre, dim=-1)
    right = torch.linalg.cross(forward, torch.tensor([0.0, 0, 1], dtype=torch.float64).expand_as(forward))
    right = torch.nn.functional.normalize(right, dim=-1)
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(len(positions), 1, 1)
    extrinsics[:, :3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=1)
    extrinsics[:, :3, 3:] = -extrinsics[:, :3, :3] @ centre[..., None]
    return extrinsics[None]


def flat_depth(*metres: float) -> Tensor:
    return torch.tensor(metres, dtype=torch.float64)[None, :, None, None, None].expand(1, len(metres), 1, 4, 4).clone()


def test_orbit_centre_is_where_the_axes_meet() -> None:
    positions = [[4.0, 0, 1], [0, 5, 2], [-3, -3, 0]]
    extrinsics = looking_at(positions, [1.0, 2.0, 0.5])
    expected = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(orbit_centre(extrinsics), expected)
    # Whatever the depth says, as long as the point is in front.
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
    """Two cameras 10 m from a point, ever nearer to each other; the depth says 4 m."""
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
    # y up: 0 is x still, and it grows counter-clockwise seen from +y, so from x towards -z.
    turned = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    rotated = extrinsics.clone()
    rotated[..., :3, :3] = extrinsics[..., :3, :3] @ turned
    again = spherical_angles(rotated, torch.zeros(1, 3), torch.tensor([[0.0, 1, 0]]))
    torch.testing.assert_close(again[0], azimuth, atol=1e-6, rtol=0)
    torch.testing.assert_close(again[1], elevation)
    # x up: 0 is y.
    azimuth, _, _ = spherical_angles(extrinsics, torch.zeros(1, 3), torch.tensor([[1.0, 0, 0]]))
    assert azimuth[0, 1] == pytest.approx(0.0)
    # From another centre: the camera at (2, 0, 0) stands at (0, 2, 0) as seen from (2, -2, 0).
    moved = spherical_angles(extrinsics, torch.tensor([[2.0, -2, 0]]), up)
    assert [float(part[0, 0]) for part in moved] == pytest.approx([90, 0, 2])


def test_azimuth_stays_below_360_in_single_precision_and_poles_have_numbers() -> None:
    extrinsics = looking_at([[1.0, -1e-9, 0], [1.0, 0, 0]], [0.0, 0, 0]).float()
    extrinsics[0, 0, :3, 3] = torch.linalg.solve(torch.eye(3), -extrinsics[0, 0, :3, :3] @ torch.tensor([1, -1e-9, 0]))
    above = torch.eye(4).repeat(1, 2, 1, 1)
    above[0, 0, 2, 3] = -3.0  # centre (0, 0, 3)
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
    # One camera that looks down by 45 degrees: wrong by as much, as documented.
    slope = estimate_up(looking_at([[1.0, 0, 1]], [0.0, 0, 0]))
    torch.testing.assert_close(slope, up.new_tensor([[-math.sqrt(0.5), 0, math.sqrt(0.5)]]))
    # Up and down cancel out: that of view 0.
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
