"""Consistency of views agrees with loops and hand-computed geometry, on rendered planes and degenerate input."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cameo.errors import ShapeError
from cameo.evaluation.consistency import symmetric_epipolar_distance, tsed, warp_error
from cameo.evaluation.keypoints import find_keypoints, match_descriptors
from cameo.geometry import camera_rays, invert_extrinsics, pixel_grid

PLANE = 2.0  # z of the rendered plane in the world


def cameras(size: int, views: int, *, step: float = 0.25, turn: float = 6.0) -> tuple[Tensor, Tensor]:
    """Cameras side by side that look along +z, each turned `turn` degrees further about the vertical axis."""
    intrinsics = torch.tensor([[size, 0, size / 2], [0, size, size / 2], [0, 0, 1]]).expand(1, views, 3, 3).clone()
    extrinsics = torch.eye(4).repeat(1, views, 1, 1)
    for view in range(views):
        cosine, sine = math.cos(math.radians(turn * view)), math.sin(math.radians(turn * view))
        rotation = torch.tensor([[cosine, 0, -sine], [0, 1, 0], [sine, 0, cosine]])
        extrinsics[0, view, :3, :3] = rotation
        extrinsics[0, view, :3, 3] = -rotation @ torch.tensor([step * view, 0.05 * view, 0])
    return intrinsics, extrinsics


def texture(points: Tensor, *, waves: int = 60, slowest: float = 4.0, fastest: float = 32.0) -> Tensor:
    """Random waves in the plane; frequencies in radians per world unit."""
    generator = torch.Generator().manual_seed(0)
    frequency, direction = torch.rand(2, waves, generator=generator, dtype=torch.float64)
    frequency, direction = slowest + frequency * (fastest - slowest), 2 * math.pi * direction
    phase = 2 * math.pi * torch.rand(waves, 3, generator=generator, dtype=torch.float64)
    wave = torch.stack([frequency * direction.cos(), frequency * direction.sin()])
    color = ((points @ wave)[..., None] + phase).sin().sum(-2)
    return (0.5 + 0.3 * color / math.sqrt(waves)).clamp(0, 1)


def render_plane(intrinsics: Tensor, extrinsics: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images and depth of a textured plane, exact at every pixel center."""
    grid = pixel_grid(size, size, dtype=torch.float64, device="cpu").flatten(0, 1)
    pose = invert_extrinsics(extrinsics.double())
    rays = camera_rays(grid, intrinsics.double()) @ pose[..., :3, :3].mT
    centre = pose[..., None, :3, 3]
    depth = (PLANE - centre[..., 2:]) / rays[..., 2:]
    images = texture((centre + depth * rays)[..., :2])
    return (
        images.mT.unflatten(-1, (size, size)).float(),
        depth.mT.unflatten(-1, (size, size)).float(),
    )


@pytest.fixture(scope="module")
def plane() -> dict[str, Tensor]:
    """Three views of a textured plane, 96 px."""
    intrinsics, extrinsics = cameras(96, 3)
    images, depth = render_plane(intrinsics, extrinsics, 96)
    return {"images": images, "depth": depth, "intrinsics": intrinsics, "extrinsics": extrinsics}


