"""The estimate of a step against real ones: what is held, what a step adds, and every count."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.common.measuring import peak_memory, peak_resident
from benchmarks.step.real_step import measure_step
from cameo.errors import DataError
from cameo.estimate import StepEstimate
from cameo.estimate import estimate_step as estimate
from cameo.estimate.tracking import Tracker
from cameo.recipes import CONFIGS
from cameo.training.runs import outlined_run
from cameo.training.settings import TrainingConfig, load_config
from cameo.training.setup import add_lora, load_pipeline, wrap_denoiser
from tests.helpers.training_runs import SETTINGS, fresh_accelerate, scene_cache

BACKBONES: dict[str, dict[str, Any]] = {
    "cat3d": {"num_views": 2},
    "mvdream": {"num_views": 2, "num_reference_views": 0},
    "sv3d": {"num_views": 3},
    "zero123plus": {"num_views": 7, "resolution": 32},
}
BOUND = 0.15  # of what a real step adds; the largest miss that is accepted without an explanation


def estimate_step(config: TrainingConfig, *, full: bool, device: str = "cpu") -> StepEstimate:
    return estimate(config, partial(outlined_run, full=full), device)


def settings(backbone: str = "cat3d", **changes: Any) -> TrainingConfig:
    common = {"backbone": backbone, "preset": "tiny", "resolution": 64, "train_batch_size": 1, "loss_weight": 0.1}
    return TrainingConfig(**{**common, **BACKBONES[backbone], **changes})


@pytest.mark.parametrize(("full", "changes"), [(True, {}), (False, {"gradient_checkpointing": True, "use_ema": True})])
def test_a_real_step_takes_what_was_said(full: bool, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    config = TrainingConfig(**{**SETTINGS, "resolution": 64, **changes})
    said = estimate_step(config, full=full)
    with fresh_accelerate():
        real = measure_step(config, full=full)
    assert sum(said.held.values()) == pytest.approx(real["held"], rel=0.01)
    assert said.beyond_held == pytest.approx(real["added"], rel=BOUND)
    assert (said.num_trained, said.parameters["denoiser"] + said.parameters["alignment heads"]) == (
        real["trained"],
        real["parameters"],
    )


@pytest.mark.parametrize("full", [pytest.param(True, marks=pytest.mark.slow), False], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_count_is_that_of_the_real_model(backbone: str, full: bool) -> None:
    config = settings(backbone, use_ema=True)
    with warnings.catch_warnings(action="ignore"):
        said, pipeline = estimate_step(config, full=full), load_pipeline(config)
        if full:
            pipeline.denoiser.requires_grad_(True)
        else:
            add_lora(pipeline.denoiser, config)
        model = wrap_denoiser(pipeline, config)
    assert said.parameters["denoiser"] == sum(one.numel() for one in model.base_model.parameters())
    assert said.parameters["alignment heads"] == sum(one.numel() for one in model.alignment_heads.parameters())
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert said.num_trained == trained
    assert said.held["trained weights"] == said.held["averaged weights"] == 4 * trained
    # AdamW keeps two numbers of each weight, and a number of steps of each tensor.
    tensors = sum(one.requires_grad for one in model.parameters())
    assert said.held["optimizer state"] == 8 * trained + 4 * tensors
    frozen = sum(one.nbytes for one in (*model.parameters(), *model.buffers()) if not one.requires_grad)
    assert said.held["frozen weights"] == frozen


def test_settings_that_save_memory_save_some() -> None:
    step = estimate_step(settings(), full=True)
    checkpointed = estimate_step(settings(gradient_checkpointing=True), full=True)
    # Of several samples, beside whose activations the weights that autocast copies count little.
    four, half = (
        estimate_step(settings(mixed_precision=precision, train_batch_size=4), full=True)
        for precision in ("no", "bf16")
    )
    double = estimate_step(settings(train_batch_size=2), full=True)
    assert checkpointed.kept < 0.5 * step.kept
    assert half.kept < 0.9 * four.kept
    assert double.kept == pytest.approx(2 * step.kept, rel=0.1)
    assert double.flops["forward"] == 2 * step.flops["forward"]
    assert checkpointed.flops["forward"] == step.flops["forward"]
    assert 1.2 < checkpointed.total_flops / step.total_flops < 1.4  # one more forward pass, of three
    assert step.peak == sum(step.at_peak.values())


def test_few_queries_are_counted() -> None:
    rows = 2 * 64  # of two views with 8 x 8 tokens, each with the other view
    whole, ten, one = (estimate_step(settings(max_queries=most), full=True) for most in (None, 10, 1))
    assert (whole.total_flops - ten.total_flops) * (rows - 1) == (whole.total_flops - one.total_flops) * (rows - 10)
    assert whole.total_flops > ten.total_flops
    assert one.peak <= ten.peak <= whole.peak


def test_accumulated_gradients_stay_and_their_work_is_counted() -> None:
    one, four = (estimate_step(settings(gradient_accumulation_steps=steps), full=True) for steps in (1, 4))
    assert four.total_flops == 4 * one.total_flops
    assert four.peaks["forward"] - one.peaks["forward"] >= 4 * one.num_trained


def test_layer_norms_are_wider_under_the_autocast_of_a_gpu() -> None:
    config = settings(mixed_precision="bf16")
    on_cpu, on_gpu = (estimate_step(config, full=True, device=device) for device in ("cpu", "cuda"))
    assert on_gpu.kept > 1.1 * on_cpu.kept
    assert on_gpu.held["batch"] == 2 * on_cpu.held["batch"]


def test_a_tracker_agrees_with_the_profiler_and_counts_products() -> None:
    layers = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    inputs = torch.randn(1000, 64)

    def step() -> None:
        layers(inputs).square().mean().backward()

    measured = peak_memory(step)
    layers.zero_grad(set_to_none=True)
    with Tracker() as tracker:
        tracker.see_all([*layers.parameters(), inputs], "before")
        tracker.reset()
        before = tracker.held
        step()
    assert tracker.peak - before == pytest.approx(measured, rel=0.01)
    product = 2 * 1000 * 64 * 256
    assert tracker.flops == 2 * product + 3 * product  # the inputs get no gradient


def test_nothing_is_allocated_for_a_released_model() -> None:
    config = load_config(CONFIGS / "lora_cat3d_sd21.yaml")
    outlined_run(settings(), full=False)  # imports what the other needs
    found = []
    grown = peak_resident(lambda: found.append(outlined_run(config, full=False)))
    (run,) = found
    assert sum(one.numel() for one in run.pipeline.vae.parameters()) == 83_653_863
    # Stable Diffusion 2.1 with 7 more input channels, and LoRA of rank 16 beside 64 + 32 projections and conv_in.
    frozen = sum(one.numel() for one in run.model.base_model.parameters() if not one.requires_grad)
    assert frozen == 865_910_724 + 320 * 7 * 9
    assert all(one.is_meta for one in run.model.base_model.parameters())
    assert grown is None or grown < 300e6  # its weights are 3.5 GB


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("lora_cat3d_sd21", marks=pytest.mark.slow),
        pytest.param("lora_mvdream_sd21", marks=pytest.mark.slow),
        pytest.param("lora_zero123plus_v12", marks=pytest.mark.long),
        pytest.param("lora_sv3d_p", marks=pytest.mark.long),
    ],
)
def test_released_sizes_are_computed_in_little_memory(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    estimate_step(settings(), full=False)
    found = []
    grown = peak_resident(lambda: found.append(estimate_step(config, full=False, device="cuda")))
    (step,) = found
    assert step.held["frozen weights"] > 1.7e9
    assert step.peak > 4e9
    assert grown is None or grown < 1e9
    with_less = estimate_step(replace(config, cache_latents=True), full=False, device="cuda")
    assert with_less.peaks["encoders"] < step.peaks["encoders"]


def test_an_unknown_release_says_how_to_get_its_settings() -> None:
    config = TrainingConfig(pretrained_model_name_or_path="somebody/model")
    with pytest.raises(DataError, match=r"somebody/model.*hf download somebody/model --include"):
        estimate_step(config, full=False)


def test_settings_that_do_not_fit_are_refused_as_in_a_training() -> None:
    with pytest.raises(ValueError, match="num_views=7"):
        estimate_step(settings("zero123plus", num_views=3), full=False)
