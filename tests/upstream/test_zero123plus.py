"""The published pipeline of Zero123++ and its `RefOnlyNoisedUNet`, on U-Nets of the released depth but narrow."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn

import cameo
from cameo.adapters.zero123plus import keep_references
from cameo.adapters.zero123plus.denoiser import ReferenceUNet
from cameo.adapters.zero123plus.pipeline import Zero123PlusPipeline
from cameo.backbone import get_backbone
from cameo.errors import CaptureError
from cameo.memory import align_module
from tests.helpers import zero123plus_models as parts
from tests.helpers.upstream_zero123plus import REFERENCE, TILE, inputs, run, wrapper

ADAPTER = get_backbone("zero123plus")


def test_the_published_wrapper_is_attached_and_stays_bit_identical(published: ModuleType) -> None:
    theirs = wrapper(published)
    before = run(theirs, inputs(2))
    model = cameo.wrap(theirs, "zero123plus")
    assert len(model.attention_layers) == 16
    assert [layer.index for layer in model.supervised_layers] == [10]
    assert model.token_grids(320, 320, 7) == ((32, 32),) + ((20, 20),) * 6
    grids = (REFERENCE,) + (TILE,) * 6
    match = parts.random_matches(grids)
    assert torch.equal(run(model, inputs(2)), before)
    with model.capture(model.attention_layers) as captured:
        assert torch.equal(run(model, inputs(1), correspondence=match), run(theirs, inputs(1)))
    assert model.num_supervised == 6 * 6 * 16
    for layer in model.attention_layers:
        stride = layer.stride // 8
        tile, reference = (8 // stride) ** 2, (16 // stride) ** 2
        assert captured[layer.path].query.shape[2] == 6 * tile
        assert captured[layer.path].key.shape[2] == 6 * tile + reference
    assert model.unwrap() is theirs
    assert torch.equal(run(theirs, inputs(2)), before)


def test_the_example_inputs_run(published: ModuleType) -> None:
    theirs = wrapper(published)
    args, kwargs = ADAPTER.example_inputs(theirs)
    with torch.no_grad():
        assert run(theirs, (args, kwargs)).shape == args[0].shape
    assert kwargs["cross_attention_kwargs"]["cond_lat"].shape[-2:] == (64, 64)  # 512 pixels


def test_our_unet_is_theirs(published: ModuleType) -> None:
    theirs, ours = wrapper(published), ReferenceUNet.from_unet(parts.stable_diffusion_unet())
    assert theirs.unet.state_dict().keys() == ours.state_dict().keys()
    expected = run(theirs, inputs(2))
    assert torch.equal(run(ours, inputs(2)), expected)
    assert torch.equal(run(ours.eval(), inputs(2)), expected)


def test_in_eval_mode_their_sampler_gives_the_same_level_of_noise(published: ModuleType) -> None:
    theirs, ours = wrapper(published).eval(), ReferenceUNet.from_unet(parts.stable_diffusion_unet()).eval()
    theirs.val_sched.set_timesteps(7)
    for timestep in theirs.val_sched.timesteps[[0, 3, 6]]:
        theirs.val_sched._step_index = None
        (canvas, _, context), kwargs = inputs()
        with torch.no_grad():
            expected = run(theirs, ((canvas, timestep, context), kwargs))
            # two formulas of one level, in float32
            torch.testing.assert_close(run(ours, ((canvas, timestep, context), kwargs)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("query", "key"), parts.MATCHES)
def test_a_match_reaches_its_token_and_the_keys_of_its_view(
    published: ModuleType, query: parts.Place, key: parts.Place
) -> None:
    model = cameo.wrap(wrapper(published), "zero123plus", head="mean")
    parts.check_reach(model, *inputs(), query=query, key=key, tile=TILE, reference=REFERENCE)


def gradients(theirs: nn.Module) -> dict[str, Tensor]:
    model = cameo.wrap(theirs, "zero123plus", head="mean").train()
    match = parts.random_matches((REFERENCE,) + (TILE,) * 6)
    output = run(model, inputs(), correspondence=match)
    (output.square().mean() + model.alignment_loss).backward()
    return {name: one.grad for name, one in theirs.named_parameters() if one.grad is not None}


def test_gradient_checkpointing_fails_and_the_cure_is_exact(published: ModuleType) -> None:
    expected = gradients(wrapper(published))
    theirs = wrapper(published)
    theirs.unet.enable_gradient_checkpointing()
    with pytest.raises(KeyError, match=r"attn1\.processor"):
        run(theirs, inputs()).sum().backward()
    theirs = wrapper(published)
    theirs.unet.enable_gradient_checkpointing()
    with pytest.raises(CaptureError, match=r"would end in a KeyError\. Call .*keep_references\(model\)"):
        gradients(theirs)
    theirs = keep_references(wrapper(published))
    theirs.unet.enable_gradient_checkpointing()
    assert ADAPTER.recognizes(theirs)
    found = gradients(theirs)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_keeping_the_references_changes_no_output(published: ModuleType) -> None:
    theirs = wrapper(published)
    before = run(theirs, inputs(2))
    assert torch.equal(run(keep_references(theirs), inputs(2)), before)


def complete(published: ModuleType) -> Any:
    theirs = published.Zero123PlusPipeline(**deterministic_parts(), ramping_coefficients=parts.RAMP)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def deterministic_parts() -> dict[str, Any]:
    """Random components, but an autoencoder that always draws its mode, and a sampler that draws nothing."""
    found = parts.components()
    encoder = found["vae"].quant_conv
    with torch.no_grad():
        encoder.weight[4:] = 0
        encoder.bias[4:] = -30  # logarithm of the variance
    settings = parts.sampler(timestep_spacing="trailing").config
    return {**found, "scheduler": DDIMScheduler.from_config(settings, clip_sample=False, set_alpha_to_one=False)}


def picture() -> tuple[Image.Image, Tensor]:
    pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()), pixels.permute(2, 0, 1)[None, None] / 255


def test_our_pipeline_draws_what_theirs_does(published: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise handed to both: encoders, context, guidance, scaling, canvas and decoder all agree."""
    theirs = complete(published)
    ours = Zero123PlusPipeline(**deterministic_parts(), ramping_coefficients=parts.RAMP)
    image, images = picture()
    steps, generator = 3, torch.Generator().manual_seed(1)
    start = torch.randn(1, 4, 12, 8, generator=generator)
    noises = iter([torch.randn(2, 4, 6, 6, generator=generator) for _ in range(steps)])
    drawn: list[Tensor] = []

    def next_noise(like: Tensor) -> Tensor:
        drawn.append(next(noises))
        assert drawn[-1].shape == like.shape
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", next_noise)
        expected = theirs(
            image,
            num_inference_steps=steps,
            guidance_scale=4.0,
            width=64,
            height=96,
            latents=start,
            output_type="pt",
        ).images
    assert len(drawn) == steps
    canvas = ours.sample_canvas(
        {"images": images, "num_reference_views": 1},
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
    )
    assert canvas.shape == expected.shape == (1, 3, 96, 64)
    assert canvas.std() > 0.01
    torch.testing.assert_close(canvas, expected, atol=1e-4, rtol=1e-4)  # float32 through three steps and a decoder


