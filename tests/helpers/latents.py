"""Small pipelines of every family with a VAE, and trainers of them on embedded scenes."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from cameo.adapters.cat3d.cameras import CONDITION_CHANNELS
from cameo.adapters.cat3d.pipeline import Cat3DPipeline
from cameo.adapters.common.noise_schedules import ddim
from cameo.adapters.mvdream.pipeline import MVDreamPipeline
from cameo.adapters.zero123plus.pipeline import Zero123PlusPipeline
from cameo.training.data import build_dataset
from cameo.training.settings import TrainingConfig
from cameo.training.setup import add_lora, wrap_denoiser
from cameo.training.trainer import Trainer
from tests.helpers import mvdream_models, sv3d_models, zero123plus_models
from tests.helpers.training_runs import SETTINGS

# Of each family the settings of a run of two steps, small enough for a second.
FAMILIES: dict[str, dict[str, Any]] = {
    "cat3d": {"num_views": 2},
    "mvdream": {"num_views": 2},
    "sv3d": {"num_views": 3, "own_view": True},
    "zero123plus": {"num_views": 7, "camera_rig": "zero123plus-v1.2", "num_scenes": 2},
}


@functools.cache
def _pipeline(backbone: str) -> Any:
    torch.manual_seed(0)
    if backbone == "sv3d":
        return sv3d_models.latent_pipeline()
    if backbone == "zero123plus":
        return Zero123PlusPipeline(**zero123plus_models.components(), ramping_coefficients=zero123plus_models.RAMP)
    if backbone == "mvdream":
        unet = mvdream_models.image_dream_unet(in_channels=4, out_channels=4)
        return MVDreamPipeline(unet, ddim(), vae=vae(), condition="image", **mvdream_models.encoders())
    unet = zero123plus_models.two_level_unet(in_channels=4 + CONDITION_CHANNELS)
    return Cat3DPipeline(unet, ddim(prediction_type="v_prediction"), vae=vae())


def pipeline(backbone: str = "cat3d") -> Any:
    """A pipeline of a family with a VAE, and with the encoders of images that its release has."""
    return copy.deepcopy(_pipeline(backbone))


def vae(seed: int = 1, **options: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4, 4, 4, 4),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "scaling_factor": 0.2,
    }
    return AutoencoderKL(**settings, **options).eval()


def latent_config(folder: Path, backbone: str = "cat3d", **changes: Any) -> TrainingConfig:
    data = {"resolution": 32, "max_overlap": 0.95, "num_reference_views": 1}
    settings = {**SETTINGS, "preset": None, "preset_options": {}, "backbone": backbone, **data, **FAMILIES[backbone]}
    places = {"output_dir": str(folder / "run"), "latents_dir": str(folder / "latents")}
    return TrainingConfig(**{**settings, "max_train_steps": 2, **places, **changes})


def latent_trainer(folder: Path, backbone: str = "cat3d", *, built: Any = None, **changes: Any) -> Trainer:
    """A LoRA trainer on a pipeline with a VAE."""
    config = latent_config(folder, backbone, **changes)
    built = pipeline(backbone) if built is None else built
    add_lora(built.denoiser, config)
    dataset = build_dataset(config, "train")
    model = wrap_denoiser(built, config, dataset)
    return Trainer(model, built, dataset, config)
