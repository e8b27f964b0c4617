"""Stable Virtual Camera's own `seva.model.Seva`, at its released depth but narrow, attached without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cameo
from cameo import CameoModel
from tests.helpers.models import (
    SAMPLES,
    VIEWS,
    add_lora,
    check_bit_identical,
    check_layout,
    check_overfits,
    frames,
    next_view,
)
from tests.helpers.upstream_imports import imports_from

LATENT, GRID = (8, 16), (4, 8)  # of the layer below, at half the latent's resolution
JOINT = "output_blocks.6.1.transformer_blocks.0.attn1"  # 10th of 16 in execution order
TEMPORAL = "output_blocks.6.1.time_mix_blocks.0.attn1"
OPTIONS: dict[str, dict[str, Any]] = {
    JOINT: {"layout": "b (v h w)", "stride": 16},
    TEMPORAL: {"layout": "(b h w) v", "stride": 16},
}
BOTH = pytest.mark.parametrize("layer", [JOINT, TEMPORAL], ids=["joint", "temporal"])


@pytest.fixture(scope="module")
def build(upstream: Callable[[str], Path]) -> Iterator[Callable[[], nn.Module]]:
    with imports_from(upstream("stable-virtual-camera")):
        from seva.model import Seva, SevaParams

        parameters = SevaParams(model_channels=32, channel_mult=[1, 1, 1, 1], num_head_channels=16, context_dim=8)

        def make() -> nn.Module:
            torch.manual_seed(0)
            return Seva(parameters)

        yield make


def wrap(model: nn.Module, layer: str) -> CameoModel:
    return cameo.wrap(model, layer=layer, head="mean", **OPTIONS[layer])


def run(model: nn.Module, **options: Any) -> Tensor:
    latents = frames(grid=LATENT, channels=11, shift=2)  # 4 of the latent, 1 of the mask, 6 of the rays
    number = len(latents)
    time, context = torch.full((number,), 400), torch.linspace(-1, 1, 8).repeat(number, 1, 1)
    return model(latents, time, context, latents[:, 5:], num_frames=VIEWS, **options)


def to_images(layer: str) -> Callable[[Tensor], Tensor]:
    height, width = GRID
    if layer == JOINT:
        return lambda x: x.reshape(SAMPLES, VIEWS, height, width, -1)
    return lambda x: x.reshape(SAMPLES, height, width, VIEWS, -1).permute(0, 3, 1, 2, 4)


def test_seven_of_sixteen_layers_join_the_views(build: Callable[[], nn.Module]) -> None:
    model = build()
    tokens: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: tokens.update({name: args[0].shape[1]})

    for name, module in model.named_modules():
        if ".transformer_blocks." in name and name.endswith("attn1"):
            module.register_forward_pre_hook(note(name))
    run(model)
    height, width = LATENT
    cells = [1, 1, 2, 2, 4, 4, 8, 4, 4, 4, 2, 2, 2, 1, 1, 1]  # latent cells per token side, in execution order
    joined = [VIEWS if 6 <= index <= 12 else 1 for index in range(16)]
    expected = [views * height * width // side**2 for views, side in zip(joined, cells, strict=True)]
    assert list(tokens.values()) == expected
    assert list(tokens)[10] == JOINT


@BOTH
def test_wrapped_is_bit_identical(build: Callable[[], nn.Module], layer: str) -> None:
    match = next_view(grid=GRID, shift=1 if layer == JOINT else 0)
    check_bit_identical(build, lambda model: wrap(model, layer), run, match)
    assert wrap(build(), layer).token_grid(64, 128) == GRID


@BOTH
def test_one_match_pulls_its_tokens_and_no_others(build: Callable[[], nn.Module], layer: str) -> None:
    model = wrap(build(), layer)
    attention = model.base_model.get_submodule(layer)
    height, width = GRID
    query = (2, 1, 5)
    key = (0, 3, 2) if layer == JOINT else (0, 1, 5)
    everywhere = [(0, row, column) for row in range(height) for column in range(width)]
    check_layout(
        model,
        run,
        to_images(layer),
        query=query,
        key=key,
        reached=everywhere if layer == JOINT else [(0, 1, 5), (1, 1, 5)],
        project=lambda x: tuple(
            one(x).unflatten(-1, (attention.heads, -1)) for one in (attention.to_q, attention.to_k)
        ),
        grid=GRID,
    )


@BOTH
def test_lora_overfits_one_batch(build: Callable[[], nn.Module], layer: str) -> None:
    model = wrap(add_lora(build(), f"{layer}.to_q", f"{layer}.to_k"), layer)
    check_overfits(model, run, next_view(grid=GRID, shift=1 if layer == JOINT else 0), rate=0.05)
