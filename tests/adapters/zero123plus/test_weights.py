"""Saving and loading of Zero123++ and of its releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

import cameo
from cameo.adapters.zero123plus.pipeline import Zero123PlusPipeline
from cameo.backbone import get_backbone
from cameo.errors import DataError
from tests.helpers import zero123plus_models as parts
from tests.helpers.zero123plus_models import SIZE, batch, pipeline
from tests.helpers.zero123plus_released import REFERENCE, released

ADAPTER = get_backbone("zero123plus")


def test_save_and_load(tmp_path: Path) -> None:
    built, given = pipeline(), batch()
    built.unet = built.unet  # what a training does; diffusers notes the class anew
    built.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["_class_name"] == "Zero123PlusPipeline"
    again = ADAPTER.load(str(tmp_path))
    assert again.config.reference_size == REFERENCE
    assert again.config.patch_size == 4
    assert again.scheduler.config.timestep_spacing == "trailing"
    drawn = [
        one.sample(given, num_inference_steps=2, generator=torch.Generator().manual_seed(0)) for one in (built, again)
    ]
    assert torch.equal(*drawn)
    assert cameo.wrap(again.unet, "zero123plus").token_grids(SIZE, SIZE, 7)[0] == (6, 6)


def test_load_a_release_and_save_it_complete(tmp_path: Path) -> None:
    built = ADAPTER.load(str(parts.write_release(tmp_path / "release")))
    assert type(built) is Zero123PlusPipeline
    assert built.config.ramping_coefficients == parts.RAMP
    assert built.config.reference_size == REFERENCE  # of its own extractor
    assert built.scheduler.config.timestep_spacing == "trailing"
    assert built.scheduler.config.prediction_type == "v_prediction"
    assert cameo.wrap(built.unet, "zero123plus").token_grids(SIZE, SIZE, 7) == ((3, 3),) + ((2, 2),) * 6
    given = batch(samples=1)

    def draw(one: Zero123PlusPipeline) -> Tensor:
        settings = {"num_inference_steps": 2, "guidance_scale": 4.0}
        return one.sample(given, **settings, generator=torch.Generator().manual_seed(0))

    first = draw(built)
    assert torch.equal(draw(_released_trailing()), first)
    built.save_pretrained(tmp_path / "saved")
    assert torch.equal(draw(ADAPTER.load(str(tmp_path / "saved"))), first)
    written = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    expected = json.loads((tmp_path / "release" / "model_index.json").read_text())
    assert {name: written[name] for name in expected if name != "_diffusers_version"} == {
        name: value for name, value in expected.items() if name != "_diffusers_version"
    }


def _released_trailing() -> Zero123PlusPipeline:
    built = released()
    built.scheduler = parts.sampler(timestep_spacing="trailing")
    return built


def test_missing_extractors_are_made(tmp_path: Path) -> None:
    settings = {name: part for name, part in parts.components().items() if not name.startswith("feature_extractor")}
    made = Zero123PlusPipeline(**settings, ramping_coefficients=parts.RAMP, reference_size=REFERENCE)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(made.reference_latents(images), released().reference_latents(images))
        assert torch.equal(made.context(images), released().context(images))
    assert Zero123PlusPipeline(**settings).config.reference_size == 512


def test_what_load_refuses(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(DataError, match="holds a FluxPipeline; zero123plus starts from a Zero123PlusPipeline"):
        ADAPTER.load(str(tmp_path))


def test_what_build_refuses() -> None:
    with pytest.raises(ValueError, match=r"unknown preset of zero123plus 'tinny': did you mean 'tiny'\?"):
        ADAPTER.build("tinny")
    with pytest.raises(ValueError, match=r"unknown option of zero123plus 'head': did you mean 'heads'\?"):
        ADAPTER.build("tiny", head=2)
    with pytest.raises(ValueError, match=r"attention_levels: expected one flag per width \(16, 32, 32\)"):
        ADAPTER.build("tiny", block_out_channels=(16, 32, 32))
    with pytest.raises(ValueError, match="reference_size: expected a multiple of 8 pixels, got 50"):
        ADAPTER.build("tiny", reference_size=50)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unet": parts.two_level_unet(in_channels=8)}, "unet: expected 4 input and output channels, got 8 and 4"),
        ({"unet": parts.two_level_unet(cross_attention_dim=8)}, "encoder: expected embeddings of width 8.*got 16"),
        ({"tokenizer": None}, "text_encoder and tokenizer: expected both or none"),
    ],
    ids=["channels", "width", "tokenizer"],
)
def test_what_the_pipeline_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Zero123PlusPipeline(**{**parts.components(), **changed})


def test_licenses() -> None:
    assert ADAPTER.license("preset:tiny") == "apache-2.0"
    assert ADAPTER.license("someone/else") is None
    assert ADAPTER.license(None) is None


def test_the_autoencoder_is_the_one_of_the_releases() -> None:
    assert isinstance(released().vae, AutoencoderKL)
    assert released().latent_stride == 8
