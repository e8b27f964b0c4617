"""What is saved names no folder of this machine, and no data set unless asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import cameo
from cameo.backbone import get_backbone
from cameo.hub.places import public_config
from cameo.training.setup import load_pipeline, wrap_denoiser
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import make_config

NARROW: dict[str, Any] = {"block_out_channels": (16, 32), "heads": 2, "norm_num_groups": 8}


@pytest.mark.parametrize("place", ["in place", "moved away"])
@pytest.mark.parametrize("kind", ["diffusers LoRA", "PEFT", "full model", "pipeline"])
def test_a_saved_folder_names_no_path(kind: str, place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "alice_private" / "alice_base"
    get_backbone("cat3d").build("tiny", **NARROW).save_pretrained(base)
    pipeline = get_backbone("cat3d").load(str(base))
    unet, settings = pipeline.unet, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    if kind == "diffusers LoRA":
        unet.add_adapter(settings)
    model = cameo.wrap(get_peft_model(unet, settings) if kind == "PEFT" else unet, backbone="cat3d")
    model.cameo_config.base_model = str(base)
    model.cameo_config.training = {"data": str(base), "list": ["~/rooms", "C:\\rooms", "kept"], "steps": 3}
    if place == "moved away":
        base.rename(tmp_path / "elsewhere")
    folder = model.save_pretrained(tmp_path / "saved", pipeline=pipeline if kind == "pipeline" else None)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        for secret in (str(tmp_path), "alice_", "~/rooms", "C:\\rooms"):
            assert secret.encode() not in path.read_bytes(), f"{path.name} holds {secret}"
    kept = json.loads((folder / "cameo_config.json").read_text())
    assert kept["training"] == {"data": "a local file or folder", "list": [kept["training"]["data"]] * 2 + ["kept"],
                                "steps": 3}  # fmt: skip
    assert model.cameo_config.base_model == str(base), "the model itself forgot its base"
    if place == "moved away":
        return
    again = model.save_pretrained(tmp_path / "own", local_base=True)
    assert json.loads((again / "cameo_config.json").read_text())["base_model"] == str(base)
    assert cameo.from_pretrained(again).cameo_config.layers == model.cameo_config.layers


def test_names_that_others_can_load_stay() -> None:
    for name in ("painter/base", "preset:tiny", "bundled:cat3d-tiny"):
        config = cameo.config.CameoConfig("cat3d", [], base_model=name, base_revision="abc")
        assert public_config(config) == config


def test_the_folder_of_the_data_is_named_only_if_asked(tmp_path: Path) -> None:
    data = write_sequence(tmp_path / "alice_private_house")
    config = make_config(tmp_path / "run", train_data_dir=str(data))
    facts = wrap_denoiser(load_pipeline(config), config).cameo_config.training
    assert "alice" not in json.dumps(facts)
    assert facts["data"] == "folder of rgbd"
    config.hub_data_name = "rooms of mine"
    assert wrap_denoiser(load_pipeline(config), config).cameo_config.training["data"] == "rooms of mine"
