from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.embeddings import TimestepEmbedding
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

import cameo
from cameo import Correspondence, TokenLayout
from cameo.adapters.mvdream import MVDream, disable_checkpointing, set_image_view
from cameo.adapters.mvdream_cameras import camera_vectors
from cameo.adapters.mvdream_loading import noise_schedule
from cameo.adapters.mvdream_pipeline import MVDreamPipeline
from cameo.adapters.mvdream_unet import CameraEmbedding, ImageDreamUNet, prepare
from cameo.backbone import get_backbone
from cameo.errors import CaptureError, ShapeError

from .conftest import make_batch
from .models import Attention, add_lora, check_overfits
from .test_mvdream_cameras import UP, ring

SIZE = 32
NARROW: dict[str, Any] = {"block_out_channels": (16, 32), "heads": 2, "norm_num_groups": 8, "image_size": SIZE}
PRESETS = ("tiny", "imagedream-tiny")


@functools.cache
def _pipeline(preset: str, **options: Any) -> MVDreamPipeline:
    torch.manual_seed(0)
    return get_backbone("mvdream").build(preset, **NARROW, **options)


def pipeline(preset: str = "tiny", **options: Any) -> MVDreamPipeline:
    return copy.deepcopy(_pipeline(preset, **options))


def batch(built: MVDreamPipeline, **options: Any) -> dict[str, Any]:
    return {**make_batch(size=SIZE, **options), "num_reference_views": built.num_reference_views}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views_of(tensor: Tensor, samples: int = 2) -> Tensor:
    return rearrange(tensor, "(b v) ... -> b v ...", b=samples)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def output_of(attention_order: Tensor) -> SimpleNamespace:
    return SimpleNamespace(sample=rearrange(attention_order, "b v c h w -> (b v) c h w"))


def image_dream_unet(**options: Any) -> ImageDreamUNet:
    torch.manual_seed(0)
    return ImageDreamUNet(
        **{
            "sample_size": 8,
            "in_channels": 48,
            "out_channels": 48,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 2,
            "cross_attention_dim": 8,
            "use_linear_projection": True,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 16,
            "encoder_hid_dim_type": "ip_image_proj",
            "encoder_hid_dim": 8,
            **options,
        }
    )


