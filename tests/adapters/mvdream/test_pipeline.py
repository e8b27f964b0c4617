"""Training inputs and losses of MVDream and ImageDream."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import Correspondence
from cameo.adapters.common.noise_schedules import ddim
from cameo.adapters.mvdream import MVDream
from cameo.adapters.mvdream.pipeline import MVDreamPipeline
from cameo.backbone import get_backbone
from cameo.errors import ShapeError
from tests.helpers.models import add_lora, check_overfits
from tests.helpers.mvdream_models import (
    NARROW,
    PRESETS,
    batch,
    encoders,
    image_dream_unet,
    pipeline,
    seeded,
    tiny_kl,
    views_of,
    with_image_tokens,
    with_text,
)


def output_of(attention_order: Tensor) -> SimpleNamespace:
    return SimpleNamespace(sample=rearrange(attention_order, "b v c h w -> (b v) c h w"))


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
    scheduler = ddim()
    root = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), (1 - root**2).cumprod(0), atol=1e-6, rtol=1e-4)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[:2].tolist() == [981, 961]  # uniform, one step up, as in the ldm sampler
    assert scheduler.timesteps[-1] == 1


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
    with pytest.raises(ValueError, match=r"unknown scheduler\.prediction_type 'velocity': .*Known: epsilon, sample"):
        adapter.build("tiny", **NARROW, prediction_type="velocity")
    with pytest.raises(ValueError, match="single_image_share: expected at least 0 and less than 1, got 1"):
        adapter.build("tiny", **NARROW, single_image_share=1)
    with pytest.raises(ValueError, match=r"single_image_share: expected 0 with condition='image', got 0\.3"):
        adapter.build("imagedream-tiny", **NARROW, single_image_share=0.3)


def test_components_that_do_not_go_together() -> None:
    unet, scheduler, parts = pipeline().unet, ddim(), encoders()
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


def test_the_adapter_is_registered() -> None:
    assert isinstance(get_backbone("mvdream"), MVDream)


@pytest.mark.parametrize("preset", ["tiny", "imagedream-tiny"])
def test_what_a_preset_predicts(preset: str) -> None:
    """The noise at the noise levels of the releases, or what is chosen."""
    scheduler = pipeline(preset).scheduler
    assert scheduler.config.prediction_type == "epsilon"
    assert torch.equal(scheduler.alphas_cumprod, ddim().alphas_cumprod)
    for chosen in ("epsilon", "v_prediction", "sample"):
        assert pipeline(preset, prediction_type=chosen).scheduler.config.prediction_type == chosen
    at_most, at_95 = scheduler.alphas_cumprod[-1], scheduler.alphas_cumprod[949]
    amplified = [round(float(((1 - alpha) / alpha).sqrt())) for alpha in (at_95, at_most)]
    assert amplified == [11, 15]  # as the class says of errors in a predicted noise
