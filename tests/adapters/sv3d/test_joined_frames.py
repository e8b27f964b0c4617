"""Spatial self-attentions whose frames are joined: hooks that are set once, copied, pickled and recomputed."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import cameo
from cameo.adapters.common import joined_frames
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers.models import VIEWS, next_view
from tests.helpers.sv3d_models import BOTH, NARROW, pipeline, run


def test_inflating_twice_is_inflating_once() -> None:
    unet = pipeline().unet
    adapter = get_backbone("sv3d")
    (path,) = [cameo.wrap(unet, "sv3d", inflate=True).supervised_layers[0].path]
    before = run(unet)
    adapter.inflate(unet, path)
    joined_frames.inflate(unet, path)
    assert list(unet.config.joined_layers) == [path]
    assert torch.equal(run(unet), before)
    joined_frames.deflate(unet, path)
    joined_frames.deflate(unet, path)
    attention = unet.get_submodule(path)
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks
    assert not joined_frames.is_inflated(unet, path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_hooks_of_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    unet = pipeline().unet
    path = cameo.wrap(unet, "sv3d", inflate=True).supervised_layers[0].path
    expected = run(unet)
    twin = copied(unet)
    assert torch.equal(run(twin), expected)
    run(twin, frames=2)
    assert (twin.get_submodule(path).joined_frames, unet.get_submodule(path).joined_frames) == (2, VIEWS)
    with torch.no_grad():
        twin.get_submodule(path).to_v.weight.zero_()
    assert torch.equal(run(unet), expected)
    joined_frames.deflate(twin, path)
    assert torch.equal(run(unet), expected)


@BOTH
def test_hooks_of_a_pickle_are_not_overwritten_in_another_process(
    inflate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch numbers hooks per process; a new one with the number of one that was loaded would take its place."""
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    torch.manual_seed(0)
    unet = get_backbone("sv3d").build("tiny", **NARROW).unet
    path = cameo.wrap(unet, "sv3d", inflate=inflate).supervised_layers[0].path
    expected, stored = run(unet), pickle.dumps(unet)
    assert RemovableHandle.next_id < 64
    hooked = ["mid_block", *([path.partition(".transformer_blocks")[0], path] if inflate else [])]
    for name, register in itertools.product(hooked, ("register_forward_pre_hook", "register_forward_hook")):
        monkeypatch.setattr(RemovableHandle, "next_id", 0)
        loaded = pickle.loads(stored)
        for _ in range(64):
            getattr(loaded.get_submodule(name), register)(lambda *_: None)
        assert torch.equal(run(loaded), expected), (name, register)


@BOTH
def test_gradient_checkpointing(inflate: bool) -> None:
    plain = pipeline().unet
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    found = []
    for unet in (plain, checkpointed):
        torch.manual_seed(4)
        model = cameo.wrap(unet, "sv3d", inflate=inflate).train()
        (run(model, correspondence=next_view(shift=0)).square().mean() + model.alignment_loss).backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    missing = [name for name, value in found[0].items() if value is None]
    assert missing == []
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_another_number_of_frames_before_the_backward_is_an_error() -> None:
    unet = pipeline().unet
    unet.enable_gradient_checkpointing()
    cameo.wrap(unet, "sv3d", inflate=True)
    output = run(unet, frames=3, samples=2)
    run(unet, frames=2, samples=3)  # as many rows
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
        output.mean().backward()
    output = run(unet, frames=3, samples=1)
    run(unet, frames=2, samples=1)
    with pytest.raises(ShapeError, match=r"t = 2 frames, got .* Run the backward of a forward before the next"):
        output.mean().backward()


def test_what_cannot_be_inflated() -> None:
    unet = pipeline().unet
    with pytest.raises(ValueError, match=r"path: expected '\.\.\. \.transformer_blocks\.N\.attn1', got 'mid_block'"):
        joined_frames.inflate(unet, "mid_block")
    path = get_backbone("sv3d").inflatable_layers(unet)[0].path
    joined_frames.inflate(unet, path)
    with pytest.raises(RuntimeError, match=r"does not know the number of frames: call it through its transformer"):
        unet.get_submodule(path)(torch.zeros(3, 4, 32))
