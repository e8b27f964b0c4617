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

__all__ = ["base_weights", "evaluation_mode", "generate_views", "has_adapter", "native_precision"]


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


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Switch the LoRA or other PEFT adapters of a model off inside the block, so that it computes as before training.

    Example:
        >>> from peft import LoraConfig, inject_adapter_in_model
        >>> lora = LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
        >>> model = inject_adapter_in_model(lora, nn.Sequential(nn.Linear(2, 2)))
        >>> with base_weights(model):
        ...     base = model(torch.ones(2))
        >>> bool((model(torch.ones(2)) == base).all())
        False

    On leaving the block the adapters are as they were, and every parameter requires a gradient as before.

    Raises:
        ValueError: if the model has no adapter: then its base weights are not kept beside the trained ones.
    """
    adapters = _adapters(model)
    if not adapters:
        raise ValueError("model: has no PEFT adapter that could be switched off; its base weights are not kept")
    enabled = [not adapter.disable_adapters for adapter in adapters]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for adapter in adapters:
            adapter.enable_adapters(False)
        yield
    finally:
        for adapter, was_enabled in zip(adapters, enabled, strict=True):
            adapter.enable_adapters(was_enabled)
        for parameter, required in gradients:  # switching an adapter on or off sets those of its weights
            parameter.requires_grad_(required)


def has_adapter(model: nn.Module) -> bool:
    """Tell whether a model holds LoRA or another PEFT adapter, which `base_weights` can switch off."""
    return bool(_adapters(model))


def _adapters(model: nn.Module) -> list[Any]:
    """List the modules of a model that PEFT has put around or beside its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


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