@functools.cache
def encoders() -> dict[str, Any]:
    """CLIP as the releases have it, tiny: letters for words."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {token: index for index, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    vocabulary |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    narrow = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = CLIPTextConfig(
        vocab_size=54, max_position_embeddings=7, bos_token_id=52, eos_token_id=53, pad_token_id=53, **narrow
    )
    return {
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=7),
        "image_encoder": CLIPVisionModel(CLIPVisionConfig(image_size=16, patch_size=8, **narrow)).eval(),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    }


@functools.cache
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


def with_text() -> MVDreamPipeline:
    plain = pipeline()
    text = {name: encoders()[name] for name in ("text_encoder", "tokenizer")}
    return MVDreamPipeline(plain.unet, plain.scheduler, **text)


def with_image_tokens() -> MVDreamPipeline:
    return MVDreamPipeline(image_dream_unet(), noise_schedule(), condition="image", **encoders())


# The layers


def check_match_in_images(
    model: cameo.CameoModel,
    run: Callable[[Correspondence], Any],
    transformer: nn.Module,
    *,
    views: int,
    grid: tuple[int, int],
    attention_view: Callable[[int], int],
) -> None:
    """A match of view 2 with view 1 must pull these views of the images that enter the transformer, and no other.

    The images are `[(b v), c, h, w]` in the attention's order, before any token exists. `model` has head="mean".
    """
    height, width = grid
    sample, query_view, key_view, query_token, key_token = 1, 2, 1, (1, 4), (3, 2)
    index = torch.full((2, views, views, height * width), -1)
    index[sample, query_view, key_view, query_token[0] * width + query_token[1]] = key_token[0] * width + key_token[1]
    transformer.norm = nn.Identity()  # a group norm would spread the gradient over the view
    entering: list[Tensor] = []
    keys: list[Tensor] = []
    transformer.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), entering.append(args[0]))[0])
    to_k = model.base_model.get_submodule(model.supervised_sites[0].path).to_k
    to_k.register_forward_hook(lambda *call: (call[-1].retain_grad(), keys.append(call[-1]))[0])
    run(Correspondence(index, (grid,) * views))
    assert model.num_supervised == 1
    model.alignment_loss.backward()
    reached = rearrange(entering[0].grad.abs().sum(1) > 0, "(b v) h w -> b v h w", v=views)
    expected = torch.zeros(2, views, height, width, dtype=torch.bool)
    expected[sample, attention_view(query_view), query_token[0], query_token[1]] = True
    expected[sample, attention_view(key_view)] = True
    assert torch.equal(reached, expected)
    # Of all keys only the matched one is pulled towards the query; the others are pushed away.
    by_view = rearrange(keys[0].grad, "b (v h w) c -> b v h w c", v=views, h=height)
    pull = by_view[sample, attention_view(key_view)]
    towards = torch.einsum("hwc,c->hw", pull, pull[key_token])
    assert towards[key_token] > 0
    assert int((towards > 0).sum()) == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_a_match_reaches_its_token_and_the_keys_of_its_view(preset: str) -> None:
    built, views = pipeline(preset), 3
    model = cameo.wrap(built.unet, "mvdream", head="mean")
    noisy = torch.randn(2 * views, built.unet.config.in_channels, 8, 12)
    context, cameras = torch.zeros(2 * views, 1, 8), torch.randn(2 * views, 16)

    def run(match: Correspondence) -> None:
        kwargs = {"class_labels": cameras, "cross_attention_kwargs": {"num_views": views}}
        model(noisy, torch.full((2 * views,), 500), context, **kwargs, correspondence=match)

    path = model.supervised_sites[0].path.removesuffix(".transformer_blocks.0.attn1")
    shift = built.num_reference_views  # the image prompt, first in the batch, is the last view of the attention
    check_match_in_images(
        model,
        run,
        built.unet.get_submodule(path),
        views=views,
        grid=(4, 6),
        attention_view=lambda view: (view - shift) % views,
    )


@pytest.mark.parametrize("pair", [(0, 1), (1, 0), (0, 2), (2, 0)])
def test_the_image_prompt_carries_no_loss(pair: tuple[int, int]) -> None:
    built = pipeline("imagedream-tiny")
    model = cameo.wrap(built.unet, "mvdream")
    inputs = built.training_inputs(batch(built), generator=seeded())
    index = torch.full((2, 3, 3, 16), -1)
    index[:, pair[0], pair[1]] = torch.arange(16)
    model(*inputs.args, **inputs.kwargs, correspondence=Correspondence(index, ((4, 4),) * 3))
    assert model.num_supervised == 0
    assert model.alignment_loss.item() == 0
    index[:, 1, 2] = torch.arange(16)
    model(*inputs.args, **inputs.kwargs, correspondence=Correspondence(index, ((4, 4),) * 3))
    assert model.num_supervised == 2 * 16
    captured: list[Tensor] = []
    attention = built.unet.get_submodule(model.supervised_sites[0].path)
    hooks = [
        layer.register_forward_hook(lambda *call: (call[-1].retain_grad(), captured.append(call[-1]))[0])
        for layer in (attention.to_q, attention.to_k)
    ]
    model(*inputs.args, **inputs.kwargs, correspondence=Correspondence(index, ((4, 4),) * 3))
    model.alignment_loss.backward()
    for tensor in captured:
        gradient = rearrange(tensor.grad, "b (v n) c -> b v n c", v=3)
        assert gradient[:, :2].any()
        assert not gradient[:, 2].any()
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("preset", [*PRESETS, "small", "imagedream-small"])
def test_layers_of_the_presets(preset: str) -> None:
    widths = {"block_out_channels": (16, 32, 32)[: 2 + ("small" in preset)]}
    built = get_backbone("mvdream").build(preset, **{**NARROW, **widths})
    adapter = get_backbone("mvdream")
    args, kwargs = adapter.example_inputs(built.unet)
    sites = adapter.sites(built.unet)
    assert [site.path for site in sites] == executed(built.unet, args, kwargs)
    views = 3 if "image" in preset else 2
    image_view = {"unsupervised_views": 1, "references_last": 1} if "image" in preset else {}
    model = cameo.wrap(built.unet, "mvdream")
    with model.capture(sites) as captured:
        model(*args, **kwargs)
    for site in sites:
        assert site.layout == TokenLayout("b (v h w)", **image_view)
        assert captured[site.path].query.shape[2] == views * (8 * 4 // site.stride) ** 2
    default = sites[adapter.default_layer(built.unet)]
    assert default.path == f"up_blocks.{len(widths['block_out_channels']) - 2}.attentions.0.transformer_blocks.0.attn1"
    assert model.supervised_sites == [default]
    assert model.token_grid(SIZE, SIZE) == (4, 4)


def executed(model: nn.Module, args: Any, kwargs: Any) -> list[str]:
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in model.named_modules()
        if name.endswith("attn1")
    ]
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return order


def test_other_models_are_refused_and_the_cure_works() -> None:
    adapter = get_backbone("mvdream")
    cat3d = get_backbone("cat3d").build("tiny", **NARROW).unet
    assert not adapter.recognises(cat3d)
    with pytest.raises(ValueError, match=r"has no camera embedding .*use backbone 'cat3d'"):
        cameo.wrap(cat3d, "mvdream")
    with pytest.raises(ValueError, match=r"Linear has neither MVDream's blocks .* nor those of diffusers"):
        cameo.wrap(nn.Linear(2, 2), "mvdream")
    unet = pipeline().unet
    unet.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match="see one view at a time") as refused:
        cameo.wrap(unet, "mvdream")
    cure = re.search(r"Before cameo\.wrap: (.*?latent_stride=8\))", str(refused.value))
    assert cure, refused.value
    exec(cure[1], {"unet": unet})  # word for word what the message says
    model = cameo.wrap(unet, "mvdream")
    assert len(model.sites) == 4
    assert model.token_grid(64, 64) == (4, 4)
    without = cameo.wrap(prepare(model.unwrap(), image_view=False), "mvdream")
    with pytest.raises(ValueError, match=r"pixels per token are not known; .*latent_stride=8"):
        without.token_grid(64, 64)
    with pytest.raises(ValueError, match=r"unet: has no camera embedding; expected .*input_dim=16"):
        prepare(cat3d, image_view=False)


def test_the_image_view_can_be_switched_off() -> None:
    unet = pipeline("imagedream-tiny").unet
    adapter = get_backbone("mvdream")
    assert adapter.sites(set_image_view(unet, False))[0].layout == TokenLayout("b (v h w)")
    for again in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert adapter.sites(again)[0].layout == TokenLayout("b (v h w)")
        assert adapter.sites(set_image_view(again, True))[0].layout.references_last == 1


# Checkpointing of the original code


class CheckpointedBlock(nn.Module):
    """Has the names of the original's transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.checkpoint = Attention(4, heads=2), True

    def forward(self, x: Tensor, context: Tensor | None = None, num_frames: int = 1) -> Tensor:
        return self.attn1(x)


class CheckpointedUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        transformer = nn.Module()
        transformer.transformer_blocks = nn.ModuleList([CheckpointedBlock()])
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Identity()])])
        self.middle_block = nn.ModuleList([nn.Identity(), transformer, nn.Identity()])
        self.output_blocks = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        return self.middle_block[1].transformer_blocks[0](x)


def test_the_originals_checkpointing_is_refused_with_a_cure_that_works() -> None:
    unet, adapter = CheckpointedUNet(), get_backbone("mvdream")
    assert adapter.recognises(unet)
    model = cameo.wrap(unet, "mvdream", layer=0)
    nothing = Correspondence(torch.full((1, 2, 2, 4), -1), ((2, 2),) * 2)
    with pytest.raises(CaptureError, match=r"1 blocks of this CheckpointedUNet .*Call .*disable_checkpointing"):
        model(torch.zeros(1, 8, 4), correspondence=nothing)
    assert adapter.hazard(disable_checkpointing(unet)) is None
    model(torch.zeros(1, 8, 4), correspondence=nothing)


def test_our_form_has_no_such_hazard_and_checkpoints() -> None:
    built = pipeline()
    given = batch(built)
    inputs = built.training_inputs(given, generator=seeded())
    index = torch.full((2, 3, 3, 16), -1)
    index[:, 0, 1] = torch.arange(16)
    gradients = []
    for checkpointed in (False, True):
        unet = copy.deepcopy(built.unet)
        if checkpointed:
            unet.enable_gradient_checkpointing()
        torch.manual_seed(0)
        model = cameo.wrap(unet, "mvdream")
        model(*inputs.args, **inputs.kwargs, correspondence=Correspondence(index, ((4, 4),) * 3))
        model.alignment_loss.backward()
        gradients.append(unet.conv_in.weight.grad)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


