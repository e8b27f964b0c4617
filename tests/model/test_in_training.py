"""A wrapped model among what training adds: checkpointing, autocast, copies, pickles, averages, compilation."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import cameo
from cameo.errors import CaptureError
from tests.helpers.wrapped_models import (
    LAYER,
    UNET_MATCHES,
    Toy,
    gradients,
    hooks,
    inputs,
    matches,
    run_loss,
    tokens,
    toy,
    unet,
)


def step(model: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(*args, **kwargs, correspondence=UNET_MATCHES).sample
    (output.square().mean() + model.alignment_loss).backward()
    return {"loss": model.alignment_loss.detach(), **gradients(model)}


def test_non_reentrant_checkpointing_changes_nothing() -> None:
    model = cameo.wrap(unet(), "cat3d")
    args, kwargs = inputs(model)
    plain = step(model, args, kwargs)
    model.enable_gradient_checkpointing()
    made: list[StorageWeakRef] = []
    layer = model.get_submodule(f"base_model.{model.supervised_layers[0].path}")
    handle = layer.to_q.register_forward_hook(lambda *call: made.append(StorageWeakRef(call[-1].untyped_storage())))
    gc.disable()
    try:
        checkpointed = step(model, args, kwargs)
        handle.remove()
        assert len(made) == 2, "the layer was not computed again: nothing was tested"
        model.unwrap()
        assert all(ref.expired() for ref in made)
    finally:
        gc.enable()
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-5, atol=1e-7)


def test_nothing_captured_outlives_the_loss() -> None:
    model = toy()
    made: list[StorageWeakRef] = []
    attention = model.blocks[1].attention
    for part in (attention.to_q, attention.to_k):
        part.register_forward_hook(lambda *call: made.append(StorageWeakRef(call[-1].untyped_storage())))
    gc.disable()
    try:
        output = model(tokens(), correspondence=matches())
        assert not any(ref.expired() for ref in made)  # the graph of the output needs them
        del output
        model(tokens())
        assert len(made) == 4
        assert all(ref.expired() for ref in made)
    finally:
        gc.enable()


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    model = cameo.wrap(unet(), "cat3d")
    args, kwargs = inputs(model)
    model.enable_gradient_checkpointing(lambda module, *given: checkpoint(module, *given, use_reentrant=True))
    with pytest.raises(CaptureError, match=r"carry no gradient.*reentrant gradient checkpointing.*use_reentrant=False"):
        model(*args, **kwargs, correspondence=UNET_MATCHES)
    assert hooks(model) == 0


def test_a_frozen_model_is_refused_in_training_and_measured_otherwise() -> None:
    model = toy()
    expected = float(run_loss(model).detach())
    model.base_model.requires_grad_(False)
    with pytest.raises(CaptureError, match=r"every parameter before this layer is frozen"):
        model(tokens(), correspondence=matches())
    with torch.no_grad():
        assert float(run_loss(model)) == expected
    with torch.inference_mode():
        assert float(run_loss(model)) == expected
    assert float(run_loss(model.eval()).detach()) == expected


def test_autocast() -> None:
    model = toy()
    exact = run_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model.base_model(tokens())
        with model.capture() as captured:
            out = model(tokens(), correspondence=matches())
    assert torch.equal(out, plain)
    assert captured[LAYER].query.dtype == torch.bfloat16
    assert model.alignment_loss.dtype == torch.float32
    torch.testing.assert_close(model.alignment_loss, exact, rtol=2e-2, atol=0)
    model.alignment_loss.backward()
    assert all(p.grad.isfinite().all() for p in model.alignment_heads.parameters())


def test_a_half_precision_model() -> None:
    model = toy().to(torch.bfloat16)
    model(tokens().bfloat16(), correspondence=matches())
    assert model.alignment_loss.dtype == torch.float32
    model.alignment_loss.backward()


@pytest.mark.parametrize("kind", ["plain", "lora", "peft"])
def test_a_copy_while_a_loss_is_alive_is_independent_and_trains(kind: str) -> None:
    model = cameo.wrap(unet(kind), "cat3d")
    args, kwargs = inputs(model.base_model)
    model(*args, **kwargs, correspondence=UNET_MATCHES)
    other = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="no alignment loss"):
        _ = other.alignment_loss
    model.alignment_loss.backward()
    mine = gradients(model)
    assert gradients(other) == {}
    other(*args, **kwargs, correspondence=UNET_MATCHES)
    assert torch.equal(other.alignment_loss, model.alignment_loss)
    other.alignment_loss.backward()
    assert gradients(other).keys() == mine.keys()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    before = model.alignment_loss.detach()
    model(*args, **kwargs, correspondence=UNET_MATCHES)
    assert torch.equal(model.alignment_loss, before)
    assert other.unwrap() is not model.unwrap()


def test_pickle_round_trip(tmp_path: Path) -> None:
    model = toy(layer=[LAYER, "blocks.2.attention"])
    expected = run_loss(model).detach()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(run_loss(again).detach(), expected)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run_loss(again).detach(), expected)
    with pytest.raises(ValueError, match="wrapped already"):
        cameo.wrap(again.base_model, layer=LAYER, layout="b (v h w)")


def test_exponential_moving_average() -> None:
    from timm.utils import ModelEmaV3

    model = toy()
    average = ModelEmaV3(model, decay=0.5)
    start = run_loss(model)
    start.backward()
    old = copy.deepcopy(model.state_dict())
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    average.update(model)
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value, (old[name] + model.state_dict()[name]) / 2)
    average.module(tokens(), correspondence=matches())
    assert float(average.module.alignment_loss.detach()) != float(start.detach())


def test_a_compiled_model_is_refused_with_the_cure() -> None:
    compiled = torch.compile(Toy())
    with pytest.raises(ValueError, match=r"compiled by torch\.compile.*cameo\.wrap\(model\._orig_mod"):
        cameo.wrap(compiled, layer=LAYER, layout="b (v h w)")
    cameo.wrap(compiled._orig_mod, layer=LAYER, layout="b (v h w)")


def test_a_data_parallel_model_is_refused_with_the_cure() -> None:
    parallel = nn.DataParallel(Toy())
    with pytest.raises(ValueError, match=r"is in DataParallel.*cameo\.wrap\(model\.module"):
        cameo.wrap(parallel, layer=LAYER, layout="b (v h w)")
