"""The video models of published repositories, narrow: views are latent frames."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.attached_models import Arguments
from tests.helpers.catalogue import noise
from tests.helpers.kernel_packages import install_flash, install_transformer_engine
from tests.helpers.models import GRID, SAMPLES, VIEWS
from tests.helpers.repositories import Builder, Entry, switch_checkpointing_on, views_first
from tests.helpers.upstream_imports import (
    bare_packages,
    import_without_assertions,
    imports_from,
    stand_in,
    without,
    without_xformers,
)

__all__ = ["VIDEOS", "VIDEO_KERNELS", "viewcrafter"]

KERNELS = ("flash_attn", "flash_attn_interface", "sageattention")


def time() -> Tensor:
    return torch.full((SAMPLES,), 400.0)


@contextmanager
def flash_attention(version: int | None) -> Iterator[None]:
    """The stand-in for flash-attn 2 or 3, or none."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        if version is not None:
            install_flash(patch)
        present = {None: (), 2: ("flash_attn",), 3: ("flash_attn", "flash_attn_interface")}[version]
        stack.enter_context(without(*(name for name in KERNELS if name not in present)))
        yield


@contextmanager
def recammaster(folder: Path, *, flash: int | None = None) -> Iterator[Builder]:
    with flash_attention(flash), imports_from(folder), bare_packages(folder, "diffsynth", "diffsynth.models"):
        dit = importlib.import_module("diffsynth.models.wan_video_dit")

        def build() -> nn.Module:
            model = dit.WanModel(
                dim=24,
                in_dim=4,
                ffn_dim=16,
                out_dim=4,
                text_dim=8,
                freq_dim=16,
                eps=1e-6,
                patch_size=(1, 2, 2),
                num_heads=2,
                num_layers=1,  # its token grid is large
                has_image_input=False,
            )
            for block in model.blocks:  # as its training adds them to Wan
                block.cam_encoder, block.projector = nn.Linear(12, 24), nn.Linear(24, 24)
            return model

        yield build


