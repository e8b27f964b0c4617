"""The image models of published repositories, narrow: views are images that a U-Net or a transformer joins."""

from __future__ import annotations

import functools
import importlib
import typing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tests.helpers.attached_models import Arguments
from tests.helpers.catalogue import noise
from tests.helpers.models import SAMPLES, VIEWS
from tests.helpers.repositories import Builder, Entry, switch_checkpointing_on
from tests.helpers.upstream_imports import (
    bare_packages,
    imports_from,
    lent_names,
    stand_in,
    without_xformers,
    xformers_by_sdpa,
)

__all__ = ["IMAGES", "IMAGE_KERNELS"]

TIME = 400
OBLONG = (6, 8)  # token grids of U-Nets, whose convolutions spread a changed cell over its neighbors
SQUARE = (6, 6)  # of those that know no other grids
UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
}


def names_of(module: str, *names: str) -> dict[str, Any]:
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in names}


@contextmanager
def diffsplat(folder: Path) -> Iterator[Builder]:
    """Its files take names from those of diffusers by `import *`, some of which are there no more."""
    hints = {name: getattr(typing, name) for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")}
    lent = {
        "diffusers.models.attention": hints,
        "diffusers.models.attention_processor": hints,
        "diffusers.models.transformers.transformer_sd3": {
            **hints,
            **names_of("diffusers.utils", "USE_PEFT_BACKEND", "scale_lora_layers", "unscale_lora_layers"),
            **names_of("diffusers.models.attention_processor", "AttentionProcessor"),
        },
    }
    package = "extensions.diffusers_diffsplat"
    packages = ("extensions", package, f"{package}.models", f"{package}.models.transformers")
    with lent_names(lent), imports_from(folder), bare_packages(folder, *packages):
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
def hunyuan_paint(folder: Path) -> Iterator[Builder]:
    parents = ("hy3dgen", "hy3dgen.texgen", "hy3dgen.texgen.hunyuanpaint")
    with imports_from(folder), bare_packages(folder, *parents):
        modules = importlib.import_module("hy3dgen.texgen.hunyuanpaint.unet.modules")

        def build() -> nn.Module:
            unet = UNet2DConditionModel(
                block_out_channels=(16,),
                down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("CrossAttnUpBlock2D",),
                use_linear_projection=True,
                **UNET,
            )
            model = modules.UNet2p5DConditionModel(unet)
            model.unet.class_embedding = nn.Embedding(49, 64)  # its width is fixed at 1280
            model.unet.learned_text_clip_ref = nn.Parameter(torch.randn(1, 77, 8))  # and at 1024
            return model

        yield build


REFERENCES = 2


def hunyuan_paint_inputs(latents: Tensor) -> Arguments:
    return with_references(torch.cat([noise(SAMPLES, REFERENCES, *latents.shape[2:]), latents], dim=1))


def with_references(latents: Tensor) -> Arguments:
    """The first views are the reference images."""
    references, targets = latents[:, :REFERENCES], latents[:, REFERENCES:]
    return (targets, TIME, noise(SAMPLES, 5, 8)), {
        "normal_imgs": noise(*targets.shape, seed=1),
        "position_imgs": noise(*targets.shape, seed=2),
        "ref_latents": references,
        "camera_info_gen": torch.arange(targets.shape[1]).repeat(SAMPLES, 1),
        "camera_info_ref": torch.arange(REFERENCES).repeat(SAMPLES, 1),
    }


def references_and_targets(hidden: Tensor, *, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, ...]:
    return encoder_hidden_states, hidden


def copies_first(views: int, grid: tuple[int, int], references: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """References `[(B U), (R h w), C]`, a copy for each of the U targets, and targets `[(B U), h w, C]`."""
    copies = references.reshape(SAMPLES, -1, REFERENCES, *grid, references.shape[-1])
    others = targets.reshape(SAMPLES, views - REFERENCES, *grid, -1)
    return torch.cat([copies.abs().sum(1), others], dim=1), targets[:0]


@contextmanager
def copy_of_diffusers(folder: Path, *, cache: bool = False) -> Iterator[Builder]:
    """MVGenMaster's copy of diffusers, which CAMEO's authors work on too; theirs can keep its attention logits."""
    with without_xformers(), imports_from(folder):
        module = importlib.import_module("my_diffusers.models.unets.unet_2d_condition")

        def build() -> nn.Module:
            model = module.UNet2DConditionModel(
                block_out_channels=(16, 32),
                down_block_types=("CrossAttnDownBlock2D",) * 2,
                up_block_types=("CrossAttnUpBlock2D",) * 2,
                use_linear_projection=True,
                **UNET,
            )
            model.use_rope = False  # this and the norms below are what its from_pretrained sets
            for attention in (part for part in model.modules() if type(part).__name__ == "Attention"):
                attention.norm_q, attention.norm_k = (nn.LayerNorm(attention.dim_head, eps=1e-5) for _ in range(2))
                if cache:
                    attention.processor.cache_attn = True
            return model

        yield build


def copy_of_diffusers_inputs(latents: Tensor) -> Arguments:
    return (latents, torch.full((SAMPLES,), TIME), noise(SAMPLES, 5, 8)), {}


def enable_checkpointing(model: Any) -> dict[str, Any]:
    """By the method of diffusers' models."""
    model.train()
    model.enable_gradient_checkpointing()
    return {}


@contextmanager
def mvdiffusion(folder: Path, *, xformers: bool = True, views: int = VIEWS, **options: Any) -> Iterator[Builder]:
    """The U-Net of Wonder3D and Era3D, written for diffusers 0.19 and 0.26.

    As released it calls xformers. Its other processors are slower, and Era3D's for two domains mixes up axes.
    """
    lent: dict[str, dict[str, Any]] = {
        "diffusers.utils": {
            **names_of("diffusers.utils.torch_utils", "maybe_allow_in_graph"),
            **dict.fromkeys(("DIFFUSERS_CACHE", "FLAX_WEIGHTS_NAME", "HF_HUB_OFFLINE")),
        },
        "diffusers.models.attention": names_of("diffusers.models.normalization", "AdaGroupNorm"),
        "diffusers.models.modeling_utils": {"_load_state_dict_into_model": None},
    }
    moved = {
        "diffusers.models.unet_2d_blocks": "diffusers.models.unets.unet_2d_blocks",
        "diffusers.models.dual_transformer_2d": "diffusers.models.transformers.dual_transformer_2d",
    }
    with ExitStack() as stack:
        stack.enter_context(xformers_by_sdpa() if xformers else without_xformers())
        stack.enter_context(lent_names(lent))
        for old, new in moved.items():
            stack.enter_context(stand_in(old, **vars(importlib.import_module(new))))
        stack.enter_context(imports_from(folder))
        module = importlib.import_module("mvdiffusion.models.unet_mv2d_condition")

        def build() -> nn.Module:
            model = module.UNetMV2DConditionModel(
                block_out_channels=(16,),
                down_block_types=("CrossAttnDownBlockMV2D",),
                up_block_types=("CrossAttnUpBlockMV2D",),
                num_views=views,
                **UNET,
                **options,
            )
            if xformers:
                use_xformers(model)
            return model

        yield build


def use_xformers(model: nn.Module) -> None:
    """What `enable_xformers_memory_efficient_attention` does, without its try of the kernel on the GPU."""
    for attention in model.modules():
        file = importlib.import_module(type(attention).__module__)
        if hasattr(attention, "processor") and hasattr(file, "XFormersMVAttnProcessor"):
            file.xformers = importlib.import_module("xformers")
            attention.set_use_memory_efficient_attention_xformers(True)


def mvdiffusion_inputs(latents: Tensor) -> Arguments:
    images = latents.flatten(0, 1)
    number = len(images)
    return (images, torch.full((number,), TIME), noise(number, 5, 8)), {}


def domains_first(views: int, grid: tuple[int, int], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[(V B), h w, C]`."""
    return tokens.reshape(views, SAMPLES, *grid, -1).transpose(0, 1), tokens[:0]


wonder3d = functools.partial(mvdiffusion, cd_attention_mid=True)
era3d = functools.partial(mvdiffusion, selfattn_block="self_rowwise", mvcd_attention=True)

# The rows of the page.
IMAGES = {
    "DiffSplat": Entry("DiffSplat", diffsplat, diffsplat_inputs, checkpoint=switch_checkpointing_on),
    "Hunyuan3D-2 paint": Entry(
        "Hunyuan3D-2",
        hunyuan_paint,
        hunyuan_paint_inputs,
        latents=(4, *SQUARE),
        grid=SQUARE,
        checkpoint=lambda model: enable_checkpointing(model.unet),
    ),
    "Hunyuan3D-2 paint, references": Entry(
        "Hunyuan3D-2",
        hunyuan_paint,
        with_references,
        latents=(4, *SQUARE),
        views=REFERENCES + VIEWS,
        grid=SQUARE,
        enters=references_and_targets,
        to_images=copies_first,
    ),
    "MVGenMaster": Entry(
        "MVGenMaster",
        copy_of_diffusers,
        copy_of_diffusers_inputs,
        latents=(4, *OBLONG),
        grid=OBLONG,
        checkpoint=enable_checkpointing,
    ),
    "CAMEO's authors": Entry(
        "CAMEO",
        copy_of_diffusers,
        copy_of_diffusers_inputs,
        latents=(4, *OBLONG),
        grid=OBLONG,
        checkpoint=enable_checkpointing,
    ),
    "Wonder3D": Entry(
        "Wonder3D", wonder3d, mvdiffusion_inputs, latents=(4, *OBLONG), grid=OBLONG, checkpoint=switch_checkpointing_on
    ),
    "Wonder3D, across domains": Entry(
        "Wonder3D",
        functools.partial(wonder3d, views=1),
        lambda latents: mvdiffusion_inputs(latents.transpose(0, 1)),
        latents=(4, *OBLONG),
        grid=OBLONG,
        views=2,  # normals and colors
        to_images=domains_first,
        checkpoint=switch_checkpointing_on,
    ),
    "Era3D": Entry(
        "Era3D",
        era3d,
        mvdiffusion_inputs,
        latents=(4, *SQUARE),
        grid=SQUARE,
        reach="row",
        checkpoint=switch_checkpointing_on,
    ),
}
# The same rows with another kernel: what opens them then.
IMAGE_KERNELS = {
    ("CAMEO's authors", "cache_attn"): functools.partial(copy_of_diffusers, cache=True),
    ("Wonder3D", "its own"): functools.partial(wonder3d, xformers=False),
    ("Era3D", "its own"): functools.partial(era3d, xformers=False, mvcd_attention=False),
}
