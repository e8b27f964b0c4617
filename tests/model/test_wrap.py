"""The wrapped model is the model, and the loss trains exactly what is upstream of the supervised layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import TokenLayout, backbone
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers.wrapped_models import (
    LAYER,
    UNET_MATCHES,
    Toy,
    gradients,
    hooks,
    inputs,
    matches,
    nothing_visible,
    run_loss,
    tokens,
    toy,
    unet,
)


@pytest.mark.parametrize("kind", ["plain", "lora", "peft"])
@pytest.mark.parametrize("training", [True, False])
def test_output_and_state_are_those_of_the_model(kind: str, training: bool) -> None:
    base = unet(kind).train(training)
    args, kwargs = inputs(base)
    plain, state = base(*args, **kwargs).sample, copy.deepcopy(base.state_dict())
    attributes = {name: set(vars(module)) for name, module in base.named_modules()}
    model = cameo.wrap(base, "cat3d")
    model.train(training)
    assert torch.equal(model(*args, **kwargs).sample, plain)
    assert torch.equal(model(*args, **kwargs, correspondence=UNET_MATCHES).sample, plain)
    assert float(model.alignment_loss.detach()) > 0
    assert model(*args, **kwargs, return_dict=False)[0].shape == plain.shape
    assert hooks(model) == 0
    assert model.unwrap() is base
    assert torch.equal(base(*args, **kwargs).sample, plain)
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert {name: set(vars(module)) for name, module in base.named_modules()} == attributes
    assert hooks(base) == 0


def test_an_exception_in_the_forward_leaves_no_hook() -> None:
    model = toy()
    with pytest.raises(RuntimeError, match="shape"):
        model(tokens()[..., :3], correspondence=matches())
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="no alignment loss"):
        _ = model.alignment_loss
    model(tokens(), correspondence=matches())
    assert float(model.alignment_loss.detach()) > 0


def test_attributes_of_the_model_are_reached() -> None:
    model = toy()
    assert model.label == "toy"
    assert model.blocks is model.base_model.blocks
    with pytest.raises(AttributeError, match="'Toy' object has no attribute 'lable'"):
        _ = model.lable


def upstream(base: nn.Module, layer: nn.Module, run: Callable[[], Any]) -> set[str]:
    """Parameters that the queries and keys of a layer depend on, by autograd through plain hooks."""
    outputs: list[Tensor] = []
    handles = [part.register_forward_hook(lambda *call: outputs.append(call[-1])) for part in (layer.to_q, layer.to_k)]
    run()
    for handle in handles:
        handle.remove()
    names, parameters = zip(*((n, p) for n, p in base.named_parameters() if p.requires_grad), strict=True)
    grads = torch.autograd.grad(sum(o.square().sum() for o in outputs), parameters, allow_unused=True)
    return {name for name, grad in zip(names, grads, strict=True) if grad is not None}


@pytest.mark.parametrize("kind", ["plain", "lora", "peft"])
@pytest.mark.parametrize("layer", [0, 2])
def test_the_gradient_reaches_exactly_what_is_upstream(kind: str, layer: int) -> None:
    base = unet(kind)
    args, kwargs = inputs(base)
    model = cameo.wrap(base, "cat3d", layer)
    path = model.supervised_layers[0].path
    module = backbone.unwrap_peft(base).get_submodule(path)
    truth = upstream(base, module, lambda: base(*args, **kwargs))
    model(*args, **kwargs, correspondence=UNET_MATCHES)
    model.alignment_loss.backward()
    found = gradients(model)
    assert {n.removeprefix("base_model.") for n in found if n.startswith("base_model.")} == truth
    heads = {n for n, _ in model.named_parameters() if n.startswith("alignment_heads.")}
    assert heads
    assert heads <= found.keys()
    assert all(found[name].any() for name in heads)
    trained = {n for n, p in base.named_parameters() if p.requires_grad}
    beyond = [n for n in trained if path in n and ("to_v" in n or "to_out" in n)] + [
        n for n in trained if "conv_out" in n
    ]
    assert beyond
    assert truth.isdisjoint(beyond)
    assert [n for n in truth if path in n and ("to_q" in n or "to_k" in n) and found[f"base_model.{n}"].any()]


def test_gradients_equal_those_of_the_loss_written_out() -> None:
    model, x, match = toy(), tokens(), matches()
    model(x, correspondence=match)
    model.alignment_loss.backward()
    found = gradients(model)
    model.zero_grad()
    hidden = model.blocks[0](x)
    layer, head = model.blocks[1].attention, model.alignment_heads[0]
    query, key = (rearrange(p(hidden), "b (v n) (k d) -> b k v n d", v=2, k=2) for p in (layer.to_q, layer.to_k))
    loss = cameo.alignment_loss(query, key, match, head)
    assert torch.equal(loss, model.alignment_loss)
    loss.backward()
    assert found.keys() == gradients(model).keys()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-8)


def test_the_loss_falls_when_one_batch_is_repeated() -> None:
    model = toy()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    history = []
    for _ in range(60):
        loss = run_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[0] > 1.5  # log 6 = 1.79 for uniform attention
    assert history[-1] < 0.6 * history[0]


def test_several_layers_are_averaged() -> None:
    layers = [LAYER, "blocks.2.attention"]
    model = toy(layer=layers)
    with torch.no_grad():
        joint = run_loss(model)
        single = []
        for index, layer in enumerate(layers):
            alone = toy(layer=layer)
            alone.alignment_heads[0].load_state_dict(model.alignment_heads[index].state_dict())
            single.append(run_loss(alone))
    torch.testing.assert_close(joint, torch.stack(single).mean())
    assert model.num_supervised == 2 * int(matches().matched.sum())
    model(tokens(), correspondence=[matches(), nothing_visible()])
    torch.testing.assert_close(model.alignment_loss.detach(), single[0] / 2)
    with pytest.raises(ValueError, match=r"a list of 2, one per supervised layer, got a list of 1"):
        model(tokens(), correspondence=[matches()])


def test_layers_with_different_grids_take_one_correspondence_each() -> None:
    wide = get_backbone("cat3d").build(
        "tiny", block_out_channels=(16, 16), attention_levels=(True, True), heads=2, norm_num_groups=8
    )
    model = cameo.wrap(wide.unet, "cat3d", [0, 2])
    args, kwargs = inputs(model)
    assert [layer.stride for layer in model.supervised_layers] == [4, 8]
    with pytest.raises(ValueError, match=r"different grids, with down_blocks\.0.*: 4, .*: 8 pixels per token"):
        model.token_grid(32, 32)
    model(*args, **kwargs, correspondence=[matches(1, 2, (8, 8)), UNET_MATCHES])
    model.alignment_loss.backward()
    with pytest.raises(ShapeError, match="another token grid or number of views"):
        model(*args, **kwargs, correspondence=UNET_MATCHES)


def test_released_reduction_counts_only_the_references_that_are_supervised() -> None:
    layout = TokenLayout("b (v h w)", references_last=1, unsupervised_views=1)
    options = {"layer": LAYER, "layout": layout, "head": "mean", "reduction": "released", "num_reference_views": 1}
    torch.manual_seed(0)
    model = cameo.wrap(Toy(), **options)
    match = matches(views=3)
    distance = torch.rand(match.index.shape, generator=torch.Generator().manual_seed(1))
    match = dataclasses.replace(match, distance=distance)
    with model.capture() as captured:
        model(tokens(views=3), correspondence=match)
        seen = captured[LAYER]
    query, key, local = model.split(model.supervised_layers[0], seen, match)
    expected = cameo.alignment_loss(
        query, key, local, model.alignment_heads[0], scale=seen.scale, reduction="released", num_reference_views=0
    )
    torch.testing.assert_close(model.alignment_loss, expected, rtol=0, atol=0)


def test_nothing_visible_is_zero_with_a_graph() -> None:
    model = toy()
    model(tokens(), correspondence=nothing_visible())
    assert model.alignment_loss.item() == 0
    assert model.num_supervised == 0
    model.alignment_loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.alignment_heads.parameters())
    assert model.blocks[0].attention.to_q.weight.grad is not None
    model(tokens(), correspondence=matches())
    assert model.num_supervised == int(matches().matched.sum()) > 0


def test_one_view_is_zero_with_a_graph() -> None:
    model = toy()
    model(tokens(views=1), correspondence=matches(views=1))
    assert model.alignment_loss.item() == 0
    model.alignment_loss.backward()


def test_the_loss_belongs_to_the_latest_forward() -> None:
    model = toy()
    with pytest.raises(RuntimeError, match=r"call the model with correspondence= before"):
        _ = model.alignment_loss
    run_loss(model)
    model(tokens())
    assert model.num_supervised == 0
    with pytest.raises(RuntimeError, match="no alignment loss"):
        _ = model.alignment_loss


@pytest.mark.parametrize("head", ["mlp", "mean", "none", {"kind": "mlp", "depth": 2, "expansion": 2}])
def test_head_options(head: Any) -> None:
    model = toy(head=head)
    run_loss(model).backward()
    assert model.blocks[0].attention.to_q.weight.grad.any()
    if isinstance(head, dict):
        assert (model.alignment_heads[0].depth, model.alignment_heads[0].expansion) == (2, 2)
    assert model.weight == model.cameo_config.weight == 0.02


def test_token_grid() -> None:
    model = cameo.wrap(unet(), "cat3d")
    assert model.token_grid(64, 96) == (8, 12)
    with pytest.raises(ValueError, match=r"pass stride= to cameo\.wrap"):
        toy().token_grid(64, 64)
    assert toy(stride=16).token_grid(64, 50) == (4, 4)
