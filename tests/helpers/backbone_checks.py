"""What every backbone has to pass, own and upstream class alike; the cases are in the test files that call these."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cameo
from cameo import CameoModel, Correspondence
from cameo.adapters.cat3d.denoiser import JointDiT
from cameo.backbone import get_backbone

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Grids = tuple[tuple[int, int], ...]


@dataclass
class Subject:
    """One denoiser to be checked.

    Attributes:
        backbone: name of its adapter.
        build: makes it with the same fresh weights every time.
        inputs: of one forward with one sample, for a denoiser.
        grids: token grid of each view in the supervised layer, in the order of the correspondence.
        wrap: options of `cameo.wrap`.
        query, value: suffixes of the projections of an attention layer.
    """

    backbone: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Inputs]
    grids: Grids
    wrap: dict[str, Any] = field(default_factory=dict)
    query: str = "to_q"
    value: str = "to_v"

    def wrapped(self, denoiser: nn.Module | None = None, **options: Any) -> CameoModel:
        return cameo.wrap(denoiser or self.build(), self.backbone, **{**self.wrap, **options})


def build_pipeline(backbone: str, preset: str, **options: Any) -> Any:
    """Build a preset from seed 0; of a fresh transformer every output is zero, so its last layer is drawn anew."""
    torch.manual_seed(0)
    built = get_backbone(backbone).build(preset, **options)
    if isinstance(built.denoiser, JointDiT):
        nn.init.normal_(built.denoiser.proj_out_2.weight, std=0.1)
    return built


class OneMatch(NamedTuple):
    """The only match of two samples, and the tokens `[2, V, h, w]` that its gradient may reach before the layer."""

    correspondence: Correspondence
    reached: Tensor
    sample: int
    key_view: int
    key_token: tuple[int, int]


def one_match(views: int, height: int, width: int) -> OneMatch:
    """Match a token of view 2 in the second sample with one of view 0."""
    sample, query_view, key_view, query_token, key_token = 1, 2, 0, (1, 4), (3, 2)
    index = torch.full((2, views, views, height * width), -1)
    index[sample, query_view, key_view, query_token[0] * width + query_token[1]] = key_token[0] * width + key_token[1]
    reached = torch.zeros(2, views, height, width, dtype=torch.bool)
    reached[sample, query_view, query_token[0], query_token[1]] = True
    reached[sample, key_view] = True
    return OneMatch(Correspondence(index, ((height, width),) * views), reached, sample, key_view, key_token)


def random_matches(grids: Grids, seed: int = 0, *, same_cell: bool = False) -> Correspondence:
    """Every token of every view matches some token of every other view; with `same_cell` the one at its place."""
    generator = torch.Generator().manual_seed(seed)
    views, tokens = len(grids), max(height * width for height, width in grids)
    index = torch.full((1, views, views, tokens), -1)
    for i, (height, width) in enumerate(grids):
        for j, (key_height, key_width) in enumerate(grids):
            if i != j:
                count = height * width
                found = torch.randint(key_height * key_width, (count,), generator=generator)
                index[0, i, j, :count] = torch.arange(count) if same_cell else found
    if same_cell:  # one view shows the point of each token, the others do not
        shown = torch.randint(views, (1, views, 1, tokens), generator=generator)
        index[torch.arange(views)[None, None, :, None] != shown] = -1
    return Correspondence(index, grids)


def matches_for(model: CameoModel, grids: Grids, seed: int = 0) -> Correspondence:
    return random_matches(grids, seed, same_cell=model.supervised_layers[0].layout.reach == "cell")


def tensors_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in (output.values() if isinstance(output, dict) else output) for tensor in tensors_of(part)]


def run(denoiser: nn.Module, inputs: Inputs, **options: Any) -> list[Tensor]:
    torch.manual_seed(7)  # Zero123++ draws noise in its forward
    args, kwargs = copy.deepcopy(inputs)  # ImageDream writes into its input
    return tensors_of(denoiser(*args, **kwargs, **options))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return bool(first) and len(first) == len(second) and all(map(torch.equal, first, second))


class Operators(TorchDispatchMode):
    """The operators that ran, with the shapes they ran on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [argument.shape for argument in args if isinstance(argument, Tensor)]
        self.seen.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


def hooks(module: nn.Module) -> int:
    return sum(
        len(one._forward_hooks) + len(one._forward_pre_hooks) + len(one._backward_hooks) for one in module.modules()
    )


