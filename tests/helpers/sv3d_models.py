"""Small SV3D models, on pixels and on latents, and their batches."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from cameo.adapters.common.noise_schedules import edm_euler
from cameo.adapters.sv3d.denoiser import SV3DUNet
from cameo.adapters.sv3d.pipeline import SV3DPipeline
from cameo.backbone import get_backbone
from tests.helpers.batches import make_batch
from tests.helpers.models import GRID, SAMPLES, VIEWS

SIZE = 32
NARROW: dict[str, Any] = {"block_out_channels": (32, 32), "heads": 2, "embed_dim": 16}
BOTH = pytest.mark.parametrize("inflate", [False, True])


@functools.cache
def _pipeline(**options: Any) -> SV3DPipeline:
    torch.manual_seed(0)
    return get_backbone("sv3d").build("tiny", **NARROW, **options)


def pipeline(**options: Any) -> SV3DPipeline:
    return copy.deepcopy(_pipeline(**options))


def batch(**options: Any) -> dict[str, Any]:
    return make_batch(**{"size": SIZE, "views": 3, **options})


def orbit(azimuths: list[float], elevations: list[float], size: int = SIZE) -> dict[str, Any]:
    """Cameras at these degrees around the origin, z up, that look at it."""
    extrinsics = torch.eye(4).repeat(1, len(azimuths), 1, 1)
    for view, (azimuth, elevation) in enumerate(zip(azimuths, elevations, strict=True)):
        a, e = math.radians(azimuth), math.radians(elevation)
        outward = torch.tensor([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
        right = torch.tensor([-math.sin(a), math.cos(a), 0.0])
        down = torch.linalg.cross(-outward, right)
        rotation = torch.stack([right, down, -outward])
        extrinsics[0, view, :3, :3], extrinsics[0, view, :3, 3] = rotation, -rotation @ (2.5 * outward)
    given = make_batch(samples=1, views=len(azimuths), size=size)
    return {**given, "extrinsics": extrinsics, "up": torch.tensor([[0.0, 0.0, 1.0]])}


TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
    "up_block_types": ("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
    "num_attention_heads": 2,
    "layers_per_block": 1,
    "cross_attention_dim": 8,
}


def plain_unet(features: int = 768, **settings: Any) -> UNetSpatioTemporalConditionModel:
    """Stable Video Diffusion's class, small; with 256 or 1280 features the shape of SV3D's."""
    torch.manual_seed(0)
    return UNetSpatioTemporalConditionModel(projection_class_embeddings_input_dim=features, **(settings or TWO_LEVELS))


def tiny_vae(kind: type = AutoencoderKL) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "block_out_channels": (32, 32, 32),
        "layers_per_block": 1,
        "latent_channels": 4,
        "scaling_factor": 0.2,
    }
    return kind(**settings, **({"up_block_types": ("UpDecoderBlock2D",) * 3} if kind is AutoencoderKL else {}))


def tiny_clip(channels: int = 8) -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=channels,
        )
    ).eval()


def latent_pipeline(kind: type = AutoencoderKL) -> SV3DPipeline:
    """The released components, but small: a VAE, an image encoder, eight input channels."""
    torch.manual_seed(0)
    unet = SV3DUNet(**TWO_LEVELS)
    return SV3DPipeline(unet, edm_euler(), vae=tiny_vae(kind), image_encoder=tiny_clip())


def run(model: nn.Module, frames: int = VIEWS, samples: int = SAMPLES, **options: Any) -> Tensor:
    """One forward whose supervised layer, one level down, has the token grid `GRID`."""
    generator = torch.Generator().manual_seed(3)
    config, features = model.config, getattr(model, "frame_features", None)
    sample = torch.randn(samples, frames, config.in_channels, 2 * GRID[0], 2 * GRID[1], generator=generator)
    numbers = torch.rand(samples, frames, 3, generator=generator)
    numbers = numbers[:, 0] if features is None else numbers[..., : len(features)]
    context = torch.zeros(samples, 1, config.cross_attention_dim)
    return model(sample, torch.full((samples,), 0.5), context, numbers, **options).sample
