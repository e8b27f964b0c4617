"""What never leaves this machine, and what is never fetched: local paths in a push, code and pickles in a download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig

import cameo
from cameo.backbone import get_backbone
from cameo.hub import local_folder, save_load

WANTED = ["cameo_config.json", "adapter_model.safetensors", "unet/diffusion_pytorch_model.safetensors", "vocab.txt"]
REFUSED = [
    "pytorch_model.bin",
    "unet/diffusion_pytorch_model.bin",
    "modeling.py",
    "unet/attention.py",
    "custom_checkpoint_0.pkl",
    "model.pt",
    "model.ckpt",
    "weights.pth",
    "run.sh",
    "setup.cfg",
    "library.so",
]


def test_code_and_pickles_of_a_repository_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert local_folder("painter/rooms") == tmp_path
    (options,) = asked
    patterns = {name: options.get(name) for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*WANTED, *REFUSED], **patterns)) == WANTED


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("alice_private") / "alice_base"
    get_backbone("cat3d").build("tiny", block_out_channels=(16, 32), heads=2, norm_num_groups=8).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["diffusers LoRA", "PEFT", "full model", "pipeline"])
@pytest.mark.parametrize("place", ["in place", "moved away"])
def test_a_local_path_is_not_pushed(kind: str, place: str, base_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alice_base"
    shutil.copytree(base_folder, folder)
    unet = get_backbone("cat3d").load(str(folder)).unet
    settings = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    if kind == "diffusers LoRA":
        unet.add_adapter(settings)
    elif kind == "PEFT":
        from peft import get_peft_model

        unet = get_peft_model(unet, settings)
    model = cameo.wrap(unet, backbone="cat3d")
    model.cameo_config.base_model = str(folder)
    if place == "moved away":
        folder.rename(tmp_path / "elsewhere")
    stage = tmp_path / "stage"
    stage.mkdir()
    pipeline = None
    if kind == "pipeline":
        pipeline = get_backbone("cat3d").load(str(tmp_path / "elsewhere" if place == "moved away" else folder))
        pipeline.unet = unet
    save_load._stage(model, stage, "painter/rooms", {"license": "mit"}, False, pipeline, None, None, on_hub=True)
    staged = {str(path.relative_to(stage)): path.read_bytes() for path in stage.rglob("*") if path.is_file()}
    assert {"README.md", "cameo_config.json"} <= staged.keys()
    for name, content in staged.items():
        for secret in (str(tmp_path), "alice_base", "alice_private"):
            assert secret.encode() not in content, f"{name} holds {secret}"
    assert json.loads(staged["cameo_config.json"])["base_model"] is None
    assert model.cameo_config.base_model == str(folder), "the model itself forgot its base"


@pytest.mark.parametrize("name", ["preset:tiny", "bundled:cat3d-transformer-tiny", "painter/base"])
def test_names_that_others_can_load_are_pushed(name: str, tmp_path: Path) -> None:
    unet = get_backbone("cat3d").build("transformer-tiny", blocks=1).unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    model = cameo.wrap(unet, backbone="cat3d")
    model.cameo_config.base_model = name
    save_load._stage(model, tmp_path, "painter/rooms", {"license": "mit"}, False, None, None, None, on_hub=True)
    assert json.loads((tmp_path / "cameo_config.json").read_text())["base_model"] == name