def check_output_is_untouched(subject: Subject) -> None:
    """Bit-identical with and without matches, in the same operators, and as it was after unwrapping."""
    denoiser = subject.build()
    if subject.wrap.get("inflate"):  # inference changes on purpose; from there on nothing else may
        denoiser = subject.wrapped(denoiser).unwrap()
    inputs = subject.inputs(denoiser)
    before, count, keys = run(denoiser, inputs), hooks(denoiser), list(denoiser.state_dict())
    with Operators() as plain, torch.no_grad():
        run(denoiser, inputs)
    model = subject.wrapped(denoiser)
    with Operators() as wrapped, torch.no_grad():
        run(model, inputs)
    assert wrapped.seen == plain.seen  # the same work, so the same time and memory
    assert same(run(model, inputs), before)
    assert same(run(model, inputs, correspondence=matches_for(model, subject.grids)), before)
    assert model.num_supervised > 0
    assert model.unwrap() is denoiser
    assert hooks(denoiser) == count
    assert list(denoiser.state_dict()) == keys
    assert same(run(denoiser, inputs), before)


def check_gradient(subject: Subject) -> None:
    """The loss reaches the query projection of its layer and what comes before, not its values nor what follows."""
    model = subject.wrapped().train()
    run(model, subject.inputs(model.base_model), correspondence=matches_for(model, subject.grids))
    model.alignment_loss.backward()
    layer = model.supervised_layers[0].path
    gradients = {name: parameter.grad for name, parameter in model.base_model.named_parameters()}
    reached = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    assert f"{layer}.{subject.query}.weight" in reached
    assert f"{layer}.{subject.value}.weight" not in reached
    assert not any(name.startswith(("conv_out", "unet.conv_out", "out.")) for name in reached)
    first = next(name for name in gradients if ".attn1" not in name and gradients[name] is not None)
    assert first in reached
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values() if gradient is not None)
    assert all(parameter.grad is not None for parameter in model.alignment_heads.parameters())


def check_copies(subject: Subject) -> None:
    """A deepcopy made while a loss is alive computes the same loss with weights of its own."""
    model = subject.wrapped().train()
    inputs = subject.inputs(model.base_model)
    match = matches_for(model, subject.grids)
    run(model, inputs, correspondence=match)
    twin = copy.deepcopy(model)
    run(twin, inputs, correspondence=match)
    assert torch.equal(twin.alignment_loss, model.alignment_loss)
    with torch.no_grad():
        for parameter in twin.base_model.parameters():
            parameter.mul_(1.5)
    before = model.alignment_loss.detach()
    run(model, inputs, correspondence=match)
    assert torch.equal(model.alignment_loss, before)
    run(twin, inputs, correspondence=match)
    assert not torch.equal(twin.alignment_loss, before)


def add_lora(denoiser: nn.Module, rank: int = 16) -> None:
    """Freeze the denoiser and add LoRA to its attention projections, as `cameo.training.setup.add_lora` does."""
    torch.manual_seed(3)
    denoiser.requires_grad_(False)
    settings = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )
    if hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(settings)
    else:
        inject_adapter_in_model(settings, denoiser)


def check_lora_overfits(subject: Subject, *, steps: int = 120, learning_rate: float = 2e-2) -> CameoModel:
    """The alignment loss of one batch falls below half its start, with LoRA as the only thing that is trained."""
    denoiser = subject.build()
    add_lora(denoiser)
    model = subject.wrapped(denoiser, head="mean").train()
    inputs, match = subject.inputs(denoiser), matches_for(model, subject.grids)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    start = None
    for _ in range(steps):
        run(model, inputs, correspondence=match)
        loss = model.alignment_loss
        start = float(loss.detach()) if start is None else start
        if float(loss.detach()) < start / 2:
            return model
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"the alignment loss fell from {start:.3f} to {float(loss):.3f} only")


def check_lora_round_trip(subject: Subject, folder: Path) -> None:
    """LoRA saved, loaded into a fresh base and applied gives the same output, bit for bit."""
    denoiser = subject.build()
    add_lora(denoiser, rank=4)
    with torch.no_grad():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    model = subject.wrapped(denoiser).eval()
    expected = run(model, subject.inputs(denoiser))
    fresh = subject.build()
    assert not same(run(fresh.eval(), subject.inputs(fresh)), expected)
    again = cameo.from_pretrained(model.save_pretrained(folder), base_model=subject.build())
    assert again.cameo_config.layers == model.cameo_config.layers
    assert same(run(again, subject.inputs(again.base_model)), expected)
