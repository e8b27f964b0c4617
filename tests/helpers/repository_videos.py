"""The video models of published repositories: views are latent frames."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.kernel_packages import install_transformer_engine
from tests.helpers.models import GRID, SAMPLES, VIEWS
from tests.helpers.repositories import Arguments, Entry, frames_first, noise
from tests.helpers.upstream_imports import bare_package, imports_from, stand_in, without_xformers

TIME = 400.0


@contextmanager
def recammaster(folder: Path) -> Iterator[Callable[[], nn.Module]]:
    with ExitStack() as stack:
        stack.enter_context(imports_from(folder))
        stack.enter_context(bare_package("diffsynth", folder / "diffsynth"))
        stack.enter_context(bare_package("diffsynth.models", folder / "diffsynth" / "models"))
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
                num_layers=2,
                has_image_input=False,
            )
            for block in model.blocks:  # as its training adds them to Wan
                block.cam_encoder, block.projector = nn.Linear(12, 24), nn.Linear(24, 24)
            return model

        yield build


def recammaster_inputs(latents: Tensor) -> Arguments:
    number = latents.shape[1] // 2  # the cameras of the target frames
    cameras = noise(SAMPLES, number, 12)
    return (latents.transpose(1, 2), torch.full((SAMPLES,), TIME), cameras, noise(SAMPLES, 5, 8)), {}


@contextmanager
def wan(folder: Path) -> Iterator[Callable[[], nn.Module]]:
    """With its own SDPA function where it calls flash-attn, which asserts CUDA tensors."""
    with ExitStack() as stack:
        stack.enter_context(imports_from(folder))
        stack.enter_context(bare_package("wan", folder / "wan"))
        stack.enter_context(bare_package("wan.modules", folder / "wan" / "modules"))
        model = importlib.import_module("wan.modules.model")
        attention = importlib.import_module("wan.modules.attention")
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


PADDED = VIEWS * GRID[0] * GRID[1] + 3


def wan_inputs(latents: Tensor) -> Arguments:
    videos = list(latents.transpose(1, 2))
    return (videos, torch.full((SAMPLES, PADDED), TIME), list(noise(SAMPLES, 5, 8)), PADDED), {}


@contextmanager
def gen3c(folder: Path) -> Iterator[Callable[[], nn.Module]]:
    """Its video transformer with the attention of Transformer Engine, which it cannot do without."""
    logs = {name: lambda *_: None for name in ("debug", "info", "critical")}
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        install_transformer_engine(patch)
        stack.enter_context(imports_from(folder))
        stack.enter_context(stand_in("megatron.core", parallel_state=None))
        stack.enter_context(stand_in("cosmos_predict1.utils.log", **logs))
        stack.enter_context(stand_in("cosmos_predict1.utils.distributed"))
        stack.enter_context(stand_in("cosmos_predict1.utils.lazy_config", instantiate=None))
        network = importlib.import_module("cosmos_predict1.diffusion.networks.general_dit")

        def build() -> nn.Module:
            with pytest.MonkeyPatch.context() as cpu:
                cpu.setattr(Tensor, "cuda", lambda tensor: tensor)  # its frequencies are made on the GPU
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
    arguments = latents.transpose(1, 2), torch.full((SAMPLES,), TIME), noise(SAMPLES, 5, 8)
    return arguments, {"fps": torch.full((SAMPLES,), 24.0)}


def sequence_first(tokens: Tensor, views: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Tokens `[(V h w), B, C]`."""
    return frames_first(tokens.transpose(0, 1), views, grid)


@contextmanager
def viewcrafter(folder: Path) -> Iterator[Callable[[], nn.Module]]:
    """In the settings of its released model; its temporal attention is not that of xformers."""
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
                use_relative_position=False,
                temporal_length=VIEWS,
                addition_attention=True,
                image_cross_attention=True,
                fs_condition=True,
            )

        yield build


def viewcrafter_inputs(latents: Tensor) -> Arguments:
    context = noise(SAMPLES, 77 + 16 * VIEWS, 8)
    return (latents.transpose(1, 2), torch.full((SAMPLES,), TIME), context), {"fs": torch.full((SAMPLES,), 10)}


def cells_first(tokens: Tensor, views: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Tokens `[(B h w), V, C]`."""
    images = tokens.reshape(SAMPLES, *grid, views, -1).permute(0, 3, 1, 2, 4)
    return images, tokens[:0]


def checkpoint_blocks(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "checkpoint"):
            module.checkpoint = True


VIDEOS = {
    "ReCamMaster": Entry(
        "ReCamMaster",
        recammaster,
        recammaster_inputs,
        latents=(4, 60, 104),
        views=2,  # a source and a target frame
        grid=(30, 52),  # the only one that its blocks take
        targets=("q", "k"),
    ),
    "Wan2.2, official code": Entry(
        "Wan2.2", wan, wan_inputs, latents=(4, GRID[0] * 2, GRID[1] * 2), targets=("q", "k")
    ),
    "GEN3C": Entry(
        "GEN3C",
        gen3c,
        gen3c_inputs,
        latents=(4, GRID[0] * 2, GRID[1] * 2),
        to_images=sequence_first,
        targets=("to_q.0", "to_k.0"),
    ),
    "ViewCrafter, DynamiCrafter": Entry(
        "ViewCrafter",
        viewcrafter,
        viewcrafter_inputs,
        latents=(8, *GRID),
        to_images=cells_first,
        reach="cell",
        checkpoint=checkpoint_blocks,
    ),
}
