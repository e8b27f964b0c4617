"""The shared recipes on every backbone, with the settings that ship with it, shortened."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cameo
from cameo.backbone import get_backbone
from cameo.config import CameoConfig
from cameo.probing.denoising import ValidationSettings
from cameo.training import layer_choice, repa, setup
from cameo.training.settings import load_config, settings_file
from cameo.training.setup import load_pipeline
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import RECIPES, REPA, SHORT, fresh_accelerate, read_lines, scene_cache

# MVDream without an image: its shipped settings have one.
TEXT = {
    "pretrained_model_name_or_path": "null",
    "preset": "tiny",
    "camera_rig": "mvdream",
    "num_views": 4,
    "num_reference_views": 0,
}
# A backbone, and what is changed of its shipped settings.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero123plus": ("zero123plus", {}),
    "mvdream": ("mvdream", TEXT),
    "imagedream": ("mvdream", {}),
    "sv3d": ("sv3d", {}),
    "sv3d-temporal": ("sv3d", {"inflate": "false", "layer": "null", "camera_rig": "sv3d-orbit", "num_views": 5}),
}
every_run = pytest.mark.parametrize("name", RUNS)


def run(recipe: str, backbone: str, output: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    # One noise level of seven: the levels differ in their noise alone, and the tests of the evaluation cover all.
    monkeypatch.setattr(setup, "ValidationSettings", functools.partial(ValidationSettings, noise_levels=(1.0,)))
    monkeypatch.setattr(layer_choice, "PROBED_SAMPLES", 4)
    settings = {**SHORT, **changes, "output_dir": output}
    arguments = [f"backbone={backbone}", *(f"{name}={value}" for name, value in settings.items())]
    with fresh_accelerate():
        runpy.run_path(str(RECIPES / f"{recipe}_finetune.py"))["main"](arguments)
    return arguments


def check_finite(output: Path, name: str) -> None:
    steps = read_lines(output / "metrics.jsonl")
    assert len(steps) == SHORT["max_train_steps"]
    assert f"<h1>Report of {output.name}</h1>" in (output / "report.html").read_text()
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["alignment_loss"]) for entry in steps)
    supervised = [entry["supervised"] > 0 for entry in steps]
    # A temporal layer is supervised by the few matches that stay at their position, which a step may have none of.
    assert any(supervised) if name == "sv3d-temporal" else all(supervised)


@every_run
def test_lora_on_embedded_scenes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, changes = RUNS[name]
    arguments = run("lora", backbone, tmp_path, monkeypatch, **changes, num_validation_images=1)
    check_finite(tmp_path, name)
    assert (tmp_path / "pictures" / "views.png").is_file()
    found = json.loads((tmp_path / "validation.json").read_text())["with CAMEO"][-1]
    assert (found["psnr_covisible"] is None) == (name == "mvdream")  # it has no reference view
    assert (found["precision"] is None) == (name == "sv3d-temporal")  # one token per view

    # The adapter loads into a fresh base of the same seed and changes its output.
    config = load_config(settings_file("lora", RECIPES / "configs", arguments), arguments)
    saved = CameoConfig.load(tmp_path / "adapter")
    assert saved.inflate == config.inflate
    assert saved.normalize == ("all_views" if name == "sv3d-temporal" else "per_view")
    model = cameo.from_pretrained(tmp_path / "adapter", base_model=load_pipeline(config).denoiser)
    inputs = get_backbone(backbone).example_inputs(model.base_model)
    plain = load_pipeline(config).denoiser.eval()
    with torch.no_grad():
        outputs = [one(*inputs[0], **inputs[1]).sample for one in (model, plain)]
    assert not torch.equal(*outputs)
    tensors = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("unet.") for key in tensors)


@every_run
def test_lora_on_an_rgbd_sequence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, changes = RUNS[name]
    sequence = write_sequence(tmp_path / "office", frames=50)
    data = {"train_data_dir": sequence, "max_overlap": 0.99, "min_overlap": 0.1}
    told = pytest.warns(UserWarning, match=r"camera_rig=.* does not apply to .*office")
    with (
        told if "camera_rig" in changes else contextlib.nullcontext()
    ):  # a settings file's own rig gives way in silence
        run("lora", backbone, tmp_path / "out", monkeypatch, **changes, **data)
    check_finite(tmp_path / "out", name)


@every_run
def test_all_weights_from_scratch_with_cameo(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, changes = RUNS[name]
    inflate = {"inflate": "true"} if name == "sv3d" else {}
    run("full", backbone, tmp_path, monkeypatch, **{"loss_weight": 0.1, "lr_warmup_steps": 1, **changes, **inflate})
    check_finite(tmp_path, name)
    pipeline = get_backbone(backbone).load(str(tmp_path / "model"))
    assert get_backbone(backbone).recognizes(pipeline.denoiser)


def test_a_run_of_all_weights_with_repa_is_named_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repa, "PROJECTOR_WIDTH", 64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "test_vit has random weights")
        run("full", "cat3d", tmp_path, monkeypatch, **REPA, max_train_steps=1, loss_weight=0.1, lr_warmup_steps=0)
    assert list(json.loads((tmp_path / "validation.json").read_text())) == ["with REPA"]
    assert "negative cosine similarity" in (tmp_path / "report.html").read_text()
