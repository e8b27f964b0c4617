"""Camera rigs: the poses that each model generates, and cameras from which the object fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cameo.data import RIGS, EmbeddedScenes, rig_cameras, rig_views
from cameo.geometry import orbit_centre, project, spherical_angles
from cameo.scenes.rigs import rig_angles

SIZE = (48, 64)
TOP = torch.tensor([[0.0, 0.0, 1.0]])


def cameras(name: str, seed: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
    """`(intrinsics [1, F, 3, 3], extrinsics [1, F, 4, 4])` of a rig."""
    intrinsics, extrinsics = rig_cameras(name, np.random.default_rng(seed), SIZE, count)
    return torch.from_numpy(intrinsics)[None], torch.from_numpy(extrinsics)[None]


def turned(azimuth: Tensor) -> list[float]:
    """Azimuth relative to view 0, whole degrees in [0, 360)."""
    return ((azimuth - azimuth[:, :1]).round() % 360)[0].tolist()


@pytest.mark.parametrize("name", RIGS)
def test_angles_come_back_from_the_cameras(name: str) -> None:
    for seed in range(3):
        azimuth, elevation = rig_angles(name, np.random.default_rng(seed))
        intrinsics, extrinsics = cameras(name, seed)
        centre = orbit_centre(extrinsics)
        torch.testing.assert_close(centre, torch.zeros(1, 3, dtype=torch.float64), atol=1e-9, rtol=0)
        found = spherical_angles(extrinsics, centre, TOP)
        np.testing.assert_allclose(found[0][0], azimuth, atol=1e-9)
        np.testing.assert_allclose(found[1][0], elevation, atol=1e-9)
        # All at one distance, from which the unit sphere fits with a margin of 3.5 %.
        half = torch.atan(min(SIZE) / 2 / intrinsics[0, :, 0, 0])
        torch.testing.assert_close(found[2][0] * half.sin(), torch.full_like(half, 1.0353))


def test_origin_is_in_the_middle_and_the_image_upright() -> None:
    for name in RIGS:
        points = torch.tensor([[0.0, 0, 0], [0.0, 0, 0.5]], dtype=torch.float64)
        intrinsics, extrinsics = cameras(name)
        xy, _ = project(points.expand(1, extrinsics.shape[1], 2, 3), intrinsics, extrinsics)
        torch.testing.assert_close(xy[0, :, 0], xy.new_tensor([32.0, 24.0]).expand(len(xy[0]), 2))
        torch.testing.assert_close(xy[0, :, 1, 0], xy.new_full((len(xy[0]),), 32.0))
        assert (xy[0, :, 1, 1] < 24).all()


@pytest.mark.parametrize(("version", "upper", "lower"), [("1.1", 30.0, -20.0), ("1.2", 20.0, -10.0)])
def test_zero123plus_has_the_released_poses(version: str, upper: float, lower: float) -> None:
    starts, inputs = [], []
    for seed in range(40):
        intrinsics, extrinsics = cameras(f"zero123plus-v{version}", seed)
        azimuth, elevation, _ = spherical_angles(extrinsics, torch.zeros(1, 3), TOP)
        assert turned(azimuth) == [0, 30, 90, 150, 210, 270, 330]
        torch.testing.assert_close(elevation[0, 1:], elevation.new_tensor([upper, lower] * 3))
        assert intrinsics[0, :, 0, 0].tolist() == pytest.approx([24 / np.tan(np.radians(15))] * 7)
        starts.append(float(azimuth[0, 0]))
        inputs.append(float(elevation[0, 0]))
    assert min(starts) < 40
    assert max(starts) > 320
    assert -10 <= min(inputs) < 0
    assert 30 < max(inputs) <= 40


def test_mvdream_and_imagedream_share_elevation_and_turn_by_right_angles() -> None:
    fields = []
    for seed in range(40):
        for name, expected in (("mvdream", [0, 90, 180, 270]), ("imagedream", [0, 0, 90, 180, 270])):
            intrinsics, extrinsics = cameras(name, seed)
            azimuth, elevation, _ = spherical_angles(extrinsics, torch.zeros(1, 3), TOP)
            assert turned(azimuth) == expected
            assert 0 <= elevation.min() <= elevation.max() <= 30
            assert elevation.max() - elevation.min() < 1e-9
        fields.append(float(torch.rad2deg(2 * torch.atan(24 / intrinsics[0, 0, 0, 0]))))
    assert 15 <= min(fields) < 25
    assert 50 < max(fields) <= 60


def test_sv3d_orbits() -> None:
    for count in (2, 5, 21):
        azimuth, elevation = rig_angles("sv3d-orbit", np.random.default_rng(0), count)
        np.testing.assert_allclose((azimuth - azimuth[0]) % 360, np.arange(count) * 360 / count, atol=1e-9)
        assert len(set(elevation.tolist())) == 1
    swings = []
    for seed in range(20):
        azimuth, elevation = rig_angles("sv3d-dynamic", np.random.default_rng(seed), 21)
        relative = (azimuth - azimuth[0]) % 360
        # In order, each within a quarter of a step of its place, and not on it.
        assert (np.diff(relative) > 0).all()
        apart = np.abs(relative - np.arange(21) * 360 / 21)
        assert apart.max() <= 0.25 * 360 / 21
        assert apart[1:].max() > 1
        # Smooth: 15 degrees of three sines change by less than 15 degrees over a step.
        assert np.abs(np.diff(elevation)).max() < 15
        swings.append(np.abs(elevation - elevation[0]).max())
    assert min(swings) > 4
    assert max(swings) <= 15


def test_same_generator_gives_the_same_cameras() -> None:
    for name in RIGS:
        assert all(torch.equal(one, two) for one, two in zip(cameras(name, 5), cameras(name, 5), strict=True))
        assert not torch.equal(cameras(name, 5)[1], cameras(name, 6)[1])


def test_unknown_rig_and_wrong_numbers_of_views() -> None:
    with pytest.raises(ValueError, match=r"unknown rig 'zero123plus': did you mean 'zero123plus-v1\.\d'"):
        rig_views("zero123plus")
    with pytest.raises(ValueError, match="rig='mvdream': has 4 views, got 8 views; ask for 4"):
        rig_views("mvdream", 8)
    with pytest.raises(ValueError, match="rig='sv3d-orbit': expected 2 views or more, got 1"):
        rig_angles("sv3d-orbit", np.random.default_rng(0), 1)


def test_scenes_show_the_rig(tmp_path: Path) -> None:
    for name in RIGS:
        count = 6 if name.startswith("sv3d") else None
        options = {"content": "objects", "rig": name, "views_per_scene": count, "size": (32, 32)}
        source = EmbeddedScenes(num_scenes=1, cache_dir=tmp_path, progress=False, **options)  # type: ignore[arg-type]
        views = source.views(0)
        assert len(views) == source.views_per_scene == rig_views(name, count)
        azimuth, elevation, _ = spherical_angles(views.extrinsics[None], torch.zeros(1, 3), TOP)
        assert 0 <= azimuth.min() <= azimuth.max() < 360
        assert -35 < elevation.min() <= elevation.max() < 46
        if name == "imagedream":
            assert torch.equal(views.images[0], views.images[1])