def wall(size: int = 8, views: int = 2) -> dict[str, Tensor]:
    """A wall two units away; each camera stands a quarter of the image further to the right."""
    intrinsics, extrinsics = cameras(size, views, turn=0.0)
    extrinsics[0, :, :3, 3] = torch.tensor([-0.5, 0, 0]) * torch.arange(views)[:, None]
    images = torch.rand(1, views, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {
        "images": images,
        "depth": torch.full((1, views, 1, size, size), 2.0),
        "intrinsics": intrinsics,
        "extrinsics": extrinsics,
    }


def warped_by_hand(batch: dict[str, Tensor], view: int, other: int) -> tuple[int, float, float]:
    """Pixels, mean absolute and mean squared error of a pair in smooth depth, one pixel at a time."""
    images, depth = batch["images"][0].double().numpy(), batch["depth"][0, :, 0].double().numpy()
    intrinsics, extrinsics = (batch[name][0].double().numpy() for name in ("intrinsics", "extrinsics"))
    height, width = depth.shape[1:]
    differences = []
    for row in range(height):
        for column in range(width):
            ray = np.linalg.inv(intrinsics[view]) @ [column + 0.5, row + 0.5, 1]
            world = np.linalg.inv(extrinsics[view]) @ [*(ray * depth[view, row, column]), 1]
            x, y, z = intrinsics[other] @ (extrinsics[other] @ world)[:3]
            x, y = x / z, y / z
            if not (0 <= x < width and 0 <= y < height):
                continue
            if abs(depth[other, int(y), int(x)] - z) > 0.1 * z:  # slanted depth between the pixels is not hidden
                continue
            left, top = math.floor(x - 0.5), math.floor(y - 0.5)
            color = np.zeros(3)
            for i, share_y in ((top, top + 1.5 - y), (top + 1, y - top - 0.5)):
                for j, share_x in ((left, left + 1.5 - x), (left + 1, x - left - 0.5)):
                    color += share_y * share_x * images[other, :, min(max(i, 0), height - 1), min(max(j, 0), width - 1)]
            differences.append(color - images[view, :, row, column])
    error = np.array(differences)
    return len(error), float(np.abs(error).mean()), float(np.square(error).mean())


def test_warp_error_agrees_with_a_loop() -> None:
    intrinsics, extrinsics = cameras(12, 3)
    batch = {"intrinsics": intrinsics, "extrinsics": extrinsics, "depth": render_plane(intrinsics, extrinsics, 12)[1]}
    batch["images"] = torch.rand(1, 3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    found = warp_error(**batch)
    assert [(pair.view, pair.other) for pair in found] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    for pair in found:
        pixels, absolute, squared = warped_by_hand(batch, pair.view, pair.other)
        assert 30 < pixels < 144
        assert pair.pixels == pixels
        assert pair.absolute == pytest.approx(absolute, rel=1e-4)
        assert pair.psnr == pytest.approx(-10 * math.log10(squared), abs=1e-3)
        assert pair.angle == pytest.approx(6 * abs(pair.view - pair.other), abs=1e-4)


def test_warped_wall_by_hand() -> None:
    batch = wall()
    batch["images"][0, 1, :, :, :-2] = batch["images"][0, 0, :, :, 2:] + 0.25  # what both see, a little brighter
    batch["images"][0, 1, :, :, -2:] = float(0)  # only the second sees it
    first, second = warp_error(**batch)
    assert first.pixels == second.pixels == 48
    assert first.absolute == pytest.approx(0.25, rel=1e-4)
    assert second.psnr == pytest.approx(-20 * math.log10(0.25), rel=1e-4)


def test_hidden_and_unmeasured_pixels_do_not_count() -> None:
    batch = wall()
    whole = warp_error(**batch, pairs=[(0, 1)])[0]
    batch["depth"][0, 1, :, :, 4:] = 1.0  # something near hides two of the six columns that both see
    assert warp_error(**batch, pairs=[(0, 1)])[0].pixels == whole.pixels - 16
    batch["depth"][0, 0, :, 3] = 0.0  # a row without measurement
    assert warp_error(**batch, pairs=[(0, 1)])[0].pixels == whole.pixels - 16 - 4


def test_nothing_in_common_is_none_not_zero() -> None:
    batch = wall()
    batch["extrinsics"][0, 1, 0, 3] = -100.0
    for pair in warp_error(**batch, truth=batch["images"]):
        assert pair.pixels == 0
        assert (pair.absolute, pair.psnr, pair.true_absolute, pair.true_psnr) == (None, None, None, None)
    assert warp_error(**{name: value[:, :1] for name, value in batch.items()}) == []


def test_true_views_agree_and_swapped_views_do_not(plane: dict[str, Tensor]) -> None:
    swapped = {**plane, "images": plane["images"].flip(1)}
    pairs = [(0, 1), (2, 1)]
    true, wrong = warp_error(**plane, pairs=pairs), warp_error(**swapped, truth=plane["images"], pairs=pairs)
    assert all(pair.absolute < 0.005 and pair.psnr > 40 for pair in true)
    assert all(pair.absolute > 0.1 and pair.psnr < 20 for pair in wrong)
    assert [(pair.true_absolute, pair.true_psnr) for pair in wrong] == [(pair.absolute, pair.psnr) for pair in true]


def test_samples_of_a_batch_do_not_mix(plane: dict[str, Tensor]) -> None:
    twice = {name: torch.cat([value, value.flip(1)]) for name, value in plane.items()}
    both = warp_error(**twice)
    assert [pair.sample for pair in both] == [0] * 6 + [1] * 6
    assert both[:6] == warp_error(**plane)
    for pair in both[6:]:
        peer = next(one for one in both[:6] if (one.view, one.other) == (2 - pair.view, 2 - pair.other))
        assert {**asdict(pair), "sample": 0, "view": peer.view, "other": peer.other} == asdict(peer)


def test_half_precision_input_is_warped_in_float32(plane: dict[str, Tensor]) -> None:
    rounded = {**plane, "depth": plane["depth"].half()}
    exact = warp_error(**{**plane, "depth": plane["depth"].half().float()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert warp_error(**rounded) == exact


def matched_points(count: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random points in front of two cameras, in pixels of both, and the cameras."""
    intrinsics, extrinsics = (tensor[0].double() for tensor in cameras(64, 2, step=0.7, turn=20.0))
    intrinsics[1, 0, 0] = 80
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(count, 3, generator=generator, dtype=torch.float64) * 2 + torch.tensor([-1.0, -1.0, 2.0])
    image = (points @ extrinsics[:, :3, :3].mT + extrinsics[:, None, :3, 3]) @ intrinsics.mT
    first, second = image[..., :2] / image[..., 2:]
    return first, second, intrinsics, extrinsics


def test_epipolar_distance_of_exact_matches_is_zero() -> None:
    assert symmetric_epipolar_distance(*matched_points()).max() < 1e-9


def test_epipolar_distance_agrees_with_lines_drawn_through_two_depths() -> None:
    first, second, intrinsics, extrinsics = matched_points()
    noise = torch.randn(2, len(first), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, second = first + 5 * noise[0], second + 5 * noise[1]

    def distance(points: Tensor, others: Tensor, view: int, other: int) -> np.ndarray:
        """Distance of `others` from the line on which `points` lie in the other view, at any depth."""
        ends = []
        one = np.ones((len(points), 1))
        for depth in (1.0, 50.0):
            ray = np.concatenate([points.numpy(), one], 1) @ np.linalg.inv(intrinsics[view].numpy()).T
            world = np.concatenate([ray * depth, one], 1) @ np.linalg.inv(extrinsics[view].numpy()).T
            pixel = (world @ extrinsics[other].numpy().T)[:, :3] @ intrinsics[other].numpy().T
            ends.append(pixel[:, :2] / pixel[:, 2:])
        along, away = ends[1] - ends[0], others.numpy() - ends[0]
        return np.abs(along[:, 0] * away[:, 1] - along[:, 1] * away[:, 0]) / np.linalg.norm(along, axis=1)

    expected = (distance(first, second, 0, 1) + distance(second, first, 1, 0)) / 2
    found = symmetric_epipolar_distance(first, second, intrinsics, extrinsics)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)
    swapped = symmetric_epipolar_distance(second, first, intrinsics.flip(0), extrinsics.flip(0))
    torch.testing.assert_close(swapped, found)


def test_epipolar_distance_of_shifted_points_is_the_shift() -> None:
    batch = wall(64)
    points = torch.rand(20, 2, generator=torch.Generator().manual_seed(0)) * 64
    shift = torch.tensor([-7.0, 3.0])  # along the epipolar line, which does not change the distance, and off the line
    found = symmetric_epipolar_distance(points, points + shift, batch["intrinsics"][0], batch["extrinsics"][0])
    torch.testing.assert_close(found, torch.full((20,), 3.0, dtype=torch.float64), rtol=0, atol=1e-5)


def test_epipolar_distance_is_nan_where_there_is_no_line() -> None:
    intrinsics, extrinsics = (tensor[0] for tensor in cameras(64, 2, step=0.0))
    extrinsics[:, :3, 3] = -extrinsics[:, :3, :3] @ torch.tensor(
        [1.3, 2.7, 3.1]
    )  # turned on the spot, as exact as float32
    points = torch.tensor([[3.0, 4.0], [32.0, 32.0]])
    assert symmetric_epipolar_distance(points, points, intrinsics, extrinsics).isnan().all()
    ahead = torch.eye(4).repeat(2, 1, 1)
    ahead[1, 2, 3] = -1.0  # one unit ahead: the image center is the epipole
    found = symmetric_epipolar_distance(points, points, intrinsics, ahead)
    assert found.isnan().tolist() == [False, True]


def test_tsed_of_true_views_and_of_swapped_ones(plane: dict[str, Tensor]) -> None:
    pytest.importorskip("cv2")
    true = tsed(plane["images"], plane["intrinsics"], plane["extrinsics"])
    assert [(pair.view, pair.other) for pair in true] == [(1, 0), (2, 0), (2, 1)]
    for pair in true:
        assert pair.matches <= min(pair.keypoints)
        assert pair.matches >= 10
        assert pair.distance < 0.3
        assert (pair.consistent, pair.reason) == (True, None)
    mirrored = plane["images"].flip(1)
    wrong = tsed(mirrored, plane["intrinsics"], plane["extrinsics"], truth=plane["images"])
    assert [pair.matches for pair in wrong] == [pair.matches for pair in reversed(true)]
    for pair in wrong[:1] + wrong[2:]:
        assert pair.distance > 2
        assert pair.consistent is False
        assert "less than 2 needed" in pair.reason


def test_tsed_counts_what_is_missing(plane: dict[str, Tensor]) -> None:
    pytest.importorskip("cv2")
    intrinsics, extrinsics = plane["intrinsics"], plane["extrinsics"]
    blank = torch.full_like(plane["images"], 0.5)
    (alone,) = tsed(blank, intrinsics, extrinsics, pairs=[(0, 1)])
    assert (alone.keypoints, alone.matches, alone.distance) == ((0, 0), 0, None)
    assert (alone.consistent, alone.reason) == (False, "0 matches, at least 10 needed")
    # A blank view is a failure where the true images are found consistent, and no answer where they are not.
    (failed,) = tsed(blank, intrinsics, extrinsics, truth=plane["images"], pairs=[(0, 1)])
    assert failed == alone
    (unknown,) = tsed(blank, intrinsics, extrinsics, truth=blank, pairs=[(0, 1)])
    assert unknown.consistent is None
    assert unknown.reason == "the true images are not found consistent either: 0 matches, at least 10 needed"
    (strict,) = tsed(plane["images"], intrinsics, extrinsics, pairs=[(0, 1)], min_matches=10_000)
    assert strict.distance is not None
    assert strict.reason == f"{strict.matches} matches, at least 10000 needed"


def test_tsed_without_a_baseline_is_open(plane: dict[str, Tensor]) -> None:
    pytest.importorskip("cv2")
    extrinsics = plane["extrinsics"][:, :1].expand(-1, 3, -1, -1)
    found = tsed(plane["images"][:, :1].expand(-1, 3, -1, -1, -1), plane["intrinsics"], extrinsics)
    assert {(pair.consistent, pair.distance) for pair in found} == {(None, None)}
    assert all("stand at one point" in pair.reason and pair.matches > 10 for pair in found)


def test_keypoints_lie_where_the_blobs_are() -> None:
    pytest.importorskip("cv2")
    centres = torch.tensor([[18.0, 24.0], [48.25, 30.5], [36.7, 62.3]])
    grid = pixel_grid(80, 80, dtype=torch.float32, device="cpu")
    distance = (grid[:, :, None] - centres).square().sum(-1)
    image = (-distance / (2 * 3.0**2)).exp().sum(-1)
    positions, descriptors = find_keypoints(image.expand(3, -1, -1))
    assert descriptors.shape == (len(positions), 128)
    nearest = torch.cdist(centres.double(), positions).amin(1)
    assert nearest.max() < 0.1, nearest  # a quarter of a pixel with OpenCV's usual upscale, half with its pixel count


def test_matches_agree_with_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(30, 8, generator=generator)
    second = torch.cat([first[:20] + 0.05 * torch.randn(20, 8, generator=generator), first[:1], first[:1]])
    expected = []
    for i in range(30):
        for j in range(22):
            here = [float((first[i] - one).norm()) for one in second]
            there = [float((second[j] - one).norm()) for one in first]
            distinct = here[j] < 0.8 * sorted(here)[1] and there[i] < 0.8 * sorted(there)[1]
            if distinct and here[j] == min(here) and there[i] == min(there):
                expected.append([i, j])
    assert 10 < len(expected) < 20
    assert match_descriptors(first, second).tolist() == expected
    assert match_descriptors(first, second[:1]).shape == (0, 2)
    assert match_descriptors(first[:0], second).shape == (0, 2)


def test_missing_opencv_says_what_to_install(plane: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r'SIFT keypoints: .*pip install "cameo-diffusion\[evaluation\]"'):
        tsed(plane["images"], plane["intrinsics"], plane["extrinsics"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"images": torch.zeros(1, 2, 3, 8, 9)},
            ShapeError,
            r"images: expected \[1, 2, 3, 8, 8\], got \[1, 2, 3, 8, 9\]",
        ),
        ({"truth": torch.zeros(1, 1, 3, 8, 8)}, ShapeError, r"truth: expected \[1, 2, 3, 8, 8\]"),
        ({"images": torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8)}, ValueError, "images: .*uint8.*divide by 255"),
        ({"images": torch.full((1, 2, 3, 8, 8), math.nan)}, ValueError, "images: expected finite values, got NaN"),
        ({"pairs": [(0, 2)]}, ValueError, r"pairs: expected two different views of 0..1 each, got \(0, 2\)"),
        ({"pairs": [(1, 1)]}, ValueError, r"pairs: .*got \(1, 1\)"),
        ({"depth_tolerance": 1.5}, ValueError, "depth_tolerance: expected a share between 0 and 1"),
        ({"intrinsics": torch.zeros(1, 2, 3, 3)}, ValueError, "intrinsics: sample 0, view 0 has a focal length"),
    ],
)
def test_bad_input_of_warp_error(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        warp_error(**{**wall(), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 8)}, ShapeError, r"images: expected \[1, 2, 3, 8, 8\]"),
        ({"truth": torch.zeros(1, 2, 3, 4, 4)}, ShapeError, r"truth: expected \[1, 2, 3, 8, 8\]"),
        ({"pairs": [(-1, 0)]}, ValueError, "pairs: expected two different views"),
        ({"max_distance": 0.0}, ValueError, "max_distance: expected more than 0 pixels"),
        ({"min_matches": 0}, ValueError, "min_matches: expected at least 1"),
        ({"extrinsics": torch.zeros(1, 2, 4, 4)}, ValueError, "extrinsics: sample 0, view 0"),
    ],
)
def test_bad_input_of_tsed(change: dict[str, Any], error: type[Exception], message: str) -> None:
    batch: dict[str, Any] = wall()
    del batch["depth"]
    with pytest.raises(error, match=message):
        tsed(**{**batch, **change})


def test_bad_input_of_epipolar_distance() -> None:
    points = torch.zeros(3, 2)
    intrinsics, extrinsics = (tensor[0] for tensor in cameras(8, 2))
    with pytest.raises(ShapeError, match=r"others: expected \[3, 2\], got \[2, 2\]"):
        symmetric_epipolar_distance(points, points[:2], intrinsics, extrinsics)
    with pytest.raises(ShapeError, match=r"intrinsics: expected \[2, 3, 3\]"):
        symmetric_epipolar_distance(points, points, intrinsics[:1], extrinsics)
    with pytest.raises(ShapeError, match=r"extrinsics: expected \[2, 4, 4\]"):
        symmetric_epipolar_distance(points, points, intrinsics, extrinsics[None])
