"""The protocol of the evaluation: the same numbers each time, the right ones, and why one is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cameo.attention.layout import TokenLayout
from cameo.data import EmbeddedScenes, MultiViewDataset, collate
from cameo.errors import DataError, WeightsUnavailable
from cameo.evaluation.consistency import EpipolarPair
from cameo.evaluation.protocol import evaluate, sample_targets
from cameo.evaluation.report import result_table
from cameo.evaluation.validation import validate
from cameo.probing.denoising import covisible_pixels, sample_batches
from cameo.probing.mode import evaluation_mode
from tests.helpers.evaluations import SMALL, UNSAMPLED
from tests.helpers.planted_attention import Painter, joined
from tests.helpers.training_runs import scene_cache


def figures(result: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, float]]]:
    for section, part in result["sections"].items():
        for metric, values in part["per_sample"].items():
            yield section, metric, values


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
        # Rounding may decide an argmax between two equal tokens.
        tolerance = 0.01 if section == "attention" else 1e-4
        assert list(values.values()) == pytest.approx(list(others.values()), abs=tolerance), metric
        pairs += len(values)
    assert pairs > 50


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
    # Black views agree with each other, so that only pairs with the reference view show the error.
    pairs = black["consistency"]["details"]["warped"]
    assert {pair["error"] > 0 for pair in pairs} == {True, False}
    assert black["consistency"]["mean"]["epipolar_consistent"] in (0, None)


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
