"""Noise levels, training inputs, losses and sampling of SV3D."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import cameo
from cameo import Correspondence
from cameo.adapters.common.diffusers_attention import XFormersOnCudaAttnProcessor
from cameo.adapters.common.noise_schedules import edm_euler
from cameo.adapters.sv3d.pipeline import SV3DPipeline
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers.models import add_lora, next_view
from tests.helpers.sv3d_models import (
    SIZE,
    batch,
    latent_pipeline,
    orbit,
    pipeline,
    plain_unet,
    run,
    tiny_clip,
    tiny_vae,
)


def test_noise_levels_are_the_quantiles_of_a_log_normal_distribution() -> None:
    built = pipeline(noise_mean=0.5, noise_deviation=1.5)
    levels = built.noise_levels(torch.arange(1000)).double().log()
    assert (levels.diff() > 0).all()
    assert levels.mean().item() == pytest.approx(0.5, abs=1e-6)
    assert levels.std().item() == pytest.approx(1.5, rel=5e-3)  # the outermost half thousandths are cut
    assert (levels < 0.5 + 1.5).double().mean().item() == pytest.approx(0.8413, abs=1e-3)


def test_target_is_the_velocity_and_its_error_the_weighted_error_of_the_clean_frames() -> None:
    built, given = pipeline(), batch()
    noise = torch.randn(built.latent_shape(given["images"].shape))
    inputs = built.training_inputs(given, timesteps=torch.tensor([300, 950]), noise=noise)
    level = built.noise_levels(inputs.timesteps).double()[:, None, None, None, None]
    clean, predicted = built.encode(given["images"]).double(), torch.randn(noise.shape, dtype=torch.float64)
    noised = clean + level * noise
    skip, out = 1 / (level**2 + 1), -level / (level**2 + 1).sqrt()
    weight = (level**2 + 1) / level**2
    expected = (weight * (skip * noised + out * predicted - clean) ** 2).mean((1, 2, 3, 4))
    output = SimpleNamespace(sample=predicted.roll(-1, dims=1))
    # float32 of the target, at noise levels up to a hundred
    torch.testing.assert_close(built.denoising_loss(output, inputs).double(), expected, rtol=1e-5, atol=0)
    assert inputs.loss_views.tolist() == [True] * 3


def test_frames_have_the_reference_last() -> None:
    built, given = pipeline(), batch(views=4)
    noise = torch.randn(built.latent_shape(given["images"].shape))
    inputs = built.training_inputs(given, timesteps=torch.tensor([500, 20]), noise=noise)
    sample, level, context, numbers = inputs.args
    sigma = built.noise_levels(inputs.timesteps)
    torch.testing.assert_close(level, 0.25 * sigma.log())
    clean, wide = built.encode(given["images"]), sigma[:, None, None, None, None]
    views = (clean + wide * noise) / (wide**2 + 1).sqrt()
    order = [1, 2, 3, 0]
    torch.testing.assert_close(sample[:, :, :48], views[:, order])
    for frame in range(4):  # the reference image beside every frame, with 1e-5 of noise on it
        torch.testing.assert_close(sample[:, frame, 48:], clean[:, 0], atol=6e-5, rtol=0)
    assert not torch.equal(sample[:, 0, 48:], clean[:, 0])
    assert numbers.shape == (2, 4, 3)
    assert context.shape == (2, 1, 32)
    assert torch.equal(inputs.noisy[:, 0], clean[:, 0])
    torch.testing.assert_close(inputs.noisy[:, 1:], (clean + wide * noise)[:, 1:])
    frames = torch.arange(8.0).reshape(2, 4, 1, 1, 1)
    assert built.prediction(SimpleNamespace(sample=frames), inputs)[0].flatten().tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_perfect_prediction_gives_the_images_back(kind: str) -> None:
    built, given = pipeline(prediction_type=kind), batch()
    inputs = built.training_inputs(given, timesteps=torch.tensor([100, 900]))
    perfect = SimpleNamespace(sample=inputs.target.roll(-1, dims=1))
    assert float(built.denoising_loss(perfect, inputs).max()) == 0
    torch.testing.assert_close(built.predict_clean(perfect, inputs), given["images"], atol=1e-5, rtol=0)
    wrong = SimpleNamespace(sample=perfect.sample + 1)
    assert torch.equal(built.predict_clean(wrong, inputs)[:, 0], built.predict_clean(perfect, inputs)[:, 0])
    assert not torch.allclose(built.predict_clean(wrong, inputs)[1, 1:], given["images"][1, 1:], atol=0.1)


def test_condition_dropout_blanks_the_image_of_whole_samples() -> None:
    built, given = latent_pipeline(), batch(samples=6)
    generator = torch.Generator().manual_seed(0)
    sample, _, context, numbers = built.training_inputs(given, generator=generator, condition_dropout=0.5).args
    blank = [not context[index].any() for index in range(6)]
    assert 0 < sum(blank) < 6
    assert [not sample[index, :, 4:].any() for index in range(6)] == blank
    assert numbers[:, :, 0].all()
    sample, _, context, _ = built.training_inputs(given, generator=generator).args
    assert sample[:, :, 4:].flatten(1).any(1).all()
    assert context.flatten(1).any(1).all()


def test_sampling_is_euler_through_the_noise_levels_of_edm() -> None:
    built, given = pipeline(), orbit([0, 40, 80], [10, 10, 10])
    found = built.sample(given, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 48, 8, 8, generator=generator)
    shown = built.encode(
        (given["images"][:, :1] * 2 - 1 + 1e-5 * torch.randn(1, 1, 3, 32, 32, generator=generator)) / 2 + 0.5
    )
    ramp = torch.linspace(0, 1, 4, dtype=torch.float64)
    levels = [*((700 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 700 ** (1 / 7))) ** 7).tolist(), 0.0]
    x = x * math.sqrt(levels[0] ** 2 + 1)
    for level, following in itertools.pairwise(levels):
        sample = torch.cat([x / math.sqrt(level**2 + 1), shown.expand(-1, 3, -1, -1, -1)], dim=2)
        with torch.no_grad():
            output = built.unet(
                sample, 0.25 * math.log(level), torch.zeros(1, 1, 32), built.camera_numbers(given)
            ).sample
        clean = x / (level**2 + 1) - level / math.sqrt(level**2 + 1) * output
        x = x + (following - level) * (x - clean) / level
    # float32 through noise of 700: an error of 1e-7 of that is left in the images
    torch.testing.assert_close(found, built.decode(x[:, :2]), atol=1e-3, rtol=0)


def test_predicted_clean_frames_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    built, given = pipeline(prediction_type="sample"), batch()
    inputs = built.training_inputs(given)
    perfect = SimpleNamespace(sample=inputs.target.roll(-1, dims=1))
    monkeypatch.setattr(built.unet, "forward", lambda *args, **kwargs: perfect)
    found = built.sample(given, num_inference_steps=4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, given["images"][:, 1:], atol=1e-3, rtol=0)


def test_sampling_repeats_and_looks_at_the_reference_only() -> None:
    built, given = pipeline(), batch()

    def sample(one: dict[str, Any], seed: int = 0, **options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return built.sample(one, num_inference_steps=2, generator=generator, **options)

    first = sample(given)
    assert first.shape == (2, 2, 3, SIZE, SIZE)
    assert torch.equal(sample(given), first)
    assert not torch.equal(sample(given, seed=1), first)
    assert torch.equal(sample({**given, "images": given["images"][:, :1]}), first)
    other = given["images"].clone()
    other[:, 0] = 1 - other[:, 0]
    assert not torch.equal(sample({**given, "images": other}), first)
    assert torch.equal(sample(given, guidance_scale=1.0), first)
    assert not torch.equal(sample(given, guidance_scale=2.5), first)


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


def test_xformers_is_for_the_spatial_attentions() -> None:
    built = pipeline()
    inputs = built.training_inputs(batch(), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = built.unet(*inputs.args).sample
    built.enable_xformers_memory_efficient_attention()
    asked = {name: isinstance(one, XFormersOnCudaAttnProcessor) for name, one in built.unet.attn_processors.items()}
    assert set(asked.values()) == {True, False}
    assert all(used == ("temporal_transformer_blocks" not in name) for name, used in asked.items())
    with torch.no_grad():
        assert torch.equal(built.unet(*inputs.args).sample, before)  # PyTorch's kernel, since this is no GPU
    built.disable_xformers_memory_efficient_attention()
    assert not any(isinstance(one, XFormersOnCudaAttnProcessor) for one in built.unet.attn_processors.values())


@pytest.mark.parametrize("references", [0, 2, 3])
def test_exactly_one_reference_view(references: int) -> None:
    given = {**batch(), "num_reference_views": references}
    message = "SV3D is conditioned on one image, got 2" if references == 2 else f"expected 1 to 2 .*got {references}"
    for use in (pipeline().training_inputs, pipeline().sample):
        with pytest.raises(ValueError, match=f"num_reference_views: {message}"):
            use(given)


def test_what_build_refuses() -> None:
    adapter = get_backbone("sv3d")
    with pytest.raises(ValueError, match=r"unknown preset of sv3d 'tinny': did you mean 'tiny'\?"):
        adapter.build("tinny")
    with pytest.raises(ValueError, match=r"unknown option of sv3d 'head': did you mean 'heads'\?"):
        adapter.build("tiny", head=2)
    with pytest.raises(ValueError, match=r"attention_levels: expected one flag per width \(32, 32, 32\)"):
        adapter.build("tiny", block_out_channels=(32, 32, 32))
    with pytest.raises(ValueError, match=r"block_out_channels: expected multiples of 32.*got \(32, 48\)"):
        adapter.build("tiny", block_out_channels=(32, 48))


def test_what_the_pipeline_refuses() -> None:
    unet = pipeline().unet
    with pytest.raises(ValueError, match=r"scheduler: expected an EulerDiscreteScheduler .*got 'epsilon' and None"):
        SV3DPipeline(unet, DDIMScheduler())
    with pytest.raises(ValueError, match=r"unknown prediction_type 'epsilon': .*Known: sample, v_prediction"):
        SV3DPipeline(unet, edm_euler(), prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"unet: expected 8 input and 4 output channels .*got 96 and 48"):
        SV3DPipeline(unet, edm_euler(), vae=tiny_vae())
    with pytest.raises(ValueError, match=r"image_encoder: expected embeddings of 32 channels.*got 8"):
        SV3DPipeline(unet, edm_euler(), image_encoder=tiny_clip(8))
    with pytest.raises(ShapeError, match="images: expected height and width divisible by 8"):
        pipeline().training_inputs(batch(size=36))


@pytest.mark.parametrize(("inflate", "steps"), [(False, 6), (True, 12)])
def test_training_lowers_both_losses_on_the_batch(inflate: bool, steps: int) -> None:
    built, given = pipeline(), orbit([0, 15, 345], [10, 10, 10])
    torch.manual_seed(0)
    model = cameo.wrap(built.unet, "sv3d", inflate=inflate).train()
    size = model.token_grid(SIZE, SIZE)
    index = torch.full((1, 3, 3, size[0] * size[1]), -1)
    for view in range(3):  # every token is seen by the next view, in its own cell
        index[:, view, (view + 1) % 3] = torch.arange(size[0] * size[1])
    inputs = built.training_inputs(given, timesteps=torch.tensor([600]), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    history = []
    for _ in range(steps):
        output = model(*inputs.args, **inputs.kwargs, correspondence=Correspondence(index, (size,) * 3))
        denoising = built.denoising_loss(output, inputs).mean()
        history.append((float(denoising.detach()), float(model.alignment_loss.detach())))
        optimizer.zero_grad()
        (denoising + model.alignment_loss).backward()
        optimizer.step()
    assert history[-1][0] < 0.8 * history[0][0]
    assert history[-1][1] < 0.8 * history[0][1]


def test_lora_of_a_plain_unet_trains_both_ways() -> None:
    for inflate in (False, True):
        model = cameo.wrap(add_lora(plain_unet(), "to_q", "to_k"), "sv3d", inflate=inflate).train()
        run(model, correspondence=next_view(shift=0))
        model.alignment_loss.backward()
        attention = model.base_model.get_submodule(model.supervised_layers[0].path)
        assert attention.to_q.lora_B["default"].weight.grad.any()
