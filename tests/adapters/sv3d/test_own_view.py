"""SV3D supervised within each frame, whose input channels hold the latents of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

import cameo
from cameo import Correspondence, TokenLayout
from cameo.adapters.common.joined_frames import is_inflated
from cameo.backbone import get_backbone
from cameo.config import CameoConfig
from tests.helpers.sv3d_models import batch, pipeline, plain_unet

FRAMES, GRID = 3, (4, 4)
TOKENS = GRID[0] * GRID[1]


def test_the_layers_are_the_spatial_ones_as_they_are() -> None:
    adapter, unet = get_backbone("sv3d"), pipeline().unet
    spatial, own = adapter.inflatable_layers(unet), adapter.own_view_layers(unet)
    assert [(layer.path, layer.stride, layer.heads) for layer in own] == [
        (layer.path, layer.stride, layer.heads) for layer in spatial
    ]
    assert {layer.layout for layer in own} == {TokenLayout("(b v) (h w)", own_view_shows=0, references_last=1)}
    video = adapter.own_view_layers(plain_unet(768))
    assert {layer.layout for layer in video} == {TokenLayout("(b v) (h w)", own_view_shows=0)}
    model = cameo.wrap(unet, "sv3d", own_view=True)
    assert model.supervised_layers == [own[adapter.default_layer(unet)]]
    assert model.attention_layers == own
    assert not is_inflated(unet, own[0].path)
    adapter.inflate(unet, own[0].path)
    first, second, *_ = adapter.own_view_layers(unet)
    assert first.layout == TokenLayout("b (v h w)", own_view_shows=0, references_last=1)
    assert second.layout == own[1].layout


@pytest.mark.parametrize("inflated", [False, True])
def test_a_match_reaches_its_token_and_the_keys_of_its_own_frame(inflated: bool) -> None:
    """View 0 of the correspondence, the reference, is the last frame."""
    built = pipeline()
    adapter = get_backbone("sv3d")
    if inflated:
        adapter.inflate(built.unet, adapter.inflatable_layers(built.unet)[adapter.default_layer(built.unet)].path)
    model = cameo.wrap(built.unet, "sv3d", own_view=True)
    inputs = built.training_inputs(batch(), generator=torch.Generator().manual_seed(0))
    index = torch.full((2, FRAMES, FRAMES, TOKENS), -1)
    index[1, 2, 0, 6] = 9  # of the second sample: token 6 of view 2, the second frame, in the reference
    index[0, 0, 1], index[0, 1, 2] = 3, 5  # from the reference, and between targets: in no frame's own tokens
    attention = model.base_model.get_submodule(model.supervised_layers[0].path)
    projected: dict[str, Tensor] = {}
    for name in ("to_q", "to_k"):
        getattr(attention, name).register_forward_hook(
            lambda *call, name=name: (call[-1].retain_grad(), projected.update({name: call[-1]}))[1]
        )
    model(*inputs.args, **inputs.kwargs, correspondence=Correspondence(index, (GRID,) * FRAMES))
    assert model.num_supervised == 1
    model.alignment_loss.backward()
    pattern = "b (v n) c -> b v n c" if inflated else "(b v) n c -> b v n c"
    reached = {
        name: rearrange(tensor.grad.ne(0), pattern, v=FRAMES, n=TOKENS).any(-1) for name, tensor in projected.items()
    }
    assert reached["to_q"].nonzero().tolist() == [[1, 1, 6]]
    assert reached["to_k"].nonzero().tolist() == [[1, 1, token] for token in range(TOKENS)]


def test_nothing_changes_at_inference() -> None:
    built = pipeline()
    inputs = built.training_inputs(batch(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = built.unet(*inputs.args, **inputs.kwargs).sample
        model = cameo.wrap(built.unet, "sv3d", own_view=True)
        index = torch.zeros(2, FRAMES, FRAMES, TOKENS, dtype=torch.long)
        index[:, range(FRAMES), range(FRAMES)] = -1
        match = Correspondence(index, (GRID,) * FRAMES)
        assert torch.equal(model(*inputs.args, **inputs.kwargs, correspondence=match).sample, before)
        assert model.num_supervised == 2 * (FRAMES - 1) * TOKENS
        assert torch.equal(model.unwrap()(*inputs.args, **inputs.kwargs).sample, before)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    built = pipeline()
    model = cameo.wrap(built.unet, "sv3d", own_view=True)
    model.save_pretrained(tmp_path)
    assert CameoConfig.load(tmp_path).own_view is True
    assert "within each view, whose own tokens show the reference view too" in (tmp_path / "README.md").read_text()
    again = cameo.from_pretrained(tmp_path, base_model=pipeline().unet)
    assert again.supervised_layers == model.supervised_layers
    older = CameoConfig.from_dict({"backbone": "sv3d", "layers": [model.supervised_layers[0].path], "inflate": True})
    assert older.own_view is False


def test_the_released_reduction_counts_the_reference() -> None:
    """Each target is a sample of two views, of which the first is the reference."""
    built = pipeline()
    losses = []
    for options in ({}, {"reduction": "released", "num_reference_views": 1}):
        model = cameo.wrap(built.unet, "sv3d", own_view=True, head="mean", **options)
        inputs = built.training_inputs(batch(), generator=torch.Generator().manual_seed(0))
        index = torch.full((2, FRAMES, FRAMES, TOKENS), -1)
        index[:, 1:, 0] = torch.arange(TOKENS)
        match = Correspondence(index, (GRID,) * FRAMES, distance=torch.ones(index.shape))
        model(*inputs.args, **inputs.kwargs, correspondence=match)
        losses.append(model.alignment_loss)
        model.unwrap()
    torch.testing.assert_close(losses[1], losses[0])  # every match is with the nearest view, and starts from a target


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (
            "sv3d",
            {"inflate": True, "own_view": True},
            "own_view: supervises layers as they attend.*Leave one of them out",
        ),
        ("cat3d", {"own_view": True}, "own_view=True: 'cat3d' does not carry the reference in the input channels"),
        (None, {"own_view": True, "layer": "x", "layout": "b (v h w)"}, "say it in the layout, .*own_view_shows=0"),
    ],
)
def test_where_it_does_not_fit(backbone: str | None, options: dict[str, Any], message: str) -> None:
    unet = get_backbone(backbone or "sv3d").build("tiny").unet
    with pytest.raises(ValueError, match=message):
        cameo.wrap(unet, backbone, **options)
