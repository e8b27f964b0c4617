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
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cameo
from cameo import Correspondence
from cameo.adapters.common.noise_schedules import linear_ddpm
from cameo.adapters.common.unet_layers import checkpoints_reentrantly
from cameo.adapters.zero123plus import keep_references, set_reference_processors
from cameo.adapters.zero123plus.denoiser import ReferenceUNet
from cameo.adapters.zero123plus.layers import ReferenceAttnProcessor
from cameo.backbone import get_backbone
from cameo.errors import CaptureError, ShapeError
from tests.helpers import zero123plus_models as parts
from tests.helpers.zero123plus_models import SIZE, batch, pipeline

REFERENCE = parts.REFERENCE
ADAPTER = get_backbone("zero123plus")


def run(unet: nn.Module) -> Tensor:
    args, kwargs = ADAPTER.example_inputs(unet)
    with torch.no_grad():
        return unet(*args, **kwargs).sample


# The layers


def test_layers_of_stable_diffusion() -> None:
    unet = ReferenceUNet.from_unet(parts.stable_diffusion_unet(), reference_size=(128, 128))
    order: list[str] = []
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    model = cameo.wrap(unet, "zero123plus")
    sites = model.sites
    args, kwargs = ADAPTER.example_inputs(unet)  # tiles of 64 x 64 pixels
    with model.capture(sites) as captured, torch.no_grad():
        model(*args, **kwargs)
    assert order == [site.path for site in sites] * 2
    assert [site.index for site in sites] == list(range(16))
    assert sites[10].path == "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert ADAPTER.default_layer(unet) == 10
    assert [site.index for site in model.supervised_sites] == [10]
    assert [site.stride for site in sites] == [8, 8, 16, 16, 32, 32, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8]
    for site in sites:
        assert site.stride is not None
        tile, reference = (64 // site.stride) ** 2, (128 // site.stride) ** 2
        seen = captured[site.path]
        assert seen.query.shape[:3] == (1, site.heads, 6 * tile)
        assert seen.key.shape[:3] == (1, site.heads, 6 * tile + reference)
        grids = site.sizes(64, 64, 7)
        assert [height * width for height, width in grids] == [reference] + [tile] * 6


def test_layers_at_the_released_size() -> None:
    sites = ADAPTER.sites(ReferenceUNet.from_unet(parts.stable_diffusion_unet()))
    assert sites[10].sizes(320, 320, 7) == ((32, 32),) + ((20, 20),) * 6
    assert sites[10].layout.shape("query", batch=2, sizes=sites[10].sizes(320, 320, 7)) == (2, 2400)
    assert sites[10].layout.shape("key", batch=2, sizes=sites[10].sizes(320, 320, 7)) == (2, 3424)
    assert sites[6].sizes(320, 320, 7) == ((8, 8),) + ((5, 5),) * 6


def test_what_the_pipeline_does_is_what_the_layers_expect() -> None:
    built = pipeline()
    model = cameo.wrap(built.unet, "zero123plus")
    assert model.token_grids(SIZE, SIZE, 7) == ((6, 6),) + ((4, 4),) * 6
    inputs = built.training_inputs(batch())
    with model.capture(model.sites) as captured:
        model(*inputs.args, **inputs.kwargs)
    for site in model.sites:
        sizes = site.sizes(SIZE, SIZE, 7)
        for of, tensor in (("query", captured[site.path].query), ("key", captured[site.path].key)):
            attention_batch, tokens = site.layout.shape(of, batch=2, sizes=sizes)
            assert (tensor.shape[0], tensor.shape[2]) == (attention_batch, tokens)


def test_the_second_run_of_a_layer_is_the_one_that_counts() -> None:
    unet = pipeline().unet
    model = cameo.wrap(unet, "zero123plus")
    (site,) = model.supervised_sites
    seen: list[Tensor] = []
    unet.get_submodule(f"{site.path}.to_q").register_forward_hook(lambda _, __, output: seen.append(output))
    args, kwargs = ADAPTER.example_inputs(unet)
    with model.capture() as captured, torch.no_grad():
        model(*args, **kwargs)
    writing, reading = seen
    assert writing.shape[1] == 6 * 6
    assert reading.shape[1] == 12 * 8
    query = captured[site.path].query.transpose(1, 2).flatten(2)
    assert torch.equal(query, reading)


def test_other_models_are_refused_with_the_cure() -> None:
    plain = parts.two_level_unet()
    with pytest.raises(ValueError, match=r"read no reference image.*set_reference_processors\(unet\)"):
        cameo.wrap(plain, "zero123plus")
    assert not ADAPTER.recognizes(get_backbone("cat3d").build("tiny").unet)
    assert not ADAPTER.recognizes(nn.Linear(2, 2))
    assert "Pass the U-Net (pipeline.unet)" in ADAPTER.explain_mismatch(nn.Linear(2, 2))
    assert ADAPTER.recognizes(set_reference_processors(plain))


# Reference attention


def test_the_processor_is_a_softmax_over_own_and_stored_tokens() -> None:
    unet = set_reference_processors(parts.two_level_unet())
    path = ADAPTER.sites(unet)[0].path
    attention = unet.get_submodule(path)
    own, stored = torch.randn(2, 12, 8), torch.randn(2, 9, 8)
    references: dict[str, Tensor] = {}
    attention(stored, mode="w", ref_dict=references)
    assert list(references) == [f"{path}.processor"]
    for _ in range(2):  # a reference can be read again
        output = attention(own, mode="r", ref_dict=references)
    query, key, value = (
        layer(tokens).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for layer, tokens in (
            (attention.to_q, own),
            (attention.to_k, torch.cat([own, stored], dim=1)),
            (attention.to_v, torch.cat([own, stored], dim=1)),
        )
    )
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    expected = attention.to_out[0]((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, expected)


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


# What a match reaches


@pytest.mark.parametrize(("query", "key"), parts.MATCHES)
def test_a_match_reaches_its_token_and_the_keys_of_its_view(query: parts.Place, key: parts.Place) -> None:
    unet = pipeline().unet
    model = cameo.wrap(unet, "zero123plus", head="mean")
    parts.check_reach(model, *ADAPTER.example_inputs(unet), query=query, key=key, tile=(4, 4), reference=(6, 6))


def test_the_reference_asks_for_no_matches() -> None:
    unet = pipeline().unet
    model = cameo.wrap(unet, "zero123plus", head="mean")
    index = torch.full((1, 7, 7, 36), -1)
    index[0, 0, 3, :] = 2
    args, kwargs = ADAPTER.example_inputs(unet)
    model(*args, **kwargs, correspondence=Correspondence(index, ((6, 6),) + ((4, 4),) * 6))
    assert model.num_supervised == 0
    assert model.alignment_loss == 0


# Gradient checkpointing


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


class PublishedProcessor(nn.Module):
    """Structure and behaviour of the published processor: a reference is gone once it was read."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.enabled, self.chained_proc = name, name.endswith("attn1.processor"), AttnProcessor2_0()

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        mode: str = "w", ref_dict: Any = None, is_cfg_guidance: bool = False,
    ) -> Tensor:  # fmt: skip
        tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if self.enabled and mode == "w":
            ref_dict[self.name] = tokens
        elif self.enabled:
            tokens = torch.cat([tokens, ref_dict.pop(self.name)], dim=1)
        return self.chained_proc(attn, hidden_states, tokens, attention_mask)

    __call__ = forward


class PublishedWrapper(nn.Module):
    """Structure of the published `RefOnlyNoisedUNet`."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        unet.set_attn_processor({name: PublishedProcessor(name) for name in unet.attn_processors})

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor, *, cross_attention_kwargs: Any) -> Any:
        stored: dict[str, Tensor] = {}
        given = cross_attention_kwargs
        noisy = linear_ddpm().add_noise(given["cond_lat"], given["cond_noise"], timestep)
        self.unet(noisy, timestep, context, cross_attention_kwargs={"mode": "w", "ref_dict": stored})
        reading = {"mode": "r", "ref_dict": stored, "is_cfg_guidance": False}
        return self.unet(sample, timestep, context, cross_attention_kwargs=reading)


def published() -> PublishedWrapper:
    return PublishedWrapper(parts.stable_diffusion_unet())


def test_the_published_wrapper_is_recognised() -> None:
    wrapper = published()
    assert ADAPTER.recognizes(wrapper)
    model = cameo.wrap(wrapper, "zero123plus")
    assert [site.index for site in model.supervised_sites] == [10]
    assert model.supervised_sites[0].path == "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert model.token_grids(320, 320, 7) == ((32, 32),) + ((20, 20),) * 6
    ours = ReferenceUNet.from_unet(parts.stable_diffusion_unet())
    args, kwargs = small_inputs(wrapper)
    with torch.no_grad():
        assert torch.equal(ours(*args, **kwargs).sample, model(*args, **kwargs).sample)


def small_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs with a reference of 64 pixels instead of 512, which would take long."""
    args, kwargs = ADAPTER.example_inputs(model)
    given = kwargs["cross_attention_kwargs"]
    assert given["cond_lat"].shape[-2:] == (64, 64)
    return args, {"cross_attention_kwargs": {name: value[:, :, :8, :8] for name, value in given.items()}}


def published_gradients(wrapper: nn.Module) -> dict[str, Tensor]:
    model = cameo.wrap(wrapper, "zero123plus", head="mean").train()
    args, kwargs = small_inputs(wrapper)
    match = parts.random_matches(((4, 4),) * 7)
    output = model(*args, **kwargs, correspondence=match).sample
    (output.square().mean() + model.alignment_loss).backward()
    return {name: one.grad for name, one in wrapper.named_parameters() if one.grad is not None}


def test_published_processors_lose_their_references_and_the_cure_works() -> None:
    expected = published_gradients(published())
    wrapper = published()
    wrapper.unet.enable_gradient_checkpointing()
    args, kwargs = small_inputs(wrapper)
    with pytest.raises(KeyError, match=r"attn1\.processor"):  # what would happen
        wrapper(*args, **kwargs).sample.sum().backward()
    with pytest.raises(CaptureError, match=r"KeyError\. Call .*keep_references\(model\)"):
        published_gradients(wrapper)
    wrapper = published()
    wrapper.unet.enable_gradient_checkpointing()
    assert keep_references(wrapper) is wrapper
    assert ADAPTER.recognizes(wrapper)
    assert ADAPTER.unsupported(wrapper) is None
    found = published_gradients(wrapper)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    with pytest.raises(ValueError, match="holds no reference-only processors"):
        keep_references(wrapper)


def test_the_cure_keeps_the_kernels() -> None:
    wrapper = published()
    attention = wrapper.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.processor.chained_proc = lambda attn, hidden_states, tokens, mask: hidden_states * tokens.shape[1]
    args, kwargs = small_inputs(wrapper)
    with torch.no_grad():
        before = wrapper(*args, **kwargs).sample
        assert torch.equal(keep_references(wrapper)(*args, **kwargs).sample, before)


# The class


def test_a_unet_becomes_a_reference_unet_in_place() -> None:
    unet = parts.two_level_unet()
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    converted = ReferenceUNet.from_unet(unet, reference_size=(REFERENCE, REFERENCE))
    assert converted is unet
    assert isinstance(unet, ReferenceUNet)
    assert unet.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert ReferenceUNet.from_unet(unet, reference_size=(64, 64)) is unet  # again, with other settings
    assert ADAPTER.sites(unet)[0].reference_size == (64, 64)
    with pytest.raises(TypeError, match=r"expected a UNet2DConditionModel, got PublishedWrapper; pass its \.unet"):
        ReferenceUNet.from_unet(PublishedWrapper(unet))
    with pytest.raises(TypeError, match=r"expected a UNet2DConditionModel, got Linear$"):
        ReferenceUNet.from_unet(nn.Linear(2, 2))


def test_it_is_saved_as_a_plain_unet(tmp_path: Path) -> None:
    unet = pipeline().unet
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert type(again) is UNet2DConditionModel
    ReferenceUNet.from_unet(again, latent_stride=4, reference_size=(REFERENCE, REFERENCE))
    assert torch.equal(run(again), run(unet))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_work_on_their_own(duplicate: Any) -> None:
    unet = pipeline().unet
    twin = duplicate(unet)
    assert torch.equal(run(twin), run(unet))
    assert ADAPTER.sites(twin) == ADAPTER.sites(unet)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(run(twin), run(unet))


@pytest.mark.parametrize("switch", ["slicing", "processor"])
def test_replaced_processors_are_noticed(switch: str) -> None:
    built = pipeline()
    args, kwargs = ADAPTER.example_inputs(built.unet)
    if switch == "slicing":
        built.enable_attention_slicing(1)
    else:
        built.unet.set_attn_processor(AttnProcessor2_0())
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
    assert ReferenceAttnProcessor("a", reads=True).reference_size == (512, 512)
