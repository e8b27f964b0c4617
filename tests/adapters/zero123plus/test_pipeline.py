"""Images, contexts, training inputs, losses and sampling of Zero123++."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

import cameo
from cameo.adapters.common.noise_schedules import linear_ddpm
from cameo.adapters.zero123plus.cameras import to_canvas
from cameo.adapters.zero123plus.denoiser import ReferenceUNet, set_tile_position
from cameo.adapters.zero123plus.pipeline import Zero123PlusPipeline
from cameo.errors import ShapeError
from tests.helpers import zero123plus_models as parts
from tests.helpers.batches import make_batch
from tests.helpers.zero123plus_models import SIZE, batch, pipeline
from tests.helpers.zero123plus_released import REFERENCE, released


def test_latents_are_scaled_as_in_the_releases() -> None:
    built, given = released(), batch()
    encoder = built.vae
    canvas = torch.zeros(2, 3, 3 * SIZE, 2 * SIZE)
    for view in range(6):
        top, left = SIZE * (view // 2), SIZE * (view % 2)
        canvas[:, :, top : top + SIZE, left : left + SIZE] = given["images"][:, view + 1]
    with torch.no_grad():
        raw = encoder.encode((canvas - 0.5) / 0.8).latent_dist.mean
        alone = encoder.encode((given["images"][:, 0] - 0.5) / 0.8).latent_dist.mean
        latents = built.encode(given["images"])
        torch.testing.assert_close(to_canvas(latents[:, 1:]), (raw * 0.18215 - 0.22) * 0.75)
        torch.testing.assert_close(latents[:, 0], (alone * 0.18215 - 0.22) * 0.75)
        decoded = encoder.decode((to_canvas(latents[:, 1:]) / 0.75 + 0.22) / 0.18215).sample
        images = (decoded / 0.5 * 0.8 / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(to_canvas(built.decode(latents)[:, 1:]), images)
        assert torch.equal(built.decode(latents[:, 1:]), built.decode(latents)[:, 1:])
        assert built.decode(latents[:, :3]).shape == (2, 3, 3, SIZE, SIZE)  # no canvas: view by view
    assert latents.shape == built.latent_shape(given["images"].shape)


def test_the_reference_is_encoded_at_its_own_size_and_unscaled() -> None:
    built, images = released(), (torch.rand(2, 3, REFERENCE, REFERENCE) * 255).round() / 255
    with torch.no_grad():
        expected = built.vae.encode((images - 0.5) / 0.8).latent_dist.mean
        grey = built.vae.encode(torch.zeros(1, 3, REFERENCE, REFERENCE)).latent_dist.mean
        torch.testing.assert_close(built.reference_latents(images), expected)
        dropped = built.reference_latents(images, torch.tensor([True, False]))
        torch.testing.assert_close(dropped, torch.cat([grey, expected[1:]]))
        assert built.reference_latents(images[:, :, :32, :32]).shape == (2, 4, 6, 6)


def test_pixels_without_an_autoencoder() -> None:
    built, given = pipeline(), batch()
    latents = built.encode(given["images"])
    assert latents.shape == (2, 7, 48, 8, 8)
    torch.testing.assert_close(latents.amin((0, 1, 2, 3, 4)), given["images"].amin() * 2 - 1)
    torch.testing.assert_close(built.decode(latents), given["images"])
    flat = torch.full((1, 3, SIZE, SIZE), 0.75)
    assert torch.allclose(built.reference_latents(flat), torch.full((1, 48, 12, 12), 5 * 0.5))
    assert not built.reference_latents(flat, torch.tensor([True])).any()
    sharp = torch.rand(1, 3, REFERENCE, REFERENCE)
    patches = F.pixel_unshuffle(sharp * 2 - 1, 4)  # of a picture that has the size already
    torch.testing.assert_close(built.reference_latents(sharp), 5 * patches)


def test_the_context_is_the_empty_prompt_and_the_ramped_image() -> None:
    built, images = released(), (torch.rand(2, 3, 16, 16) * 255).round() / 255
    with torch.no_grad():
        ids = torch.tensor([[0, 1, 1, 1, 1]])  # start, end, and padding by the end
        text = built.text_encoder(ids).last_hidden_state
        mean, deviation = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
        pixels = (images - mean[:, None, None]) / deviation[:, None, None]
        embedding = built.vision_encoder(pixels).image_embeds
        expected = text + embedding[:, None] * torch.tensor(parts.RAMP)[:, None]
        torch.testing.assert_close(built.context(images), expected)
        dropped = built.context(images, torch.tensor([False, True]))
        torch.testing.assert_close(dropped, torch.cat([expected[:1], text]))
    line = Zero123PlusPipeline(**parts.components())
    with torch.no_grad():
        straight = text + embedding[:, None] * torch.tensor([0, 0.25, 0.5, 0.75, 1])[:, None]
        torch.testing.assert_close(line.context(images), straight)
        line.register_to_config(ramping_coefficients=[1.0, 2.0])
        with pytest.raises(ValueError, match="ramping_coefficients: expected one per token, 5, got 2"):
            line.context(images)
    assert not pipeline().context(images).any()
    assert pipeline().context(images).shape == (2, 1, 8)


def test_training_inputs() -> None:
    built, given = pipeline(), batch()
    noise = torch.randn(built.latent_shape(given["images"].shape))
    inputs = built.training_inputs(given, timesteps=torch.tensor([999, 300]), noise=noise)
    clean = built.encode(given["images"])
    assert inputs.loss_views.tolist() == [False] + [True] * 6
    assert torch.equal(inputs.noisy[:, 0], clean[:, 0])
    alphas = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)
    for sample, timestep in enumerate((999, 300)):
        alpha = alphas[timestep]
        noisy = alpha.sqrt() * clean[sample] + (1 - alpha).sqrt() * noise[sample]
        torch.testing.assert_close(inputs.noisy[sample, 1:], noisy[1:])
        velocity = alpha.sqrt() * noise[sample] - (1 - alpha).sqrt() * clean[sample]
        torch.testing.assert_close(inputs.target[sample], velocity)
    canvas, timesteps, context = inputs.args
    assert torch.equal(canvas, to_canvas(inputs.noisy[:, 1:]))
    assert timesteps.tolist() == inputs.timesteps.tolist() == [999, 300]
    assert not context.any()
    given_to_unet = inputs.kwargs["cross_attention_kwargs"]
    assert torch.equal(given_to_unet["cond_lat"], built.reference_latents(given["images"][:, 0]))
    assert given_to_unet["cond_lat"].shape == given_to_unet["cond_noise"].shape == (2, 48, 12, 12)


def test_the_noise_on_the_reference_follows_the_noise_of_its_view() -> None:
    built, given = pipeline(), batch()
    noise = torch.randn(built.latent_shape(given["images"].shape))

    def drawn(noise: Tensor, given: dict[str, Any] = given) -> Tensor:
        inputs = built.training_inputs(given, timesteps=torch.tensor([5] * len(noise)), noise=noise)
        return inputs.kwargs["cross_attention_kwargs"]["cond_noise"]

    first = drawn(noise)
    assert torch.equal(drawn(noise), first)
    assert torch.equal(drawn(noise[1:], batch_of(given, slice(1, 2))), first[1:])  # whatever else is in the batch
    assert not torch.equal(first[0], first[1])
    noise[0, 0, 0, 0, 0] += 1
    changed = drawn(noise)
    assert not torch.equal(changed[0], first[0])
    assert torch.equal(changed[1], first[1])
    assert abs(float(first.mean())) < 0.05  # 13824 numbers: six standard errors
    assert abs(float(first.std()) - 1) < 0.05


def batch_of(given: dict[str, Any], samples: slice) -> dict[str, Any]:
    return {name: value if isinstance(value, int) else value[samples] for name, value in given.items()}


def test_inputs_follow_the_generator() -> None:
    built, given = pipeline(), batch()
    one, same, other = (built.training_inputs(given, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one.noisy, same.noisy)
    assert torch.equal(one.timesteps, same.timesteps)
    assert not torch.equal(one.noisy, other.noisy)
    for name, value in one.kwargs["cross_attention_kwargs"].items():
        assert torch.equal(value, same.kwargs["cross_attention_kwargs"][name])


def test_condition_dropout() -> None:
    built, given = released(), batch(samples=6)

    def inputs(share: float) -> Any:
        return built.training_inputs(given, generator=torch.Generator().manual_seed(3), condition_dropout=share)

    plain, half, all_dropped = inputs(0), inputs(0.5), inputs(1)
    with torch.no_grad():
        grey = built.vae.encode(torch.zeros(1, 3, REFERENCE, REFERENCE)).latent_dist.mean
        text = built.text_encoder(torch.tensor([[0, 1, 1, 1, 1]])).last_hidden_state
    torch.testing.assert_close(all_dropped.kwargs["cross_attention_kwargs"]["cond_lat"], grey.expand(6, -1, -1, -1))
    torch.testing.assert_close(all_dropped.args[2], text.expand(6, -1, -1))
    kept = [torch.equal(half.args[2][sample], plain.args[2][sample]) for sample in range(6)]
    assert 0 < sum(kept) < 6
    for sample, keep in enumerate(kept):
        latents = (plain if keep else all_dropped).kwargs["cross_attention_kwargs"]["cond_lat"][sample]
        assert torch.equal(half.kwargs["cross_attention_kwargs"]["cond_lat"][sample], latents)
    assert torch.equal(half.noisy, plain.noisy)
    assert torch.equal(half.timesteps, plain.timesteps)


def output_of(inputs: Any, views: Tensor) -> SimpleNamespace:
    return SimpleNamespace(sample=to_canvas(views[:, 1:]))


@pytest.mark.parametrize("make", [pipeline, released])
def test_the_true_target_gives_back_the_images(make: Any) -> None:
    built, given = make(), batch()
    inputs = built.training_inputs(given, timesteps=torch.tensor([0, 600]))
    loss = built.denoising_loss(output_of(inputs, inputs.target), inputs)
    assert loss.tolist() == [0, 0]
    with torch.no_grad():
        images = built.predict_clean(output_of(inputs, inputs.target), inputs)
        expected = built.decode(built.encode(given["images"]))
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)  # float32 through noising and back
    prediction = inputs.target + 1
    prediction[:, 0] += 100  # the reference carries no loss
    torch.testing.assert_close(built.denoising_loss(output_of(inputs, prediction), inputs), torch.ones(2))


def test_epsilon_prediction() -> None:
    settings = {**parts.components(), "scheduler": parts.sampler(prediction_type="epsilon")}
    built, given = Zero123PlusPipeline(**settings), batch(samples=1)
    noise = torch.randn(built.latent_shape(given["images"].shape))
    inputs = built.training_inputs(given, noise=noise, timesteps=torch.tensor([400]))
    assert torch.equal(inputs.target, noise)


def test_predicted_clean_views_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    built, given = pipeline(prediction_type="sample"), batch(samples=1)
    inputs = built.training_inputs(given, timesteps=torch.tensor([999]))
    found = built.predict_clean(output_of(inputs, inputs.target), inputs)
    torch.testing.assert_close(found, given["images"], rtol=0, atol=1e-4)
    perfect = (output_of(inputs, inputs.target).sample,)
    monkeypatch.setattr(built.unet, "forward", lambda *args, **kwargs: perfect)
    found = built.sample(given, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, given["images"][:, 1:], rtol=0, atol=1e-4)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown scheduler\.prediction_type 'flow': Known: epsilon, sample, v_pred"):
        Zero123PlusPipeline(**{**parts.components(), "scheduler": parts.sampler(prediction_type="flow")})


@pytest.mark.parametrize(("views", "references"), [(4, 1), (7, 2), (7, 0), (8, 1)])
def test_other_numbers_of_views_are_refused(views: int, references: int) -> None:
    given = {**make_batch(views=views, size=SIZE), "num_reference_views": references}
    for use in (pipeline().training_inputs, pipeline().sample):
        with pytest.raises(
            ValueError, match=rf"got {views} and {references}\. Set num_views=7 and num_reference_views=1"
        ):
            use(given)


def test_a_plain_unet_set_later_is_noticed() -> None:
    built, given = pipeline(), batch()
    plain = UNet2DConditionModel.from_config(built.unet.config)
    plain.load_state_dict(built.unet.state_dict())
    expected = built.sample(given, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    built.unet = plain
    cure = r"ReferenceUNet\.from_unet\(pipeline\.unet, latent_stride=4, reference_size=\(48, 48\)\), then "
    cure += r"cameo\.adapters\.zero123plus\.denoiser\.set_tile_position\(pipeline\.unet, 'sincos'\)"
    for use in (built.training_inputs, functools.partial(built.sample, num_inference_steps=1)):
        with pytest.raises(RuntimeError, match=rf"plain UNet2DConditionModel.*Call .*{cure}"):
            use(given)
    set_tile_position(ReferenceUNet.from_unet(built.unet, latent_stride=4, reference_size=(48, 48)), "sincos")
    again = built.sample(given, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, expected)


@pytest.mark.parametrize("size", [(36, 36), (32, 64)])
def test_images_that_do_not_fit(size: tuple[int, int]) -> None:
    given = {**batch(), "images": torch.rand(2, 7, 3, *size)}
    for use in (pipeline().training_inputs, pipeline().sample):
        with pytest.raises(ShapeError, match="images: expected squares with sides divisible by 8"):
            use(given)
    with pytest.raises(ShapeError, match=r"images: expected \[B, V, 3, H, W\], got \[2, 7, 1, 32, 32\]"):
        pipeline().training_inputs({**given, "images": torch.rand(2, 7, 1, SIZE, SIZE)})


def test_images_of_another_kind() -> None:
    given = batch()
    with pytest.raises(ValueError, match=r"images: expected floats in \[0, 1\], got torch\.uint8"):
        pipeline().training_inputs({**given, "images": (given["images"] * 255).byte()})


class Denoiser(nn.Module):
    """Stands in for the U-Net: knows the canvas, or answers a constant that tells whether it saw a reference."""

    def __init__(self, like: Zero123PlusPipeline, clean: Tensor | None = None) -> None:
        super().__init__()
        self.inner, self.config, self.clean = like.unet, like.unet.config, clean
        self.down_blocks = like.unet.down_blocks
        self.seen: list[tuple[Tensor, float, Tensor, Tensor]] = []

    def forward(
        self, sample: Tensor, timesteps: Tensor, context: Tensor, cross_attention_kwargs: Any, return_dict: bool
    ) -> Any:
        reference, noise = cross_attention_kwargs["cond_lat"], cross_attention_kwargs["cond_noise"]
        self.seen.append((reference, float(timesteps[0]), noise, context))
        if self.clean is None:
            seen = reference.flatten(1).any(1)[:, None, None, None]
            return (torch.where(seen, 0.1, 0.3).expand_as(sample),)
        alpha = linear_ddpm().alphas_cumprod[timesteps.long()][:, None, None, None]
        drawn = (sample - alpha.sqrt() * self.clean) / (1 - alpha).sqrt()
        return (alpha.sqrt() * drawn - (1 - alpha).sqrt() * self.clean,)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("kind", ["euler", "ddim"])
def test_a_perfect_denoiser_recovers_the_images(steps: int, kind: str) -> None:
    built, given = pipeline(), batch()
    if kind == "ddim":
        built.scheduler = DDIMScheduler.from_config(linear_ddpm().config, timestep_spacing="trailing")
    clean = built.encode(given["images"])
    built.denoiser = oracle = Denoiser(built, to_canvas(clean[:, 1:]))
    sampled = built.sample(given, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled, given["images"][:, 1:], atol=1e-3, rtol=0)  # noise at the last level is 0.04
    assert len(oracle.seen) == steps
    assert oracle.seen[0][1] == 999
    references = [seen[0] for seen in oracle.seen]
    assert all(torch.equal(one, built.reference_latents(given["images"][:, 0])) for one in references)
    assert all(one[2].shape == references[0].shape for one in oracle.seen)
    assert steps == 1 or not torch.equal(oracle.seen[0][2], oracle.seen[1][2])  # noise anew in each step


def test_sampling_looks_at_the_reference_alone() -> None:
    built, given = pipeline(), batch()
    first = built.sample(given, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    without = {"images": given["images"][:, :1], "num_reference_views": 1}
    again = built.sample(without, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    other = built.sample(given, num_inference_steps=2, generator=torch.Generator().manual_seed(1))
    assert first.shape == (2, 6, 3, SIZE, SIZE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0 <= first.min() <= first.max() <= 1
    canvas = built.sample_canvas(given, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert canvas.shape == (2, 3, 3 * SIZE, 2 * SIZE)
    assert torch.equal(canvas[:, :, SIZE : 2 * SIZE, :SIZE], first[:, 2])


def test_sampling_in_half_precision() -> None:
    built, given = released(), batch(samples=1)
    full = built.sample(given, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    built.to(torch.bfloat16)
    half = built.sample(given, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.05  # bfloat16 has 8 bits


def test_guidance_steps_away_from_the_answer_without_a_reference() -> None:
    built, given = pipeline(), batch()
    built.denoiser = oracle = Denoiser(built)
    settings = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(0)}
    drawn = torch.randn(2, 48, 24, 16, generator=torch.Generator().manual_seed(0))
    sampled = built.sample_canvas(given, guidance_scale=2, **settings)
    alpha = built.scheduler.alphas_cumprod[999]
    start = drawn * built.scheduler.init_noise_sigma * alpha.sqrt()
    # 0.3 + 2 (0.1 - 0.3) = -0.1; one step from the last level to the clean canvas.
    clean = alpha.sqrt() * start + (1 - alpha).sqrt() * 0.1
    expected = built.decode(clean[:, None])[:, 0]
    torch.testing.assert_close(sampled, expected, atol=1e-5, rtol=1e-4)
    ((reference, _, noise, _),) = oracle.seen
    assert not reference[:2].any()  # the unconditional half comes first
    assert torch.equal(reference[2:], built.reference_latents(given["images"][:, 0]))
    assert len(noise) == 4


def test_guidance_of_a_release_drops_the_image_embedding_too() -> None:
    built, given = released(), batch(samples=1)
    built.denoiser = oracle = Denoiser(built)
    assert built.sample(given, num_inference_steps=1, guidance_scale=4).shape == (1, 6, 3, SIZE, SIZE)
    context = oracle.seen[0][3]
    with torch.no_grad():
        text = built.text_encoder(torch.tensor([[0, 1, 1, 1, 1]])).last_hidden_state
        torch.testing.assert_close(context[:1], text)
        torch.testing.assert_close(context[1:], built.context(given["images"][:, 0]))


def test_training_lowers_both_losses_on_the_batch() -> None:
    built, given = pipeline(), batch(samples=1)
    torch.manual_seed(0)
    model = cameo.wrap(built.unet, "zero123plus", head="mean")
    match = parts.random_matches(model.token_grids(SIZE, SIZE, 7))
    match.index[:, :, 1:] = -1  # to the reference alone, which few steps can learn
    inputs = built.training_inputs(given, timesteps=torch.tensor([700]), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    history = []
    for _ in range(10):
        output = model(*inputs.args, **inputs.kwargs, correspondence=match)
        denoising = built.denoising_loss(output, inputs).mean()
        history.append((float(denoising.detach()), float(model.alignment_loss.detach())))
        optimizer.zero_grad()
        (denoising + model.alignment_loss).backward()
        optimizer.step()
    assert history[-1][0] < 0.8 * history[0][0]
    assert history[-1][1] < 0.9 * history[0][1]
