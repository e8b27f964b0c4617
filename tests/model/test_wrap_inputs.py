"""Values that `wrap`, the model around it and its settings take from users: of any number type, or refused by name."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cameo
from cameo import AlignmentHead, Correspondence, TokenLayout, alignment_loss
from cameo.backbone import find_layer, get_backbone
from cameo.config import CameoConfig
from cameo.errors import DataError
from cameo.training.repa import FeatureAlignment
from cameo.wrap import attach
from tests.helpers.models import GRID, JointModel, frames, next_view

NAN, INF = float("nan"), float("inf")


def wrapped(**options: Any) -> cameo.CameoModel:
    return cameo.wrap(JointModel(), layer="joint", layout=options.pop("layout", "b (v h w)"), **options)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return (
        get_backbone("cat3d").build("tiny", block_out_channels=(8, 8), heads=2, norm_num_groups=4, position="none").unet
    )


def run(model: cameo.CameoModel, views: int = 2) -> torch.Tensor:
    model(frames(views=views), num_frames=views, correspondence=next_view(views=views, grid=GRID))
    return model.alignment_loss


# The weight


def test_the_weight_that_is_set_is_the_one_that_is_saved(tmp_path: Path) -> None:
    model = wrapped()
    model.weight = 0.5
    assert (model.weight, model.cameo_config.weight) == (0.5, 0.5)
    assert CameoConfig.load(model.save_pretrained(tmp_path / "saved")).weight == 0.5
    model.cameo_config.weight = 0.25
    assert model.weight == 0.25
    assert pickle.loads(pickle.dumps(model)).weight == 0.25
    model.weight = np.float32(1)
    assert json.loads(json.dumps(model.weight)) == 1.0


@pytest.mark.parametrize("value", [NAN, INF, -0.1, "0.5", None, True], ids=str)
def test_a_weight_that_is_none_is_refused_wherever_it_is_set(value: Any) -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="weight: expected a finite factor >= 0, got"):
        model.weight = value
    assert model.weight == 0.02
    with pytest.raises(ValueError, match="weight: expected a finite factor >= 0, got"):
        wrapped(weight=value)


# The loss before a forward


def test_a_loss_that_was_not_computed_is_no_attribute() -> None:
    model = wrapped()
    features = FeatureAlignment(model, ["joint"], [16], 4, seed=0)
    for wrapper in (model, features):
        assert not hasattr(wrapper, "alignment_loss")
        assert getattr(wrapper, "alignment_loss", None) is None
        for kind in (RuntimeError, AttributeError):
            with pytest.raises(kind, match="no alignment loss: call the model with"):
                _ = wrapper.alignment_loss
    run(model)
    assert hasattr(model, "alignment_loss")
    model(frames(views=2), num_frames=2)
    assert not hasattr(model, "alignment_loss")


# Layers


@pytest.mark.parametrize(
    "number", [np.int64(1), np.uint8(1), torch.tensor(1), np.array(1)], ids=lambda n: type(n).__name__
)
def test_a_layer_by_an_integer_of_any_type(number: Any, unet: nn.Module) -> None:
    layers = get_backbone("cat3d").attention_layers(unet)
    assert find_layer(layers, number) == layers[1]
    for layer in (number, [number], (number, 2)):
        model = cameo.wrap(unet, "cat3d", layer)
        assert model.supervised_layers[0] == layers[1]
        json.dumps(model.cameo_config.layers)
        model.unwrap()


def test_layers_by_an_array(unet: nn.Module) -> None:
    model = cameo.wrap(unet, "cat3d", np.array([0, 1]))
    assert [layer.index for layer in model.supervised_layers] == [0, 1]
    model.unwrap()


@pytest.mark.parametrize(
    "layer", [1.0, np.float32(1), torch.tensor(1.0), np.bool_(True), [True], [0, 1.5], [[1]]], ids=str
)
def test_what_is_no_layer_is_refused_by_name(layer: Any, unet: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"unknown layer .*Known: down_blocks"):
        cameo.wrap(unet, "cat3d", layer)


# Descriptions of a model without an adapter


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": 3}, TypeError, r"layout: expected a cameo\.TokenLayout or a pattern such as 'b \(v h w\)', got 3"),
        ({"head": 3}, TypeError, "head: expected its kind or the keyword arguments of AlignmentHead, got 3"),
        ({"heads": 3}, ValueError, "heads: layer 'joint' has 2 attention heads, got 3; leave heads= out"),
        ({"heads": "2"}, ValueError, "heads: expected an integer of at least 1, got '2'"),
        ({"heads": 0}, ValueError, "heads: expected an integer of at least 1, got 0"),
        ({"stride": 8.0}, ValueError, "stride: expected an integer of at least 1, got 8.0"),
        ({"num_reference_views": -1}, ValueError, "num_reference_views: expected an integer of at least 0, got -1"),
        ({"num_reference_views": "a"}, ValueError, "num_reference_views: expected an integer of at least 0, got 'a'"),
        ({"num_reference_views": 1.0}, ValueError, "num_reference_views: expected an integer of at least 0, got 1.0"),
        ({"softness": NAN}, ValueError, "softness: expected a finite number of tokens >= 0, got nan"),
        ({"softness": "1"}, ValueError, "softness: expected a finite number of tokens >= 0, got '1'"),
    ],
)
def test_what_wrap_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrapped(**options)


def test_numbers_of_numpy_are_saved_as_plain_ones(tmp_path: Path) -> None:
    layout = TokenLayout("b (t + v h w)", t=np.int64(3))
    model = wrapped(
        layout=layout, heads=np.int64(2), stride=np.int32(8), num_reference_views=np.int8(1), softness=np.float32(1)
    )
    config = CameoConfig.load(model.cameo_config.save(tmp_path))
    assert config == model.cameo_config
    assert TokenLayout(**config.layout) == layout
    assert AlignmentHead(np.int64(2)).num_heads == 2


@pytest.mark.parametrize("reduction", ["mean", "released"])
def test_more_reference_views_than_views_are_refused_in_the_first_forward(reduction: str) -> None:
    model = wrapped(num_reference_views=99, reduction=reduction)
    with pytest.raises(
        ValueError, match="num_reference_views: expected at most 2, the views of the correspondence, got 99"
    ):
        run(model)
    assert not hasattr(model, "alignment_loss")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((0, 0), "height: expected an integer of at least 1, got 0"),
        ((-32, 32), "height: expected an integer of at least 1, got -32"),
        ((NAN, 32), "height: expected an integer of at least 1, got nan"),
        ((32, 32.0), "width: expected an integer of at least 1, got 32.0"),
        ((32, "32"), "width: expected an integer of at least 1, got '32'"),
    ],
)
def test_image_sizes_that_are_none(size: tuple[Any, Any], message: str) -> None:
    model = wrapped(stride=8)
    with pytest.raises(ValueError, match=message):
        model.token_grid(*size)
    with pytest.raises(ValueError, match=message):
        model.token_grids(*size, 2)
    with pytest.raises(ValueError, match="num_views: expected an integer of at least 1, got 0"):
        model.token_grids(32, 32, 0)
    assert model.token_grid(np.int64(32), np.int64(64)) == (4, 8)


# Settings of a file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layout": {"query": "b (v h w)"}},
            "layout: describes a model without an adapter, but backbone 'cat3d' knows it",
        ),
        ({"heads": "a"}, "heads: expected an integer of at least 1, got 'a'"),
        ({"heads": 2}, "heads: describes a model without an adapter"),
        ({"stride": 8}, "stride: describes a model without an adapter"),
        ({"kernel_call": 0}, "kernel_call: describes a model without an adapter"),
        ({"training": "x"}, "training: expected a mapping of names to values, got 'x'"),
        ({"head": "mlp"}, "head: expected a mapping of names to values, got 'mlp'"),
        ({"layer_choice": 3}, "layer_choice: expected a mapping of names to values, got 3"),
        ({"layers": [1]}, r"layers: expected a list of module paths, got \[1\]"),
        ({"inflate": "yes"}, "inflate: expected True or False, got 'yes'"),
        ({"base_model": 3}, "base_model: expected text, got 3"),
        ({"weight": -0.5}, "weight: expected a finite factor >= 0, got -0.5"),
        ({"num_reference_views": -1}, "num_reference_views: expected an integer of at least 0, got -1"),
    ],
)
def test_settings_that_say_nothing_or_nonsense_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, unet: nn.Module
) -> None:
    values = {"backbone": "cat3d", "layers": ["mid_block.attentions.0.transformer_blocks.0.attn1"], **changes}
    path = tmp_path / "cameo_config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"cameo_config.json: {message}"):
        CameoConfig.load(path)
    with pytest.raises(ValueError, match=message):
        attach(unet, CameoConfig(**values))


# The loss and its matches


def test_a_scale_that_is_no_number_is_refused() -> None:
    match = next_view(views=2, grid=GRID)
    query = torch.zeros(match.batch_size, 2, 2, GRID[0] * GRID[1], 4)
    for scale in (NAN, INF):
        with pytest.raises(ValueError, match=rf"scale: expected a finite factor of q\.k or None, got {scale}"):
            alignment_loss(query, query, match, AlignmentHead(2), scale=scale)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("match_weight", NAN, ValueError, "match_weight: holds negative or NaN or infinite values"),
        ("match_weight", INF, ValueError, "match_weight: holds negative or NaN or infinite values"),
        ("match_weight", -1.0, ValueError, "match_weight: holds negative or NaN or infinite values"),
        ("distance", NAN, ValueError, "distance: holds negative or NaN values. Cure: use inf"),
        ("distance", -1.0, ValueError, "distance: holds negative or NaN values"),
        ("match_weight", None, TypeError, "^match_weight: expected a tensor, got ndarray"),
        ("distance", None, TypeError, "distance: expected a tensor, got ndarray"),
        ("index", None, TypeError, "index: expected a tensor, got ndarray"),
    ],
)
def test_matches_whose_values_are_none(name: str, value: float | None, error: type[Exception], message: str) -> None:
    index = torch.full((1, 2, 2, 4), -1)
    fields = {"index": index, "match_weight": torch.ones(index.shape), "distance": torch.ones(index.shape)}
    if value is None:
        fields[name] = fields[name].numpy()
    else:
        fields[name][0, 1, 0, 2] = value
    with pytest.raises(error, match=message):
        Correspondence(token_grids=((2, 2), (2, 2)), **fields)


def test_distances_without_measurement_are_infinite() -> None:
    index = torch.full((1, 2, 2, 4), -1)
    assert Correspondence(index, ((2, 2), (2, 2)), distance=torch.full(index.shape, INF)).distance is not None


def test_grids_by_numbers_of_numpy() -> None:
    features = torch.randn(1, 2, 3, 4, 4)
    for size in (np.int64(2), (np.int64(2), 2), [(2, np.int64(2)), (2, 2)]):
        assert Correspondence.from_features(features, token_grid=size).token_grids == ((2, 2), (2, 2))
    for size in (True, (2, 2.0), (2, 0), (2,), "22", 2.5):
        with pytest.raises(ValueError, match="token_grid: expected a positive int or"):
            Correspondence.from_features(features, token_grid=size)


def test_a_description_mentions_once_how_it_is_proved(caplog: pytest.LogCaptureFixture) -> None:
    sys.modules["cameo.wrap"]._mention_the_check.cache_clear()  # `cameo.wrap` is the function
    with caplog.at_level(logging.INFO, logger="cameo.wrap"):
        for _ in range(2):
            cameo.wrap(JointModel(), layer="joint", layout="b (v h w)")
    told = [record.getMessage() for record in caplog.records]
    assert told == ["a layout is taken as described; model.check_layout(inputs, images) proves it on the model"]
