"""The U-Nets of MVGenMaster and of CAMEO's authors, which join the views by attention processors of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import cameo
from cameo.backbone import get_backbone
from cameo.errors import CaptureError
from tests.helpers import upstream_cat3d as cat3d
from tests.helpers.matches import random_matches

ADAPTER = get_backbone("cat3d")
EACH = pytest.mark.parametrize("kind", cat3d.KINDS)
Modules = Callable[[str], SimpleNamespace]


@torch.no_grad()
def influence(model: nn.Module) -> Tensor:
    """What changing view 0 does to the output of the others."""
    (latents, *args), kwargs = cat3d.inputs()
    changed = latents.clone()
    changed[:, 0] += 1
    first, second = (model(one, *args, **kwargs).sample for one in (latents, changed))
    return (first - second)[1:]


@EACH
def test_the_layer_of_the_paper(kind: str, cat3d_modules: Modules) -> None:
    unet = cat3d.build(cat3d_modules(kind))
    processors = dict(unet.attn_processors)
    model = cameo.wrap(unet, "cat3d")
    assert unet.attn_processors == processors
    (layer,) = model.supervised_layers
    assert (layer.index, layer.path) == (10, "up_blocks.2.attentions.0.transformer_blocks.0.attn1")
    assert len(model.attention_layers) == 16
    assert model.token_grid(64, 64) == cat3d.GRID
    assert influence(unet.eval()).abs().amax() > 1e-4


@EACH
def test_the_finest_level_stays_within_a_view(kind: str, cat3d_modules: Modules) -> None:
    layers = ADAPTER.attention_layers(cat3d.build(cat3d_modules(kind), finest=cat3d.APART))
    assert [layer.index for layer in layers if layer.unsupported] == [0, 1, 13, 14, 15]


@EACH
def test_example_inputs_fit(kind: str, cat3d_modules: Modules) -> None:
    unet = cat3d.build(cat3d_modules(kind))
    args, kwargs = ADAPTER.example_inputs(unet)
    assert unet(*args, **kwargs).sample.shape == (2, 4, 8, 8)


@EACH
def test_gradient_checkpointing_changes_nothing(kind: str, cat3d_modules: Modules) -> None:
    modules = cat3d_modules(kind)
    found = []
    for checkpointed in (False, True):
        model = cameo.wrap(cat3d.build(modules), "cat3d", head="mean")
        if checkpointed:
            model.base_model.enable_gradient_checkpointing()
        args, kwargs = cat3d.inputs()
        output = model(*args, **kwargs, correspondence=random_matches(1, (cat3d.GRID,) * cat3d.VIEWS)).sample
        (output.square().mean() + model.alignment_loss).backward()
        found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


@EACH
def test_views_that_come_apart_are_noticed(kind: str, cat3d_modules: Modules, tmp_path: Path) -> None:
    modules = cat3d_modules(kind)
    unet = cat3d.build(modules)
    model, (args, kwargs) = cameo.wrap(unet, "cat3d"), cat3d.inputs()
    matches = random_matches(1, (cat3d.GRID,) * cat3d.VIEWS)
    unet.set_attention_slice("max")
    assert influence(unet).abs().amax() < 1e-6  # what would go on without a word
    message = "attn1 joined the views until its processor was replaced by a SlicedAttnProcessor"
    with pytest.raises(CaptureError, match=message):
        model(*args, **kwargs, correspondence=matches)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "saved")
    unet.set_attn_processor(modules.processors.AttnProcessor2_0())
    model(*args, **kwargs, correspondence=matches)
    model.save_pretrained(tmp_path / "saved")
