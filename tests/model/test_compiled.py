"""A supervised forward in code that `torch.compile` compiled: one graph, the same numbers, nothing left behind."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import cameo
from cameo.attention.compiled.in_place import compile_in_place
from cameo.attention.compiled.traced_layers import TracedLayers
from cameo.backbone import get_backbone
from cameo.errors import CaptureError
from tests.helpers.wrapped_models import (
    LAYER,
    UNET_MATCHES,
    WIDTH,
    Attention,
    Toy,
    gradients,
    hooks,
    inputs,
    matches,
    tokens,
    toy,
    unet,
)


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Checkpointed(Toy):
    """`Toy` with each block in a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def wrapped(base: type[nn.Module] = Toy, attend: Callable[..., Tensor] | None = None) -> cameo.CameoModel:
    torch.manual_seed(0)
    model = base()
    if attend is not None:
        model.get_submodule(LAYER).__class__ = type("Attending", (Attention,), {"forward": attend})
    return cameo.wrap(model, layer=LAYER, layout="b (v h w)")


def compiled(model: cameo.CameoModel, way: str, backend: Any = "eager", whole: bool = True) -> Any:
    """Compile a model in place, or around it, in which case what is to be called is returned."""
    if way == "around":
        return torch.compile(model, backend=backend)
    core = model.base_model
    for part in {"model": [core], "blocks": getattr(core, "blocks", []), "layer": [core.get_submodule(LAYER)]}[way]:
        part.compile(backend=backend, fullgraph=whole)
    return model


def step(run: Any, model: cameo.CameoModel, number: int) -> list[Tensor]:
    """Forward and backward on inputs and a correspondence of their own; the numbers that come of it."""
    model.zero_grad()
    output = run(tokens(seed=number), correspondence=matches(seed=number))
    (output.square().mean() + model.alignment_loss).backward()
    return [output.detach(), model.alignment_loss.detach(), *gradients(model).values()]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("base", [Toy, Checkpointed])
@pytest.mark.parametrize(("way", "first", "all_graphs"), [("around", 0, 1), ("model", 0, 1), ("blocks", 2, 3)])
def test_one_graph_for_every_correspondence_and_the_same_numbers(
    way: str, first: int, all_graphs: int, base: type[nn.Module]
) -> None:
    if way == "blocks" and base is Checkpointed:
        pytest.skip("the next test")
    eager, model = wrapped(base), wrapped(base)
    run = compiled(model, way)
    counted = []
    for number in range(4):
        torch.testing.assert_close(step(run, model, number), step(eager, eager, number), rtol=0, atol=0)
        counted.append(graphs())
    # The first forward checks the attention eagerly. Of the blocks the first has an input without gradient and the
    # supervised one has further outputs; the others share a graph.
    assert counted == [first, all_graphs, all_graphs, all_graphs]
    assert not counters["graph_break"]
    plain = run(tokens())
    torch.testing.assert_close(plain, eager(tokens()), rtol=0, atol=0)
    assert step(run, model, 5)
    assert torch.equal(run(tokens()), plain)
    assert graphs() == all_graphs + (way != "blocks"), "the plain forward is a graph of its own"


