from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import cameo
from cameo import Correspondence, TokenLayout, backbone
from cameo.attention.capture import AttentionLayer
from cameo.backbone import Backbone, get_backbone
from cameo.config import CameoConfig
from cameo.errors import CaptureError, DataError, ShapeError
from cameo.wrap import attach

GRID = (2, 3)
WIDTH = 8
LAYER = "blocks.1.attention"
DESCRIBED = {"layer": "mid_block.attentions.0", "layout": "b (v h w)", "heads": 2}  # of the U-Net


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(p(x), "b n (k d) -> b k n d", k=2) for p in (self.to_q, self.to_k, self.to_v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b k n d -> b n (k d)"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x).tanh()


class Toy(nn.Module):
    """Three blocks over the joined tokens of all views."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.label = "toy"

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def toy(**options: Any) -> cameo.CameoModel:
    torch.manual_seed(0)
    return cameo.wrap(Toy(), layer=options.pop("layer", LAYER), layout="b (v h w)", **options)


def tokens(samples: int = 2, views: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, views * GRID[0] * GRID[1], WIDTH, generator=generator)


def matches(samples: int = 2, views: int = 2, grid: tuple[int, int] = GRID, seed: int = 0) -> Correspondence:
    """Random matches, half of the tokens visible."""
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    index = torch.randint(count, (samples, views, views, count), generator=generator)
    index[torch.rand(index.shape, generator=generator) < 0.5] = -1
    index[:, range(views), range(views)] = -1
    return Correspondence(index, (grid,) * views)


def nothing_visible(samples: int = 2, views: int = 2, grid: tuple[int, int] = GRID) -> Correspondence:
    return Correspondence(torch.full((samples, views, views, grid[0] * grid[1]), -1), (grid,) * views)


@functools.cache
def _unet() -> nn.Module:
    torch.manual_seed(0)
    return get_backbone("cat3d").build("tiny", block_out_channels=(16, 32), heads=2, norm_num_groups=8).unet


def unet(kind: str = "plain") -> nn.Module:
    """A narrow tiny U-Net, plain or with LoRA (not zero, as after training)."""
    model = copy.deepcopy(_unet())
    if kind == "plain":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    settings = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets)
    if kind == "peft":
        return get_peft_model(model, settings)
    model.requires_grad_(False)
    model.add_adapter(settings)
    return model


def inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return get_backbone("cat3d").example_inputs(model)


UNET_MATCHES = matches(1, 2, (4, 4))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


# 1. The wrapped model is the model


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


# 2. What the loss trains


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
    module = backbone.core_module(base).get_submodule(path)
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


# 3. Gradient checkpointing, evaluation


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


def run_loss(model: cameo.CameoModel) -> Tensor:
    model(tokens(), correspondence=matches())
    return model.alignment_loss


# 4. In the company of others


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


@pytest.mark.parametrize("part", ["wrapper", "base in place", "layer in place"])
def test_compiled_parts_run_eagerly_with_a_correspondence(part: str) -> None:
    torch.compiler.reset()
    model = toy()
    expected, plain = run_loss(model), model(tokens())
    expected.backward()
    truth = gradients(model)
    model.zero_grad()
    compiled: list[int] = []

    def counting(graph: Any, example_inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    run: Any = model
    if part == "wrapper":
        run = torch.compile(model, backend=counting)
    else:
        paths = {"base": "base_model", "layer": f"base_model.{LAYER}"}
        model.get_submodule(paths[part.split()[0]]).compile(backend=counting)
    torch.testing.assert_close(run(tokens()), plain)
    assert compiled, "nothing was compiled: nothing was tested"
    for _ in range(2):
        torch.testing.assert_close(run(tokens(), correspondence=matches()), plain)
        torch.testing.assert_close(model.alignment_loss, expected)
    model.alignment_loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, truth[name])
    torch.testing.assert_close(run(tokens()), plain)


def test_a_compiled_model_is_refused_with_the_cure() -> None:
    compiled = torch.compile(Toy())
    with pytest.raises(ValueError, match=r"compiled by torch\.compile.*cameo\.wrap\(model\._orig_mod"):
        cameo.wrap(compiled, layer=LAYER, layout="b (v h w)")
    cameo.wrap(compiled._orig_mod, layer=LAYER, layout="b (v h w)")


def test_a_data_parallel_model_is_refused_with_the_cure() -> None:
    parallel = nn.DataParallel(Toy())
    with pytest.raises(ValueError, match=r"is in DataParallel.*cameo\.wrap\(model\.module"):
        cameo.wrap(parallel, layer=LAYER, layout="b (v h w)")


# 5. Training does what it is for


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
            one = toy(layer=layer)
            one.alignment_heads[0].load_state_dict(model.alignment_heads[index].state_dict())
            single.append(run_loss(one))
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


# 6. Nothing to supervise


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


# 7. What is refused, and the cure


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (matches(grid=(2, 2)), r"another token grid or number of views.*model\.token_grid"),
        (matches(views=3), "another token grid or number of views"),
        (matches(1), r"2 times the batch of the correspondence\. Classifier-free guidance doubles it"),
        (matches(3), "has 3 samples; give the model the same number"),
    ],
    ids=["grid", "views", "guidance", "batch"],
)
def test_a_correspondence_of_another_shape(match: Correspondence, message: str) -> None:
    model = toy()
    with pytest.raises(ShapeError, match=message):
        model(tokens(), correspondence=match)
    with pytest.raises(RuntimeError, match="no alignment loss"):
        _ = model.alignment_loss


def test_a_correspondence_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"expected a cameo\.Correspondence or a list of them, got Tensor"):
        toy()(tokens(), correspondence=matches().index)
    with pytest.raises(TypeError, match="got Tensor"):
        toy()(tokens(), correspondence=[matches().index])


def test_a_second_wrap_is_refused_and_the_cure_works() -> None:
    base = Toy()
    model = cameo.wrap(base, layer=LAYER, layout="b (v h w)")
    for again in (base, model):
        with pytest.raises(ValueError, match=r"this model is wrapped already\. Call \.unwrap\(\) on that CameoModel"):
            cameo.wrap(again, layer=LAYER, layout="b (v h w)")
    second = cameo.wrap(model.unwrap(), layer="blocks.2.attention", layout="b (v h w)")
    assert float(run_loss(second).detach()) > 0
    with pytest.raises(RuntimeError, match="unwrapped already"):
        model.unwrap()
    with pytest.raises(ValueError, match="wrapped already"):  # the old wrapper has no say any more
        cameo.wrap(base, layer=LAYER, layout="b (v h w)")
    assert second.unwrap() is base


def test_the_message_of_a_second_wrap_offers_a_list_of_layers() -> None:
    model = toy()
    with pytest.raises(ValueError, match="pass a list as layer= to supervise several layers"):
        cameo.wrap(model.base_model, layer="blocks.2.attention", layout="b (v h w)")
    both = cameo.wrap(model.unwrap(), layer=[LAYER, "blocks.2.attention"], layout="b (v h w)")
    assert len(both.supervised_layers) == 2


def test_parts_and_wholes_of_a_wrapped_model_are_refused() -> None:
    model = toy()
    with pytest.raises(ValueError, match="model: is part of a Toy that is wrapped already"):
        cameo.wrap(model.base_model.blocks[1], layer="attention", layout="b (v h w)")
    for whole in (nn.Sequential(model), nn.Sequential(model.base_model)):
        with pytest.raises(ValueError, match=r"its submodule '0' is wrapped already"):
            cameo.wrap(whole, layer="0", layout="b (v h w)", heads=2)


def test_a_forgotten_wrapper_does_not_lock_the_model() -> None:
    base = Toy()
    cameo.wrap(base, layer=LAYER, layout="b (v h w)")
    gc.collect()
    model = cameo.wrap(base, layer=LAYER, layout="b (v h w)")
    assert float(run_loss(model).detach()) > 0


def test_a_failed_wrap_does_not_lock_the_model() -> None:
    base = Toy()
    with pytest.raises(ValueError, match="unknown head kind"):
        cameo.wrap(base, layer=LAYER, layout="b (v h w)", head="nlp")
    cameo.wrap(base, layer=LAYER, layout="b (v h w)")


def test_a_copy_of_an_unwrapped_model_can_be_wrapped() -> None:
    model = toy()
    base = copy.deepcopy(model.base_model)
    cameo.wrap(base, layer=LAYER, layout="b (v h w)")
    model.unwrap()
    stale = copy.deepcopy(model)
    cameo.wrap(stale.base_model, layer=LAYER, layout="b (v h w)")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backbone": "cat3"}, ValueError, r"unknown backbone 'cat3': did you mean 'cat3d'\?"),
        ({"backbone": "cat3d", "layer": 4}, ValueError, r"layer 4 does not exist: .* 0 down_blocks\.1\..* 3 up_blocks"),
        ({"backbone": "cat3d", "layer": -1}, ValueError, "layer -1 does not exist: this model has 4"),
        (
            {"backbone": "cat3d", "layer": "mid_block.attentions.0.attn1"},
            ValueError,
            r"unknown layer .*did you mean 'mid_block\.attentions\.0\.transformer_blocks\.0\.attn1'\?",
        ),
        ({"backbone": "cat3d", "layer": True}, ValueError, "unknown layer True"),
        ({"backbone": "cat3d", "layer": []}, ValueError, "got an empty list"),
        ({"backbone": "cat3d", "layer": [1, 1]}, ValueError, "the same layer is named twice"),
        ({"backbone": "cat3d", "layout": "b (v h w)"}, ValueError, "'cat3d' knows them"),
        ({"backbone": "cat3d", "weight": -0.1}, ValueError, "weight: expected a finite factor >= 0, got -0.1"),
        ({"backbone": "cat3d", "weight": float("nan")}, ValueError, "weight: expected a finite factor"),
        ({"backbone": "cat3d", "head": "mpl"}, ValueError, r"unknown head kind 'mpl': did you mean 'mlp'\?"),
        ({"backbone": "cat3d", "head": {"dept": 2}}, ValueError, r"unknown head option 'dept': did you mean 'depth'\?"),
        ({"backbone": "cat3d", "head": {"num_heads": 2}}, ValueError, "unknown head option 'num_heads'"),
        ({"backbone": "cat3d", "normalize": "per_veiw"}, ValueError, r"unknown normalize .*did you mean 'per_view'\?"),
        ({"backbone": "cat3d", "reduction": "means"}, ValueError, r"unknown reduction 'means': did you mean 'mean'\?"),
        ({"backbone": "cat3d", "reduction": "released"}, ValueError, 'num_reference_views: reduction="released" needs'),
        ({}, ValueError, r"backbone=None needs layer= .* and layout="),
        ({"layer": "mid_block"}, ValueError, r"backbone=None needs layer= .* and layout="),
        ({"layer": 3, "layout": "b (v h w)"}, TypeError, "expected a dotted module path, got 3"),
        ({"layer": "mid_block.attn1", "layout": "b (v h w)"}, ValueError, "unknown layer 'mid_block.attn1': did you"),
        ({"layer": "mid_block.attentions.0", "layout": "b (v h w)"}, ValueError, "pass heads= to cameo.wrap"),
        ({"layer": "mid_block.attentions.0", "layout": "b (v h"}, ValueError, r"b \(v h"),
        ({"backbone": "cat3d", "inflate": True}, ValueError, "inflate=True: 'cat3d' has no layer that sees one view"),
        ({**DESCRIBED, "inflate": True}, ValueError, "inflate=True needs an adapter"),
        ({"backbone": "cat3d", "kernel_call": 0}, ValueError, r"kernel_call= describe a model .*'cat3d' knows them"),
        ({**DESCRIBED, "kernel_call": -1}, ValueError, "kernel_call: expected an integer of at least 0, got -1"),
        ({**DESCRIBED, "kernel_call": "1"}, ValueError, "kernel_call: expected an integer of at least 0, got '1'"),
        ({**DESCRIBED, "kernel_call": True}, ValueError, "kernel_call: expected an integer of at least 0, got True"),
        ({**DESCRIBED, "stride": 0}, ValueError, "stride: expected an integer of at least 1, got 0"),
        ({**DESCRIBED, "stride": -8}, ValueError, "stride: expected an integer of at least 1, got -8"),
    ],
)
def test_what_wrap_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    base = _unet()
    with pytest.raises(error, match=message):
        cameo.wrap(base, **options)
    assert hooks(base) == 0


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone 'cat3d' does not fit: Toy has no modules named like"):
        cameo.wrap(Toy(), "cat3d")
    pipeline = get_backbone("cat3d").build("tiny", block_out_channels=(16, 16), heads=2, norm_num_groups=8)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got Cat3DPipeline; .*pipeline\.unet"):
        cameo.wrap(pipeline, "cat3d")


def test_a_layer_that_no_match_can_reach_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot be supervised with normalize='per_view'.*all_views"):
        cameo.wrap(Toy(), layer=LAYER, layout="(b h w) v", normalize="per_view")
    assert cameo.wrap(Toy(), layer=LAYER, layout="(b h w) v").cameo_config.normalize == "all_views"
    assert cameo.wrap(Toy(), layer=LAYER, layout="(b h) (v w)").cameo_config.normalize == "per_view"


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


# 8. Configuration file

# As written before there were `inflate`, `kernel_call` and layouts with `references_last`.
FIRST_VERSION = """{
  "backbone": null, "base_model": null, "base_revision": null, "cameo_version": "0.1.0", "head": {"kind": "mlp"},
  "heads": null, "layers": ["blocks.1.attention"],
  "layout": {"key": "b (v h w)", "query": "b (v h w)", "unsupervised_views": 0},
  "normalise": "per_view", "num_reference_views": null, "reduction": "mean", "stride": 8, "training": {}, "weight": 0.02
}"""


def test_settings_survive_the_file(tmp_path: Path) -> None:
    config = toy(head={"kind": "mlp", "depth": 2}, stride=8, weight=0.5).cameo_config
    config.save(tmp_path)
    assert CameoConfig.load(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["cameo_config.json"]
    again = attach(Toy(), CameoConfig.load(tmp_path))
    assert again.supervised_layers == toy(stride=8).supervised_layers


def test_settings_of_the_first_version_load(tmp_path: Path) -> None:
    (tmp_path / "cameo_config.json").write_text(FIRST_VERSION)
    model = attach(Toy(), CameoConfig.load(tmp_path))
    assert model.supervised_layers == toy(stride=8).supervised_layers
    assert (model.cameo_config.inflate, model.cameo_config.kernel_call) == (False, None)
    stored = {"query": "b (t + v h w)", "key": "b (t + v h w)", "unsupervised_views": 0, "t": 77}
    assert TokenLayout(**stored) == TokenLayout("b (t + v h w)", t=77)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"backbone": "cat3d"}', "key 'layers' is missing"),
        ('{"backbone": "cat3d", "layers": "mid"}', "layers: expected a list of module paths, got 'mid'"),
        ('{"backbone": null, "layers": [], "wieght": 1}', r"unknown key .* 'wieght': did you mean 'weight'\?"),
    ],
)
def test_a_broken_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "cameo_config.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        CameoConfig.load(tmp_path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; a folder saved by CameoModel\.save_pretrained"):
        CameoConfig.load(tmp_path / "cameo_config.json")


# 9. Registry


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    fresh: dict[str, Any] = {}
    monkeypatch.setattr(backbone, "_registry", fresh)
    return fresh


class ToyBackbone(Backbone):
    def recognizes(self, model: nn.Module) -> bool:
        return isinstance(model, Toy)

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        return [
            AttentionLayer(i, f"blocks.{i}.attention", 2, TokenLayout("b (v h w)"), 8, "runs twice" if i == 2 else None)
            for i in range(3)
        ]

    def default_layer(self, model: nn.Module) -> int:
        return 1


def test_a_backbone_of_a_third_party(registry: dict[str, Any]) -> None:
    assert cameo.register_backbone("toy")(ToyBackbone) is ToyBackbone
    assert "toy" in cameo.backbones()
    model = cameo.wrap(Toy(), "toy")
    assert model.supervised_layers[0].path == LAYER
    assert len(model.attention_layers) == 3
    assert float(run_loss(model).detach()) > 0
    with pytest.raises(ValueError, match=r"layer 2 \(blocks\.2\.attention\) cannot be supervised: runs twice"):
        cameo.wrap(Toy(), "toy", 2)
    with pytest.raises(ValueError, match="Linear does not have the structure of backbone 'toy'"):
        cameo.wrap(nn.Linear(2, 2), "toy")
    with pytest.raises(NotImplementedError, match="backbone 'toy' only attaches; it has no presets"):
        get_backbone("toy").build("tiny")


class MixedBackbone(ToyBackbone):
    """Its first layer is temporal; `inflate` leaves a note on the model."""

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        return [
            AttentionLayer(0, "blocks.0.attention", 2, TokenLayout("(b h w) v")),
            super().attention_layers(model)[1],
        ]

    def inflatable_layers(self, model: nn.Module) -> list[AttentionLayer]:
        return ToyBackbone.attention_layers(self, model)

    def inflate(self, model: nn.Module, path: str) -> None:
        model.joined = {*getattr(model, "joined", ()), path}


def test_inflate_joins_the_chosen_layers_only(registry: dict[str, Any]) -> None:
    cameo.register_backbone("mixed")(MixedBackbone)
    model = cameo.wrap(Toy(), "mixed", [0, 1], inflate=True)
    assert model.joined == {"blocks.0.attention", LAYER}
    assert len(model.attention_layers) == 3
    assert model.unwrap().joined == {"blocks.0.attention", LAYER}
    assert not hasattr(cameo.wrap(Toy(), "mixed"), "joined")
    assert ToyBackbone().inflatable_layers(Toy()) == []
    with pytest.raises(NotImplementedError, match="has no layers to inflate"):
        ToyBackbone().inflate(Toy(), LAYER)


@pytest.mark.parametrize("options", [{"head": "mpl"}, {"layer": 2}, {"normalize": "each"}, {"layer": [1, 1]}], ids=str)
def test_a_refused_wrap_inflates_nothing(options: dict[str, Any], registry: dict[str, Any]) -> None:
    cameo.register_backbone("mixed")(MixedBackbone)
    base = Toy()
    with pytest.raises(ValueError, match=r"unknown|cannot be supervised|named twice"):
        cameo.wrap(base, "mixed", inflate=True, **options)
    assert not hasattr(base, "joined")


def test_normalize_follows_from_all_chosen_layers(registry: dict[str, Any]) -> None:
    cameo.register_backbone("mixed")(MixedBackbone)
    assert cameo.wrap(Toy(), "mixed", 0).cameo_config.normalize == "all_views"
    assert cameo.wrap(Toy(), "mixed", 1).cameo_config.normalize == "per_view"
    with pytest.raises(ValueError, match=r"blocks\.0\.attention' cannot be supervised with normalize='per_view'"):
        cameo.wrap(Toy(), "mixed", [0, 1])
    assert cameo.wrap(Toy(), "mixed", [0, 1], normalize="all_views").cameo_config.normalize == "all_views"


def test_names_are_not_taken_twice(registry: dict[str, Any]) -> None:
    cameo.register_backbone("toy")(ToyBackbone)
    cameo.register_backbone("toy")(ToyBackbone)  # a notebook cell that runs again
    with pytest.raises(ValueError, match=r"'toy' is already registered by .*test_wrap:ToyBackbone"):
        cameo.register_backbone("toy")(type("Other", (Backbone,), {}))
    elsewhere = type("ToyBackbone", (Backbone,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="already registered"):  # the same class name is not the same class
        cameo.register_backbone("toy")(elsewhere)
    with pytest.raises(ValueError, match=r"'cat3d' is already registered by cameo\.adapters\.cat3d:Cat3D"):
        cameo.register_backbone("cat3d")(ToyBackbone)  # installed, though not loaded yet
    with pytest.raises(TypeError, match=r"expected a subclass of cameo\.backbone\.Backbone"):
        cameo.register_backbone("linear")(nn.Linear)  # type: ignore[arg-type]


def test_an_installed_backbone_is_found_by_its_entry_point(registry: dict[str, Any]) -> None:
    assert "cat3d" in cameo.backbones()
    assert registry == {}
    assert type(get_backbone("cat3d")).__name__ == "Cat3D"
    assert list(registry) == ["cat3d"]
    with pytest.raises(ValueError, match=r"unknown backbone 'cat4d': did you mean 'cat3d'\? Known: .*cat3d"):
        get_backbone("cat4d")


def test_a_broken_entry_point_is_named(registry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    points = [
        EntryPoint("broken", "no_such_package.adapter:Adapter", "cameo.backbones"),
        EntryPoint("renamed", "cameo.adapters.cat3d:Dog3D", "cameo.backbones"),
        EntryPoint("foreign", "torch.nn:Linear", "cameo.backbones"),
    ]
    monkeypatch.setattr(
        backbone, "entry_points", lambda group, name=None: [p for p in points if name in (None, p.name)]
    )
    with pytest.raises(ImportError, match=r"backbone 'broken': its entry point 'no_such_package\.adapter:Adapter'"):
        get_backbone("broken")
    with pytest.raises(ImportError, match="Dog3D"):
        get_backbone("renamed")
    with pytest.raises(TypeError, match="expected a subclass"):
        get_backbone("foreign")


@pytest.fixture(autouse=True)
def no_hooks_on_the_shared_unet() -> Iterator[None]:
    yield
    if _unet.cache_info().currsize:
        assert hooks(_unet()) == 0
