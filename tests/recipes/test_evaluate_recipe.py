"""What `recipes/evaluate.py` loads, measures and writes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cameo.errors import DataError
from cameo.training.data import build_dataset
from cameo.training.runs import data_settings, load_evaluated
from cameo.training.settings import TrainingConfig, load_config, save_config
from cameo.training.setup import load_pipeline, wrap_denoiser
from cameo.wrap import CameoModel
from tests.helpers.training_runs import RECIPES, SETTINGS, fresh_accelerate, make_config, make_trainer, scene_cache


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    with fresh_accelerate():
        yield


def test_data_settings_are_those_that_decide_the_samples() -> None:
    base = TrainingConfig()
    for change in ({"resolution": 32}, {"data_seed": 1}, {"num_validation_scenes": 8}, {"max_overlap": 0.8}):
        assert data_settings(replace(base, **change)) != data_settings(base)
    for change in ({"learning_rate": 1.0}, {"layer": 3}, {"seed": 5}, {"loss_weight": 0.0}, {"num_scenes": 3}):
        assert data_settings(replace(base, **change)) == data_settings(base)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A LoRA run and a full run of two steps each, with what the recipes save."""
    folder = tmp_path_factory.mktemp("runs")
    os.environ["CAMEO_CACHE"], before = scene_cache(), os.environ.get("CAMEO_CACHE")
    models = {}
    try:
        with fresh_accelerate():
            trainer = make_trainer(folder / "lora", max_train_steps=2, head="mlp")
            trainer.train()
            trainer.model.save_pretrained(folder / "lora" / "adapter")
            models["lora"] = trainer.model.eval()
        with fresh_accelerate():
            config = make_config(folder / "full", max_train_steps=2, use_ema=True)
            pipeline = load_pipeline(config)
            model = wrap_denoiser(pipeline, config)
            from cameo.training.trainer import Trainer

            Trainer(model, pipeline, build_dataset(config, "train"), config).train()
            model.save_pretrained(folder / "full" / "model", pipeline=pipeline)
            models["full"] = model.eval()
    finally:
        os.environ.pop("CAMEO_CACHE") if before is None else os.environ.update(CAMEO_CACHE=before)
    return {"folder": folder, **models}


def same_output(loaded: Any, expected: CameoModel) -> bool:
    from cameo.backbone import get_backbone

    args, kwargs = get_backbone("cat3d").example_inputs(expected.base_model)
    with torch.no_grad():
        outputs = [model.base_model(*args, **kwargs).sample for model in (loaded.model, expected)]
    return torch.equal(*outputs)


CONFIGS = RECIPES / "configs"


@pytest.mark.parametrize(
    ("name", "place", "trained_head"),
    [("lora", "checkpoint-2", True), ("lora", "adapter", False), ("full", "model", False)],
)
def test_what_a_run_saved_is_loaded_as_it_was(runs: Any, name: str, place: str, trained_head: bool) -> None:
    loaded = load_evaluated([], CONFIGS, checkpoint=str(runs["folder"] / name / place))
    assert same_output(loaded, runs[name])
    assert loaded.trained_head == trained_head
    assert loaded.config.resolution == 32  # of the run, not of the settings file
    assert loaded.facts["layers"] == loaded.model.cameo_config.layers
    assert not loaded.model.training
    if trained_head:
        ours, theirs = (model.alignment_heads.state_dict() for model in (loaded.model, runs[name]))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert load_evaluated(["num_views=3"], CONFIGS, checkpoint=str(runs["folder"] / name / place)).config.num_views == 3


