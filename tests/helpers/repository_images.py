"""The image models of published repositories: views are images that a U-Net or a transformer joins."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.models import GRID, SAMPLES, VIEWS
from tests.helpers.repositories import Arguments, Entry, noise
from tests.helpers.upstream_imports import (
    bare_package,
    imports_from,
    lent_names,
    stand_in,
    without_xformers,
)

TIME = 400
SQUARE = (4, 4)  # some repositories know square token grids only


def enable(model: Any) -> None:
    model.enable_gradient_checkpointing()


def shape_of(views: int = VIEWS) -> tuple[int, int, int]:
    return (4, *GRID)


@contextmanager
def diffsplat(folder: Path) -> Iterator[Callable[[], nn.Module]]:
    package = "extensions.diffusers_diffsplat"
    place = folder / "extensions" / "diffusers_diffsplat"
    hints = {name: getattr(typing, name) for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")}
    utils = importlib.import_module("diffusers.utils")
    moved = {name: getattr(utils, name) for name in ("USE_PEFT_BACKEND", "is_torch_version", "scale_lora_layers", "unscale_lora_layers")}
    processors = importlib.import_module("diffusers.models.attention_processor")
    lent = {
        "diffusers.models.attention": hints,
        "diffusers.models.attention_processor": hints,
        "diffusers.models.transformers.transformer_sd3": {
            **hints,
            **moved,
            "AttentionProcessor": processors.AttentionProcessor,
            "FusedJointAttnProcessor2_0": processors.FusedJointAttnProcessor2_0,
        },
    }
    with ExitStack() as stack:
        stack.enter_context(lent_names(lent))
        stack.enter_context(imports_from(folder))
        stack.enter_context(bare_package("extensions", folder / "extensions"))
        stack.enter_context(bare_package(package, place))
        stack.enter_context(bare_package(f"{package}.models", place / "models"))
        stack.enter_context(bare_package(f"{package}.models.transformers", place / "models" / "transformers"))
        module = importlib.import_module(f"{package}.models.transformers.transformer_mvsd3")

        def build() -> nn.Module:
            return module.SD3TransformerMV2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=8,
                caption_projection_dim=16,
                pooled_projection_dim=8,
                out_channels=4,
                pos_embed_max_size=8,
                qk_norm="rms_norm",
            )

        yield build


def diffsplat_inputs(latents: Tensor) -> Arguments:
    return (), {
        "hidden_states": latents.flatten(0, 1),
        "encoder_hidden_states": noise(SAMPLES, 5, 8),
        "pooled_projections": noise(SAMPLES, 8),
        "timestep": torch.full((SAMPLES,), TIME),
        "joint_attention_kwargs": {"num_views": latents.shape[1]},
    }


@contextmanager
def hunyuan_paint(folder: Path) -> Iterator[Callable[[], nn.Module]]:
    from diffusers import UNet2DConditionModel

    with ExitStack() as stack:
        stack.enter_context(imports_from(folder))
        stack.enter_context(bare_package("hy3dgen", folder / "hy3dgen"))
        stack.enter_context(bare_package("hy3dgen.texgen", folder / "hy3dgen" / "texgen"))
        stack.enter_context(bare_package("hy3dgen.texgen.hunyuanpaint", folder / "hy3dgen" / "texgen" / "hunyuanpaint"))
        modules = importlib.import_module("hy3dgen.texgen.hunyuanpaint.unet.modules")

        def build() -> nn.Module:
            unet = UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16,),
                layers_per_block=1,
                norm_num_groups=8,
                down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("CrossAttnUpBlock2D",),
                attention_head_dim=2,
                cross_attention_dim=8,
                use_linear_projection=True,
            )
            model = modules.UNet2p5DConditionModel(unet)
            model.unet.class_embedding = nn.Embedding(49, 64)  # the released width is 1280
            model.unet.learned_text_clip_ref = nn.Parameter(torch.randn(1, 77, 8))  # and 1024
            return model

        yield build


def hunyuan_paint_inputs(latents: Tensor) -> Arguments:
    views = latents.shape[1]
    return (latents, TIME, noise(SAMPLES, 5, 8)), {
        "normal_imgs": noise(*latents.shape, seed=1),
        "position_imgs": noise(*latents.shape, seed=2),
        "ref_latents": noise(SAMPLES, 1, *latents.shape[2:]),
        "camera_info_gen": torch.arange(views).repeat(SAMPLES, 1),
        "camera_info_ref": torch.zeros(SAMPLES, 1, dtype=torch.long),
    }


@contextmanager
def own_diffusers(folder: Path) -> Iterator[Callable[[], nn.Module]]:
    """MVGenMaster's copy of diffusers, which CAMEO's authors work on too."""
    with without_xformers(), imports_from(folder):
        module = importlib.import_module("my_diffusers.models.unets.unet_2d_condition")

        def build() -> nn.Module:
            model = module.UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                down_block_types=("CrossAttnDownBlock2D",) * 2,
                up_block_types=("CrossAttnUpBlock2D",) * 2,
                attention_head_dim=2,
                cross_attention_dim=8,
                use_linear_projection=True,
            )
            model.use_rope = False  # this and the norms below are what its from_pretrained sets
            for attention in (part for part in model.modules() if type(part).__name__ == "Attention"):
                attention.norm_q, attention.norm_k = (nn.LayerNorm(attention.dim_head, eps=1e-5) for _ in range(2))
            return model

        yield build


def own_diffusers_inputs(latents: Tensor) -> Arguments:
    return (latents, torch.full((SAMPLES,), TIME), noise(SAMPLES, 5, 8)), {}


def older_diffusers() -> dict[str, dict[str, Any]]:
    """Names of diffusers 0.19 and 0.26 that have moved or gone since."""
    torch_utils = importlib.import_module("diffusers.utils.torch_utils")
    normalization = importlib.import_module("diffusers.models.normalization")
    loading = importlib.import_module("diffusers.models.model_loading_utils")
    return {
        "diffusers.utils": {
            "maybe_allow_in_graph": torch_utils.maybe_allow_in_graph,
            "DIFFUSERS_CACHE": None,
            "FLAX_WEIGHTS_NAME": None,
            "HF_HUB_OFFLINE": True,
        },
        "diffusers.models.attention": {"AdaGroupNorm": normalization.AdaGroupNorm},
        "diffusers.models.modeling_utils": {"_load_state_dict_into_model": None},
    }


@contextmanager
def multi_view_unet(folder: Path, **options: Any) -> Iterator[Callable[[], nn.Module]]:
    blocks = importlib.import_module("diffusers.models.unets.unet_2d_blocks")
    dual = importlib.import_module("diffusers.models.transformers.dual_transformer_2d")
    with ExitStack() as stack:
        stack.enter_context(without_xformers())
        stack.enter_context(lent_names(older_diffusers()))
        stack.enter_context(stand_in("diffusers.models.unet_2d_blocks", **vars(blocks)))
        stack.enter_context(stand_in("diffusers.models.dual_transformer_2d", **vars(dual)))
        stack.enter_context(imports_from(folder))
        module = importlib.import_module("mvdiffusion.models.unet_mv2d_condition")

        def build() -> nn.Module:
            return module.UNetMV2DConditionModel(
                sample_size=8,
                block_out_channels=(16,),
                layers_per_block=1,
                norm_num_groups=8,
                down_block_types=("CrossAttnDownBlockMV2D",),
                up_block_types=("CrossAttnUpBlockMV2D",),
                attention_head_dim=2,
                cross_attention_dim=8,
                num_views=VIEWS,
                **options,
            )

        yield build


def wonder3d(folder: Path) -> Any:
    return multi_view_unet(folder, cd_attention_mid=True)


def era3d(folder: Path) -> Any:
    return multi_view_unet(folder, selfattn_block="self_rowwise")


def multi_view_inputs(latents: Tensor) -> Arguments:
    images = latents.flatten(0, 1)
    number = len(images)
    return (images, torch.full((number,), TIME), noise(number, 5, 8)), {}


IMAGES = {
    "DiffSplat": Entry("DiffSplat", diffsplat, diffsplat_inputs, latents=(4, GRID[0] * 2, GRID[1] * 2)),
    "Hunyuan3D-2 paint": Entry(
        "Hunyuan3D-2", hunyuan_paint, hunyuan_paint_inputs, latents=(4, *SQUARE), grid=SQUARE
    ),
    "MVGenMaster": Entry("MVGenMaster", own_diffusers, own_diffusers_inputs, latents=(4, *GRID), checkpoint=enable),
    "CAMEO": Entry("CAMEO", own_diffusers, own_diffusers_inputs, latents=(4, *GRID), checkpoint=enable),
    "Wonder3D": Entry("Wonder3D", wonder3d, multi_view_inputs, latents=(4, *GRID)),
    "Era3D": Entry("Era3D", era3d, multi_view_inputs, latents=(4, *SQUARE), grid=SQUARE, reach="row"),
}
LINES = {
    "DiffSplat": 'cameo.wrap(model, layer="transformer_blocks.0.attn", layout=cameo.TokenLayout("b (v h w + t)", t=None))',
    "Hunyuan3D-2 paint": 'cameo.wrap(model, layer="unet.up_blocks.0.attentions.0.transformer_blocks.0.attn_multiview", layout="b (v h w)")',
    "MVGenMaster": 'cameo.wrap(model, layer="up_blocks.1.attentions.0.transformer_blocks.0.attn1", layout="b (v h w)")',
    "CAMEO": 'cameo.wrap(model, layer="up_blocks.1.attentions.0.transformer_blocks.0.attn1", layout="b (v h w)")',
    "Wonder3D": 'cameo.wrap(model, layer="up_blocks.0.attentions.0.transformer_blocks.0.attn1", layout=cameo.TokenLayout("(b v) (h w)", key="(b u) (v h w)"))',
    "Era3D": 'cameo.wrap(model, layer="up_blocks.0.attentions.0.transformer_blocks.0.attn_mv", layout="(b h) (v w)")',
}
