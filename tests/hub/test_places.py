"""Where `from_pretrained` reads the base of an adapter from, and what the examples of saving show."""

from __future__ import annotations

import doctest
import importlib
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import cameo
from cameo import Correspondence
from cameo.backbone import get_backbone, unwrap_peft
from tests.helpers.backbone_checks import build_pipeline
from tests.helpers.training_runs import fresh_accelerate, make_trainer, scene_cache

BASE, REVISION = "painter/base", "0" * 40


def cached(cache: Path, pipeline: Any) -> None:
    """Put a pipeline into a cache of the Hub, as if it had been downloaded."""
    repository = cache / "models--painter--base"
    pipeline.save_pretrained(str(repository / "snapshots" / REVISION))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)


@pytest.mark.parametrize("backbone", ["cat3d", "mvdream", "sv3d", "zero123plus"])
def test_the_base_is_read_from_the_cache_that_is_given(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked although local_files_only=True")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    pipeline = build_pipeline(backbone, "tiny")
    cached(tmp_path / "cache", pipeline)
    unet = pipeline.denoiser
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    model = cameo.wrap(unet, backbone=backbone)
    model.cameo_config.base_model = BASE
    saved = model.save_pretrained(tmp_path / "adapter")
    again = cameo.from_pretrained(saved, cache_dir=tmp_path / "cache", local_files_only=True)
    mine, theirs = unwrap_peft(model.base_model).state_dict(), unwrap_peft(again.base_model).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises((OSError, ValueError), match=BASE):
        cameo.from_pretrained(saved, cache_dir=tmp_path / "cache", local_files_only=True)


def test_a_backbone_without_such_options_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller did not say is not passed on: an adapter of a third party may know revisions only."""
    pipeline = build_pipeline("cat3d", "transformer-tiny")
    kind = type(get_backbone("cat3d"))
    monkeypatch.setattr(kind, "load", lambda self, name, *, revision=None: pipeline)
    unet = build_pipeline("cat3d", "transformer-tiny").denoiser
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    model = cameo.wrap(unet, backbone="cat3d")
    model.cameo_config.base_model = BASE
    assert cameo.from_pretrained(model.save_pretrained(tmp_path)).base_model is pipeline.denoiser


@pytest.mark.parametrize("module", ["cameo.hub.save_load", "cameo.model"])
def test_examples_wrap_what_can_be_supervised(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[cameo.CameoModel] = []
    wrap = cameo.wrap

    def recording(*args: Any, **kwargs: Any) -> cameo.CameoModel:
        models.append(wrap(*args, **kwargs))
        return models[-1]

    documented = importlib.import_module(module)
    monkeypatch.setattr(cameo, "wrap", recording)
    assert doctest.testmod(documented, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).failed == 0
    models = [model for model in models if model.cameo_config.backbone]  # others are described layer by layer
    assert models
    for model in models:
        args, kwargs = get_backbone(str(model.cameo_config.backbone)).example_inputs(unwrap_peft(model.base_model))
        side = args[0].shape[-1] // (model.supervised_layers[0].stride // 4)  # 4 pixels per latent cell
        index = torch.full((1, 2, 2, side * side), -1)
        index[0, 0, 1] = torch.arange(side * side)
        model.base_model(*args, **kwargs)
        with model.capture() as captured:
            model.base_model(*args, **kwargs)
        (layer,) = model.supervised_layers
        query, _, local = model.split(layer, captured[layer.path], Correspondence(index, ((side, side),) * 2))
        assert query.shape[2] == 2
        assert int(local.matched.sum()) == side * side


def test_a_checkpoint_holds_safetensors_and_json_as_the_guide_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    page = (Path(__file__).parents[2] / "docs" / "guides" / "saving.md").read_text(encoding="utf-8")
    assert "`checkpoint-N` folders of a training, which hold safetensors and JSON" in page
    with fresh_accelerate():
        make_trainer(tmp_path, max_train_steps=1, checkpointing_steps=1).train()
    files = [path for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    assert any(path.suffix == ".safetensors" for path in files)