def recammaster_inputs(latents: Tensor) -> Arguments:
    cameras = noise(SAMPLES, latents.shape[1] // 2, 12)  # of the target frames
    return (latents.transpose(1, 2), time(), cameras, noise(SAMPLES, 5, 8)), {}


def recammaster_checkpoint(model: nn.Module) -> dict[str, Any]:
    model.train()
    return {"use_gradient_checkpointing": True}


@contextmanager
def wan(folder: Path, *, flash: int | None = None) -> Iterator[Builder]:
    """It calls flash-attn alone, on CUDA tensors alone. Without one, its own fallback takes that function's place."""
    with flash_attention(flash), imports_from(folder), bare_packages(folder, "wan", "wan.modules"):
        attention = import_without_assertions("wan.modules.attention", folder)
        model = importlib.import_module("wan.modules.model")
        if flash is None:
            model.flash_attention = functools.partial(attention.attention, dtype=torch.float32)

        def build() -> nn.Module:
            return model.WanModel(
                text_len=5,
                in_dim=4,
                dim=24,
                ffn_dim=16,
                freq_dim=16,
                text_dim=8,
                out_dim=4,
                num_heads=2,
                num_layers=2,
            )

        yield build


def wan_inputs(latents: Tensor) -> Arguments:
    length = VIEWS * GRID[0] * GRID[1] + 3  # with padding
    return (list(latents.transpose(1, 2)), time()[:, None].expand(-1, length), list(noise(SAMPLES, 5, 8)), length), {}


@contextmanager
def gen3c(folder: Path, *, backend: str = "transformer_engine") -> Iterator[Builder]:
    logs = {name: lambda *_: None for name in ("debug", "info")}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        install_transformer_engine(patch)
        stack.enter_context(imports_from(folder))
        stack.enter_context(stand_in("megatron.core", parallel_state=None))
        stack.enter_context(stand_in("cosmos_predict1.utils.log", **logs))
        stack.enter_context(stand_in("cosmos_predict1.utils.distributed"))
        stack.enter_context(stand_in("cosmos_predict1.utils.lazy_config", instantiate=None))
        blocks = importlib.import_module("cosmos_predict1.diffusion.module.blocks")
        network = importlib.import_module("cosmos_predict1.diffusion.networks.general_dit")
        blocks.Attention = functools.partial(blocks.Attention, backend=backend)  # no setting of the model says it
        patch.setattr(Tensor, "cuda", lambda tensor: tensor)  # it makes its frequencies on the GPU

        def build() -> nn.Module:
            return network.GeneralDIT(
                max_img_h=16,
                max_img_w=16,
                max_frames=8,
                in_channels=4,
                out_channels=4,
                patch_spatial=2,
                patch_temporal=1,
                concat_padding_mask=False,
                model_channels=48,
                num_blocks=2,
                num_heads=2,
                mlp_ratio=1.0,
                block_x_format="THWBD",
                crossattn_emb_channels=8,
                pos_emb_cls="rope3d",
                use_adaln_lora=True,
                adaln_lora_dim=8,
            )

        yield build


def gen3c_inputs(latents: Tensor) -> Arguments:
    return (latents.transpose(1, 2), time(), noise(SAMPLES, 5, 8)), {"fps": torch.full((SAMPLES,), 24.0)}


def sequence_first(views: int, grid: tuple[int, int], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[(V h w), B, C]`."""
    return views_first(views, grid, tokens.transpose(0, 1))


@contextmanager
def trajectorycrafter(folder: Path) -> Iterator[Builder]:
    with imports_from(folder):
        module = importlib.import_module("models.crosstransformer3d")
        embed = module.get_3d_sincos_pos_embed
        module.get_3d_sincos_pos_embed = lambda *given: embed(*given).numpy()  # as earlier releases of diffusers

        def build() -> nn.Module:
            return module.CrossTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=24,
                in_channels=8,
                out_channels=4,
                time_embed_dim=16,
                text_embed_dim=8,
                num_layers=2,
                sample_width=8,
                sample_height=6,
                sample_frames=9,
                max_text_seq_length=5,
                is_train_cross=True,
                cross_attn_in_channels=4,
                cross_attn_dim_head=8,
                cross_attn_num_heads=2,
            )

        yield build


def trajectorycrafter_inputs(latents: Tensor) -> Arguments:
    return (latents, noise(SAMPLES, 5, 8), time()), {
        "inpaint_latents": noise(*latents.shape, seed=1),
        "cross_latents": noise(*latents.shape, seed=2),
    }


def with_references(latents: Tensor) -> Arguments:
    """The first half of the views are the reference frames."""
    references, targets = latents.chunk(2, dim=1)
    (_, *others), options = trajectorycrafter_inputs(targets)
    return (targets, *others), {**options, "cross_latents": references}


def references_and_targets(references: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return references, targets


def halves(views: int, grid: tuple[int, int], *parts: Tensor) -> tuple[Tensor, Tensor]:
    """Reference and target frames, `[B, (V h w), C]` each."""
    return views_first(views, grid, torch.cat(parts, dim=1))


@contextmanager
def viewcrafter(folder: Path, **options: Any) -> Iterator[Builder]:
    """In the settings of its released model, but narrow."""
    with without_xformers(), imports_from(folder):
        network = importlib.import_module("lvdm.modules.networks.openaimodel3d")

        def build() -> nn.Module:
            return network.UNetModel(
                in_channels=8,
                model_channels=32,
                out_channels=4,
                num_res_blocks=1,
                attention_resolutions=[1],
                channel_mult=(1,),
                num_head_channels=16,
                context_dim=8,
                use_linear=True,
                temporal_conv=True,
                temporal_length=VIEWS,
                addition_attention=True,
                image_cross_attention=True,
                fs_condition=True,
                **{"use_relative_position": False, **options},
            )

        yield build


def viewcrafter_inputs(latents: Tensor) -> Arguments:
    context = noise(SAMPLES, 77 + 16 * VIEWS, 8)
    return (latents.transpose(1, 2), time(), context), {"fs": torch.full((SAMPLES,), 10)}


def cells_first(views: int, grid: tuple[int, int], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[(B h w), V, C]`."""
    return tokens.reshape(SAMPLES, *grid, views, -1).permute(0, 3, 1, 2, 4), tokens[:0]


def viewcrafter_checkpoint(model: nn.Module) -> dict[str, Any]:
    for module in model.modules():
        if hasattr(module, "checkpoint"):
            module.checkpoint = True
    return {}


# The rows of the page.
VIDEOS = {
    "ReCamMaster": Entry(
        "ReCamMaster",
        recammaster,
        recammaster_inputs,
        latents=(4, 60, 104),
        views=2,  # a source and a target frame
        grid=(30, 52),  # the only one that its blocks take
        checkpoint=recammaster_checkpoint,
    ),
    "Wan2.2, official code": Entry("Wan2.2", wan, wan_inputs),
    "GEN3C": Entry("GEN3C", gen3c, gen3c_inputs, to_images=sequence_first),
    "TrajectoryCrafter": Entry(
        "TrajectoryCrafter", trajectorycrafter, trajectorycrafter_inputs, checkpoint=switch_checkpointing_on
    ),
    "TrajectoryCrafter, references": Entry(
        "TrajectoryCrafter",
        trajectorycrafter,
        with_references,
        views=2 * VIEWS,
        enters=references_and_targets,
        to_images=halves,
    ),
    "ViewCrafter, DynamiCrafter": Entry(
        "ViewCrafter",
        viewcrafter,
        viewcrafter_inputs,
        latents=(8, *GRID),
        to_images=cells_first,
        reach="cell",
        checkpoint=viewcrafter_checkpoint,
    ),
}
# The same rows with another kernel: what opens them then.
VIDEO_KERNELS = {
    ("ReCamMaster", "flash-attn 2"): functools.partial(recammaster, flash=2),
    ("ReCamMaster", "flash-attn 3"): functools.partial(recammaster, flash=3),
    ("Wan2.2, official code", "flash-attn 2"): functools.partial(wan, flash=2),
    ("GEN3C", "torch"): functools.partial(gen3c, backend="torch"),
}
