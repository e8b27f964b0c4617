"""The SV3D adapter: both kinds of layers, camera per frame, EDM's noise levels, sampling, released layouts.

Axes: B samples, V views (reference first), T frames (reference last), h w token grid, C channels, K heads.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import cameo
from cameo import Correspondence
from cameo.adapters.common import joined_frames
from cameo.adapters.common.noise_schedules import edm_euler
from cameo.adapters.sv3d.convert import from_sgm, to_sgm
from cameo.adapters.sv3d.denoiser import SV3DUNet
from cameo.adapters.sv3d.pipeline import SV3DPipeline, triangle_scale
from cameo.backbone import get_backbone
from cameo.errors import DataError, ShapeError
from tests.conftest import make_batch
from tests.models import GRID, SAMPLES, VIEWS, add_lora, check_layout, next_view

SIZE = 32
NARROW: dict[str, Any] = {"block_out_channels": (32, 32), "heads": 2, "embed_dim": 16}
BOTH = pytest.mark.parametrize("inflate", [False, True])


@functools.cache
def _pipeline(**options: Any) -> SV3DPipeline:
    torch.manual_seed(0)
    return get_backbone("sv3d").build("tiny", **NARROW, **options)


def pipeline(**options: Any) -> SV3DPipeline:
    return copy.deepcopy(_pipeline(**options))


def batch(**options: Any) -> dict[str, Any]:
    return make_batch(**{"size": SIZE, "views": 3, **options})


def orbit(azimuths: list[float], elevations: list[float], size: int = SIZE) -> dict[str, Any]:
    """Cameras at these degrees around the origin, z up, that look at it."""
    extrinsics = torch.eye(4).repeat(1, len(azimuths), 1, 1)
    for view, (azimuth, elevation) in enumerate(zip(azimuths, elevations, strict=True)):
        a, e = math.radians(azimuth), math.radians(elevation)
        outward = torch.tensor([math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)])
        right = torch.tensor([-math.sin(a), math.cos(a), 0.0])
        down = torch.linalg.cross(-outward, right)
        rotation = torch.stack([right, down, -outward])
        extrinsics[0, view, :3, :3], extrinsics[0, view, :3, 3] = rotation, -rotation @ (2.5 * outward)
    given = make_batch(samples=1, views=len(azimuths), size=size)
    return {**given, "extrinsics": extrinsics, "up": torch.tensor([[0.0, 0.0, 1.0]])}


TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "down_block_types": ("DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
    "up_block_types": ("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
    "num_attention_heads": 2,
    "layers_per_block": 1,
    "cross_attention_dim": 8,
}


def plain_unet(features: int = 768, **settings: Any) -> UNetSpatioTemporalConditionModel:
    """Stable Video Diffusion's class, small; with 256 or 1280 features the shape of SV3D's."""
    torch.manual_seed(0)
    return UNetSpatioTemporalConditionModel(projection_class_embeddings_input_dim=features, **(settings or TWO_LEVELS))


def tiny_vae(kind: type = AutoencoderKL) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "block_out_channels": (32, 32, 32),
        "layers_per_block": 1,
        "latent_channels": 4,
        "scaling_factor": 0.2,
    }
    return kind(**settings, **({"up_block_types": ("UpDecoderBlock2D",) * 3} if kind is AutoencoderKL else {}))


def tiny_clip(channels: int = 8) -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=channels,
        )
    ).eval()


def latent_pipeline(kind: type = AutoencoderKL) -> SV3DPipeline:
    """The released components, but small: a VAE, an image encoder, eight input channels."""
    torch.manual_seed(0)
    unet = SV3DUNet(**TWO_LEVELS)
    return SV3DPipeline(unet, edm_euler(), vae=tiny_vae(kind), image_encoder=tiny_clip())


def executed(model: nn.Module, kind: str) -> list[str]:
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if name.endswith(".attn1") and f".{kind}." in name
    ]
    args, kwargs = get_backbone("sv3d").example_inputs(model)
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return order


def run(model: nn.Module, frames: int = VIEWS, samples: int = SAMPLES, **options: Any) -> Tensor:
    """One forward whose supervised layer, one level down, has the token grid `GRID`."""
    generator = torch.Generator().manual_seed(3)
    config, features = model.config, getattr(model, "frame_features", None)
    sample = torch.randn(samples, frames, config.in_channels, 2 * GRID[0], 2 * GRID[1], generator=generator)
    numbers = torch.rand(samples, frames, 3, generator=generator)
    numbers = numbers[:, 0] if features is None else numbers[..., : len(features)]
    context = torch.zeros(samples, 1, config.cross_attention_dim)
    return model(sample, torch.full((samples,), 0.5), context, numbers, **options).sample


# The layers


def test_layers_of_stable_video_diffusion() -> None:
    adapter = get_backbone("sv3d")
    unet = plain_unet(block_out_channels=(32,) * 4, num_attention_heads=(1, 2, 2, 2), cross_attention_dim=8)
    sites, spatial = adapter.sites(unet), adapter.inflatable(unet)
    assert [site.path for site in sites] == executed(unet, "temporal_transformer_blocks")
    assert [site.path for site in spatial] == executed(unet, "transformer_blocks")
    assert [site.index for site in sites] == [site.index for site in spatial] == list(range(16))
    assert adapter.default_layer(unet) == 10
    assert sites[10].path == "up_blocks.2.attentions.0.temporal_transformer_blocks.0.attn1"
    assert spatial[10].path == "up_blocks.2.attentions.0.transformer_blocks.0.attn1"
    assert [site.stride for site in sites] == [8, 8, 16, 16, 32, 32, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8]
    assert [sites[index].heads for index in (0, 2, 6)] == [1, 2, 2]


@pytest.mark.parametrize(("features", "last"), [(256, 1), (768, 0), (1280, 1)])
def test_where_the_conditioning_frame_is(features: int, last: int) -> None:
    adapter, unet = get_backbone("sv3d"), plain_unet(features)
    assert {site.layout.references_last for site in [*adapter.sites(unet), *adapter.inflatable(unet)]} == {last}


@pytest.mark.parametrize("preset", ["tiny", "small"])
@BOTH
def test_layers_of_the_presets(preset: str, inflate: bool) -> None:
    widths = (32, 32, 32)[: 2 + (preset == "small")]
    built = get_backbone("sv3d").build(preset, **{**NARROW, "block_out_channels": widths})
    size = built.unet.config.sample_size * built.latent_stride
    model = cameo.wrap(built.unet, "sv3d", inflate=inflate)
    assert model.token_grid(size, size) == (size // 8, size // 8)
    assert model.cameo_config.normalise == ("per_view" if inflate else "all_views")
    given = batch(samples=1, size=size)
    inputs = built.training_inputs(given)
    for site in model.sites:  # joined one by one
        if inflate:
            get_backbone("sv3d").inflate(built.unet, site.path)
    with model.capture(model.sites) as captured, torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
    for site in model.sites:
        cells = (size // site.stride) ** 2
        expected = (1, site.heads, 3 * cells) if inflate else (cells, site.heads, 3)
        assert captured[site.path].query.shape[:3] == expected, site


def test_other_models_are_not_recognised() -> None:
    adapter = get_backbone("sv3d")
    other = get_backbone("cat3d").build("tiny").unet
    assert isinstance(other, UNet2DConditionModel)
    assert not adapter.recognizes(other)
    with pytest.raises(
        ValueError, match=r"UNet2DConditionModel has no modules named like .*temporal_transformer_blocks"
    ):
        cameo.wrap(other, "sv3d")
    assert adapter.unsupported(plain_unet()) is None


@BOTH
def test_output_is_bit_identical(inflate: bool) -> None:
    unet = pipeline().unet
    before = run(unet)
    model = cameo.wrap(unet, "sv3d", inflate=inflate)
    now = run(unet)
    assert torch.equal(now, before) is not inflate
    assert torch.equal(run(model), now)
    assert torch.equal(run(model, correspondence=next_view(shift=0)), now)
    assert model.num_supervised > 0
    assert model.unwrap() is unet
    assert torch.equal(run(unet), now)  # unwrapping leaves the layers joined
    for path in list(unet.config.joined_layers):
        get_backbone("sv3d").deflate(unet, path)
    assert list(unet.config.joined_layers) == []
    assert torch.equal(run(unet), before)


# What the tokens mean


def project(attention: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    query, key = (
        rearrange(linear(images), "b v h w (k d) -> b v h w k d", k=attention.heads)
        for linear in (attention.to_q, attention.to_k)
    )
    return query, key


@pytest.mark.parametrize("released", [False, True])
def test_a_temporal_query_sees_its_own_cell_of_the_other_frames(released: bool) -> None:
    unet = plain_unet() if released else pipeline().unet
    model = cameo.wrap(unet, "sv3d", head="mean")

    def to_images(tokens: Tensor) -> Tensor:
        images = rearrange(tokens, "(b h w) t c -> b t h w c", h=GRID[0], w=GRID[1])
        return images if released else torch.stack([images[:, 2], images[:, 0], images[:, 1]], dim=1)

    check_layout(
        model,
        run,
        to_images,
        query=(1, 1, 3),
        key=(0, 1, 3),
        reached=[(0, 1, 3), (2, 1, 3)],
        project=functools.partial(project, unet.get_submodule(model.supervised_sites[0].path)),
    )


def test_an_inflated_query_sees_all_tokens_of_the_view_looked_at() -> None:
    unet = pipeline().unet
    model = cameo.wrap(unet, "sv3d", head="mean", inflate=True)

    def to_images(tokens: Tensor) -> Tensor:
        tokens = rearrange(tokens, "b (t s) c -> (b t) s c", t=VIEWS) if tokens.shape[0] == SAMPLES else tokens
        images = rearrange(tokens, "(b t) (h w) c -> b t h w c", t=VIEWS, h=GRID[0])
        return torch.stack([images[:, 2], images[:, 0], images[:, 1]], dim=1)

    check_layout(
        model,
        run,
        to_images,
        query=(2, 0, 1),
        key=(0, 2, 1),
        reached=[(0, row, column) for row in range(GRID[0]) for column in range(GRID[1])],
        project=functools.partial(project, unet.get_submodule(model.supervised_sites[0].path)),
    )


def test_inflation_is_attention_over_all_frames() -> None:
    unet = pipeline().unet
    seen: list[Tensor] = []
    model = cameo.wrap(unet, "sv3d", inflate=True)
    attention = unet.get_submodule(model.supervised_sites[0].path)
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    attention.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        run(unet)
        tokens, output = seen
        assert tokens.shape[:2] == (SAMPLES, VIEWS * GRID[0] * GRID[1])
        query, key, value = (
            rearrange(linear(tokens), "b l (k d) -> b k l d", k=attention.heads)
            for linear in (attention.to_q, attention.to_k, attention.to_v)
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        expected = attention.to_out[0](rearrange(weights @ value, "b k l d -> b l (k d)"))
    torch.testing.assert_close(output, rearrange(expected, "b (t s) c -> (b t) s c", t=VIEWS))


# Hooks: once, copied, pickled, recomputed


def test_inflating_twice_is_inflating_once() -> None:
    unet = pipeline().unet
    adapter = get_backbone("sv3d")
    (path,) = [cameo.wrap(unet, "sv3d", inflate=True).supervised_sites[0].path]
    before = run(unet)
    adapter.inflate(unet, path)
    joined_frames.inflate(unet, path)
    assert list(unet.config.joined_layers) == [path]
    assert torch.equal(run(unet), before)
    joined_frames.deflate(unet, path)
    joined_frames.deflate(unet, path)
    attention = unet.get_submodule(path)
    assert not attention._forward_hooks
    assert not attention._forward_pre_hooks
    assert not joined_frames.is_inflated(unet, path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_hooks_of_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    unet = pipeline().unet
    path = cameo.wrap(unet, "sv3d", inflate=True).supervised_sites[0].path
    expected = run(unet)
    twin = copied(unet)
    assert torch.equal(run(twin), expected)
    run(twin, frames=2)
    assert (twin.get_submodule(path).joined_frames, unet.get_submodule(path).joined_frames) == (2, VIEWS)
    with torch.no_grad():
        twin.get_submodule(path).to_v.weight.zero_()
    assert torch.equal(run(unet), expected)
    joined_frames.deflate(twin, path)
    assert torch.equal(run(unet), expected)


@BOTH
def test_hooks_of_a_pickle_are_not_overwritten_in_another_process(
    inflate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch numbers hooks per process; a new one with the number of one that was loaded would take its place."""
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    torch.manual_seed(0)
    unet = get_backbone("sv3d").build("tiny", **NARROW).unet
    path = cameo.wrap(unet, "sv3d", inflate=inflate).supervised_sites[0].path
    expected, stored = run(unet), pickle.dumps(unet)
    assert RemovableHandle.next_id < 64
    hooked = ["mid_block", *([path.partition(".transformer_blocks")[0], path] if inflate else [])]
    for name, register in itertools.product(hooked, ("register_forward_pre_hook", "register_forward_hook")):
        monkeypatch.setattr(RemovableHandle, "next_id", 0)
        loaded = pickle.loads(stored)
        for _ in range(64):
            getattr(loaded.get_submodule(name), register)(lambda *_: None)
        assert torch.equal(run(loaded), expected), (name, register)


