"""The loop of every sampler: predict, guide, step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["sample_latents"]


def sample_latents(
    scheduler: Any,
    noise: Tensor,
    predict: Callable[[Tensor, Tensor], Sequence[Tensor]],
    *,
    num_inference_steps: int,
    guidance_scale: float | Tensor = 1.0,
    generator: Any = None,
    progress_bar: Callable[[Iterable[Tensor]], Iterable[Tensor]] | None = None,
) -> Tensor:
    """Denoise latents step by step.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> noise = torch.ones(1, 3, 4, 8, 8)
        >>> sample_latents(DDIMScheduler(), noise, lambda x, t: [torch.zeros_like(x)], num_inference_steps=5).shape
        torch.Size([1, 3, 4, 8, 8])

    Args:
        scheduler: a scheduler of diffusers.
        noise: standard normal, in the shape of the latents.
        predict: takes the latents, scaled as the denoiser expects them, and the time step; returns the prediction with
            the condition, and for classifier-free guidance also the one without it, each like the latents.
        num_inference_steps: number of denoising steps, at least 1.
        guidance_scale: how far to go from the prediction without the condition to the one with it; a number, or a
            tensor that broadcasts to the latents. Ignored unless `predict` returns two predictions.
        generator: source of the noise that some schedulers add between the steps.
        progress_bar: wraps the time steps, such as `pipeline.progress_bar`; default none.

    Returns:
        Clean latents, with the shape and precision of `noise`.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = noise * scheduler.init_noise_sigma
    for timestep in progress_bar(scheduler.timesteps) if progress_bar else scheduler.timesteps:
        predictions = predict(scheduler.scale_model_input(latents, timestep), timestep)
        prediction, *without = (tensor.to(latents) for tensor in predictions)
        if without:
            prediction = without[0] + guidance_scale * (prediction - without[0])
        latents = scheduler.step(prediction, timestep, latents, **options).prev_sample
    return latents
