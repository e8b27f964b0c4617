"""Sampling with MVDream and ImageDream."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from cameo.adapters.mvdream.pipeline import MVDreamPipeline
from tests.helpers.mvdream_models import PRESETS, SIZE, batch, pipeline, seeded, views_of, with_text


@pytest.mark.parametrize("preset", PRESETS)
def test_sampling_is_deterministic_and_looks_at_the_references_alone(preset: str) -> None:
    built = pipeline(preset)
    given = batch(built)
    first = built.sample(given, num_inference_steps=2, generator=seeded())
    scrambled = given["images"].clone()
    scrambled[:, built.num_reference_views :] = 0
    again = built.sample(given | {"images": scrambled}, num_inference_steps=2, generator=seeded())
    other = built.sample(given, num_inference_steps=2, generator=seeded(1))
    assert first.shape == (2, 3 - built.num_reference_views, 3, SIZE, SIZE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    if built.num_reference_views:
        scrambled[:, 0] = 0
        changed = built.sample(given | {"images": scrambled}, num_inference_steps=2, generator=seeded())
        assert not torch.equal(first, changed)


class Oracle(nn.Module):
    """Stands in for the U-Net: answers the true noise, or a constant that tells whether it saw the condition."""

    def __init__(self, like: MVDreamPipeline, clean: Tensor | None = None) -> None:
        super().__init__()
        self.config, self.clean, self.alphas = like.unet.config, clean, like.scheduler.alphas_cumprod
        self.seen: list[tuple[Tensor, int, Any]] = []

    def forward(self, sample: Tensor, timesteps: Tensor, context: Tensor, **kwargs: Any) -> Any:
        self.seen.append((sample, int(timesteps[0]), kwargs))
        if self.clean is None:
            value = 0.2 if views_of(sample)[:, -1].any() else 0.6
            return SimpleNamespace(sample=torch.full_like(sample, value))
        alpha = self.alphas[timesteps][:, None, None, None]
        clean = rearrange(self.clean, "b v c h w -> (b v) c h w")
        return SimpleNamespace(sample=(sample - alpha.sqrt() * clean) / (1 - alpha).sqrt())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_perfect_denoiser_recovers_the_images(preset: str) -> None:
    built = pipeline(preset)
    given = batch(built)
    clean = built.encode(given["images"])
    references = built.num_reference_views
    built.denoiser = oracle = Oracle(built, clean.roll(-references, dims=1))
    sampled = built.sample(given, num_inference_steps=20, generator=seeded())
    # The published schedule ends at alphas_cumprod[0] = 0.99915, so up to 3 % of the noise stays.
    assert (sampled - given["images"][:, references:]).abs().mean() < 0.02
    assert len(oracle.seen) == 20
    if references:
        assert all(torch.equal(views_of(sample)[:, -1], clean[:, 0]) for sample, _, _ in oracle.seen)


def test_guidance_steps_away_from_the_answer_without_the_image() -> None:
    built = pipeline("imagedream-tiny")
    built.denoiser = oracle = Oracle(built)
    given = batch(built)
    steps: list[Tensor] = []
    step = built.scheduler.step
    built.scheduler.step = lambda prediction, *rest: (steps.append(prediction), step(prediction, *rest))[1]
    built.sample(given, num_inference_steps=1, guidance_scale=3)
    torch.testing.assert_close(steps[0], torch.full_like(steps[0], 0.6 + 3 * (0.2 - 0.6)))
    (_, _, first), (blank, _, second) = oracle.seen
    assert not views_of(blank)[:, -1].any()
    assert torch.equal(first["class_labels"], second["class_labels"])
    built.sample(given, num_inference_steps=1)
    torch.testing.assert_close(steps[1], torch.full_like(steps[1], 0.2))


def test_guidance_by_text() -> None:
    built = with_text()
    given = batch(built) | {"caption": ["a cat", "dogs"]}
    plain, guided, other = (
        built.sample(given | {"caption": texts}, num_inference_steps=1, guidance_scale=scale, generator=seeded())
        for texts, scale in ((["a cat", "dogs"], 1), (["a cat", "dogs"], 8), (["", "dogs"], 8))
    )
    assert not torch.equal(plain, guided)
    assert not torch.equal(guided[0], other[0])
    empty = built.sample(given | {"caption": ["", ""]}, num_inference_steps=1, generator=seeded())
    torch.testing.assert_close(other[0], empty[0])  # the empty text against itself


@pytest.mark.parametrize("preset", PRESETS)
def test_half_precision_samples_without_autocast(preset: str) -> None:
    built = pipeline(preset)
    given = batch(built)

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return built.sample(given, num_inference_steps=2, guidance_scale=2.0, generator=generator)

    exact = sample()
    built.to(torch.bfloat16)
    half = sample()
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    # bfloat16 has 8 bits, 2 ** -8 of each of the layers' outputs; images in [0, 1]
    torch.testing.assert_close(half, exact, atol=0.1, rtol=0)
