"""U-Nets of other authors that join the views themselves: recognized by what they do, supervised as they are."""

from __future__ import annotations

import copy
import functools
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import cameo
from cameo.adapters.common import foreign_attention
from cameo.backbone import get_backbone
from cameo.errors import CaptureError
from tests.helpers.cat3d_relatives import (
    WIDTH,
    Fold,
    FoldByView,
    FoldOfThree,
    FoldRows,
    FoldTokensFirst,
    SeparateProcessor,
    frame_unet,
    unet_with,
)

ADAPTER = get_backbone("cat3d")
KINDS = {
    "copy of diffusers": frame_unet,
    "own processor": functools.partial(unet_with, Fold),
    "fixed number": functools.partial(unet_with, FoldOfThree),
}
EACH = pytest.mark.parametrize("kind", KINDS)
LAYER = "up_blocks.0.attentions.0.transformer_blocks.0.attn1"
VIEWS = {"copy of diffusers": 2, "own processor": 2, "fixed number": 3}


def matches(views: int, tokens: int = 16) -> cameo.Correspondence:
    index = torch.full((1, views, views, tokens), -1)
    index[0, 0, 1] = torch.arange(tokens)
    return cameo.Correspondence(index, ((4, 4),) * views)


@torch.no_grad()
def influence(model: nn.Module) -> Tensor:
    """What changing view 0 does to the output of view 1."""
    model.eval()
    (sample, *args), kwargs = ADAPTER.example_inputs(model)
    changed = sample.clone()
    (changed[0] if sample.ndim == 5 else changed)[0] += 1
    first, second = (model(one, *args, **kwargs).sample for one in (sample, changed))
    return (first - second)[1]


@EACH
def test_it_is_recognized_and_supervised_as_it_is(kind: str) -> None:
    unet = KINDS[kind]()
    state = {name: dict(vars(module)) for name, module in unet.named_modules()}
    processors = dict(unet.attn_processors)
    assert ADAPTER.recognizes(unet)
    model = cameo.wrap(unet, "cat3d")
    assert [layer.path for layer in model.supervised_layers] == [LAYER]
    assert unet.attn_processors == processors
    assert {name: dict(vars(module)) for name, module in unet.named_modules()} == state  # trying it left no trace
    assert influence(model.base_model).abs().amax() > 1e-4
    args, kwargs = ADAPTER.example_inputs(unet)
    assert model.token_grid(64, 64) == (4, 4)  # 8 pixels per latent cell, halved once
    expected = model.eval()(*args, **kwargs).sample
    found = model(*args, **kwargs, correspondence=matches(VIEWS[kind])).sample
    assert torch.equal(found, expected)
    assert model.num_supervised == 16
    model.train()(*args, **kwargs, correspondence=matches(VIEWS[kind]))
    model.alignment_loss.backward()
    assert model.get_submodule(f"base_model.{LAYER}").to_q.weight.grad.abs().amax() > 0


def test_layers_within_a_view_keep_their_number() -> None:
    """Those of the finest level of the copy; the paper counts them too."""
    layers = ADAPTER.attention_layers(frame_unet())
    assert [layer.index for layer in layers] == list(range(7))
    assert [layer.unsupported is None for layer in layers] == [False, True, True, True, True, False, False]
    with pytest.raises(ValueError, match=r"layer 0 .* cannot be supervised: it sees one view at a time"):
        cameo.wrap(frame_unet(), "cat3d", layer=0)
    assert all(layer.unsupported is None for layer in ADAPTER.attention_layers(unet_with(Fold)))


@pytest.mark.parametrize("kind", [FoldByView, FoldTokensFirst, FoldRows])
def test_views_that_are_joined_in_another_order_are_refused(kind: type[Fold]) -> None:
    unet = unet_with(kind)
    tokens = torch.randn(4, 4, WIDTH)
    attention = unet.get_submodule(LAYER)
    assert not torch.equal(attention(tokens, n=2), attention(tokens, n=1))  # it does join them
    assert not ADAPTER.recognizes(unet)


def test_a_copy_whose_views_are_apart_is_refused() -> None:
    unet = frame_unet()
    unet.set_attn_processor(SeparateProcessor())
    with pytest.raises(
        ValueError, match=r"attn1 of this FrameUNet is no attention of diffusers.*by layer= and layout="
    ):
        cameo.wrap(unet, "cat3d")


def test_views_that_come_apart_are_noticed(tmp_path: Path) -> None:
    unet = frame_unet()
    model = cameo.wrap(unet, "cat3d").train()
    args, kwargs = ADAPTER.example_inputs(unet)
    former = dict(unet.attn_processors)
    assert ADAPTER.unsupported(unet) is None
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"  # another layer than the supervised one
    unet.get_submodule(path).set_processor(SeparateProcessor())
    message = rf"self-attention {path} joined the views until .* replaced by a SeparateProcessor.*former processor"
    for _ in range(2):
        with pytest.raises(CaptureError, match=message):
            model(*args, **kwargs, correspondence=matches(2))
    with pytest.raises(ValueError, match=f"does not fit any more.*{message}"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match=message):
        cameo.wrap(model.unwrap(), "cat3d")
    unet.set_attn_processor(former)
    cameo.wrap(unet, "cat3d")(*args, **kwargs, correspondence=matches(2))


def test_an_attention_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question comes before every step of a training."""
    unet = cameo.wrap(frame_unet(), "cat3d").unwrap()
    monkeypatch.setattr(foreign_attention, "_try", lambda *_: pytest.fail("tried again"))
    assert ADAPTER.recognizes(unet)
    assert ADAPTER.unsupported(unet) is None
    ADAPTER.attention_layers(unet)
    before = len(foreign_attention._seen)
    del unet
    gc.collect()
    assert len(foreign_attention._seen) == before - 7


def test_trying_runs_no_hooks_and_draws_no_random_numbers() -> None:
    unet = frame_unet()
    ran: list[Any] = []
    for module in unet.modules():
        module.register_forward_pre_hook(lambda *call: ran.append(call))
    state = torch.get_rng_state()
    assert ADAPTER.recognizes(unet)
    assert ran == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in unet.parameters())


@EACH
def test_what_is_saved_is_loaded(kind: str, tmp_path: Path) -> None:
    unet = KINDS[kind]()
    expected = influence(unet)
    cameo.wrap(unet, "cat3d").save_pretrained(tmp_path)
    base = KINDS[kind]()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
    again = cameo.from_pretrained(tmp_path, base_model=base)
    assert torch.equal(influence(again.base_model.eval()), expected)
    assert [layer.path for layer in again.supervised_layers] == [LAYER]


def test_low_precision_and_copies() -> None:
    unet = copy.deepcopy(frame_unet()).to(torch.bfloat16)
    assert ADAPTER.recognizes(unet)
    assert ADAPTER.recognizes(copy.deepcopy(unet))
    with torch.device("meta"):
        assert not ADAPTER.recognizes(frame_unet())  # there are no numbers to try it with


def test_diffusers_own_processors_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_attention, "_joins", lambda *_: pytest.fail("tried"))
    unet = unet_with(AttnProcessor2_0)
    with pytest.raises(ValueError, match=r"see one view at a time.*inflate\(unet, latent_stride=8\)"):
        cameo.wrap(unet, "cat3d")
