"""Depth of a network, brought to the scale of the cameras by tracks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cameo import Tracks
from cameo.data.depth_estimator import DepthEstimator, fit_depth
from cameo.errors import DataError, ShapeError, WeightsUnavailable
from cameo.scenes.embedded import EmbeddedScenes
from cameo.scenes.views import Views
from tests.helpers.tracked_rooms import pixel_tracks


@pytest.fixture(scope="module")
def room() -> Views:
    return EmbeddedScenes(split="validation", num_scenes=1, views_per_scene=4, size=(48, 48), seed=0).views(0)


@pytest.fixture(scope="module")
def tracks(room: Views) -> Tracks:
    return pixel_tracks(room)


def off(found: Tensor, room: Views) -> Tensor:
    """Relative error of the depth, median of each view."""
    return ((found - room.depth) / room.depth).abs().flatten(1).nanmedian(dim=1).values


@pytest.mark.parametrize("output", ["scaled", "relative", "inverse"])
def test_scale_and_shift_of_each_view_are_found(room: Views, tracks: Tracks, output: str) -> None:
    scale = torch.tensor([0.5, 2.0, 7.0, 0.01])[:, None, None, None]
    shift = torch.tensor([0.3, -0.2, 0.0, 1.0])[:, None, None, None]
    estimated = {"scaled": room.depth * scale, "relative": room.depth * scale + shift}.get(
        output, scale / room.depth + shift
    )
    found = fit_depth(estimated, tracks, room.intrinsics, room.extrinsics, output=output)
    assert found.shape == room.depth.shape
    # The sightings are at centers of pixels, so that their points are half a pixel off.
    assert off(found, room).max() < 0.03


@pytest.mark.parametrize("output", ["scaled", "relative", "inverse"])
def test_a_fifth_of_the_points_may_be_false(room: Views, tracks: Tracks, output: str) -> None:
    generator = torch.Generator().manual_seed(0)
    false = (torch.rand(int(tracks.point.max()) + 1, generator=generator) < 0.2)[tracks.point]
    moved = tracks.xy + 12 * torch.randn(len(tracks), 2, generator=generator)
    wrong = Tracks(tracks.point, tracks.view, torch.where(false[:, None], moved, tracks.xy), tracks.num_views)
    estimated = 1 / room.depth if output == "inverse" else room.depth
    found = fit_depth(estimated, wrong, room.intrinsics, room.extrinsics, output=output)
    assert off(found, room).max() < 0.1


def test_nothing_is_metric_without_points(room: Views, tracks: Tracks) -> None:
    cameras = room.intrinsics, room.extrinsics
    with pytest.raises(DataError, match=r"tracks: the depth of a network has no unit .*COLMAP"):
        fit_depth(room.depth, None, *cameras, output="scaled")
    few = tracks.of_views([0, 1, 2, 3])
    few = Tracks(few.point[:4], few.view[:4], few.xy[:4], 4)
    with pytest.raises(DataError, match="tracks: expected at least 8 points of known depth"):
        fit_depth(room.depth, few, *cameras, output="scaled")
    kept = tracks.view != 3
    three = Tracks(tracks.point[kept], tracks.view[kept], tracks.xy[kept], 4)
    with pytest.warns(UserWarning, match="1 of 4 views have less than 8 points .* first: view 3"):
        found = fit_depth(room.depth, three, *cameras, output="relative")
    assert not found[3].any()
    assert found[:3].all()
    # An estimate that falls where the depth rises is not of this kind.
    with pytest.raises(DataError, match="got none that has"):
        fit_depth(room.depth, tracks, *cameras, output="inverse")


def test_bad_arguments_are_named(room: Views, tracks: Tracks) -> None:
    cameras = room.intrinsics, room.extrinsics
    with pytest.raises(ValueError, match=r"unknown output 'metric'.*inverse, relative, scaled"):
        fit_depth(room.depth, tracks, *cameras, output="metric")
    with pytest.raises(ShapeError, match=r"estimated: expected \[V, 1, H, W\]"):
        fit_depth(room.depth[:, 0], tracks, *cameras, output="scaled")
    with pytest.raises(ShapeError, match="tracks: expected of 4 views, as estimated, got 2"):
        fit_depth(room.depth, tracks.of_views([0, 1]), *cameras, output="scaled")


def test_an_estimator_of_transformers(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path)
    transformers.DPTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    estimator = DepthEstimator(str(tmp_path))
    images = torch.rand(2, 3, 40, 56)
    found = estimator(images)
    assert found.shape == (2, 1, 40, 56)
    assert found.isfinite().all()
    assert torch.equal(found, estimator.train()(images))
    assert not torch.equal(found[0], found[1])
    with pytest.raises(ShapeError, match=r"images: expected \[V, 3, H, W\]"):
        estimator(images[None])
    with pytest.raises(WeightsUnavailable, match="none: its weights are not reachable"):
        DepthEstimator(str(tmp_path / "none"))
