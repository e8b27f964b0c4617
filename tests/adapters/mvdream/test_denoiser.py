"""The U-Net of MVDream and ImageDream: cameras, image tokens, joined views, LoRA."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding

import cameo
from cameo.adapters.mvdream.cameras import camera_vectors
from cameo.adapters.mvdream.denoiser import CameraEmbedding, prepare
from cameo.backbone import get_backbone
from tests.helpers.mvdream_models import PRESETS, batch, pipeline, views_of
from tests.helpers.orbits import UP, ring


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
    assert again.supervised_layers == model.supervised_layers


def test_a_denoiser_whose_views_are_apart_is_noticed() -> None:
    built = pipeline()
    given = batch(built)
    built.denoiser = UNet2DConditionModel.from_config(built.unet.config)
    for use in (built.training_inputs, functools.partial(built.sample, num_inference_steps=1)):
        with pytest.raises(
            RuntimeError, match=r"attn1 sees one view at a time.*call .*prepare\(pipeline.unet, image_view=False, "
        ):
            use(given)
    prepare(built.unet, image_view=False, latent_stride=built.latent_stride)  # as the message says
    built.training_inputs(given)