# Training inputs


def test_all_views_are_noised_for_a_text() -> None:
    built = pipeline()
    given = batch(built)
    noise = torch.randn(built.latent_shape(given["images"].shape))
    inputs = built.training_inputs(given, timesteps=torch.tensor([999, 300]), noise=noise)
    clean, alpha = built.encode(given["images"]), built.scheduler.alphas_cumprod[300]
    assert inputs.loss_views.tolist() == [True, True, True]
    torch.testing.assert_close(inputs.noisy[1], alpha.sqrt() * clean[1] + (1 - alpha).sqrt() * noise[1])
    assert torch.equal(inputs.target, noise)  # the noise is predicted
    sample, timesteps, context = inputs.args
    assert torch.equal(views_of(sample), inputs.noisy)
    assert timesteps.tolist() == [999] * 3 + [300] * 3
    assert not context.any()
    assert inputs.kwargs["cross_attention_kwargs"] == {"num_views": 3}
    assert inputs.aligned


def test_the_image_prompt_is_the_last_view_of_the_unet() -> None:
    built = pipeline("imagedream-tiny")
    given = batch(built)
    inputs = built.training_inputs(given, generator=seeded())
    clean = built.encode(given["images"])
    assert inputs.loss_views.tolist() == [False, True, True]
    assert torch.equal(inputs.noisy[:, 0], clean[:, 0])
    sample = views_of(inputs.args[0])
    assert torch.equal(sample[:, 2], clean[:, 0])
    assert torch.equal(sample[:, :2], inputs.noisy[:, 1:])
    assert views_of(inputs.args[1]).eq(inputs.timesteps[:, None]).all()
    # The output comes back in the order of the batch, and that of the prompt does not count.
    answer = torch.randn_like(inputs.noisy)
    prediction = built.prediction(output_of(answer), inputs)
    assert torch.equal(prediction[:, 1:], answer[:, :2])
    loss = built.denoising_loss(output_of(answer), inputs)
    torch.testing.assert_close(loss, (answer[:, :2] - inputs.target[:, 1:]).square().flatten(1).mean(1))
    answer[:, 2] += 100
    assert torch.equal(built.denoising_loss(output_of(answer), inputs), loss)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_true_target_gives_back_the_images(preset: str) -> None:
    built = pipeline(preset)
    given = batch(built)
    inputs = built.training_inputs(given, timesteps=torch.tensor([0, 600]))
    order = inputs.target.roll(-built.num_reference_views, dims=1)
    images = built.predict_clean(output_of(order), inputs)
    torch.testing.assert_close(images, given["images"], atol=1e-4, rtol=0)
    wrong = built.predict_clean(output_of(torch.randn_like(order)), inputs)
    assert not torch.allclose(wrong[1, 1:], given["images"][1, 1:], atol=0.1)


def test_the_schedule_is_the_published_one() -> None:
    scheduler = noise_schedule()
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), (1 - root**2).cumprod(0), atol=1e-6, rtol=1e-4)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[:2].tolist() == [981, 961]  # uniform, one step up, as in the ldm sampler
    assert scheduler.timesteps[-1] == 1


