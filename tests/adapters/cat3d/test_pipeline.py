"""Training inputs, losses and sampling of CAT3D-style models."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import Correspondence
from cameo.adapters.cat3d.cameras import CONDITION_CHANNELS
from cameo.adapters.cat3d.pipeline import Cat3DPipeline
from cameo.adapters.common.diffusers_attention import XFormersOnCudaAttnProcessor
from cameo.adapters.common.joint_views import inflate
from cameo.adapters.common.noise_schedules import ddim
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers.batches import make_batch
from tests.helpers.cat3d_models import NARROW, SIZE, batch, pipeline, run, stable_diffusion_unet, tiny_kl


def test_references_stay_clean_and_targets_are_noised() -> None:
    built, given = pipeline(), batch(views=4)
    given["num_reference_views"] = 2
    noise = torch.randn(built.latent_shape(given["images"].shape))
    inputs = built.training_inputs(given, timesteps=torch.tensor([999, 300]), noise=noise)
    clean = built.encode(given["images"])
    assert inputs.noisy.shape == built.latent_shape(given["images"].shape) == clean.shape
    assert torch.equal(inputs.noisy[:, :2], clean[:, :2])
    assert inputs.loss_views.tolist() == [False, False, True, True]
    assert torch.equal(inputs.noisy[0, 2:], noise[0, 2:])  # zero terminal SNR: the last step shows nothing
    alpha = built.scheduler.alphas_cumprod[300]
    torch.testing.assert_close(inputs.noisy[1, 2:], alpha.sqrt() * clean[1, 2:] + (1 - alpha).sqrt() * noise[1, 2:])
    torch.testing.assert_close(inputs.target[1], alpha.sqrt() * noise[1] - (1 - alpha).sqrt() * clean[1])
    sample, timesteps, context = inputs.args
    channels = clean.shape[2]
    assert sample.shape == (8, channels + CONDITION_CHANNELS, 8, 8)
    assert torch.equal(rearrange(sample, "(b v) c h w -> b v c h w", v=4)[:, :, :channels], inputs.noisy)
    mask = rearrange(sample[:, channels], "(b v) h w -> b v h w", v=4)
    assert mask[:, :2].eq(1).all()
    assert mask[:, 2:].eq(0).all()
    assert timesteps.tolist() == [999] * 4 + [300] * 4
    assert not context.any()
    assert inputs.kwargs == {"cross_attention_kwargs": {"num_views": 4}}


def test_single_image_batches_see_neither_other_views_nor_cameras() -> None:
    built, given = pipeline(), batch(views=3)
    noise = torch.randn(built.latent_shape(given["images"].shape))
    steps = torch.tensor([500, 500])
    joint = built.training_inputs(given, timesteps=steps, noise=noise)
    apart = built.training_inputs(given, timesteps=steps, noise=noise, joint=False)
    assert (joint.aligned, apart.aligned) == (True, False)
    channels = apart.noisy.shape[2]
    assert torch.equal(apart.args[0][:, : channels + 1], joint.args[0][:, : channels + 1])  # latents and mask
    assert joint.args[0][:, channels + 1 :].any()
    assert not apart.args[0][:, channels + 1 :].any()
    images = given["images"].clone()
    images[:, 0] = 1 - images[:, 0]
    others = built.training_inputs({**given, "images": images}, timesteps=steps, noise=noise, joint=False)
    outputs = [built.prediction(built.unet(*one.args, **one.kwargs), one) for one in (apart, others)]
    assert torch.equal(outputs[0][:, 1:], outputs[1][:, 1:])
    assert not torch.equal(outputs[0][:, 0], outputs[1][:, 0])


def test_the_share_of_single_image_batches_is_drawn_in_training_alone() -> None:
    built = get_backbone("cat3d").build("tiny", **NARROW, single_image_share=0.3)
    given = batch()

    def joint(**options: Any) -> list[bool]:
        drawn = [torch.Generator().manual_seed(seed) for seed in range(100)]
        return [built.training_inputs(given, generator=generator, **options).aligned for generator in drawn]

    built.unet.train()
    assert 15 < joint().count(False) < 45
    assert all(joint(noise=torch.zeros(built.latent_shape(given["images"].shape))))  # a validation gives the noise
    built.unet.eval()
    assert all(joint())
    with pytest.raises(ValueError, match="single_image_share: expected at least 0 and less than 1, got 1"):
        get_backbone("cat3d").build("tiny", **NARROW, single_image_share=1)


def output_of(views: Tensor) -> SimpleNamespace:
    return SimpleNamespace(sample=rearrange(views, "b v c h w -> (b v) c h w"))


def test_the_loss_is_over_the_target_views_alone() -> None:
    built = pipeline()
    inputs = built.training_inputs(batch(), generator=torch.Generator().manual_seed(0))
    prediction = torch.randn_like(inputs.target)
    loss = built.denoising_loss(output_of(prediction), inputs)
    expected = (prediction - inputs.target)[:, 1:].square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected)
    prediction[:, 0] += 100
    assert torch.equal(built.denoising_loss(output_of(prediction), inputs), loss)
    assert built.denoising_loss(output_of(inputs.target), inputs).tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_the_true_target_gives_back_the_images(kind: str) -> None:
    built = pipeline(prediction_type=kind, zero_terminal_snr=kind != "epsilon")
    last = 600 if kind == "epsilon" else 999
    given = batch()
    inputs = built.training_inputs(given, timesteps=torch.tensor([0, last]))
    images = built.predict_clean(output_of(inputs.target), inputs)
    torch.testing.assert_close(images, given["images"], atol=1e-4, rtol=0)
    inputs = built.training_inputs(given, timesteps=torch.tensor([last, last]))
    wrong = built.predict_clean(output_of(torch.randn_like(inputs.target)), inputs)
    torch.testing.assert_close(wrong[:, 0], given["images"][:, 0])
    assert not torch.allclose(wrong[:, 1:], given["images"][:, 1:], atol=0.1)


def test_the_schedule_ends_in_pure_noise() -> None:
    assert ddim(zero_terminal_snr=True).alphas_cumprod[-1] == 0
    assert ddim().alphas_cumprod[-1] > 0
    with pytest.raises(ValueError, match="epsilon-prediction is not defined at zero terminal SNR"):
        get_backbone("cat3d").build("tiny", **NARROW, prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"unknown scheduler\.prediction_type 'flow': Known: epsilon, sample, v_pred"):
        get_backbone("cat3d").build("tiny", **NARROW, prediction_type="flow")


class Denoiser(nn.Module):
    """Stands in for the U-Net: knows the images, or answers a constant that tells whether it saw rays."""

    def __init__(self, like: Cat3DPipeline, clean: Tensor | None = None) -> None:
        super().__init__()
        self.config, self.clean, self.alphas = like.unet.config, clean, like.scheduler.alphas_cumprod
        self.seen: list[tuple[Tensor, int]] = []

    def forward(self, sample: Tensor, timesteps: Tensor, context: Tensor, cross_attention_kwargs: Any) -> Any:
        channels = self.config.out_channels
        self.seen.append((sample, int(timesteps[0])))
        if self.clean is None:
            value = 0.1 if sample[:, channels + 1 :].any() else 0.3
            return SimpleNamespace(sample=torch.full_like(sample[:, :channels], value))
        alpha = self.alphas[timesteps][:, None, None, None]
        clean = rearrange(self.clean, "b v c h w -> (b v) c h w")
        noise = (sample[:, :channels] - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return SimpleNamespace(sample=alpha.sqrt() * noise - (1 - alpha).sqrt() * clean)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_a_perfect_denoiser_recovers_the_images(steps: int) -> None:
    built, given = pipeline(), batch()
    clean = built.encode(given["images"])
    oracle = Denoiser(built, clean)
    built.denoiser = oracle
    sampled = built.sample(given, num_inference_steps=steps)
    assert sampled.shape == (2, 2, 3, SIZE, SIZE)
    torch.testing.assert_close(sampled, given["images"][:, 1:], atol=1e-4, rtol=0)
    assert oracle.seen[0][1] == 999  # starts where training has pure noise
    assert len(oracle.seen) == steps
    for sample, _ in oracle.seen:
        views = rearrange(sample[:, : clean.shape[2]], "(b v) c h w -> b v c h w", b=2)
        assert torch.equal(views[:, :1], clean[:, :1])  # references are given clean at every step


def test_half_precision_samples_without_autocast() -> None:
    built = pipeline()
    given = batch()

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


def test_sampling_looks_at_the_references_alone() -> None:
    built, given = pipeline(), batch()
    first = built.sample(given, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    without = {**given, "images": given["images"][:, :1]}
    again = built.sample(without, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    other = built.sample(given, num_inference_steps=2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1


def test_guidance_steps_away_from_the_answer_without_cameras() -> None:
    built, given = pipeline(), batch()
    built.denoiser = Denoiser(built)
    sampled = built.sample(given, num_inference_steps=1, guidance_scale=2)
    # 0.3 + 2 (0.1 - 0.3) = -0.1; at pure noise the clean latent is minus the velocity, and 0.1 is 0.55 in [0, 1].
    torch.testing.assert_close(sampled, torch.full_like(sampled, 0.55))
    assert len(built.denoiser.seen) == 2
    plain = built.sample(given, num_inference_steps=1)
    torch.testing.assert_close(plain, torch.full_like(plain, 0.45))


def test_switching_xformers_keeps_the_views_joined() -> None:
    built = pipeline()
    sample = torch.randn(2, built.unet.config.in_channels, 8, 8)
    before = run(built.unet, sample, 2)
    built.enable_xformers_memory_efficient_attention()
    attention = built.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert isinstance(attention.processor, XFormersOnCudaAttnProcessor)
    assert torch.equal(run(built.unet, sample, 2), before)  # xformers has no CPU kernel
    assert cameo.wrap(built.unet, "cat3d").token_grid(SIZE, SIZE) == (4, 4)
    built.disable_xformers_memory_efficient_attention()
    assert torch.equal(run(built.unet, sample, 2), before)


def test_a_denoiser_whose_views_are_apart_is_noticed() -> None:
    built = pipeline()
    built.denoiser = UNet2DConditionModel.from_config(built.unet.config)
    for use in (built.training_inputs, functools.partial(built.sample, num_inference_steps=1)):
        with pytest.raises(
            RuntimeError, match=r"attn1 sees one view at a time, since .*call .*inflate\(pipeline.unet,"
        ):
            use(batch())
    inflate(built.unet, latent_stride=built.latent_stride)  # as the message says
    built.training_inputs(batch())


@pytest.mark.parametrize("size", [36, 4])
def test_images_that_do_not_divide(size: int) -> None:
    with pytest.raises(ShapeError, match="images: expected height and width divisible by 8"):
        pipeline().training_inputs(make_batch(size=size))


def test_images_of_another_kind() -> None:
    given = batch()
    with pytest.raises(ValueError, match=r"images: expected floats in \[0, 1\], got torch\.uint8"):
        pipeline().training_inputs({**given, "images": (given["images"] * 255).byte()})
    with pytest.raises(ShapeError, match=r"images: expected \[B, V, 3, H, W\], got \[3, 3, 32, 32\]"):
        pipeline().encode(given["images"][0])


@pytest.mark.parametrize("references", [0, 3])
def test_a_number_of_reference_views_out_of_range(references: int) -> None:
    given = {**batch(), "num_reference_views": references}
    for use in (pipeline().training_inputs, pipeline().sample):
        with pytest.raises(ValueError, match=f"num_reference_views: expected 1 to 2 of 3 views, got {references}"):
            use(given)


def test_what_build_refuses() -> None:
    adapter = get_backbone("cat3d")
    with pytest.raises(ValueError, match=r"unknown preset of cat3d 'tinny': did you mean 'tiny'\?"):
        adapter.build("tinny")
    with pytest.raises(ValueError, match=r"unknown option of cat3d 'head': did you mean 'heads'\?"):
        adapter.build("tiny", head=2)
    with pytest.raises(ValueError, match=r"attention_levels: expected one flag per width \(16, 32, 32\)"):
        adapter.build("tiny", block_out_channels=(16, 32, 32))
    with pytest.raises(ValueError, match=r"unet: expected 11 input and 4 output channels .*got 4 and 4"):
        Cat3DPipeline(
            stable_diffusion_unet(), ddim("v_prediction", zero_terminal_snr=True, whole_range=True), vae=tiny_kl()
        )


def test_training_lowers_both_losses_on_the_batch() -> None:
    built, given = pipeline(), batch(samples=1)
    torch.manual_seed(0)
    model = cameo.wrap(built.unet, "cat3d")
    match = Correspondence.from_depth(
        given["depth"], given["intrinsics"], given["extrinsics"], token_grid=model.token_grid(SIZE, SIZE)
    )
    assert match.matched.any()
    inputs = built.training_inputs(given, timesteps=torch.tensor([700]), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(15):
        output = model(*inputs.args, **inputs.kwargs, correspondence=match)
        denoising = built.denoising_loss(output, inputs).mean()
        history.append((float(denoising.detach()), float(model.alignment_loss.detach())))
        optimizer.zero_grad()
        (denoising + model.alignment_loss).backward()
        optimizer.step()
    assert history[-1][0] < 0.8 * history[0][0]
    assert history[-1][1] < 0.8 * history[0][1]
