"""Small CAT3D-style models, on pixels and on latents, and their batches."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from cameo.adapters.cat3d.pipeline import Cat3DPipeline
from cameo.backbone import get_backbone
from tests.helpers.batches import make_batch

SIZE = 32
NARROW: dict[str, Any] = {"block_out_channels": (16, 32), "heads": 2, "norm_num_groups": 8, "image_size": SIZE}


@functools.cache
def _pipeline(**options: Any) -> Cat3DPipeline:
    torch.manual_seed(0)
    return get_backbone("cat3d").build("tiny", **NARROW, **options)


def pipeline(**options: Any) -> Cat3DPipeline:
    return copy.deepcopy(_pipeline(**options))


def batch(**options: Any) -> dict[str, Any]:
    return make_batch(size=SIZE, **options)


def stable_diffusion_unet(in_channels: int = 4) -> UNet2DConditionModel:
    """Stable Diffusion 2.1's U-Net, but narrow."""
    torch.manual_seed(0)
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        down_block_types=(cross, cross, cross, plain),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2, 4, 4),
        cross_attention_dim=8,
        norm_num_groups=4,
        use_linear_projection=True,
    )


def tiny_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.2,
    )


def run(unet: nn.Module, sample: Tensor, views: int | None, timestep: int = 400) -> Tensor:
    context = torch.zeros(sample.shape[0], 1, 8)
    kwargs = {} if views is None else {"cross_attention_kwargs": {"num_views": views}}
    with torch.no_grad():
        return unet(sample, torch.full((sample.shape[0],), timestep), context, **kwargs).sample