@BOTH
def test_gradient_checkpointing(inflate: bool) -> None:
    plain = pipeline().unet
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    found = []
    for unet in (plain, checkpointed):
        torch.manual_seed(4)
        model = cameo.wrap(unet, "sv3d", inflate=inflate).train()
        (run(model, correspondence=next_view(shift=0)).square().mean() + model.alignment_loss).backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    missing = [name for name, value in found[0].items() if value is None]
    assert missing == []
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_another_number_of_frames_before_the_backward_is_an_error() -> None:
    unet = pipeline().unet
    unet.enable_gradient_checkpointing()
    cameo.wrap(unet, "sv3d", inflate=True)
    output = run(unet, frames=3, samples=2)
    run(unet, frames=2, samples=3)  # as many rows
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
        output.mean().backward()
    output = run(unet, frames=3, samples=1)
    run(unet, frames=2, samples=1)
    with pytest.raises(ShapeError, match=r"t = 2 frames, got .* Run the backward of a forward before the next"):
        output.mean().backward()


def test_what_cannot_be_inflated() -> None:
    unet = pipeline().unet
    with pytest.raises(ValueError, match=r"path: expected '\.\.\. \.transformer_blocks\.N\.attn1', got 'mid_block'"):
        joined_frames.inflate(unet, "mid_block")
    path = get_backbone("sv3d").inflatable(unet)[0].path
    joined_frames.inflate(unet, path)
    with pytest.raises(RuntimeError, match=r"does not know the number of frames: call it through its transformer"):
        unet.get_submodule(path)(torch.zeros(3, 4, 32))