def test_a_saved_model_keeps_its_layer(runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def probed(*_: Any) -> None:
        raise AssertionError("the layer is known, and must not be looked for again")

    monkeypatch.setattr("cameo.training.setup.probe_for", probed)
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-2"
    shutil.copytree(runs["folder"] / "lora" / "checkpoint-2", checkpoint)
    config = load_config(runs["folder"] / "lora" / "config.yaml", ["layer=auto"])
    save_config(config, run / "config.yaml")
    loaded = load_evaluated([], CONFIGS, checkpoint=str(checkpoint))
    assert loaded.config.layer == "auto"
    assert loaded.facts["layers"] == runs["lora"].cameo_config.layers
    assert same_output(loaded, runs["lora"])
    for given in ("layer=auto", "--layer=0", "head=mean"):
        with pytest.raises(ValueError, match=r"checkpoint=.* has its own in cameo_config.json; leave it out"):
            load_evaluated([given], CONFIGS, checkpoint=str(checkpoint))


def test_the_layer_of_a_base_is_looked_for_with_auto(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cameo.training.layer_choice.PROBED_SAMPLES", 2)
    settings = [f"config={runs['folder'] / 'lora' / 'config.yaml'}", "layer=auto"]
    with warnings.catch_warnings(action="ignore"):  # the ranking of fresh weights is not above chance
        loaded = load_evaluated(settings, CONFIGS)
    choice = loaded.model.cameo_config.layer_choice
    assert choice is not None
    assert loaded.facts["layers"] == [choice["layer"]]


def test_checkpoints_with_an_average_say_that_they_hold_other_weights(runs: Any) -> None:
    with pytest.warns(UserWarning, match="not the averaged ones of use_ema=true"):
        loaded = load_evaluated([], CONFIGS, checkpoint=str(runs["folder"] / "full" / "checkpoint-2"))
    assert not same_output(loaded, runs["full"])


def test_a_head_that_no_loss_trained_is_not_read(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_train_steps=1, loss_weight=0.0)
    trainer.train()
    assert not load_evaluated([], CONFIGS, checkpoint=str(tmp_path / "checkpoint-1")).trained_head


def test_a_base_and_a_plain_pipeline_are_evaluated_as_a_training_starts_from_them(runs: Any, tmp_path: Path) -> None:
    base = [f"preset_options={json.dumps(SETTINGS['preset_options'])}", "preset=tiny"]
    base += ["pretrained_model_name_or_path=null", "resolution=32", "head=mlp"]
    loaded = load_evaluated(base, CONFIGS)
    assert not loaded.trained_head
    loaded.pipeline.save_pretrained(str(tmp_path))
    again = load_evaluated(["head=mean"], CONFIGS, checkpoint=str(tmp_path))
    assert same_output(again, loaded.model)
    assert again.trained_head  # the mean of the heads has nothing to train


def test_folders_that_cannot_be_loaded_say_why(runs: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither cameo_config.json nor model_index.json"):
        load_evaluated([], CONFIGS, checkpoint=str(tmp_path))
    with pytest.raises(DataError, match="no such folder, and not the id of a Hub repository"):
        load_evaluated([], CONFIGS, checkpoint=str(tmp_path / "no" / "such" / "folder"))
    runs["lora"].save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"an adapter on fresh weights \(preset:tiny\), which are not saved here"):
        load_evaluated([], CONFIGS, checkpoint=str(tmp_path / "elsewhere"))
    settings = f"config={runs['folder'] / 'lora' / 'config.yaml'}"
    assert same_output(load_evaluated([settings], CONFIGS, checkpoint=str(tmp_path / "elsewhere")), runs["lora"])
    other = [
        settings,
        "preset=null",
        "pretrained_model_name_or_path=bundled:cat3d-transformer-tiny",
        "preset_options={}",
    ]
    with (
        pytest.warns(UserWarning, match=r"trained on preset:tiny, and is put on bundled:cat3d-transformer-tiny"),
        pytest.raises(ValueError, match="base_model:"),
    ):
        load_evaluated(other, CONFIGS, checkpoint=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="is of backbone 'cat3d', got backbone=sv3d"):
        load_evaluated(["backbone=sv3d"], CONFIGS, checkpoint=str(tmp_path / "elsewhere"))


def recipe() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_recipe", RECIPES / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_recipe_evaluates_and_compares(runs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["num_samples=2", "num_sampled=1", "num_inference_steps=1", "lpips=null", "noise_levels=[0.5,1.0]"]
    small += ["attention_layers=none", "fid=false"]
    main = recipe().main
    for name, place in (("before", None), ("after", "checkpoint-2")):
        chosen = [f"config={runs['folder'] / 'lora' / 'config.yaml'}"] if place is None else []
        chosen += [f"checkpoint={runs['folder'] / 'lora' / place}"] if place else []
        main([*chosen, *small, f"output={tmp_path / name}"])
        assert (tmp_path / name / "table.md").read_text().splitlines()[3] in capsys.readouterr().out
    result = json.loads((tmp_path / "after" / "result.json").read_text())
    assert result["settings"]["num_samples"] == 2
    assert result["settings"]["metric_depth"] is True
    assert result["data"]["resolution"] == 32
    assert result["run"]["backbone"] == "cat3d"
    assert result["run"]["checkpoint"].endswith("checkpoint-2")

    with pytest.warns(UserWarning, match="common scenes|of one scene"):
        main(["--compare", str(tmp_path / "before"), str(tmp_path / "after"), f"output={tmp_path / 'both'}"])
    table = (tmp_path / "both" / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert table.splitlines()[0] == "| | before | after | difference [95 %] | n |"
    assert "denoising loss" in table
    with Image.open(tmp_path / "both" / "comparison.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    result["data"]["resolution"] = 64
    (tmp_path / "other.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"data.resolution is 32 in one and 64 in the other"):
        main(["--compare", str(tmp_path / "before"), str(tmp_path / "other.json")])


def test_recipe_names_the_nearest_setting() -> None:
    with pytest.raises(ValueError, match="unknown setting 'num_sample': did you mean"):
        recipe().main(["num_sample=3"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("output", "argument 'output': expected key=value"),
        ("--checkpoint", "--checkpoint: expected a value after it"),
        ("checkpoint_revision", "argument 'checkpoint_revision': expected key=value"),
    ],
)
def test_recipe_does_not_pass_over_an_option_without_a_value(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe().main([option])