def test_inputs_follow_the_generator() -> None:
    built = pipeline()
    given = batch(built)
    one, same, other = (built.training_inputs(given, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.noisy, same.noisy)
    assert torch.equal(one.timesteps, same.timesteps)
    assert not torch.equal(one.noisy, other.noisy)


def test_condition_dropout_empties_the_text_and_keeps_the_cameras() -> None:
    built = with_text()
    given = batch(built, samples=8) | {"caption": ["a cat"] * 8}
    full = built.training_inputs(given, generator=seeded())
    with torch.no_grad():
        ids = built.tokenizer(["a cat", ""], padding="max_length", return_tensors="pt").input_ids
        cat, nothing = built.text_encoder(ids)[0]
    assert full.args[2].shape == (24, 7, 8)
    torch.testing.assert_close(full.args[2], cat.expand(24, 7, 8))
    empty = built.training_inputs(given, generator=seeded(), condition_dropout=1.0)
    torch.testing.assert_close(empty.args[2], nothing.expand(24, 7, 8))
    assert torch.equal(empty.kwargs["class_labels"], full.kwargs["class_labels"])
    assert torch.equal(empty.noisy, full.noisy)
    half = views_of(built.training_inputs(given, generator=seeded(), condition_dropout=0.5).args[2], samples=8)
    kept = torch.isclose(half, cat).flatten(1).all(1)
    assert 0 < int(kept.sum()) < 8
    del given["caption"]
    built.register_to_config(prompt="a cat")
    torch.testing.assert_close(built.training_inputs(given).args[2], full.args[2])
    with pytest.raises(ValueError, match="caption: expected a list of 8 texts, one per sample, got 'a cat'"):
        built.training_inputs(given | {"caption": "a cat"})


def test_condition_dropout_blanks_the_image_prompt() -> None:
    built = with_image_tokens()
    given = batch(built, samples=4)
    full = built.training_inputs(given, generator=seeded())
    tokens = full.kwargs["added_cond_kwargs"]["image_embeds"][0]
    assert tokens.shape == (12, 1, 5, 8)
    assert torch.equal(views_of(tokens, 4)[:, 0], views_of(tokens, 4)[:, 2])
    with torch.no_grad():
        pixels = (given["images"][:, 0] * 255).round().byte()
        pixels = built.feature_extractor(list(pixels), return_tensors="pt").pixel_values
        expected = built.image_encoder(pixels, output_hidden_states=True).hidden_states[1]  # of 0, 1, 2
    torch.testing.assert_close(views_of(tokens, 4)[:, 0, 0], expected)
    empty = built.training_inputs(given, generator=seeded(), condition_dropout=1.0)
    assert not empty.noisy[:, 0].any()
    assert not empty.kwargs["added_cond_kwargs"]["image_embeds"][0].any()
    assert torch.equal(empty.noisy[:, 1:], full.noisy[:, 1:])
    assert torch.equal(empty.kwargs["class_labels"], full.kwargs["class_labels"])


def test_cameras_reach_the_unet_in_the_order_of_the_views() -> None:
    for preset in PRESETS:
        built = pipeline(preset)
        given = batch(built)
        given["extrinsics"] = ring(40, 130, 220, elevation=20).float().repeat(2, 1, 1, 1)
        given["up"] = UP.float().repeat(2, 1)
        labels = views_of(built.training_inputs(given).kwargs["class_labels"])
        if preset == "tiny":
            expected = camera_vectors(given["extrinsics"], given["up"])
        else:  # the image prompt, view 0, comes last and has no camera; its azimuth is 0
            expected = camera_vectors(ring(0, 90, 180, elevation=20).float().repeat(2, 1, 1, 1), given["up"])
            expected = torch.cat([expected[:, 1:], torch.zeros(2, 1, 16)], dim=1)
        torch.testing.assert_close(labels, expected, atol=1e-5, rtol=0)


def test_the_camera_embedding_is_that_of_diffusers() -> None:
    torch.manual_seed(0)
    plain = TimestepEmbedding(16, 8)
    ours = CameraEmbedding.around(plain)
    cameras = torch.randn(3, 16)
    assert torch.equal(ours(cameras), plain(cameras))
    assert {id(parameter) for parameter in ours.parameters()} == {id(parameter) for parameter in plain.parameters()}
    assert ours.state_dict().keys() == plain.state_dict().keys()
    cameras[1] = math.nan
    out = ours(cameras)
    assert torch.equal(out[1], torch.zeros(8))
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in plain.parameters())
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(again(cameras), out)


# Batches of single images


