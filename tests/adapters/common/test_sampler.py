"""The loop that all samplers share."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from cameo.adapters.common.noise_schedules import ddim, edm_euler
from cameo.adapters.common.sampler import sample_latents

CLEAN = torch.linspace(-1, 1, 2 * 3 * 4).reshape(1, 2, 3, 2, 2).double()


def noise(seed: int = 0) -> Tensor:
    return torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(seed)).double()


def test_a_perfect_prediction_gives_the_clean_latents() -> None:
    scheduler = ddim("epsilon", whole_range=True)

    def predict(latents: Tensor, timestep: Tensor) -> list[Tensor]:
        alpha = scheduler.alphas_cumprod[timestep].double()
        return [(latents - alpha.sqrt() * CLEAN) / (1 - alpha).sqrt()]

    found = sample_latents(scheduler, noise(), predict, num_inference_steps=4)
    torch.testing.assert_close(found, CLEAN, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 3.0, torch.tensor([1.0, 2.0])[:, None, None, None]], ids=str)
def test_guidance_goes_from_the_prediction_without_the_condition_to_the_one_with_it(scale: float | Tensor) -> None:
    def sample(*predictions: Tensor) -> Tensor:
        return sample_latents(
            DDIMScheduler(clip_sample=False),
            noise(),
            lambda latents, timestep: predictions,
            num_inference_steps=1,
            guidance_scale=scale,
        )

    conditional, unconditional = noise(1), noise(2)
    expected = sample(unconditional + scale * (conditional - unconditional))
    assert torch.equal(sample(conditional, unconditional), expected)


def test_latents_start_and_are_scaled_as_the_scheduler_says() -> None:
    scheduler, seen = edm_euler(), []

    def predict(latents: Tensor, timestep: Tensor) -> list[Tensor]:
        seen.append(latents)
        return [torch.zeros_like(latents)]

    sample_latents(scheduler, noise(), predict, num_inference_steps=2)
    start = noise() * scheduler.init_noise_sigma
    torch.testing.assert_close(seen[0], start / (scheduler.sigmas[0] ** 2 + 1).sqrt(), rtol=1e-6, atol=0)
    assert len(seen) == 2


@pytest.mark.parametrize("kind", [EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_the_noise_between_the_steps_follows_the_generator(kind: type) -> None:
    def sample(seed: int) -> Tensor:
        options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(seed)}
        return sample_latents(kind(), noise(), lambda latents, timestep: [0.1 * latents], **options)

    assert torch.equal(sample(0), sample(0))
    assert torch.equal(sample(0), sample(1)) == (kind is not EulerAncestralDiscreteScheduler)


def test_the_progress_bar_sees_every_step() -> None:
    steps: list[int] = []

    def bar(timesteps: Tensor) -> Tensor:
        steps.extend(timesteps.tolist())
        return timesteps

    sample_latents(ddim(), noise(), lambda latents, timestep: [latents], num_inference_steps=4, progress_bar=bar)
    assert steps == [751, 501, 251, 1]
