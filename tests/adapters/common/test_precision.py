"""The precision of the VAE: that of its weights, a lower one in mixed precision, float32 where it would overflow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, AutoencoderTiny

from cameo.pipeline import LatentEncoder
from tests.helpers import cat3d_models, sv3d_models
from tests.helpers.latents import FAMILIES, pipeline, vae

IMAGES = torch.rand(1, 7, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def with_vae(**options: Any) -> Any:
    built = pipeline()
    built.register_modules(vae=vae(**options))
    return built


def fits(latents: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding to a precision changes nothing."""
    return torch.equal(latents.to(dtype).to(latents.dtype), latents)


@pytest.mark.parametrize("backbone", FAMILIES)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_the_encoder_runs_in_the_precision_that_is_set(backbone: str, precision: torch.dtype) -> None:
    built = pipeline(backbone)
    built.vae.register_to_config(force_upcast=False)
    full = built.encode_views(IMAGES)
    assert built.latent_dtype == torch.float32
    assert not fits(full, precision)
    built.encoder_precision = precision
    assert built.latent_dtype == precision
    lowered = built.encode_views(IMAGES)
    assert lowered.dtype == torch.float32
    assert fits(lowered, precision)
    assert (lowered - full).abs().max() < 0.05 * full.abs().max()
    assert built.vae.dtype == torch.float32  # what is saved is not rounded
    assert torch.equal(built.vae.encoder.conv_in.weight, pipeline(backbone).vae.encoder.conv_in.weight)


def test_force_upcast_keeps_float32_instead_of_float16() -> None:
    built = with_vae(force_upcast=True)
    full = built.encode_views(IMAGES)
    built.encoder_precision = torch.float16
    assert built.latent_dtype == torch.float32
    assert torch.equal(built.encode_views(IMAGES), full)
    built.encoder_precision = torch.bfloat16  # has the range of float32
    assert built.latent_dtype == torch.bfloat16
    assert fits(built.encode_views(IMAGES), torch.bfloat16)


def test_a_vae_that_overflows_in_float16_is_finite_with_force_upcast() -> None:
    def overflowing(**options: Any) -> Any:
        built = with_vae(**options)
        with torch.no_grad():
            built.vae.quant_conv.bias.add_(1e5)
        built.encoder_precision = torch.float16
        return built

    assert overflowing(force_upcast=True).encode_views(IMAGES).isfinite().all()
    assert not overflowing(force_upcast=False).encode_views(IMAGES).isfinite().all()


@pytest.mark.parametrize("force_upcast", [False, True])
def test_weights_in_float16(force_upcast: bool) -> None:
    """Weights that were loaded in half precision become float32 on first use where the VAE asks for it."""
    built = with_vae(force_upcast=force_upcast)
    built.vae.to(torch.float16)
    expected = torch.float32 if force_upcast else torch.float16
    assert built.latent_dtype == expected
    exact = copy.deepcopy(built)
    exact.vae.to(torch.float32)
    exact.vae.register_to_config(force_upcast=False)
    latents = built.encode(IMAGES)
    assert built.vae.dtype == expected
    assert torch.equal(latents, exact.encode(IMAGES)) == force_upcast
    again = with_vae(force_upcast=force_upcast)
    again.vae.to(torch.float16)
    images = again.decode(latents)
    assert again.vae.dtype == expected
    assert torch.equal(images, exact.decode(latents)) == force_upcast


def test_the_temporal_decoder_honors_it_too() -> None:
    built = sv3d_models.latent_pipeline(AutoencoderKLTemporalDecoder)
    assert built.vae.config.force_upcast
    latents = built.encode(IMAGES[:, :3])
    expected = built.decode(latents)
    built.vae.to(torch.float16).to(torch.float32)
    rounded = built.decode(latents)
    built.vae.to(torch.float16)
    assert torch.equal(built.decode(latents), rounded)
    assert not torch.equal(expected, rounded)


def test_a_tiny_autoencoder_has_no_need_of_it() -> None:
    built = pipeline()
    built.register_modules(
        vae=AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    )
    built.encoder_precision = torch.float16
    assert built.latent_dtype == torch.float16
    assert fits(built.encode_views(IMAGES), torch.float16)


def test_an_autocast_around_a_step_is_left_alone() -> None:
    """In a loop of one's own the VAE runs under the autocast that is there."""
    built = pipeline()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fits(built.encode_views(IMAGES), torch.bfloat16)


def test_pixels_have_no_encoder() -> None:
    built = cat3d_models.pipeline()
    assert isinstance(built, LatentEncoder)
    built.encoder_precision = torch.bfloat16
    assert built.latent_dtype == torch.float32
    assert not fits(built.encode_views(IMAGES), torch.bfloat16)