# Saving


def test_an_inflated_model_is_saved_and_loaded(tmp_path: Path) -> None:
    unet = pipeline().unet
    model = cameo.wrap(unet, "sv3d", inflate=True).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    expected = run(model)
    for again in (
        cameo.from_pretrained(model.save_pretrained(tmp_path / "cameo"), base_model=pipeline().unet),
        SV3DUNet.from_pretrained(tmp_path / "cameo"),
    ):
        assert torch.equal(run(again), expected)
    pipe = pipeline()
    pipe.unet = unet
    pipe.save_pretrained(tmp_path / "pipeline")
    assert torch.equal(run(get_backbone("sv3d").load(str(tmp_path / "pipeline")).unet), expected)
    plain = pipeline().unet
    plain.load_state_dict(unet.state_dict())
    assert not torch.equal(run(plain), expected)


@BOTH
def test_lora_is_saved_as_diffusers_does(inflate: bool, tmp_path: Path) -> None:
    from peft import LoraConfig

    unet = pipeline().unet
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]))
    model = cameo.wrap(unet, "sv3d", inflate=inflate).train()
    run(model, correspondence=next_view(shift=0))
    model.alignment_loss.backward()
    path = model.supervised_sites[0].path
    assert unet.get_submodule(path).to_q.lora_B["default"].weight.grad.any()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    expected = run(model.eval())
    folder = model.save_pretrained(tmp_path)
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    again = cameo.from_pretrained(folder, base_model=pipeline().unet)
    assert torch.equal(run(again), expected)


