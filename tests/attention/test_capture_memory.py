"""The supervised layer keeps its fused kernel, and of its attention only queries and keys are ever held."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import cameo
import cameo.attention.capture
from cameo import Correspondence
from cameo.alignment import heads, sweep
from cameo.attention.kernel_calls import CallWatcher
from cameo.backbone import get_backbone
from cameo.errors import CaptureError
from tests.helpers.backbone_checks import Operators, random_matches
from tests.helpers.memory import memory_of
from tests.helpers.wrapped_models import unet

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"
VIEWS, SIDE = 4, 16  # token grid of the supervised layer
ATTENTION = ("bmm", "matmul", "softmax", "scaled_dot_product", "einsum")


def wrapped(*, checkpointing: bool = False) -> cameo.CameoModel:
    """A narrow U-Net of diffusers whose attention processors call SDPA."""
    base = unet().train()
    if checkpointing:
        base.enable_gradient_checkpointing()
    return cameo.wrap(base, "cat3d")


def inputs(side: int = SIDE) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (latents, _, context), _ = get_backbone("cat3d").example_inputs(unet())
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(VIEWS, latents.shape[1], 2 * side, 2 * side, generator=generator)
    context = torch.zeros(VIEWS, 1, context.shape[2])
    return (latents, torch.full((VIEWS,), 500), context), {"cross_attention_kwargs": {"num_views": VIEWS}}


def some_matches(side: int = SIDE) -> Correspondence:
    """A tenth of the tokens has a match."""
    match = random_matches(((side, side),) * VIEWS)
    hidden = torch.rand(match.index.shape, generator=torch.Generator().manual_seed(2)) < 0.9
    return Correspondence(match.index.masked_fill(hidden, -1), match.token_grids)


def loss_of(model: cameo.CameoModel, match: Correspondence | None, side: int = SIDE) -> Tensor:
    args, kwargs = inputs(side)
    loss = model(*args, **kwargs, correspondence=match).sample.square().mean()
    return loss if match is None else loss + model.weight * model.alignment_loss


def attention_of(model: cameo.CameoModel) -> nn.Module:
    return model.get_submodule(f"base_model.{model.supervised_layers[0].path}")


class LiveQueriesAndKeys:
    """Counts the queries and keys of the supervised layer that are still in memory, without holding them itself."""

    def __init__(self, model: cameo.CameoModel) -> None:
        layer = attention_of(model)
        self.storages: list[StorageWeakRef] = []
        self.handles = [part.register_forward_hook(self._note) for part in (layer.to_q, layer.to_k)]

    def _note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.storages.append(StorageWeakRef(output.untyped_storage()))

    def alive(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Without garbage collection, so that a tensor is freed only because nothing refers to it."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_kernels_run_with_and_without_the_loss(checkpointing: bool) -> None:
    model = wrapped(checkpointing=checkpointing)
    loss_of(model, some_matches())  # the first forward also looks for attention that runs unseen
    seen = {}
    for match in (None, some_matches()):
        model.zero_grad()
        with Operators() as operators:
            loss_of(model, match).backward()
        seen[match is not None] = operators.seen
    without, present = (
        [call for call in seen[aligned] if any(name in call[0] for name in ATTENTION)] for aligned in (False, True)
    )
    assert present == without  # the same operators in the same order on the same shapes
    kernels = Counter(name for name, _ in present)
    layers = len(model.attention_layers) * 2  # self- and cross-attention
    assert kernels == {
        f"{FLASH}.default": layers * (1 + checkpointing),
        f"{FLASH}_backward.default": layers,
    }

    counts = {aligned: Counter(name for name, _ in calls) for aligned, calls in seen.items()}
    more = counts[True] - counts[False]
    assert not counts[False] - counts[True]
    assert more["cameo.alignment_loss.default"] == 1
    large = model.supervised_layers[0].heads * (VIEWS * SIDE**2) ** 2
    assert all(shape.numel() < large for _, shapes in seen[True] for shape in shapes)


def test_inside_the_supervised_layer_the_profiler_sees_the_fused_kernel() -> None:
    model = wrapped()
    loss_of(model, some_matches())  # the first forward also looks for attention that runs unseen
    layer = attention_of(model)
    regions: list[Any] = []
    layer.register_forward_pre_hook(lambda *_: regions.append(torch.profiler.record_function("supervised").__enter__()))
    layer.register_forward_hook(lambda *_: regions.pop().__exit__(None, None, None))
    with torch.profiler.profile() as profile:
        loss_of(model, some_matches())
    (region,) = [event for event in profile.events() if event.name == "supervised"]
    start, end = region.time_range.start, region.time_range.end
    inside = [event.name for event in profile.events() if start <= event.time_range.start <= end]
    assert inside.count(FLASH.replace("aten.", "aten::")) == 1
    assert not [name for name in inside if "softmax" in name or "bmm" in name or "cameo" in name]


def test_checkpointed_queries_and_keys_die_with_the_forward(no_garbage_collection: None, monkeypatch: Any) -> None:
    watchers: list[int] = []

    class Counting(CallWatcher):
        def __enter__(self) -> CallWatcher:
            watchers.append(len(made.storages))
            return super().__enter__()

    monkeypatch.setattr(cameo.attention.capture, "CallWatcher", Counting)
    model = wrapped(checkpointing=True)
    made = LiveQueriesAndKeys(model)
    loss = loss_of(model, some_matches())
    assert len(made.storages) == 2
    assert made.alive() == 0  # the loss holds the gradients of queries and keys, not these
    kept = [StorageWeakRef(tensor.untyped_storage()) for tensor in saved_by_the_loss(model)]
    assert not any(storage.expired() for storage in kept)
    loss.backward()
    assert len(made.storages) == 4, "the layer was not computed again: nothing was tested"
    assert watchers == [0]  # once, before the first was computed: nothing is captured in the recomputation
    assert made.alive() == 0
    assert float(model.alignment_loss.detach()) > 0  # the value remains
    assert all(storage.expired() for storage in kept[:2])  # the others have become the gradients of the head's weights


def saved_by_the_loss(model: cameo.CameoModel) -> tuple[Tensor, ...]:
    """Gradients with respect to query, key and head that the operator keeps for the backward pass."""
    node = model.alignment_loss.grad_fn
    while node is not None and "alignment_loss" not in node.name():
        node = node.next_functions[0][0]
    assert node is not None
    return node.saved_tensors


def test_without_checkpointing_they_die_with_the_graph(no_garbage_collection: None) -> None:
    model = wrapped()
    made = LiveQueriesAndKeys(model)
    loss = loss_of(model, some_matches())
    assert made.alive() == 2  # for the backward pass of the kernel
    loss.backward()
    assert made.alive() == 0


def test_the_loss_without_a_gradient_holds_nothing(no_garbage_collection: None) -> None:
    model = wrapped()
    made = LiveQueriesAndKeys(model)
    with torch.no_grad():
        loss_of(model, some_matches())
    assert made.alive() == 0
    assert float(model.alignment_loss) > 0


def memory_of_a_step(model: cameo.CameoModel, match: Correspondence | None) -> tuple[int, int]:
    """Return the most bytes that a step holds beyond those before it, and the bytes that remain after it."""

    def step() -> None:
        loss_of(model, match).backward()
        model.base_model.zero_grad()
        model.alignment_heads.zero_grad()

    return memory_of(step)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_holds_no_more_than_the_gradients_of_queries_and_keys(
    checkpointing: bool, no_garbage_collection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Portions so small that the peak is the model's and not that of the workspace, which is freed before.
    monkeypatch.setattr(sweep, "CPU_PRODUCTS", 4096)
    monkeypatch.setattr(heads, "CPU_HIDDEN", 1024)
    model, match = wrapped(checkpointing=checkpointing), some_matches()
    with model.capture() as captured:
        loss_of(model, None)
        seen = captured.take(model.supervised_layers[0].path)
        with pytest.raises(CaptureError, match=r"take\(\) handed its call over already"):
            captured.take(model.supervised_layers[0].path)
    gradients = seen.query.nbytes + seen.key.nbytes
    assert gradients == 2 * 4 * seen.query.numel()
    del seen, captured
    for warm_up in (match, None):
        loss_of(model, warm_up).backward()
        model.zero_grad()
    without, _ = memory_of_a_step(model, None)
    scalars = 1024  # the loss, its factor, the number of matches
    peak, left = memory_of_a_step(model, match)
    assert gradients <= peak - without <= gradients + scalars
    assert left <= scalars