def test_the_published_pipeline_samples_while_it_is_observed(published: ModuleType) -> None:
    theirs = complete(published)
    theirs.prepare()
    model = cameo.wrap(theirs.unet, "zero123plus")
    with model.capture() as captured:
        canvas = theirs(picture()[0], num_inference_steps=1, width=64, height=96, output_type="pt").images
    assert torch.isfinite(canvas).all()
    assert captured[model.supervised_layers[0].path].key.shape[2] == 24 + 9  # six views of 2 x 2, reference of 3 x 3


def test_scales_are_theirs(published: ModuleType) -> None:
    ours = Zero123PlusPipeline(**parts.components())
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(ours.scale_image(x), published.scale_image(x))
    torch.testing.assert_close(ours.unscale_image(x), published.unscale_image(x))
    scaling = ours.vae.config.scaling_factor
    torch.testing.assert_close(ours.scale_latents(x / scaling), published.scale_latents(x))
    torch.testing.assert_close(ours.unscale_latents(x) * scaling, published.unscale_latents(x))


def test_what_we_save_loads_into_their_pipeline(published: ModuleType, tmp_path: Path) -> None:
    ours = Zero123PlusPipeline(**deterministic_parts(), ramping_coefficients=parts.RAMP)
    ours.save_pretrained(tmp_path)
    theirs = published.Zero123PlusPipeline.from_pretrained(tmp_path)
    assert theirs.config.ramping_coefficients == parts.RAMP
    for component in theirs.components.values():
        if isinstance(component, nn.Module):
            align_module(component)  # theirs lie where the files hold them, which shows in the last bits
    canvases = []
    for one in (complete(published), theirs):
        one.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        canvases.append(one(picture()[0], num_inference_steps=1, width=64, height=96, output_type="pt").images)
    assert torch.equal(*canvases)


def test_lora_trained_with_ours_loads_into_theirs(published: ModuleType, tmp_path: Path) -> None:
    ours = ReferenceUNet.from_unet(parts.two_level_unet(), reference_size=(parts.REFERENCE, parts.REFERENCE))
    ours.requires_grad_(False)
    ours.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    model = cameo.wrap(ours, "zero123plus").train()
    args, kwargs = ADAPTER.example_inputs(ours)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.05)
    for _ in range(3):
        model(*args, **kwargs, correspondence=parts.random_matches(model.token_grids(64, 64, 7)))
        optimizer.zero_grad()
        model.alignment_loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    theirs = complete(published)
    untrained = copy.deepcopy(theirs)
    theirs.load_lora_weights(tmp_path)
    align_module(theirs.unet)  # the LoRA lies where the file holds it, which shows in the last bits
    outputs = []
    for pipeline in (theirs, untrained):
        pipeline.prepare()
        pipeline.unet.train()
        torch.manual_seed(0)
        noise = torch.randn_like(kwargs["cross_attention_kwargs"]["cond_lat"])
        outputs.append(run(pipeline.unet, (args, kwargs)))
    given = {**kwargs["cross_attention_kwargs"], "cond_noise": noise}
    assert torch.equal(ours(*args, cross_attention_kwargs=given).sample, outputs[0])
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)
