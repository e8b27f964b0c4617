"""The diffusion transformer of `cat3d`, beside what tests/adapters/test_backbones.py asks of every preset."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from einops import rearrange
from torch import Tensor

import cameo
from cameo.adapters.cat3d.cameras import CONDITION_CHANNELS
from cameo.adapters.cat3d.denoiser import JointDiT
from cameo.adapters.cat3d.pipeline import Cat3DPipeline
from cameo.adapters.common.joint_views import inflate
from cameo.adapters.common.noise_schedules import ddim
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers.backbone_checks import build_pipeline, one_match
from tests.helpers.batches import make_batch
from tests.helpers.cat3d_models import tiny_kl


@functools.cache
def _pipeline() -> Cat3DPipeline:
    return build_pipeline("cat3d", "transformer-tiny", width=16, blocks=3, heads=2)


def pipeline() -> Cat3DPipeline:
    return copy.deepcopy(_pipeline())


def dit(**settings: Any) -> JointDiT:
    torch.manual_seed(0)
    own = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "num_embeds_ada_norm": 1}
    return JointDiT(**{**own, "in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2, **settings})


def test_it_computes_what_the_class_of_diffusers_does() -> None:
    own = dit()
    theirs = DiTTransformer2DModel(**{name: own.config[name] for name in own.config if not name.startswith("_")})
    theirs.load_state_dict(own.state_dict())
    sample, timestep = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    with torch.no_grad():
        expected = theirs.eval()(sample, timestep, torch.ones(3, dtype=torch.long)).sample
        assert torch.equal(own.eval()(sample, timestep).sample, expected)
        assert torch.equal(own(sample, timestep, return_dict=False)[0], expected)
        assert torch.equal(own.train()(sample, timestep).sample, expected)  # no label is dropped
        one_for_all = own(sample, 500).sample
    assert torch.equal(one_for_all[1], expected[1])


def test_pictures_need_not_be_square() -> None:
    own = dit(out_channels=1)
    count = torch.arange(4.0 * 9)  # 36 tokens, as of 6 x 6
    own.proj_out_2.register_forward_hook(
        lambda _module, _args, out: rearrange(count, "n -> 1 n 1").expand(len(out), -1, 4)
    )
    found = own(torch.randn(2, 4, 8, 18), torch.tensor(5)).sample
    expected = rearrange(count, "(h w) -> h w", w=9).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(found, expected.expand(2, 1, -1, -1))


def test_what_a_forward_refuses() -> None:
    with pytest.raises(ShapeError, match=r"sample: expected height and width divisible by 2, got \[1, 4, 9, 8\]"):
        dit()(torch.zeros(1, 4, 9, 8), torch.tensor(5))


def test_the_pixels_of_a_patch_are_in_order() -> None:
    own = dit()
    within = torch.arange(16.0)  # rows, columns, channels of a patch of 2 x 2
    own.proj_out_2.register_forward_hook(lambda _module, _args, out: within.expand_as(out))
    found = own(torch.randn(1, 4, 8, 8), torch.tensor(5)).sample
    assert found[0, :, 2:4, 4:6].tolist() == rearrange(within, "(p q c) -> c p q", p=2, q=2).tolist()


def test_views_see_each_other_and_samples_do_not() -> None:
    unet = _pipeline().unet
    sample = torch.randn(4, unet.config.in_channels, 8, 8)  # two samples of two views
    changed = sample.clone()
    changed[1] += 1

    def run(given: Tensor, views: int) -> Tensor:
        with torch.no_grad():
            return unet(given, torch.tensor(300), cross_attention_kwargs={"num_views": views}).sample

    assert not torch.allclose(run(changed, 2)[0], run(sample, 2)[0], atol=1e-4)
    assert torch.equal(run(changed, 2)[2:], run(sample, 2)[2:])
    torch.testing.assert_close(run(changed, 1)[0], run(sample, 1)[0])
    with pytest.raises(ShapeError, match=r"num_views.*a divisor of the batch 4 = samples x views, got 3"):
        run(sample, 3)


def test_a_match_reaches_its_token_and_the_keys_of_its_view() -> None:
    built = pipeline()
    model = cameo.wrap(built.unet, "cat3d", head="mean")
    height, width, views = 4, 6, 3
    match = one_match(views, height, width)
    entering: list[Tensor] = []
    layer = built.unet.transformer_blocks[model.supervised_layers[0].index]
    layer.register_forward_pre_hook(lambda _, args: (args[0].retain_grad(), entering.append(args[0]))[0])
    model(
        torch.randn(2 * views, built.unet.config.in_channels, height, width),
        torch.full((2 * views,), 500),
        cross_attention_kwargs={"num_views": views},
        correspondence=match.correspondence,
    )
    model.alignment_loss.backward()
    reached = rearrange(entering[0].grad.abs().sum(-1) > 0, "(b v) (h w) -> b v h w", v=views, w=width)
    assert torch.equal(reached, match.reached)


def test_latents_of_an_autoencoder_in_patches() -> None:
    model = dit(in_channels=4 + CONDITION_CHANNELS)
    built = Cat3DPipeline(model, ddim("v_prediction", zero_terminal_snr=True, whole_range=True), vae=tiny_kl())
    assert built.size_multiple == 16
    layers = get_backbone("cat3d").attention_layers(built.unet)
    assert [(layer.path, layer.stride) for layer in layers] == [(f"transformer_blocks.{i}.attn1", 16) for i in range(2)]
    batch = make_batch(size=64)
    assert cameo.wrap(built.unet, "cat3d").token_grid(64, 48) == (4, 3)
    assert built.sample(batch, num_inference_steps=1).shape == (2, 2, 3, 64, 64)
    with pytest.raises(ShapeError, match="images: expected height and width divisible by 16"):
        built.training_inputs(make_batch(size=40))


def test_views_that_are_apart_are_noticed_and_joined() -> None:
    built, batch = pipeline(), make_batch(size=32)
    before = built.sample(batch, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"processor: expected one for each of .*got \[\]"):
        built.unet.set_attn_processor({})
    joined, built.denoiser = built.unet, type(built.unet).from_config(built.unet.config)
    built.unet.load_state_dict(joined.state_dict())
    assert not get_backbone("cat3d").recognizes(built.unet)
    with pytest.raises(
        ValueError, match=r"self-attentions of this JointDiT see one view at a time.*inflate\(unet, latent_stride=8\)"
    ):
        cameo.wrap(built.unet, "cat3d")
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0\.attn1 sees one view at a time"):
        built.training_inputs(batch)
    inflate(built.unet, latent_stride=4)
    after = built.sample(batch, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, after)
    built.enable_xformers_memory_efficient_attention()
    assert cameo.wrap(built.unet, "cat3d").token_grid(32, 32) == (8, 8)


def test_half_precision_samples_without_autocast() -> None:
    built = pipeline().to(torch.bfloat16)
    found = built.sample(make_batch(size=32), num_inference_steps=2)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()


def test_the_first_prediction_of_a_preset_is_zero() -> None:
    built = get_backbone("cat3d").build("transformer-tiny", width=16, blocks=1, heads=2)
    inputs = built.training_inputs(make_batch(samples=1, size=32), timesteps=torch.tensor([500]))
    assert not built.unet(*inputs.args, **inputs.kwargs).sample.any()


def test_what_build_refuses() -> None:
    adapter = get_backbone("cat3d")
    with pytest.raises(ValueError, match=r"unknown option of cat3d 'norm_num_groups'.*width"):
        adapter.build("transformer-tiny", norm_num_groups=8)
    with pytest.raises(ValueError, match="unknown option of cat3d 'block'"):
        adapter.build("transformer-tiny", block=8)
    with pytest.raises(ValueError, match="blocks: expected at least 1, got 0"):
        adapter.build("transformer-tiny", blocks=0)
    with pytest.raises(ValueError, match="image_size: expected a multiple of patch_size=4, got 30"):
        adapter.build("transformer-tiny", image_size=30)
    with pytest.raises(ValueError, match=r"heads: expected a divisor of the width 16, got 3"):
        adapter.build("transformer-tiny", width=16, heads=3)
    with pytest.raises(ValueError, match=r"unet: expected 11 input and 4 output channels .*got 4 and 4"):
        Cat3DPipeline(dit(), ddim("v_prediction", zero_terminal_snr=True, whole_range=True), vae=tiny_kl())