def test_a_compiled_block_in_a_checkpoint_runs_eagerly_and_the_others_stay_compiled() -> None:
    eager, model = wrapped(Checkpointed), compiled(wrapped(Checkpointed), "blocks")
    model.base_model(tokens()).sum().backward()  # as it was compiled
    before = graphs()
    with pytest.warns(UserWarning, match=rf"'{LAYER}' is supervised in a part .* compiled in place and checkpointed"):
        found = [step(model, model, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found += [step(model, model, number) for number in (1, 2)]
    for number, values in enumerate(found):
        torch.testing.assert_close(values, step(eager, eager, number), rtol=0, atol=0)
    assert [block._compiled_call_impl is None for block in model.base_model.blocks] == [False, True, False]
    assert graphs() == before


def test_fullgraph_around_the_model_after_an_eager_forward() -> None:
    model = toy()
    step(model, model, 0)
    run = torch.compile(model, backend="eager", fullgraph=True)
    for number in range(3):
        step(run, model, number)
    assert (graphs(), len(counters["graph_break"])) == (1, 0)


def test_a_larger_compiled_function_holds_a_plain_forward_in_its_graph() -> None:
    model = toy()
    run = torch.compile(lambda x: model(x) * 2, backend="eager", fullgraph=True)
    assert torch.equal(run(tokens()), model(tokens()) * 2)


def by_softmax(self: Attention, x: Tensor) -> Tensor:
    q, k, v = (rearrange(p(x), "b n (k d) -> b k n d", k=2) for p in (self.to_q, self.to_k, self.to_v))
    weights = (q @ k.transpose(-1, -2) * (WIDTH // 2) ** -0.5).softmax(-1)
    return self.to_out(rearrange(weights @ v, "b k n d -> b n (k d)"))


@pytest.mark.parametrize("way", ["around", "model", "blocks"])
def test_attention_that_a_graph_does_not_show_runs_eagerly_with_one_warning(way: str) -> None:
    eager, model = wrapped(attend=by_softmax), wrapped(attend=by_softmax)
    run = compiled(model, way)
    what = "the compiled part of the model that holds it" if way != "around" else "the whole model"
    with pytest.warns(UserWarning, match=f"attends by an explicit softmax.*{what} runs eagerly"):
        found = [step(run, model, 0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found += [step(run, model, number) for number in (1, 2)]
    for number, values in enumerate(found):
        torch.testing.assert_close(values, step(eager, eager, number), rtol=0, atol=0)
    others = graphs()
    assert others == (2 if way == "blocks" else 0), "the other blocks stay compiled"
    run(tokens())
    assert graphs() == others + 1


def test_a_kernel_that_was_changed_after_the_first_forward_is_an_error() -> None:
    model = compiled(toy(), "model")
    step(model, model, 0)
    layer = model.base_model.get_submodule(LAYER)
    layer.__class__ = type("Attending", (Attention,), {"forward": by_softmax})
    with pytest.raises(CaptureError, match=r"called F\.scaled_dot_product_attention no more, in compiled code"):
        step(model, model, 1)
    assert type(layer).__name__ == "Attending"


def masked_and_scaled(self: Attention, x: Tensor) -> Tensor:
    q, k, v = (rearrange(p(x), "b n (k d) -> b k n d", k=2) for p in (self.to_q, self.to_k, self.to_v))
    mask = torch.ones(len(x), 1, 1, x.shape[1], dtype=torch.bool)
    mask[:, :, :, 3] = False
    return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v, mask, scale=0.3), "b k n d -> b n (k d)"))


def test_the_own_scale_and_the_mask_of_a_layer_come_out_of_the_graph() -> None:
    eager, model, other = (wrapped(attend=attend) for attend in (masked_and_scaled, masked_and_scaled, None))
    compiled(model, "model")
    for number in range(2):
        torch.testing.assert_close(step(model, model, number), step(eager, eager, number), rtol=0, atol=0)
    assert graphs() == 1
    assert not torch.allclose(step(other, other, 1)[1], model.alignment_loss)


def beside_unseen(self: Attention, x: Tensor) -> Tensor:
    # Tokens are mixed once more by what is no attention call.
    return Attention.forward(self, x) + 3 * self.to_v(x).mean(1, keepdim=True)


def test_the_checks_of_the_first_forward_stay_in_force() -> None:
    model = compiled(wrapped(attend=beside_unseen), "model", whole=False)
    with pytest.raises(CaptureError, match="another attention runs unseen"):
        step(model, model, 0)


def test_nothing_is_left_on_the_model_and_a_copy_trains_its_own_weights() -> None:
    model = compiled(toy(), "model")
    before = {name: (type(part), set(vars(part))) for name, part in model.base_model.named_modules()}
    for number in range(2):
        step(model, model, number)
    assert hooks(model) == 0
    assert {name: (type(part), set(vars(part))) for name, part in model.base_model.named_modules()} == before
    with pytest.raises(RuntimeError, match="inside"), TracedLayers(model.base_model, [LAYER], lambda *_: None):
        raise RuntimeError("inside")
    assert {name: (type(part), set(vars(part))) for name, part in model.base_model.named_modules()} == before
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        expected = step(model, model, 2)
        torch.testing.assert_close(step(copied, copied, 2), expected)
        with torch.no_grad():
            copied.base_model.get_submodule(LAYER).to_q.weight.zero_()
        compiled(copied, "model")
        step(copied, copied, 2)
        assert copied.alignment_loss != expected[1]
        assert step(model, model, 2)[1] == expected[1]


def test_two_observed_forwards_at_a_time_are_an_error() -> None:
    model = Toy()
    with (
        TracedLayers(model, [LAYER], lambda *_: None),
        pytest.raises(CaptureError, match="observed by another forward"),
        TracedLayers(model, [LAYER], lambda *_: None),
    ):
        pass
    assert type(model.get_submodule(LAYER)) is Attention


def test_a_module_that_was_replaced_by_a_compiled_one_is_refused() -> None:
    model = toy()
    model.base_model.blocks[1] = torch.compile(model.base_model.blocks[1], backend="eager")
    with pytest.raises(CaptureError, match=r"replaced by torch\.compile\(module\).*in place, module\.compile\(\)"):
        step(model, model, 0)


def denoiser(kind: str) -> nn.Module:
    if kind != "transformer":
        return unet("lora" if kind == "unet" else kind)
    torch.manual_seed(0)
    model = get_backbone("cat3d").build("transformer-tiny", width=32, heads=2, blocks=3).unet
    from peft import LoraConfig

    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "way", "backend"),
    [
        ("transformer", "default", "aot_eager"),
        ("transformer", "regional", "aot_eager"),
        pytest.param("transformer", "default", "inductor", marks=pytest.mark.long),
        pytest.param("unet", "default", "aot_eager", marks=pytest.mark.slow),
        pytest.param("unet", "regional", "aot_eager", marks=pytest.mark.long),
        pytest.param("peft", "default", "aot_eager", marks=pytest.mark.long),
    ],
)
@pytest.mark.filterwarnings("ignore:layer .* compiled in place and checkpointed")
def test_models_with_lora(kind: str, way: str, backend: str, checkpointing: bool) -> None:
    eager, model = (cameo.wrap(denoiser(kind), "cat3d").train() for _ in range(2))
    core = model.base_model.get_base_model() if kind == "peft" else model.base_model
    args, kwargs = inputs(core)
    grid = UNET_MATCHES.token_grids[0] if kind != "transformer" else model.token_grid(32, 32)
    if checkpointing:
        for one in (eager, model):
            one.enable_gradient_checkpointing()
    compile_in_place(model.base_model, core, way, backend=backend, fullgraph=True)
    found: Counter[int] = Counter()
    for number in range(4):
        results = []
        for one in (eager, model):
            torch.manual_seed(number)
            one.zero_grad()
            output = one(*args, **kwargs, correspondence=matches(1, 2, grid, seed=number)).sample
            (output.square().mean() + one.alignment_loss).backward()
            results.append([output.detach(), one.alignment_loss.detach(), *gradients(one).values()])
        # Code that inductor generates may sum in another order.
        exact = {"rtol": 1e-4, "atol": 1e-5} if backend == "inductor" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(*results, **exact)
        found[graphs()] += 1
    assert not counters["graph_break"]
    if way == "default":
        assert found == {0: 1, 1: 3}
    else:
        assert len(found) == (1 if checkpointing else 2), "no new graph after the second forward"
    assert not any("_orig_mod" in name for name in model.state_dict())
