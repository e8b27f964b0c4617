"""SGM's `VideoUNet` as it is: attached, inflated and checkpointed.

Axes: B samples, V views, T frames, h w token grid, C channels, K heads.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo.adapters.common.joined_frames import deflate, is_inflated
from cameo.adapters.sv3d import use_non_reentrant_checkpointing
from cameo.backbone import get_backbone
from cameo.errors import CaptureError
from tests.helpers.models import add_lora, check_layout
from tests.helpers.upstream_sv3d import (
    FRAMES,
    GRID,
    HEADS,
    SAMPLES,
    arguments,
    build,
    matches,
)


def executed(model: nn.Module, kind: str) -> list[str]:
    order: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(".attn1") and kind in name:
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    with torch.no_grad():
        model(**arguments())
    return order


def test_layers_in_the_order_they_run(sgm: SimpleNamespace) -> None:
    adapter, model = get_backbone("sv3d"), build(sgm, num_res_blocks=2)
    assert adapter.recognizes(model)
    layers, spatial = adapter.attention_layers(model), adapter.inflatable_layers(model)
    assert [layer.path for layer in spatial] == executed(model, "transformer_blocks")
    assert [layer.path for layer in layers] == executed(model, "time_stack")
    assert len(layers) == 2 * 2 + 1 + 2 * 3
    assert [layer.stride for layer in layers] == [8, 8, 16, 16, 16, 16, 16, 16, 8, 8, 8]
    assert layers[adapter.default_layer(model)].path == "output_blocks.0.1.time_stack.0.attn1"
    assert {layer.heads for layer in layers} == {HEADS, 2 * HEADS}


def test_layer_10_of_the_released_size(sgm: SimpleNamespace) -> None:
    with torch.device("meta"):
        model = build(
            sgm,
            model_channels=320,
            num_res_blocks=2,
            attention_resolutions=[4, 2, 1],
            channel_mult=[1, 2, 4, 4],
            num_head_channels=64,
            context_dim=1024,
        )
    adapter = get_backbone("sv3d")
    layers = adapter.attention_layers(model)
    assert len(layers) == len(adapter.inflatable_layers(model)) == 16
    assert adapter.default_layer(model) == 10
    assert layers[10].path == "output_blocks.6.1.time_stack.0.attn1"
    assert (layers[10].heads, layers[10].stride, layers[6].stride) == (10, 16, 64)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_525_278_442  # SV3D_p


def test_found_inside_the_engine(sgm: SimpleNamespace) -> None:
    engine = nn.ModuleDict({"model": nn.ModuleDict({"diffusion_model": build(sgm)})})
    adapter = get_backbone("sv3d")
    inside = [layer.path.removeprefix("model.diffusion_model.") for layer in adapter.attention_layers(engine)]
    assert inside == [layer.path for layer in adapter.attention_layers(build(sgm))]
    assert [layer.stride for layer in adapter.attention_layers(engine)] == [
        layer.stride for layer in adapter.attention_layers(build(sgm))
    ]
    model = cameo.wrap(engine, "sv3d")
    assert model.token_grid(96, 128) == (6, 8)


def test_stable_video_diffusion_has_its_conditioning_frame_first(sgm: SimpleNamespace) -> None:
    adapter = get_backbone("sv3d")
    for features, last in ((256, 1), (768, 0), (1280, 1)):
        assert {
            layer.layout.references_last for layer in adapter.attention_layers(build(sgm, adm_in_channels=features))
        } == {last}


def test_example_inputs(sgm: SimpleNamespace) -> None:
    adapter, model = get_backbone("sv3d"), build(sgm)
    args, kwargs = adapter.example_inputs(model)
    with torch.no_grad():
        assert model(*args, **kwargs).shape == (3, 4, 8, 8)
    with pytest.raises(ValueError, match="expected the U-Net itself, got ModuleDict around it"):
        adapter.example_inputs(nn.ModuleDict({"diffusion_model": model}))


@pytest.mark.parametrize("kind", ["softmax", "softmax-xformers"])
@pytest.mark.parametrize("inflate", [False, True])
def test_output_is_bit_identical(sgm: SimpleNamespace, kind: str, inflate: bool) -> None:
    model, given = build(sgm, spatial_transformer_attn_type=kind), arguments()
    plain = model(**given)
    wrapped = cameo.wrap(model, "sv3d", inflate=inflate)
    before = model(**given)  # the layers are joined from here on
    assert torch.equal(before, plain) is not inflate
    assert torch.equal(wrapped(**given), before)
    assert torch.equal(wrapped(**given, correspondence=matches()), before)
    assert wrapped.num_supervised == SAMPLES * FRAMES * GRID[0] * GRID[1]
    assert wrapped.unwrap() is model
    assert torch.equal(model(**given), before)
    if inflate:
        path = wrapped.supervised_layers[0].path
        assert is_inflated(model, path)
        deflate(model, path)
        assert torch.equal(model(**given), plain)


def project(attention: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    query, key = (
        rearrange(linear(images), "b v h w (k d) -> b v h w k d", k=attention.heads)
        for linear in (attention.to_q, attention.to_k)
    )
    return query, key


def test_a_temporal_query_sees_its_own_cell_of_the_other_frames(sgm: SimpleNamespace) -> None:
    model = cameo.wrap(build(sgm), "sv3d", head="mean")
    attention = model.get_submodule(model.supervised_layers[0].path)

    def to_images(tokens: Tensor) -> Tensor:  # frames to views: the conditioning frame is the last
        images = rearrange(tokens, "(b h w) t c -> b t h w c", h=GRID[0], w=GRID[1])
        return torch.stack([images[:, 2], images[:, 0], images[:, 1]], dim=1)

    check_layout(
        model,
        lambda model, **options: model(**arguments(), **options),
        to_images,
        query=(1, 1, 3),
        key=(0, 1, 3),
        reached=[(0, 1, 3), (2, 1, 3)],
        project=functools.partial(project, attention),
    )


def test_an_inflated_query_sees_all_tokens_of_the_view_looked_at(sgm: SimpleNamespace) -> None:
    model = cameo.wrap(build(sgm), "sv3d", head="mean", inflate=True)
    attention = model.get_submodule(model.supervised_layers[0].path)

    def to_images(tokens: Tensor) -> Tensor:
        if tokens.shape[0] == SAMPLES:  # joined by now
            tokens = rearrange(tokens, "b (t s) c -> (b t) s c", t=FRAMES)
        images = rearrange(tokens, "(b t) (h w) c -> b t h w c", t=FRAMES, h=GRID[0])
        return torch.stack([images[:, 2], images[:, 0], images[:, 1]], dim=1)

    check_layout(
        model,
        lambda model, **options: model(**arguments(), **options),
        to_images,
        query=(1, 1, 3),
        key=(0, 2, 1),
        reached=[(0, row, column) for row in range(GRID[0]) for column in range(GRID[1])],
        project=functools.partial(project, attention),
    )


def test_inflation_is_attention_over_all_frames(sgm: SimpleNamespace) -> None:
    model = build(sgm)
    path = get_backbone("sv3d").inflatable_layers(model)[0].path
    cameo.wrap(model, "sv3d", layer=0, inflate=True).unwrap()
    attention, seen = model.get_submodule(path), []
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attention.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        model(**arguments())
        tokens = seen[0].flatten(0, 1) if seen[0].ndim == 4 else seen[0]
        assert tokens.shape[:2] == (SAMPLES, FRAMES * 4 * GRID[0] * GRID[1])
        query, key, value = (
            rearrange(linear(tokens), "b l (k d) -> b k l d", k=HEADS)
            for linear in (attention.to_q, attention.to_k, attention.to_v)
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        expected = attention.to_out(rearrange(weights @ value, "b k l d -> b l (k d)"))
    torch.testing.assert_close(rearrange(seen[1], "(b t) s c -> b (t s) c", t=FRAMES), expected)


@pytest.mark.parametrize("inflate", [False, True])
def test_slices_of_the_kernel_are_joined(sgm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, inflate: bool) -> None:
    """SGM feeds xformers 32768 rows a call, which two samples of the released size exceed; here it is 7 rows."""
    kind, kernel = sgm.attention.MemoryEfficientCrossAttention, sgm.attention.xformers.ops.memory_efficient_attention
    code = kind.forward.__code__
    assert code.co_consts.count(32768) == 1
    small = code.replace(co_consts=tuple(7 if value == 32768 else value for value in code.co_consts))
    whole, calls = cameo.wrap(build(sgm), "sv3d", head="mean", inflate=inflate), []
    output = whole(**arguments(), correspondence=matches())

    def counting(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape[0])
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", FunctionType(small, kind.forward.__globals__, None, kind.forward.__defaults__))
    monkeypatch.setattr(sgm.attention.xformers.ops, "memory_efficient_attention", counting)
    sliced = cameo.wrap(build(sgm), "sv3d", head="mean", inflate=inflate)
    torch.testing.assert_close(sliced(**arguments(), correspondence=matches()), output)
    assert max(calls) == 7
    for model in (sliced, whole):
        model.alignment_loss.backward()
    torch.testing.assert_close(sliced.alignment_loss, whole.alignment_loss)
    (layer,) = sliced.supervised_layers
    found, expected = (model.base_model.get_submodule(layer.path).to_k.weight.grad for model in (sliced, whole))
    torch.testing.assert_close(found, expected)
    with sliced.capture() as captured:
        sliced(**arguments())
    rows, tokens = (SAMPLES, FRAMES * GRID[0] * GRID[1]) if inflate else (SAMPLES * GRID[0] * GRID[1], FRAMES)
    assert captured[layer.path].query.shape[:3] == captured[layer.path].key.shape[:3] == (rows, 2 * HEADS, tokens)


def gradients(model: nn.Module, wrapped: Any) -> dict[str, Tensor]:
    model.zero_grad()
    output = wrapped(**arguments(), correspondence=matches())
    (output.square().mean() + wrapped.alignment_loss).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.fixture
def own_names(sgm: SimpleNamespace) -> Iterator[None]:
    """Give the Python modules their function `checkpoint` back."""
    modules = vars(sgm).values()
    before = [(module, module.checkpoint) for module in modules if hasattr(module, "checkpoint")]
    yield
    for module, function in before:
        module.checkpoint = function


@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning", "ignore:None of the inputs:UserWarning")
@pytest.mark.parametrize("inflate", [False, True])
@pytest.mark.usefixtures("own_names")
def test_reentrant_checkpointing_is_refused_and_the_cure_works(sgm: SimpleNamespace, inflate: bool) -> None:
    plain, model = build(sgm), build(sgm, use_checkpoint=True)
    model.load_state_dict(plain.state_dict())
    adapter = get_backbone("sv3d")
    assert adapter.unsupported(plain) is None
    torch.manual_seed(5)
    expected = gradients(plain, cameo.wrap(plain, "sv3d", inflate=inflate).train())
    torch.manual_seed(5)  # the same alignment head
    wrapped = cameo.wrap(model, "sv3d", inflate=inflate).train()
    with pytest.raises(CaptureError, match=r"Block runs under reentrant .*use_non_reentrant_checkpointing\(model\)"):
        wrapped(**arguments(), correspondence=matches())
    wrapped.eval()(**arguments(), correspondence=matches())  # to measure is fine
    wrapped.train()
    changed = use_non_reentrant_checkpointing(model)
    assert {"sgm.modules.attention", "sgm.modules.video_attention"} < set(changed)
    assert use_non_reentrant_checkpointing(model) == []
    assert adapter.unsupported(model) is None
    found = gradients(model, wrapped)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.usefixtures("own_names")
def test_a_function_of_others_is_not_judged(sgm: SimpleNamespace) -> None:
    model = build(sgm, use_checkpoint=True)
    for module in (sgm.attention, sgm.video_attention):
        module.checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    assert get_backbone("sv3d").unsupported(model) is not None
    for module in (sgm.attention, sgm.video_attention):
        module.checkpoint = lambda function, *args: function(*args)
    assert get_backbone("sv3d").unsupported(model) is None


def test_lora_trains_through_both_kinds_of_layer(sgm: SimpleNamespace) -> None:
    for inflate in (False, True):
        model = add_lora(build(sgm), "to_q", "to_k")
        wrapped = cameo.wrap(model, "sv3d", inflate=inflate).train()
        wrapped(**arguments(), correspondence=matches())
        wrapped.alignment_loss.backward()
        path = wrapped.supervised_layers[0].path
        assert model.get_submodule(path).to_q.lora_B["default"].weight.grad.any()


def test_a_deepcopy_has_hooks_of_its_own(sgm: SimpleNamespace) -> None:
    model = build(sgm)
    path = cameo.wrap(model, "sv3d", inflate=True).supervised_layers[0].path
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(**arguments()), model(**arguments()))
        other = arguments(samples=3, frames=2)
        twin(**other)
        assert (twin.get_submodule(path).joined_frames, model.get_submodule(path).joined_frames) == (2, FRAMES)
        deflate(twin, path)
        assert torch.equal(model(**arguments()), model(**arguments()))
    assert is_inflated(model, path)
