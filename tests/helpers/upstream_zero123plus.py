"""The pipeline of Zero123++ as published, on U-Nets of the released depth but narrow, and inputs for it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from tests.helpers import zero123plus_models as parts

TILE, REFERENCE = (4, 4), (8, 8)  # tokens of layer 10 for the inputs below
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def published_module(file: Path) -> Iterator[ModuleType]:
    """Import the file of the published pipeline."""
    spec = importlib.util.spec_from_file_location("zero123plus_published", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def wrapper(published: ModuleType, width: int = 8) -> nn.Module:
    sampler = parts.sampler(timestep_spacing="trailing")
    training = DDPMScheduler.from_config(sampler.config)
    return published.RefOnlyNoisedUNet(parts.stable_diffusion_unet(width), training, sampler).train()


def inputs(samples: int = 1) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(samples, *shape, generator=generator)

    timesteps = torch.tensor([500, 20])[:samples]
    args = (draw(4, 24, 16), timesteps, draw(parts.TOKENS, parts.WIDTH))
    return args, {"cross_attention_kwargs": {"cond_lat": draw(4, 16, 16)}}


def run(model: nn.Module, given: Inputs, **options: Any) -> Tensor:
    torch.manual_seed(0)  # the noise on the reference
    args, kwargs = given
    return model(*args, **kwargs, **options).sample