def test_single_image_batches_know_no_other_view_and_no_camera() -> None:
    built = pipeline()
    given = batch(built)
    inputs = built.training_inputs(given, generator=seeded(), joint=False)
    assert not inputs.aligned
    assert inputs.kwargs["cross_attention_kwargs"] == {"num_views": 1}
    assert inputs.kwargs["class_labels"].isnan().all()
    with torch.no_grad():
        out = views_of(built.unet(*inputs.args, **inputs.kwargs).sample)
        changed = inputs.args[0].clone()
        changed[1] += 1
        other = views_of(built.unet(changed, *inputs.args[1:], **inputs.kwargs).sample)
    assert out.isfinite().all()
    torch.testing.assert_close(other[:, [0, 2]], out[:, [0, 2]])
    assert not torch.allclose(other[0, 1], out[0, 1], atol=1e-3)
    # As if the U-Net had no camera embedding: with weights that make it vanish the answer is the same.
    silent = copy.deepcopy(built.unet)
    nn.init.zeros_(silent.class_embedding.linear_2.weight)
    nn.init.zeros_(silent.class_embedding.linear_2.bias)
    with torch.no_grad():
        plain = silent(*inputs.args, class_labels=torch.randn(6, 16)).sample
    assert torch.equal(views_of(plain), out)
    loss = built.denoising_loss(built.unet(*inputs.args, **inputs.kwargs), inputs).mean()
    loss.backward()
    assert not built.unet.class_embedding.linear_1.weight.grad.any()
    assert built.unet.conv_in.weight.grad.any()


def test_the_share_of_single_image_batches() -> None:
    built = pipeline(single_image_share=0.3)
    given = batch(built, samples=1, views=2)

    def joint(**options: Any) -> list[bool]:
        return [built.training_inputs(given, generator=seeded(seed), **options).aligned for seed in range(100)]

    built.unet.train()
    drawn = joint()
    assert 15 < drawn.count(False) < 45
    assert drawn == joint()
    assert all(joint(joint=True))
    assert all(joint(noise=torch.zeros(1, 2, 48, 8, 8)))  # a validation gives the noise
    built.unet.eval()
    assert all(joint())
    # Where none are asked for, nothing is drawn: the seed gives what it gave before.
    plain = pipeline()
    given["num_reference_views"] = 0
    assert torch.equal(
        plain.training_inputs(given, generator=seeded()).noisy, built.training_inputs(given, generator=seeded()).noisy
    )


def test_a_single_image_batch_trains_without_alignment() -> None:
    built = pipeline()
    model = cameo.wrap(built.unet, "mvdream")
    given = batch(built)
    inputs = built.training_inputs(given, joint=False)
    match = Correspondence(torch.full((2, 3, 3, 16), -1), ((4, 4),) * 3)
    with pytest.raises(ShapeError, match="query: expected AB = 2"):  # hence TrainingInputs.aligned
        model(*inputs.args, **inputs.kwargs, correspondence=match)
    model(*inputs.args, **inputs.kwargs)


# Sampling


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


# Training


@pytest.mark.parametrize("preset", PRESETS)
def test_overfitting_one_batch_with_lora(preset: str) -> None:
    built = pipeline(preset)
    add_lora(built.unet, "to_q", "to_k", "to_v", "to_out.0")
    torch.manual_seed(0)
    model = cameo.wrap(built.unet, "mvdream")
    inputs = built.training_inputs(batch(built, samples=1), generator=seeded())
    index = torch.full((1, 3, 3, 16), -1)
    index[:, 1, 2] = index[:, 2, 1] = torch.arange(16).flip(0)
    match = Correspondence(index, ((4, 4),) * 3)
    check_overfits(model, lambda model, **options: model(*inputs.args, **inputs.kwargs, **options), match)


def test_a_lora_is_saved_and_loaded(tmp_path: Path) -> None:
    built = pipeline("imagedream-tiny")
    plain = copy.deepcopy(built.unet)
    from peft import LoraConfig

    built.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    model = cameo.wrap(built.unet, "mvdream").eval()
    model.save_pretrained(tmp_path)
    again = cameo.from_pretrained(tmp_path, base_model=plain)
    args, kwargs = get_backbone("mvdream").example_inputs(built.unet)
    with torch.no_grad():
        assert torch.equal(again(*args, **kwargs).sample, model(*args, **kwargs).sample)
        assert not torch.equal(pipeline("imagedream-tiny").unet(*args, **kwargs).sample, model(*args, **kwargs).sample)
    assert again.supervised_sites == model.supervised_sites


# Mistakes


