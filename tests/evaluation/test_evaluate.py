"""The protocol of the evaluation, what it loads, and its recipe."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
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
from torch import Tensor

from cameo.attention.layout import TokenLayout
from cameo.data import EmbeddedScenes, MultiViewDataset, collate
from cameo.errors import DataError, WeightsUnavailable
from cameo.evaluation.consistency import EpipolarPair
from cameo.evaluation.protocol import EvaluationSettings, Section, evaluate, sample_targets
from cameo.evaluation.report import attention_figure, result_table, write_result
from cameo.evaluation.validation import validate
from cameo.probing.denoising import covisible_pixels, sample_batches
from cameo.probing.mode import evaluation_mode
from cameo.training.data import build_dataset
from cameo.training.runs import data_settings, evaluation_settings, load_evaluated
from cameo.training.settings import TrainingConfig, load_config, save_config
from cameo.training.setup import load_pipeline, wrap_denoiser
from cameo.wrap import CameoModel
from tests.evaluation.test_evaluation import Planted, joined
from tests.helpers.training_runs import RECIPES, SETTINGS, fresh_accelerate, make_config, make_trainer, scene_cache

SMALL = EvaluationSettings(
    num_samples=3,
    batch_size=3,
    noise_levels=(0.1, 0.5, 1.0),
    attention_levels=(0.5, 1.0),
    num_sampled=2,
    num_inference_steps=2,
    lpips=None,
)
UNSAMPLED = replace(SMALL, num_sampled=0)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    with fresh_accelerate():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[CameoModel, Any, MultiViewDataset]:
    os.environ["CAMEO_CACHE"], before = scene_cache(), os.environ.get("CAMEO_CACHE")
    try:
        config = make_config(tmp_path_factory.mktemp("model"), num_views=3)
        pipeline = load_pipeline(config)
        model = wrap_denoiser(pipeline, config).train()
        return model, pipeline, build_dataset(config, "validation")
    finally:
        os.environ.pop("CAMEO_CACHE") if before is None else os.environ.update(CAMEO_CACHE=before)


@pytest.fixture(scope="module")
def result(trained: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    return evaluate(*trained, SMALL)


def figures(result: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, float]]]:
    for section, part in result["sections"].items():
        for metric, values in part["per_sample"].items():
            yield section, metric, values


# 1. The same numbers each time, and the model as it was


def test_evaluation_is_a_pure_function_and_leaves_the_model_alone(trained: Any, result: dict[str, Any]) -> None:
    model, pipeline, data = trained
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    denoiser, state = pipeline.denoiser, torch.get_rng_state()
    torch.manual_seed(99)
    assert evaluate(model, pipeline, data, SMALL) == result
    torch.set_rng_state(state)
    evaluate(model, pipeline, data, UNSAMPLED)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert pipeline.denoiser is denoiser
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    other = evaluate(model, pipeline, data, replace(SMALL, noise_seed=1))
    for section in ("denoising", "novel_views"):
        assert other["sections"][section]["mean"] != result["sections"][section]["mean"]


def test_batch_size_does_not_matter(trained: Any, result: dict[str, Any]) -> None:
    apart = evaluate(*trained, replace(SMALL, batch_size=1))
    pairs = 0
    for (section, metric, values), (*same, others) in zip(figures(result), figures(apart), strict=True):
        assert [section, metric] == same
        assert values.keys() == others.keys()
        # Rounding: an argmax of the attention between two equal tokens may turn.
        tolerance = 0.01 if section == "attention" else 1e-4
        assert list(values.values()) == pytest.approx(list(others.values()), abs=tolerance), metric
        pairs += len(values)
    assert pairs > 50


# 2. The figures


def test_generated_views_match_an_independent_computation(trained: Any, result: dict[str, Any]) -> None:
    model, pipeline, data = trained
    section = result["sections"]["novel_views"]
    for index in range(2):
        batch = collate([data[index]])
        with evaluation_mode(model):
            generator = torch.Generator().manual_seed(SMALL.noise_seed + index)
            images = pipeline.sample(batch, num_inference_steps=2, generator=generator)[0]
        truth, seen = batch["images"][0, 1:], covisible_pixels(batch)[0, 1:]  # type: ignore[index]
        every, covisible = [], []
        for image, true, mask in zip(images, truth, seen, strict=True):
            squared = (image - true).square()
            every.append(-10 * math.log10(squared.mean()))
            covisible.append(-10 * math.log10(squared[mask.expand_as(squared)].mean()))
        key = batch["key"][0]  # type: ignore[index]
        assert section["per_sample"]["psnr"][key] == pytest.approx(sum(every) / 2, abs=1e-4)
        assert section["per_sample"]["psnr_covisible"][key] == pytest.approx(sum(covisible) / 2, abs=1e-4)
    for metric, values in section["per_sample"].items():
        assert section["mean"][metric] == pytest.approx(sum(values.values()) / 2)
    assert section["details"] == {"images": 4}


def test_denoising_and_attention_agree_with_the_validation(trained: Any, result: dict[str, Any]) -> None:
    denoising, found = result["sections"]["denoising"], validate(*trained, SMALL.validation())
    assert denoising["mean"]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    for name in ("psnr_covisible", "psnr_all"):
        assert denoising["mean"][name] == pytest.approx(found[name], abs=1e-5)
        assert denoising["details"]["by_level"][name]["1.0"] == pytest.approx(found[name], abs=1e-5)
    by_level = found["loss_by_level"]
    for band, level in (("low", "0.1"), ("mid", "0.5"), ("high", "1.0")):
        assert denoising["mean"][f"loss_{band}"] == pytest.approx(by_level[level], rel=1e-6)
    assert denoising["details"]["by_level"]["loss"] == pytest.approx(by_level, rel=1e-6)

    levels = replace(SMALL, noise_levels=SMALL.attention_levels).validation()
    precision = validate(*trained, levels)["precision"]
    path = trained[0].supervised_layers[0].path
    attention = result["sections"]["attention"]
    for readout, within in (("mean", 0), ("mean", 1), ("through_head", 1)):
        assert attention["mean"][f"{path} {readout}@{within}"] == pytest.approx(precision[f"{readout}@{within}"])
    details = attention["details"][path]["mean"]
    pairs = sum(one["pairs"] for one in details["by_angle"])
    hits = sum(one["pairs"] * one["precision"] for one in details["by_angle"] if one["pairs"])
    assert hits / pairs == pytest.approx(attention["mean"][f"{path} mean@1"])
    assert sum(details["by_level"].values()) / 2 == pytest.approx(attention["mean"][f"{path} mean@1"])


def test_views_of_another_number_of_samples_are_refused(trained: Any) -> None:
    sampled = sample_targets(*trained, replace(SMALL, num_sampled=1))
    with pytest.raises(ValueError, match="sampled: expected num_sampled=2 samples, got 1"):
        evaluate(*trained, replace(SMALL, num_samples=1, attention_layers="none"), sampled=sampled)


def test_bands_without_a_level_are_noted(trained: Any) -> None:
    found = evaluate(*trained, replace(UNSAMPLED, noise_levels=(1.0,), attention_layers="none"))
    section = found["sections"]["denoising"]
    assert section["mean"]["loss_low"] is None
    assert section["notes"]["loss_mid"].startswith("no level of noise_levels=(1.0,)")
    assert section["mean"]["loss_high"] == section["mean"]["loss"]


def test_all_layers_are_measured_and_an_untrained_head_is_left_out(trained: Any) -> None:
    model = trained[0]
    settings = replace(UNSAMPLED, attention_layers="all", attention_levels=(1.0,), metric_depth=True, num_samples=1)
    section = evaluate(*trained, settings, trained_head=False)["sections"]["attention"]
    assert list(section["details"]) == [layer.path for layer in model.attention_layers]
    assert not any("through_head" in name for name in section["mean"])
    assert "head was not trained" in section["notes"]["through_head"]
    supervised = model.supervised_layers[0].path
    other = next(layer.path for layer in model.attention_layers if layer.path != supervised)
    assert f"{supervised} best_head@1" in section["mean"]
    assert f"{other} best_head@1" not in section["mean"]
    within = f"{other} mean@2cm"
    assert 0 <= section["mean"][within] <= section["mean"][f"{other} ceiling@2cm"] <= 1


class Painter(Planted):
    """Attends to the true matches; predicts and generates the true images plus `off`, or the views in reverse."""

    off, reverse = 0.0, False

    def painted(self, images: Tensor) -> Tensor:
        return (images.flip(1) if self.reverse else images + self.off).clamp(0, 1)

    def predict_clean(self, output: Any, inputs: Any) -> Tensor:
        return self.painted(inputs.noisy)

    def sample(self, batch: Any, **options: Any) -> Tensor:
        return self.painted(batch["images"][:, int(batch["num_reference_views"]) :])

    @property
    def denoiser(self) -> Any:
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "denoiser":  # a module that holds itself would have no end
            super().__setattr__(name, value)


@pytest.fixture(scope="module")
def rooms() -> MultiViewDataset:
    scenes = EmbeddedScenes(
        num_scenes=2, views_per_scene=6, size=(48, 48), cache_dir=Path(scene_cache()) / "rooms", progress=False
    )
    return MultiViewDataset(scenes, num_views=3, min_overlap=0.4)


def paint(data: Any, **changes: Any) -> dict[str, Any]:
    painter = Painter(TokenLayout("b (v h w)"), joined)
    for name, value in changes.items():
        setattr(painter, name, value)
    return evaluate(painter.wrapped(), painter, data, replace(SMALL, num_samples=2))["sections"]


def test_a_perfect_model_has_perfect_figures(rooms: MultiViewDataset) -> None:
    found = paint(rooms)
    views, warped = found["novel_views"]["mean"], found["consistency"]["mean"]
    assert views["psnr"] == views["psnr_covisible"] == found["denoising"]["mean"]["psnr_all"] == 100
    assert views["ssim"] == pytest.approx(1)
    assert warped["warp_error"] == warped["warp_error_truth"] > 0
    assert warped["warp_psnr"] == warped["warp_psnr_truth"]
    assert found["attention"]["mean"]["attn mean@0"] == 1
    assert found["attention"]["mean"]["attn chance@0"] == pytest.approx(1 / 16)


def test_degenerate_models_have_the_figures_they_deserve(rooms: MultiViewDataset) -> None:
    perfect, black, reversed_ = (paint(rooms, **change) for change in ({}, {"off": -1.0}, {"reverse": True}))
    truth = torch.cat([rooms[index]["images"][1:].flatten(1) for index in range(2)])
    expected = float(-10 * truth.square().mean(1).log10().mean())
    assert black["novel_views"]["mean"]["psnr"] == pytest.approx(expected, abs=1e-4)
    assert black["denoising"]["mean"]["loss"] == 0.25
    for worse in (black, reversed_):
        for metric in ("psnr", "ssim"):
            assert worse["novel_views"]["mean"][metric] < perfect["novel_views"]["mean"][metric]
        assert worse["consistency"]["mean"]["warp_error"] > 2 * perfect["consistency"]["mean"]["warp_error"]
        assert worse["consistency"]["mean"]["warp_error_truth"] == perfect["consistency"]["mean"]["warp_error_truth"]
    # Black views agree with each other: only pairs with the reference tell.
    pairs = black["consistency"]["details"]["warped"]
    assert {pair["error"] > 0 for pair in pairs} == {True, False}
    assert black["consistency"]["mean"]["epipolar_consistent"] in (0, None)


# 3. What is missing says why


def test_sections_that_are_not_measured_say_why(trained: Any, rooms: MultiViewDataset) -> None:
    sections = evaluate(*trained, replace(UNSAMPLED, attention_layers="none", num_samples=1))["sections"]
    for name in ("novel_views", "consistency"):
        assert sections[name] == {
            "mean": {},
            "per_sample": {},
            "notes": {"all": "num_sampled=0: no view was generated"},
            "details": {},
        }
    assert sections["attention"]["notes"] == {"all": "attention_layers=none: left out"}
    settings = replace(SMALL, consistency=False, num_samples=1, num_sampled=1, attention_layers="none")
    sections = evaluate(*trained, settings)["sections"]
    assert sections["consistency"]["notes"] == {"all": "consistency=false: left out"}
    assert sections["novel_views"]["notes"] == {"lpips": "lpips=null: left out"}

    without = MultiViewDataset(rooms.source, num_views=3, num_reference_views=0)
    found = paint(without)
    for name in ("novel_views", "consistency"):
        assert found[name]["notes"]["all"].startswith("num_reference_views=0: no reference view says")
    assert found["denoising"]["mean"]["psnr_covisible"] is None
    assert "no reference view that could see" in found["denoising"]["notes"]["psnr_covisible"]
    assert found["denoising"]["mean"]["psnr_all"] == 100
    assert "psnr_covisible" not in found["denoising"]["details"]["by_level"]


def test_metrics_that_cannot_be_had_say_why(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: Any) -> None:
        raise WeightsUnavailable("weights of it are not reachable, skipped")

    def not_installed(*_: Any, **__: Any) -> None:
        raise ImportError("pip install cameo-diffusion[evaluation]")

    monkeypatch.setattr("cameo.evaluation.generated.Lpips", unavailable)
    monkeypatch.setattr("cameo.evaluation.generated.Fid", unavailable)
    monkeypatch.setattr("cameo.evaluation.generated.tsed", not_installed)
    settings = replace(SMALL, lpips="vgg", fid=True, num_samples=1, attention_layers="none")
    result = evaluate(*trained, settings)
    views, consistency = (result["sections"][name] for name in ("novel_views", "consistency"))
    for name in ("lpips_vgg", "fid"):
        assert views["mean"][name] is None
        assert views["notes"][name] == "weights of it are not reachable, skipped"
    assert consistency["notes"]["epipolar"] == "skipped: pip install cameo-diffusion[evaluation]"
    assert "epipolar_consistent" not in consistency["mean"]
    assert consistency["mean"]["warp_error"] is not None
    table = result_table(result)
    assert "| LPIPS of generated views, VGG ↓ | - | - |" in table
    assert "- novel_views, lpips_vgg: weights of it are not reachable, skipped" in table


def test_distances_that_exist_are_means_per_sample(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def distance(images: Tensor, truth: Tensor) -> Tensor:
        return torch.arange(len(images)) + 1.0

    monkeypatch.setattr("cameo.evaluation.generated.Lpips", lambda trunk: distance)
    result = evaluate(*trained, replace(SMALL, lpips="alex", attention_layers="none"))
    assert list(result["sections"]["novel_views"]["per_sample"]["lpips_alex"].values()) == [1.5, 1.5]


def test_epipolar_figures_are_those_of_the_pairs_that_can_be_judged(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [[(True, 1.0), (False, 3.0), (None, 50.0), (False, None)], [(None, 50.0), (None, None)]]

    def judged(*_: Any, **__: Any) -> list[EpipolarPair]:
        found = samples[next(calls)]
        return [EpipolarPair(0, 1, 0, 5.0, (20, 20), 12, distance, told, None) for told, distance in found]

    calls = iter(range(2))
    monkeypatch.setattr("cameo.evaluation.generated.tsed", judged)
    section = evaluate(*trained, replace(SMALL, attention_layers="none"))["sections"]["consistency"]
    assert section["mean"]["epipolar_distance"] == 2
    assert section["mean"]["epipolar_consistent"] == pytest.approx(1 / 3)
    assert len(section["per_sample"]["epipolar_distance"]) == 1
    assert section["details"]["epipolar_pairs"] == [3, 6]
    for name in ("epipolar_consistent", "epipolar_distance"):
        assert section["notes"][name].startswith("no two views whose true images are found consistent")
        assert section["notes"][name].endswith("in 1 of 2 samples")


def test_a_broken_model_is_refused(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pipeline, data = trained
    broken = math.nan * torch.ones(1, 2, 3, 32, 32)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "sample", lambda *_, **__: broken)
        with pytest.raises(
            ValueError, match=f"model: generates values that are not finite for sample {data[0]['key']}"
        ):
            sample_targets(model, pipeline, data, SMALL)
    parameter = next(model.base_model.parameters())
    before = parameter.data.clone()
    try:
        parameter.data.fill_(math.nan)
        with pytest.raises(
            ValueError, match=f"prediction for sample {data[0]['key']} at noise level 0.1 is not finite"
        ):
            evaluate(model, pipeline, data, UNSAMPLED)
    finally:
        parameter.data.copy_(before)


def test_depth_without_measurement_does_not_hide_the_sample(rooms: MultiViewDataset) -> None:
    def data(unmeasured: float) -> Any:
        depth = rooms[0]["depth"].clone()
        depth[:, :, :5] = unmeasured
        return [{**rooms[0], "depth": depth}]

    painter = Painter(TokenLayout("b (v h w)"), joined)
    settings = replace(UNSAMPLED, num_samples=1, attention_layers="none")
    zero, *others = (evaluate(painter.wrapped(), painter, data(value), settings) for value in (0.0, math.nan, math.inf))
    depth = data(0.0)[0]["depth"]
    assert zero["data"]["samples"][rooms[0]["key"]][1] == pytest.approx(float(depth.mean()), abs=1e-4)
    for other in others:
        assert other == zero


def test_a_sample_without_a_value_is_counted_out() -> None:
    section = Section()
    section.add("psnr", ["a", "b", "c"], [10.0, math.nan, None], missing="nothing seen")
    assert section.per_sample == {"psnr": {"a": 10.0}}
    assert section.mean == {"psnr": 10.0}
    assert section.notes == {"psnr": "nothing seen in 2 of 3 samples"}
    section.add("ssim", ["a"], [None], missing="nothing seen")
    assert section.mean["ssim"] is None
    section.add("loss", ["a", "b"], [1.0, math.inf])
    assert section.mean["loss"] == 1
    assert section.notes["loss"] == "not finite in 1 of 2 samples"


def test_samples_that_repeat_get_names_of_their_own(rooms: MultiViewDataset) -> None:
    data = [rooms[0], rooms[1], rooms[0], rooms[0]]
    keys = [key for _, batch in sample_batches(data, 4, 3, torch.device("cpu")) for key in batch["key"]]  # type: ignore[arg-type]
    first, second = rooms[0]["key"], rooms[1]["key"]
    assert keys == [first, second, f"{first}#2", f"{first}#3"]
    with pytest.raises(DataError, match="expected at least num_samples=5 samples, got 4; lower num_samples"):
        list(sample_batches(data, 5, 3, torch.device("cpu")))  # type: ignore[arg-type]
    painter = Painter(TokenLayout("b (v h w)"), joined)
    with pytest.raises(DataError, match="expected at least num_sampled=5 samples, got 4; lower num_sampled"):
        sample_targets(painter.wrapped(), painter, data, replace(SMALL, num_sampled=5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 0}, "num_samples: expected at least 1, got 0"),
        ({"num_sampled": -1}, "num_sampled: expected at least 0, got -1"),
        ({"num_inference_steps": 0}, "num_inference_steps: expected at least 1, got 0"),
        ({"noise_levels": ()}, r"noise_levels: expected different levels between 0 and 1, got \(\)"),
        ({"noise_levels": (0.5, 1.5)}, r"noise_levels: expected a share in \[0, 1\], got 1.5"),
        ({"noise_levels": (1.0, 1.0)}, "noise_levels: expected different levels"),
        ({"attention_levels": (math.nan,)}, "attention_levels: expected a finite number, got nan"),
        ({"noise_levels": (0.5,)}, r"noise_levels: expected one at or above high_noise=0.95, got \(0.5,\)"),
        ({"noise_bands": (0.7, 0.3)}, r"noise_bands: expected two rising levels, got \(0.7, 0.3\)"),
        ({"attention_layers": "al"}, "unknown attention_layers 'al': did you mean 'all'?"),
        ({"lpips": "alexnet"}, "unknown lpips 'alexnet': did you mean 'alex'?"),
        ({"epipolar_threshold": 0.0}, "epipolar_threshold: expected a number > 0, got 0.0"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**change)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_samples": "many"}, "num_samples: expected a whole number, got 'many'"),
        ({"num_samples": "1.5"}, "num_samples: expected a whole number, got '1.5'"),
        ({"noise_levels": "0.5"}, r"noise_levels: expected one at or above high_noise=0.95, got \(0.5,\)"),
        ({"noise_levels": "[high]"}, r"noise_levels: expected a list \[a, b\], got '\[high\]'"),
        ({"noise_levels": "[]"}, r"noise_levels: expected different levels between 0 and 1, got \(\)"),
        ({"noise_levels": "[0.5, 1.5]"}, r"noise_levels: expected a share in \[0, 1\], got 1.5"),
        ({"noise_bands": "[0.5]"}, r"noise_bands: expected a list \[a, b\], got '\[0.5\]'"),
        ({"lpips": "3"}, "unknown lpips '3': Known: alex, squeeze, vgg"),
        ({"fid": "often"}, "fid: expected true or false, got 'often'"),
    ],
)
def test_settings_of_the_wrong_type(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation_settings(given, TrainingConfig())


def test_settings_from_the_command_line(tmp_path: Path) -> None:
    given = {"noise_levels": "[0.5,1]", "guidance_scale": "2", "lpips": "null", "fid": "true"}
    settings = evaluation_settings(given, TrainingConfig())
    assert settings == EvaluationSettings(
        noise_levels=(0.5, 1), guidance_scale=2.0, lpips=None, fid=True, metric_depth=True
    )
    assert evaluation_settings({}, TrainingConfig(data_format="bare_rooms")).metric_depth
    assert not evaluation_settings({}, TrainingConfig(camera_rig="mvdream", num_views=4)).metric_depth
    assert evaluation_settings({"metric_depth": "true"}, TrainingConfig(data_format="objects")).metric_depth


def test_data_settings_are_those_that_decide_the_samples() -> None:
    base = TrainingConfig()
    for change in ({"resolution": 32}, {"data_seed": 1}, {"num_validation_scenes": 8}, {"max_overlap": 0.8}):
        assert data_settings(replace(base, **change)) != data_settings(base)
    for change in ({"learning_rate": 1.0}, {"layer": 3}, {"seed": 5}, {"loss_weight": 0.0}, {"num_scenes": 3}):
        assert data_settings(replace(base, **change)) == data_settings(base)


# 4. What is loaded


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
    with warnings.catch_warnings(action="ignore"):  # fresh weights have nothing to tell
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


# 5. Files and the recipe


def recipe() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_recipe", RECIPES / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_files_of_a_result(trained: Any, result: dict[str, Any], tmp_path: Path) -> None:
    files = write_result(result, tmp_path, sampled=sample_targets(*trained, SMALL))
    names = ["attention.png", "denoising.png", "result.json", "samples.png", "scenes.png", "table.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in files) == names
    assert json.loads((tmp_path / "result.json").read_text()) == result
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(10**6)) > 20, path  # not blank
    rows = (tmp_path / "table.md").read_text().splitlines()
    loss = result["sections"]["denoising"]["mean"]["loss"]
    assert f"| denoising loss, fixed noise ↓ | {loss:.4f} | 3 |" in rows
    unsampled = copy.deepcopy(result)
    for name in ("novel_views", "consistency"):
        unsampled["sections"][name]["per_sample"] = {}
    write_result(unsampled, tmp_path)
    assert not (tmp_path / "scenes.png").exists()
    assert not (tmp_path / "samples.png").exists()
    unsampled["sections"]["attention"]["details"] = {}
    assert attention_figure(unsampled) is None


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
