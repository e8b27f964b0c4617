"""Zero123++'s U-Net, which sees a reference."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cameo
from cameo.adapters.common.unet_layers import checkpoints_reentrantly
from cameo.adapters.zero123plus import set_reference_processors
from cameo.adapters.zero123plus.denoiser import ReferenceUNet
from cameo.errors import CaptureError, ShapeError
from cameo.memory import align_module
from tests.helpers import zero123plus_models as parts
from tests.helpers.zero123plus_models import SIZE, batch, pipeline
from tests.helpers.zero123plus_published import ADAPTER, PublishedWrapper

REFERENCE = parts.REFERENCE


def run(unet: nn.Module) -> Tensor:
    args, kwargs = ADAPTER.example_inputs(unet)
    with torch.no_grad():
        return unet(*args, **kwargs).sample


def test_the_canvas_sees_the_reference() -> None:
    unet = pipeline().unet
    args, kwargs = ADAPTER.example_inputs(unet)
    other = copy.deepcopy(kwargs)
    other["cross_attention_kwargs"]["cond_lat"] += 1
    with torch.no_grad():
        before, after = (unet(*args, **one).sample for one in (kwargs, other))
        assert not torch.allclose(before, after, atol=1e-4)
        two = [torch.cat([part, part]) for part in args]
        both = {
            name: torch.cat([kwargs["cross_attention_kwargs"][name], other["cross_attention_kwargs"][name]])
            for name in ("cond_lat", "cond_noise")
        }
        torch.testing.assert_close(unet(*two, cross_attention_kwargs=both).sample, torch.cat([before, after]))


def test_the_noise_on_the_reference_is_drawn_in_the_forward_unless_given() -> None:
    unet = pipeline().unet
    args, kwargs = ADAPTER.example_inputs(unet)
    given = kwargs["cross_attention_kwargs"]
    drawn = {"cond_lat": given["cond_lat"]}

    def forward(arguments: dict[str, Tensor], seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return unet(*args, cross_attention_kwargs=arguments).sample

    assert torch.equal(forward(given, 0), forward(given, 1))
    assert torch.equal(forward(drawn, 0), forward(drawn, 0))
    assert not torch.equal(forward(drawn, 0), forward(drawn, 1))
    torch.manual_seed(0)
    by_hand = {**drawn, "cond_noise": torch.randn_like(given["cond_lat"])}
    assert torch.equal(forward(by_hand, 1), forward(drawn, 0))


def test_the_reference_has_the_noise_level_of_the_canvas() -> None:
    unet = pipeline().unet
    clean, noise = torch.randn(2, 2, 4, 6, 6)
    alpha = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000), 0)[[3, 900]][:, None, None, None]
    noised = unet.noised(clean, noise, torch.tensor([3, 900]))
    torch.testing.assert_close(noised, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise)
    torch.testing.assert_close(unet.noised(clean, noise, torch.tensor([3.0, 900.0])), noised)
    assert unet.noised(clean.half(), noise.half(), torch.tensor([3.0, 900.0])).dtype == torch.float16


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
def test_between_the_levels_the_noise_is_the_samplers(spacing: str) -> None:
    unet, sampler = pipeline().unet, parts.sampler(timestep_spacing=spacing)
    sampler.set_timesteps(7)
    clean, noise = torch.randn(2, 1, 4, 6, 6)
    for timestep in sampler.timesteps:
        sampler._step_index = None
        expected = sampler.scale_model_input(sampler.add_noise(clean, noise, timestep[None]), timestep)
        torch.testing.assert_close(unet.noised(clean, noise, timestep[None]), expected)
    assert spacing != "linspace" or any(timestep % 1 for timestep in sampler.timesteps)


def test_half_precision_latents_get_the_noise_of_the_first_levels() -> None:
    unet = ReferenceUNet.from_unet(parts.stable_diffusion_unet())
    latents, noise = torch.zeros(1, 4, 8, 8), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = unet.noised(latents, noise, torch.tensor([0]))
    half = unet.noised(latents.bfloat16(), noise.bfloat16(), torch.tensor([0]))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=2**-6, atol=0)  # two roundings of bfloat16


def test_running_both_passes_by_hand_is_the_same() -> None:
    unet = pipeline().unet
    plain = set_reference_processors(
        UNet2DConditionModel.from_config(unet.config), latent_stride=4, reference_size=(REFERENCE, REFERENCE)
    )
    plain.load_state_dict(unet.state_dict())
    ADAPTER.set_position(plain, "sincos")
    args, kwargs = ADAPTER.example_inputs(unet)
    given = kwargs["cross_attention_kwargs"]
    model = cameo.wrap(unet, "zero123plus", head="mean")
    match = parts.random_matches(model.token_grids(SIZE, SIZE, 7))
    with torch.no_grad():
        expected = model(*args, **kwargs, correspondence=match).sample
    by_hand = cameo.wrap(plain, "zero123plus", head="mean")
    stored: dict[str, Tensor] = {}
    noisy = unet.noised(given["cond_lat"], given["cond_noise"], args[1])
    with torch.no_grad():
        by_hand(noisy, *args[1:], cross_attention_kwargs={"mode": "w", "ref_dict": stored})
        reading = {"mode": "r", "ref_dict": stored}
        output = by_hand(*args, cross_attention_kwargs=reading, correspondence=match).sample
    assert torch.equal(output, expected)
    assert torch.equal(by_hand.alignment_loss, model.alignment_loss)
    assert ADAPTER.example_inputs(plain)[1]["cross_attention_kwargs"]["mode"] == "r"
    assert torch.isfinite(run(plain)).all()


def gradients(unet: nn.Module) -> dict[str, Tensor]:
    model = cameo.wrap(unet, "zero123plus", head="mean").train()
    args, kwargs = ADAPTER.example_inputs(unet)
    match = parts.random_matches(((6, 6),) + ((4, 4),) * 6)
    output = model(*args, **kwargs, correspondence=match).sample
    (output.square().mean() + model.alignment_loss).backward()
    model.unwrap()
    return {name: one.grad.clone() for name, one in unet.named_parameters() if one.grad is not None}


def test_checkpointed_gradients_are_exact() -> None:
    plain, recomputed = pipeline().unet, pipeline().unet
    recomputed.enable_gradient_checkpointing()
    assert ADAPTER.unsupported(recomputed) is None
    before, after = gradients(plain), gradients(recomputed)
    assert before.keys() == after.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(after[name], gradient) for name, gradient in before.items())


def test_reentrant_checkpointing_is_noticed() -> None:
    unet = pipeline().unet
    assert ADAPTER.unsupported(unet) is None
    assert not checkpoints_reentrantly(unet)
    unet.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False))
    assert ADAPTER.unsupported(unet) is None
    unet.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=True))
    with pytest.raises(CaptureError, match=r"reentrant.*Call unet\.enable_gradient_checkpointing\(\) without"):
        gradients(unet)
    unet.disable_gradient_checkpointing()
    assert ADAPTER.unsupported(unet) is None


def test_a_unet_becomes_a_reference_unet_in_place() -> None:
    unet = parts.two_level_unet()
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    converted = ReferenceUNet.from_unet(unet, reference_size=(REFERENCE, REFERENCE))
    assert converted is unet
    assert isinstance(unet, ReferenceUNet)
    assert unet.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert ReferenceUNet.from_unet(unet, reference_size=(64, 64)) is unet  # again, with other settings
    assert ADAPTER.attention_layers(unet)[0].reference_size == (64, 64)
    with pytest.raises(TypeError, match=r"expected a UNet2DConditionModel, got PublishedWrapper; pass its \.unet"):
        ReferenceUNet.from_unet(PublishedWrapper(unet))
    with pytest.raises(TypeError, match=r"expected a UNet2DConditionModel, got Linear$"):
        ReferenceUNet.from_unet(nn.Linear(2, 2))


def test_it_is_saved_as_a_plain_unet(tmp_path: Path) -> None:
    unet = pipeline(position="none").unet
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    align_module(again)  # diffusers leaves tensors where the file holds them, which shows in the last bits
    assert type(again) is UNet2DConditionModel
    ReferenceUNet.from_unet(again, latent_stride=4, reference_size=(REFERENCE, REFERENCE))
    assert torch.equal(run(again), run(unet))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_work_on_their_own(duplicate: Any) -> None:
    unet = pipeline().unet
    twin = duplicate(unet)
    assert torch.equal(run(twin), run(unet))
    assert ADAPTER.attention_layers(twin) == ADAPTER.attention_layers(unet)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(run(twin), run(unet))


def test_a_unet_without_references_is_noticed() -> None:
    built = pipeline()
    args, kwargs = ADAPTER.example_inputs(built.unet)
    built.denoiser = ReferenceUNet.from_config(built.unet.config)
    for use in (built.training_inputs, functools.partial(built.sample, num_inference_steps=1)):
        with pytest.raises(
            RuntimeError, match=r"attn1 sees no reference: its processor is .*Call .*set_reference_proc"
        ):
            use(batch())
    with pytest.raises(RuntimeError, match="no self-attention stored its reference"):
        built.unet(*args, **kwargs)
    set_reference_processors(built.unet)
    built.training_inputs(batch())
    assert torch.isfinite(built.unet(*args, **kwargs).sample).all()


def test_switching_xformers_keeps_the_reference_in_sight() -> None:
    built = pipeline()
    before = run(built.unet)
    built.enable_xformers_memory_efficient_attention()
    assert torch.equal(run(built.unet), before)  # xformers has no CPU kernel
    assert cameo.wrap(built.unet, "zero123plus").token_grids(SIZE, SIZE, 7)[0] == (6, 6)
    built.disable_xformers_memory_efficient_attention()
    assert torch.equal(run(built.unet), before)


def test_what_the_unet_refuses() -> None:
    unet = pipeline().unet
    (canvas, timestep, context), kwargs = ADAPTER.example_inputs(unet)
    with pytest.raises(ValueError, match=r"\['cond_lat'\]: expected the latents of the reference, got none"):
        unet(canvas, timestep, context, cross_attention_kwargs={})
    reference = kwargs["cross_attention_kwargs"]["cond_lat"]
    for wrong in (torch.cat([reference] * 2), reference[:, :4], reference[0]):
        with pytest.raises(ShapeError, match=r"\['cond_lat'\]: expected \[1, 48, h, w\], got"):
            unet(canvas, timestep, context, cross_attention_kwargs={"cond_lat": wrong})
    plain = set_reference_processors(parts.two_level_unet())
    args = torch.zeros(1, 4, 4, 4), 0, torch.zeros(1, 1, parts.WIDTH)
    for given in ({}, {"mode": "m", "ref_dict": {}}, {"mode": "w"}):
        with pytest.raises(ValueError, match="expected mode 'w' or 'r' and a ref_dict"):
            plain(*args, cross_attention_kwargs=given)
    with pytest.raises(ValueError, match=r"holds no reference for .*attn1\.processor; run the U-Net over the"):
        plain(*args, cross_attention_kwargs={"mode": "r", "ref_dict": {}})
    with pytest.raises(ValueError, match="is_cfg_guidance: expected False"):
        plain(*args, cross_attention_kwargs={"mode": "r", "ref_dict": {}, "is_cfg_guidance": True})
