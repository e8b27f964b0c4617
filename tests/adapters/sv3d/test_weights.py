"""Saving and loading of SV3D in all its layouts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
)
from torch import Tensor, nn

from cameo.adapters.sv3d.pipeline import SV3DPipeline, triangle_scale
from cameo.backbone import get_backbone
from cameo.errors import DataError
from tests.helpers.sv3d_models import SIZE, batch, latent_pipeline, pipeline


def test_a_folder_of_checkpoints_asks_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model_index.json.*as a local file \(sv3d_p.safetensors"):
        get_backbone("sv3d").load(str(tmp_path))


def test_licenses_and_revisions_are_those_of_the_table() -> None:
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