def test_names_of_the_weights_are_those_of_diffusers() -> None:
    unet = pipeline().unet
    config = {name: value for name, value in unet.config.items() if name not in ("latent_stride", "joined_layers")}
    plain = UNetSpatioTemporalConditionModel.from_config(config)
    assert {name: value.shape for name, value in plain.state_dict().items()} == {
        name: value.shape for name, value in unet.state_dict().items()
    }
    weights = from_sgm(to_sgm(unet.state_dict(), unet.config), unet.config)
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())
    with pytest.raises(DataError, match=r"weights: 'input_blocks\.9\.0\.op\.weight' has no counterpart"):
        from_sgm({"input_blocks.9.0.op.weight": torch.zeros(1)}, unet.config)


# One camera per frame


def fourier(number: float, width: int) -> Tensor:
    """Cosines, then sines, of a number times falling frequencies from 1 to almost 1/10000."""
    angles = number * 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.cat([angles.cos(), angles.sin()]).float()


@pytest.mark.parametrize("camera", [True, False])
def test_every_residual_block_gets_the_embedding_of_each_frame(camera: bool) -> None:
    unet = pipeline(camera=camera).unet
    seen: dict[str, Tensor] = {}
    for name, module in unet.named_modules():
        if name.endswith("time_emb_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    numbers = torch.rand(2, 3, 3 if camera else 1) * 3
    levels = [0.3, -0.7]
    with torch.no_grad():
        unet(torch.zeros(2, 3, unet.config.in_channels, 8, 8), torch.tensor(levels), torch.zeros(2, 1, 32), numbers)
        expected = torch.zeros(2, 3, 128)
        for sample in range(2):
            for frame in range(3):
                widths = (16, 32, 32) if camera else (16,)
                values = zip(numbers[sample, frame].tolist(), widths, strict=True)
                features = torch.cat([fourier(number, width) for number, width in values])
                time = unet.time_embedding(fourier(levels[sample], 32)[None])
                expected[sample, frame] = F.silu(time + unet.add_embedding(features[None]))[0]
    assert len(seen) == 2 * (2 + 2 + 4)
    for name, found in seen.items():
        found = found if found.ndim == 3 else rearrange(found, "(b t) e -> b t e", t=3)
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_the_camera_of_one_frame_changes_the_output() -> None:
    unet = pipeline().unet
    sample, context = torch.randn(1, 3, unet.config.in_channels, 8, 8), torch.zeros(1, 1, 32)
    numbers = torch.zeros(1, 3, 3)
    with torch.no_grad():
        before = unet(sample, 0.5, context, numbers).sample
        numbers[0, 1, 2] = 2.0
        assert not torch.equal(unet(sample, 0.5, context, numbers).sample, before)
        assert torch.equal(unet(sample, 0.5, context, numbers * 0, return_dict=False)[0], before)
    with pytest.raises(ShapeError, match=r"added_time_ids: expected \[1, 3, 3\] for \[B, T, N\], got \[1, 3\]"):
        unet(sample, 0.5, context, numbers[:, :, 0])
    assert not any(hasattr(block, "frame_embedding") for block in unet.modules())
    with pytest.raises(RuntimeError):
        unet(sample[:, :, :5], 0.5, context, numbers)
    assert not any(hasattr(block, "frame_embedding") for block in unet.modules())


def test_a_plain_unet_becomes_ours_and_shares_its_weights() -> None:
    plain = plain_unet(1280).eval()
    built = SV3DPipeline(plain, edm_euler(), vae=tiny_vae())
    assert isinstance(built.unet, SV3DUNet)
    assert built.unet.conv_in.weight is plain.conv_in.weight
    assert not built.unet.training
    assert built.unet.config.latent_stride == 4
    with pytest.raises(ValueError, match=r"expected addition_time_embed_dim \(SV3D_u\) or 5 times .*got 768 with 256"):
        SV3DPipeline(plain_unet(768), edm_euler(), vae=tiny_vae())


# Noise levels, targets, frames


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


def test_a_perfect_prediction_gives_the_images_back() -> None:
    built, given = pipeline(), batch()
    inputs = built.training_inputs(given, timesteps=torch.tensor([100, 900]))
    perfect = SimpleNamespace(sample=inputs.target.roll(-1, dims=1))
    assert float(built.denoising_loss(perfect, inputs).max()) == 0
    torch.testing.assert_close(built.predict_clean(perfect, inputs), given["images"], atol=1e-5, rtol=0)
    wrong = SimpleNamespace(sample=perfect.sample + 1)
    assert torch.equal(built.predict_clean(wrong, inputs)[:, 0], built.predict_clean(perfect, inputs)[:, 0])
    assert not torch.allclose(built.predict_clean(wrong, inputs)[1, 1:], given["images"][1, 1:], atol=0.1)


def test_training_inputs_repeat_with_their_seed() -> None:
    built, given = pipeline(), batch()

    def draw(seed: int, **options: Any) -> Any:
        return built.training_inputs(given, generator=torch.Generator().manual_seed(seed), **options)

    first, second, other = draw(0), draw(0), draw(1)
    assert all(map(torch.equal, first.args, second.args))
    assert not torch.equal(first.args[0], other.args[0])


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


# Cameras


def test_angles_of_an_orbit() -> None:
    given = orbit([30, 90, 20, 30], [10, -5, 60, 10])
    numbers = pipeline().camera_numbers(given)[0]
    polar, azimuth = numbers[:, 1].rad2deg(), numbers[:, 2].rad2deg()
    torch.testing.assert_close(polar, torch.tensor([95.0, 30.0, 80.0, 80.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(azimuth, torch.tensor([60.0, 350.0, 0.0, 0.0]), atol=1e-3, rtol=0)
    assert numbers[:, 0].tolist() == pytest.approx([1e-5] * 4)
    assert azimuth[-1] == 0  # the reference, exactly


def test_up_is_estimated_where_the_batch_has_none() -> None:
    given = orbit([0, 120, 240], [20, 20, 20])  # a whole turn: the estimate is exact
    expected = pipeline().camera_numbers(given)
    del given["up"]
    torch.testing.assert_close(pipeline().camera_numbers(given), expected, atol=1e-4, rtol=0)


def test_sv3d_u_is_not_told_the_cameras() -> None:
    built, given = pipeline(camera=False), batch()
    assert built.training_inputs(given).args[3].shape == (2, 3, 1)
    elsewhere = {**given, "extrinsics": orbit([0, 90, 180], [0, 0, 0])["extrinsics"].expand(2, -1, -1, -1)}
    first, second = (
        built.sample(one, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
        for one in (given, elsewhere)
    )
    assert torch.equal(first, second)


# Sampling


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
    asked = {name: getattr(one, "use_xformers", False) for name, one in built.unet.attn_processors.items()}
    assert set(asked.values()) == {True, False}
    assert all(used == ("temporal_transformer_blocks" not in name) for name, used in asked.items())
    with torch.no_grad():
        assert torch.equal(built.unet(*inputs.args).sample, before)  # PyTorch's kernel, since this is no GPU
    built.disable_xformers_memory_efficient_attention()
    assert not any(getattr(one, "use_xformers", False) for one in built.unet.attn_processors.values())


def test_a_folder_of_checkpoints_asks_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model_index.json.*as a local file \(sv3d_p.safetensors"):
        get_backbone("sv3d").load(str(tmp_path))


def test_licences_and_revisions_are_those_of_the_table() -> None:
    adapter = get_backbone("sv3d")
    assert adapter.license("preset:tiny") == "apache-2.0"
    assert adapter.license("chenguolin/sv3d-diffusers")["license_name"] == "sv3d-nc-community"
    assert adapter.revision("chenguolin/sv3d-diffusers") == "cf4c88acda116901e1e21aa9afa61976a21363f8"
    assert (adapter.license("someone/else"), adapter.revision("someone/else")) == (None, None)


def test_guidance_is_largest_in_the_middle() -> None:
    assert triangle_scale(21, 2.5)[[0, 5, 10, 15, 20]].tolist() == [1.0, 1.75, 2.5, 1.75, 1.0]
    built, given = latent_pipeline(), batch(samples=1, views=4)
    calls: list[Any] = []

    class Recorder(nn.Module):
        config, frame_features = built.unet.config, built.unet.frame_features

        def forward(self, *args: Tensor) -> Any:
            calls.append(args)
            value = 1.0 if args[2].any() else 0.0
            return SimpleNamespace(sample=torch.full_like(args[0][:, :, :4], value))

    built.register_modules(unet=None)
    built.unet = Recorder()
    predictions: list[Tensor] = []
    built.scheduler.step = lambda prediction, *_: (
        predictions.append(prediction) or SimpleNamespace(prev_sample=torch.zeros_like(prediction))
    )
    built.sample(given, num_inference_steps=1, guidance_scale=4.0)
    conditioned, blank = calls
    assert conditioned[0][:, :, 4:].any()
    assert not blank[0][:, :, 4:].any()
    assert torch.equal(conditioned[0][:, :, :4], blank[0][:, :, :4])
    assert torch.equal(conditioned[3], blank[3])  # the cameras stay
    torch.testing.assert_close(predictions[0][0, :, 0, 0, 0], torch.tensor([1.0, 3.0, 3.0, 1.0]))


# Components


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderKLTemporalDecoder])
def test_condition_latents_are_not_scaled(kind: type) -> None:
    built, given = latent_pipeline(kind), batch()
    assert built.latent_stride == built.unet.config.latent_stride == 4
    sample, _, context, _ = built.training_inputs(given).args
    with torch.no_grad():
        mode = built.vae.encode(given["images"][:, 0] * 2 - 1).latent_dist.mode()
        torch.testing.assert_close(sample[:, 1, 4:], mode, atol=1e-3, rtol=1e-3)  # 1e-5 of noise on the image
        torch.testing.assert_close(built.encode(given["images"])[:, 0], 0.2 * mode)
    assert built.sample(given, num_inference_steps=1).shape == (2, 2, 3, SIZE, SIZE)
    pixels = F.interpolate(given["images"][:, 0], (28, 28), mode="bicubic", antialias=True)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(context[:, 0], built.image_encoder((pixels - mean) / deviation).image_embeds)


def test_saved_pipelines_load_again(tmp_path: Path) -> None:
    adapter = get_backbone("sv3d")
    for number, built in enumerate((pipeline(noise_mean=0.25), latent_pipeline())):
        given, folder = batch(), str(tmp_path / str(number))
        built.save_pretrained(folder)
        loaded = adapter.load(folder)
        assert type(loaded) is SV3DPipeline
        assert loaded.config.noise_mean == built.config.noise_mean
        assert (loaded.image_encoder is None) == (built.image_encoder is None)
        first, second = (
            one.sample(given, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
            for one in (built, loaded)
        )
        assert torch.equal(first, second)


def test_the_layout_of_a_conversion_to_diffusers(tmp_path: Path) -> None:
    """chenguolin/sv3d-diffusers: classes of its own code, which is never run."""
    built, given = latent_pipeline(), batch()
    built.save_pretrained(tmp_path)
    unet_config = json.loads((tmp_path / "unet/config.json").read_text())
    unet_config["_class_name"] = "SV3DUNetSpatioTemporalConditionModel"
    del unet_config["latent_stride"], unet_config["joined_layers"]
    (tmp_path / "unet/config.json").write_text(json.dumps(unet_config))
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {
        "_class_name": "StableVideo3DDiffusionPipeline",
        "unet": ["diffusers_sv3d", "SV3DUNetSpatioTemporalConditionModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = get_backbone("sv3d").load(str(tmp_path))
    assert loaded.unet.config.latent_stride == 4
    first, second = (
        one.sample(given, num_inference_steps=2, generator=torch.Generator().manual_seed(0)) for one in (built, loaded)
    )
    assert torch.equal(first, second)
    index["vae"] = ["diffusers", "VQModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"its vae is a VQModel; expected AutoencoderKL"):
        get_backbone("sv3d").load(str(tmp_path))
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"holds a StableVideo3DDiffusionPipeline with the U-Net .*sv3d starts from"):
        get_backbone("sv3d").load(str(tmp_path))


# Mistakes


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
    with pytest.raises(ValueError, match=r"unet: expected 8 input and 4 output channels .*got 96 and 48"):
        SV3DPipeline(unet, edm_euler(), vae=tiny_vae())
    with pytest.raises(ValueError, match=r"image_encoder: expected embeddings of 32 channels.*got 8"):
        SV3DPipeline(unet, edm_euler(), image_encoder=tiny_clip(8))
    with pytest.raises(ShapeError, match="images: expected height and width divisible by 8"):
        pipeline().training_inputs(batch(size=36))


# Training


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
        attention = model.base_model.get_submodule(model.supervised_sites[0].path)
        assert attention.to_q.lora_B["default"].weight.grad.any()
