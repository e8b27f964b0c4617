"""Saved files that are damaged, or hold NaN, are named on loading; nothing is loaded from them in silence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import cameo
from cameo.backbone import get_backbone
from cameo.errors import DataError
from tests.helpers.models import JointModel

NARROW: dict[str, Any] = {"block_out_channels": (8, 8), "heads": 2, "norm_num_groups": 4}


def denoiser() -> nn.Module:
    torch.manual_seed(0)
    return get_backbone("cat3d").build("tiny", **NARROW).unet


def diffusers_lora() -> cameo.CameoModel:
    unet = denoiser()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    return cameo.wrap(unet, backbone="cat3d")


def peft_adapter() -> cameo.CameoModel:
    return cameo.wrap(get_peft_model(denoiser(), LoraConfig(r=2, target_modules=["to_q"])), backbone="cat3d")


def plain_module() -> cameo.CameoModel:
    return cameo.wrap(JointModel(), layer="joint", layout="b (v h w)")


SAVED: dict[str, tuple[Callable[[], cameo.CameoModel], Callable[[], nn.Module]]] = {
    "diffusers LoRA": (diffusers_lora, denoiser),
    "PEFT": (peft_adapter, denoiser),
    "full model": (lambda: cameo.wrap(denoiser(), backbone="cat3d"), denoiser),
    "module": (plain_module, JointModel),
}


@pytest.fixture(params=SAVED)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, nn.Module]:
    build, base = SAVED[request.param]
    return build().save_pretrained(tmp_path / "rooms", include_head=True), base()


def empty(content: bytes) -> bytes:
    return b""


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [empty, half])
def test_a_damaged_file_is_named(saved: tuple[Path, nn.Module], damage: Callable[[bytes], bytes]) -> None:
    folder, base = saved
    before = {name: value.clone() for name, value in base.state_dict().items()}
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json")]
    assert len(files) >= 3
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        with pytest.raises(DataError, match=re.escape(str(path))):
            cameo.from_pretrained(folder, base_model=base)
        path.write_bytes(whole)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert cameo.from_pretrained(folder, base_model=base).unwrap() is not None


def test_weights_that_are_no_numbers_are_named(saved: tuple[Path, nn.Module]) -> None:
    folder, base = saved
    before = {name: value.clone() for name, value in base.state_dict().items()}
    (path,) = [path for path in folder.glob("*.safetensors") if path.name != "alignment_head.safetensors"]
    key = with_nan(path)
    with pytest.raises(DataError, match=rf"{re.escape(key)} holds NaN"):
        cameo.from_pretrained(folder, base_model=base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_head_that_is_no_numbers_is_named(tmp_path: Path) -> None:
    folder = plain_module().save_pretrained(tmp_path, include_head=True)
    with_nan(folder / "alignment_head.safetensors")
    with pytest.raises(DataError, match=r"alignment_head.safetensors: .* holds NaN"):
        cameo.from_pretrained(folder, base_model=JointModel())


def with_nan(path: Path) -> str:
    """Make the first value of a file NaN, and return its name."""
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    key = min(state)
    state[key].view(-1)[0] = torch.nan
    save_file(state, path, metadata=metadata)
    return key.split(".", 1)[1]


def test_a_full_model_without_a_named_base_is_not_called_an_adapter(tmp_path: Path) -> None:
    folder = cameo.wrap(denoiser(), backbone="cat3d").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cameo_config.json names no base; pass the base as base_model="):
        cameo.from_pretrained(folder)


def test_a_damaged_base_is_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    get_backbone("cat3d").build("tiny", **NARROW).save_pretrained(base)
    model = diffusers_lora()
    model.cameo_config.base_model = str(base)
    folder = model.save_pretrained(tmp_path / "rooms", local_base=True)
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(half(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(str(path))):
        cameo.from_pretrained(folder)
