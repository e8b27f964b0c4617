"""Evaluate a model in the middle of its training, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cameo.backbone import unwrap_peft
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline

__all__ = ["evaluation_mode", "generate_views", "native_precision"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off inside the block; on leaving it, every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def native_precision(model: nn.Module) -> Iterator[None]:
    """Autocast to the half precision of frozen weights, if a model has any beside a float32 LoRA, as training does."""
    parameters = list(model.parameters())
    half = next((weight.dtype for weight in parameters if weight.dtype in (torch.float16, torch.bfloat16)), None)
    with torch.autocast(parameters[0].device.type, dtype=half, enabled=half is not None):
        yield


def generate_views(
    model: CameoModel,
    pipeline: MultiViewPipeline,
    batch: Mapping[str, Any],
    *,
    generator: torch.Generator,
    num_inference_steps: int,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Sample the target views of a batch with the weights of `model`, whatever denoiser the pipeline has.

    Returns:
        Images of all views in [0, 1], `[B, V, 3, H, W]`: the given reference views and the generated target views.
    """
    denoiser = pipeline.denoiser
    pipeline.denoiser = unwrap_peft(model.base_model)
    try:
        with evaluation_mode(model), native_precision(model):
            sampled = pipeline.sample(
                batch,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generator,
            )
    finally:
        pipeline.denoiser = denoiser
    references = int(batch["num_reference_views"])
    return torch.cat([batch["images"][:, :references].to(sampled), sampled], dim=1)
