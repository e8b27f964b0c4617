"""MV-Adapter's own attention processors on a small Stable Diffusion U-Net, attached without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import einops
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import cameo
from cameo import CameoModel, TokenLayout
from cameo.errors import CaptureError
from tests.helpers.models import SAMPLES, add_lora, check_bit_identical, check_layout, check_overfits, frames, next_view
from tests.helpers.upstream_imports import imports_from

SIDE = 4  # the processors know square token grids only
GRID = (SIDE, SIDE)
LAYER = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
ROWS = TokenLayout("(b v h) w", key="(b u h) (v w)")


@pytest.fixture(scope="module")
def processors(upstream: Callable[[str], Path]) -> Iterator[ModuleType]:
    with imports_from(upstream("MV-Adapter")):
        import mvadapter.models.attention_processor

        yield mvadapter.models.attention_processor


def build(processors: ModuleType, kind: str = "DecoupledMVRowSelfAttnProcessor2_0", views: int = 3) -> nn.Module:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=2,
        cross_attention_dim=8,
        use_linear_projection=True,
    )

    def processor(name: str, size: int, *_: Any, active: bool) -> nn.Module:
        options = {"num_views": views, "name": name, "use_mv": active, "use_ref": active}
        return getattr(processors, kind)(query_dim=size, inner_dim=size, **options)

    processors.set_unet_2d_condition_attn_processor(
        unet,
        set_self_attn_proc_func=lambda *given: processor(*given, active=True),
        set_cross_attn_proc_func=lambda *given: processor(*given, active=False),
    )
    return unet


def run(model: nn.Module, views: int = 3, grid: tuple[int, int] = GRID, **options: Any) -> Tensor:
    latents, context = frames(views=views, grid=grid), torch.linspace(-1, 1, 8).reshape(1, 1, 8)
    reference: dict[str, Tensor] = {}
    with torch.no_grad():  # the clean pass over the first view, as upstream's pipeline makes it
        caching = {"cache_hidden_states": reference, "use_mv": False, "use_ref": False}
        number = SAMPLES
        model(latents[::views], 0, context.repeat(number, 1, 1), cross_attention_kwargs=caching)
    joint = {
        "num_views": views,
        "ref_hidden_states": {name: states.repeat_interleave(views, dim=0) for name, states in reference.items()},
    }
    context = context.repeat(len(latents), 1, 1)
    return model(latents, 400, context, cross_attention_kwargs=joint, **options).sample


def wrap(model: nn.Module, **options: Any) -> CameoModel:
    options = {"layout": ROWS, "kernel_call": 1, "stride": 8, **options}
    return cameo.wrap(model, layer=LAYER, head="mean", **options)


def to_images(x: Tensor) -> Tensor:
    return x.reshape(SAMPLES, -1, SIDE, SIDE, x.shape[-1])


def project(model: CameoModel) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    attention = model.base_model.get_submodule(LAYER)
    own = attention.processor
    return lambda x: tuple(linear(x).unflatten(-1, (attention.heads, -1)) for linear in (own.to_q_mv, own.to_k_mv))


def test_wrapped_is_bit_identical(processors: ModuleType) -> None:
    check_bit_identical(lambda: build(processors), wrap, run, next_view(grid=GRID))


def test_one_match_pulls_its_row_and_nothing_else(processors: ModuleType) -> None:
    model = wrap(build(processors))
    check_layout(
        model,
        run,
        to_images,
        query=(2, 1, 3),
        key=(0, 1, 2),
        reached=[(0, 1, column) for column in range(SIDE)],
        project=project(model),
        grid=GRID,
    )


def test_lora_overfits_one_batch(processors: ModuleType) -> None:
    own = f"{LAYER}.processor"
    model = wrap(add_lora(build(processors), f"{own}.to_q_mv", f"{own}.to_k_mv"))
    check_overfits(model, run, next_view(grid=GRID))


def test_the_clean_pass_mixes_no_views_and_takes_no_correspondence(processors: ModuleType) -> None:
    model = wrap(build(processors))
    kwargs = {"cache_hidden_states": {}, "use_mv": False, "use_ref": False}
    arguments = (frames(grid=GRID)[::3], 0, torch.zeros(SAMPLES, 1, 8))
    assert model(*arguments, cross_attention_kwargs=kwargs).sample.shape == (SAMPLES, 4, *GRID)
    with pytest.raises(CaptureError, match=r"1 times.*no kernel_call=1"):
        model(*arguments, cross_attention_kwargs=kwargs, correspondence=next_view(grid=GRID))


def test_upstream_takes_square_grids_only(processors: ModuleType) -> None:
    with pytest.raises(einops.EinopsError):
        run(build(processors), grid=(4, 8))


def test_rows_and_columns_of_the_texture_model(processors: ModuleType) -> None:
    """Six views; the second call joins the rows of the first four, the third call columns of others."""
    model = wrap(build(processors, "DecoupledMVRowColSelfAttnProcessor2_0", views=6), layout="(b h) (v w)")
    check_layout(
        model,
        lambda wrapped, **options: run(wrapped, views=6, **options),
        to_images,
        query=(3, 1, 3),
        key=(0, 1, 2),
        reached=[(0, 1, column) for column in range(SIDE)],
        project=project(model),
        views=6,
        matched_views=4,
        grid=GRID,
    )