def test_the_number_of_reference_views_belongs_to_the_condition() -> None:
    for preset, wrong, cure in (
        ("tiny", 1, "Set num_reference_views=0, or use condition='image'"),
        ("imagedream-tiny", 2, "Set num_reference_views=1, or use condition='text'"),
        ("imagedream-tiny", 0, "Set num_reference_views=1, or use condition='text'"),
    ):
        built = pipeline(preset)
        given = {**batch(built), "num_reference_views": wrong}
        for use in (built.training_inputs, functools.partial(built.sample, num_inference_steps=1)):
            with pytest.raises(ValueError, match=rf"num_reference_views: expected \d with .*got {wrong}\. {cure}"):
                use(given)
    built = pipeline("imagedream-tiny")
    with pytest.raises(ValueError, match="at least one view besides the image prompt, got 1 view"):
        built.training_inputs(batch(built, views=1))


def test_what_build_and_the_pipeline_refuse() -> None:
    adapter = get_backbone("mvdream")
    with pytest.raises(ValueError, match=r"unknown preset of mvdream 'tinny': did you mean 'tiny'\?"):
        adapter.build("tinny")
    with pytest.raises(ValueError, match=r"unknown option of mvdream 'head': did you mean 'heads'\?"):
        adapter.build("tiny", head=2)
    with pytest.raises(ValueError, match=r"attention_levels: expected one flag per width \(16, 32, 32\)"):
        adapter.build("tiny", block_out_channels=(16, 32, 32))
    with pytest.raises(ValueError, match="unknown condition 'images': did you mean 'image'"):
        adapter.build("tiny", **NARROW, condition="images")
    with pytest.raises(ValueError, match=r"scheduler\.prediction_type: expected epsilon or v_prediction, got sample"):
        adapter.build("tiny", **NARROW, prediction_type="sample")
    with pytest.raises(ValueError, match="single_image_share: expected at least 0 and less than 1, got 1"):
        adapter.build("tiny", **NARROW, single_image_share=1)
    with pytest.raises(ValueError, match=r"single_image_share: expected 0 with condition='image', got 0\.3"):
        adapter.build("imagedream-tiny", **NARROW, single_image_share=0.3)


def test_components_that_do_not_go_together() -> None:
    unet, scheduler, parts = pipeline().unet, noise_schedule(), encoders()
    with pytest.raises(ValueError, match=r"unet: expected 4 input and output channels .*got 48 and 48"):
        MVDreamPipeline(unet, scheduler, vae=tiny_kl())
    with pytest.raises(ValueError, match="tokenizer: expected one, since there is a text_encoder"):
        MVDreamPipeline(unet, scheduler, text_encoder=parts["text_encoder"])
    with pytest.raises(ValueError, match="image_encoder: this U-Net has no image tokens"):
        MVDreamPipeline(unet, scheduler, condition="image", **parts)
    with pytest.raises(ValueError, match="image_encoder: an ImageDreamUNet needs one"):
        MVDreamPipeline(image_dream_unet(), scheduler, condition="image")
    with pytest.raises(ValueError, match="condition: an ImageDreamUNet is conditioned by an image, got 'text'"):
        MVDreamPipeline(image_dream_unet(), scheduler, **parts)
    text = {name: parts[name] for name in ("text_encoder", "tokenizer")}
    wide = get_backbone("mvdream").build("tiny", **NARROW, cross_attention_dim=12)
    with pytest.raises(ValueError, match="text_encoder: expected 12 channels, the U-Net's cross_attention_dim, got 8"):
        MVDreamPipeline(wide.unet, scheduler, **text)
    with pytest.raises(ValueError, match="expected encoder_hid_dim_type='ip_image_proj' and encoder_hid_dim="):
        image_dream_unet(encoder_hid_dim_type=None)


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


def test_image_tokens_that_were_lost_are_noticed() -> None:
    unet = prepare(image_dream_unet(), image_view=True)
    unet.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match=r"attn2.processor is AttnProcessor2_0.*Load the U-Net again"):
        prepare(unet, image_view=True)


def test_views_that_were_separated_are_noticed() -> None:
    built = pipeline()
    given = batch(built)
    built.unet.set_attn_processor(AttnProcessor2_0())
    for use in (built.training_inputs, functools.partial(built.sample, num_inference_steps=1)):
        with pytest.raises(RuntimeError, match="attn1 sees one view at a time"):
            use(given)
    built.disable_xformers_memory_efficient_attention()
    built.training_inputs(given)
    built.enable_xformers_memory_efficient_attention()
    assert built.unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor.use_xformers
    built.training_inputs(given)


def test_the_adapter_is_registered() -> None:
    assert isinstance(get_backbone("mvdream"), MVDream)
