"""What a run is supervised with: controls, noise and schedules, for CAMEO and REPA alike."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cameo import Correspondence
from cameo.attention.capture import AttentionCapture
from cameo.config import CameoConfig
from cameo.correspondence.features import FeatureExtractor
from cameo.data import collate
from cameo.data.batches import match_batch
from cameo.errors import DataError
from cameo.training.checkpoints.verify import read_state, write_state
from cameo.training.data import noisy_inputs, step_generator
from cameo.training.settings import TrainingConfig
from cameo.training.settings.config import CHANGEABLE
from cameo.training.setup import load_pipeline, planned_runs, wrap_denoiser
from cameo.training.supervision import (
    PROJECTOR_FILE,
    alignment_weight,
    drop_low_noise,
    matches_of_next_sample,
    noisy_depth,
    random_matches,
)
from cameo.training.trainer import Trainer
from tests.helpers import training_runs
from tests.helpers.training_runs import FEATURES, REPA, make_config, same_files

pytestmark = pytest.mark.usefixtures("small_runs_with_features")


def make_trainer(output_dir: Path, **changes: Any) -> Trainer:
    """LoRA on the queries alone: putting it on more is half of such a short run's time."""
    return training_runs.make_trainer(output_dir, target_modules=["to_q"], **changes)


def history(trainer: Trainer) -> list[dict[str, float]]:
    return trainer.train().history()


def supervised(trainer: Trainer) -> list[float]:
    return [entry["supervised"] for entry in history(trainer)]


def match_with(
    seed: int = 0, batch: int = 3, token_grids: tuple[tuple[int, int], ...] = ((2, 3), (4, 4))
) -> Correspondence:
    """Random matches between views with grids of their own, two thirds of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    views, tokens = len(token_grids), max(h * w for h, w in token_grids)
    index = torch.full((batch, views, views, tokens), -1)
    for i, j in ((i, j) for i in range(views) for j in range(views) if i != j):
        count, keys = math.prod(token_grids[i]), math.prod(token_grids[j])
        index[:, i, j, :count] = torch.randint(-(keys // 2), keys, (batch, count), generator=generator).clamp(min=-1)
    distance = torch.rand(index.shape, generator=generator)
    return Correspondence(index, token_grids, match_weight=distance * 2, distance=distance)


# ---- when


@pytest.mark.parametrize(
    ("schedule", "share"),
    [("constant", lambda x: 1), ("linear", lambda x: 1 - x), ("cosine", lambda x: math.cos(math.pi * x / 2) ** 2)],
)
def test_the_weight_decays_to_zero_at_the_end(schedule: str, share: Callable[[float], float]) -> None:
    config = TrainingConfig(loss_weight=0.3, weight_schedule=schedule, max_train_steps=8, alignment_until=7)
    expected = [0.3 * share(step / 8) for step in range(7)] + [0.0]
    assert [alignment_weight(config, step) for step in range(8)] == pytest.approx(expected)
    assert alignment_weight(replace(config, loss_weight=0.0), 0) == 0


@pytest.mark.parametrize("settings", [{}, REPA])
def test_the_decayed_weight_is_what_the_gradient_gets(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The schedule counts steps, of which each has two micro steps."""
    options = {"max_train_steps": 4, "gradient_accumulation_steps": 2, "loss_weight": 0.5, **settings}
    trainer = make_trainer(tmp_path, **options, weight_schedule="linear")
    dataset, found = trainer.dataset, []
    for micro_step in (1, 4):
        batch = collate([dataset[0], dataset[1]])
        loss, denoising, alignment = trainer._losses(trainer._prepare(batch, micro_step), None)
        found.append(((loss - denoising) / alignment).item())
    assert found == pytest.approx([0.5, 0.25], rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"correspondence_in": "worker"}, REPA])
def test_nothing_is_matched_once_the_alignment_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    calls = {"match": 0, "features": 0, "capture": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr("cameo.data.batches.match_batch", counted("match", match_batch))
    monkeypatch.setattr(FeatureExtractor, "forward", counted("features", FeatureExtractor.forward))
    trainer = make_trainer(tmp_path, alignment_until=2, max_train_steps=4, **settings)
    monkeypatch.setattr("cameo.checks.observed_forward.AttentionCapture", counted("capture", AttentionCapture))
    found = history(trainer)
    assert [entry["supervised"] > 0 for entry in found] == [True, True, False, False]
    assert [entry["alignment_loss"] != 0 for entry in found] == [True, True, False, False]
    samples = 4 if settings.get("correspondence_in") else 2  # workers match one sample at a time
    expected = {"match": 0, "features": 2, "capture": 0} if settings is REPA else {"match": samples, "features": 0}
    assert calls == {"capture": 2, **expected}


def test_the_run_goes_on_as_one_without_alignment(tmp_path: Path) -> None:
    """From the step on the loss is the denoising loss alone, to the last bit of its gradient."""
    trainer = make_trainer(tmp_path, alignment_until=1)
    batch = collate([trainer.dataset[0], trainer.dataset[1]])
    loss, denoising, _ = trainer._losses(trainer._prepare(batch, 1), None)
    assert torch.equal(loss, denoising)
    plain = make_trainer(tmp_path, loss_weight=0.0)
    assert torch.equal(plain._losses(plain._prepare(batch, 1), None)[0], loss)
    loss.backward()
    assert all(not parameter.grad.any() for parameter in trainer.model.alignment_heads.parameters())


def test_samples_with_little_noise_have_no_matches() -> None:
    match = match_with()
    kept = drop_low_noise(match, torch.tensor([0.2, 0.5, 0.9]), 0.5)
    assert not kept.matched[0].any()
    assert torch.equal(kept.index[1:], match.index[1:])


@pytest.mark.parametrize("settings", [{}, REPA])
def test_only_noisy_samples_are_aligned(tmp_path: Path, settings: dict[str, Any]) -> None:
    options = {"max_train_steps": 2, "train_batch_size": 3, **settings}
    trainer = make_trainer(tmp_path / "some", alignment_min_noise=0.5, **options)
    config, sample = trainer.config, trainer.dataset
    expected = []
    for step in range(2):
        batch = collate([sample[3 * step + i] for i in range(3)])
        steps = noisy_inputs(trainer.pipeline, batch, config, step).timesteps
        noisy = steps >= 0.5 * (trainer.pipeline.num_train_timesteps - 1)
        if settings:
            expected.append(float(noisy.sum() * 2 * 16))  # views and tokens
        else:
            expected.append(float(match_batch(batch, (4, 4)).matched[noisy].sum()))
    assert supervised(trainer) == expected
    assert 0 < sum(expected) < 2 * 3 * 2 * 16


@pytest.mark.parametrize("settings", [{}, REPA])
def test_a_batch_without_noisy_samples_has_no_alignment_loss(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = history(make_trainer(tmp_path, alignment_min_noise=0.9999, max_train_steps=1, **settings))
    assert [(entry["alignment_loss"], entry["supervised"]) for entry in found] == [(0, 0)]


# ---- controls


def test_each_sample_gets_the_matches_of_the_next() -> None:
    match = match_with()
    found = matches_of_next_sample(match)
    for sample in range(3):
        other = match.select((sample + 1) % 3)
        assert torch.equal(found.index[sample], other.index[0])
        assert torch.equal(found.match_weight[sample], other.match_weight[0])  # type: ignore[index]
        assert torch.equal(found.distance[sample], other.distance[0])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"at least 2 samples, .*got 1. Cure: a larger batch"):
        matches_of_next_sample(match.select(0))


def test_random_matches_are_uniform_over_the_view_and_keep_what_is_visible() -> None:
    match = match_with(batch=2000)
    found = random_matches(match, torch.Generator().manual_seed(1))
    assert torch.equal(found.matched, match.matched)
    for i, j, count in ((0, 1, 16), (1, 0, 6)):
        drawn = found.index[:, i, j][found.matched[:, i, j]]
        assert drawn.max() == count - 1
        shares = torch.bincount(drawn, minlength=count) / len(drawn)
        assert (shares - 1 / count).abs().max() < 5 * math.sqrt(1 / count / len(drawn))  # five standard deviations
    again = random_matches(match, torch.Generator().manual_seed(1))
    assert torch.equal(again.index, found.index)


def test_noise_is_relative_and_leaves_what_is_missing_missing() -> None:
    depth = torch.tensor([0.5, 4.0]).repeat_interleave(20000).view(1, 2, 1, 100, 200).clone()
    depth[..., 0, 0], depth[..., 0, 1] = 0, math.inf
    noisy = noisy_depth(depth, 0.1, torch.Generator().manual_seed(0))
    assert (noisy[..., 0, 0] == 0).all()
    assert not noisy[..., 0, 1].isfinite().any() or (noisy[..., 0, 1].abs() == math.inf).all()
    relative = (noisy / depth)[..., 1:, :] - 1
    assert relative.std(dim=(2, 3, 4)).flatten().tolist() == pytest.approx([0.1, 0.1], rel=0.02)
    assert relative.mean().item() == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize(
    "settings",
    [
        {"correspondence_control": "other_scene"},
        {"correspondence_control": "random"},
        {"geometry_noise": 0.01},
        {"correspondence": "features", **FEATURES},
        {"correspondence_control": "other_scene", "correspondence_in": "worker"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_the_run_trains_with_the_matches_that_its_settings_ask_for(tmp_path: Path, settings: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, max_train_steps=1, condition_dropout=0.0, **settings)
    config, dataset = trainer.config, trainer.dataset
    batch = collate([dataset[0], dataset[1]])
    if noise := config.geometry_noise:
        generator = step_generator(config, 0, 0, 1)
        gaussian = torch.randn(batch["depth"].shape, generator=generator)  # type: ignore[attr-defined]
        batch["depth"] = batch["depth"] * (1 + noise * gaussian)  # type: ignore[operator]
    if config.uses_features:
        extractor = FeatureExtractor("test_vit", pretrained=False, size=32)
        match = Correspondence.from_features(extractor(batch["images"]), token_grid=4)
    else:
        match = match_batch(batch, (4, 4))
    if config.correspondence_control == "other_scene":
        match = Correspondence.cat([match.select(1), match.select(0)])
    if config.correspondence_control == "random":
        match = random_matches(match, step_generator(config, 0, 0, 2))
    inputs = noisy_inputs(trainer.pipeline, batch, config, 0)
    with torch.no_grad():
        trainer.model.train()(*inputs.args, **inputs.kwargs, correspondence=match)
    expected = (trainer.model.alignment_loss.item(), float(trainer.model.num_supervised))
    (entry,) = history(trainer)
    assert (entry["alignment_loss"], entry["supervised"]) == (pytest.approx(expected[0], rel=1e-6), expected[1])


def test_random_numbers_of_a_step_are_its_own() -> None:
    config = TrainingConfig()
    draws = [
        torch.rand(4, generator=step_generator(setting, *place)).tolist()
        for setting in (config, TrainingConfig(seed=1))
        for place in ((0, 0), (1, 0), (0, 1), (0, 0, 1), (0, 0, 2), (1, 0, 1))
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)


# ---- settings

NEW_SETTINGS = {
    "supervision": "repa",
    "correspondence_control": "random",
    "geometry_noise": 0.1,
    "weight_schedule": "cosine",
    "alignment_until": 5,
    "alignment_min_noise": 0.5,
    "feature_model": "vit_tiny_patch16_224",
    "feature_pretrained": False,
    "feature_size": 64,
}


def test_a_resumed_run_keeps_its_supervision(tmp_path: Path) -> None:
    assert NEW_SETTINGS.keys() <= {entry.name for entry in fields(TrainingConfig)} - CHANGEABLE
    make_trainer(tmp_path, max_train_steps=1).train()
    with pytest.raises(ValueError, match=r"geometry_noise: 0\.0 -> 0\.1"):
        make_trainer(tmp_path, max_train_steps=2, geometry_noise=0.1, resume_from_checkpoint="latest").train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"supervision": "rapa"}, r"unknown supervision 'rapa': did you mean 'repa'"),
        ({"correspondence_control": "other"}, r"unknown correspondence_control 'other'"),
        ({"weight_schedule": "cosin"}, r"unknown weight_schedule 'cosin': did you mean 'cosine'"),
        ({"alignment_until": 0}, r"alignment_until: expected at least 1, got 0"),
        ({"alignment_min_noise": 1.0}, r"alignment_min_noise: expected a share in \[0, 1\), got 1.0"),
        ({"geometry_noise": -0.1}, r"geometry_noise: expected a share in \[0, 1\), got -0.1"),
        ({"geometry_noise": math.nan}, r"geometry_noise: expected a finite number, got nan"),
        ({"feature_size": 0}, r"feature_size: expected at least 1, got 0"),
        ({"correspondence_control": "other_scene", "train_batch_size": 1}, r"give train_batch_size=2 or more"),
        ({"geometry_noise": 0.1, "correspondence": "point_map"}, r"geometry_noise=0.1: .*give correspondence=depth"),
        ({"geometry_noise": 0.1, "correspondence_in": "worker"}, r"geometry_noise=0.1: .*correspondence_in=step"),
        ({"geometry_noise": 0.1, "precomputed_correspondence": "x"}, r"precomputed_correspondence=null"),
        ({"correspondence": "features", "correspondence_in": "worker"}, r"features: .*correspondence_in=step"),
        ({"correspondence": "features", "precomputed_correspondence": "x"}, r"precomputed_correspondence=null"),
        ({"correspondence": "features", "reduction": "released"}, r"features: gives no distances .*reduction=mean"),
        ({"supervision": "repa", "correspondence_control": "random"}, r"correspondence_control=random: .*repa uses"),
        ({"supervision": "repa", "geometry_noise": 0.1}, r"geometry_noise=0.1: .*give supervision=cameo"),
        ({"supervision": "repa", "correspondence_in": "worker"}, r"correspondence_in=worker: .*repa uses none"),
        ({"supervision": "repa", "precomputed_correspondence": "x"}, r"precomputed_correspondence=x: .*repa uses"),
        ({"feature_pretrained": False, "feature_checkpoint": "x"}, r"feature_checkpoint=x; give one"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_the_card_tells_how_the_run_was_supervised(tmp_path: Path) -> None:
    def facts(**settings: Any) -> dict[str, Any]:
        config = make_config(tmp_path, **settings)
        model = wrap_denoiser(load_pipeline(config), config)
        return {"weight": model.cameo_config.weight, **model.cameo_config.training}

    plain = facts()
    assert "supervision" not in plain
    other = facts(correspondence_control="random", geometry_noise=0.1, weight_schedule="linear", alignment_until=3)
    assert dict(other.items() - plain.items()) == {
        "correspondence control": "random",
        "geometry noise": 0.1,
        "weight schedule": "linear",
        "alignment until": 3,
    }
    aligned = facts(**REPA, loss_weight=0.2)
    assert aligned["weight"] == 0  # of CAMEO
    assert aligned["supervision"] == "REPA, weight 0.2, features of test_vit"
    assert aligned["feature weights"] == "random"


def test_the_arms_of_a_comparison_are_named_after_the_supervision(tmp_path: Path) -> None:
    config = make_config(tmp_path, compare_without_cameo=True, **REPA)
    assert list(planned_runs(config)) == ["without CAMEO", "with REPA"]
    assert list(planned_runs(replace(config, compare_without_cameo=False))) == ["with REPA"]


@pytest.mark.parametrize(
    "settings",
    [
        {
            "correspondence_control": "random",
            "geometry_noise": 0.01,
            "weight_schedule": "cosine",
            "alignment_min_noise": 0.3,
            "alignment_until": 3,
        },
        {"loss_weight": 0.5, "use_ema": True, **REPA},
    ],
    ids=["cameo", "repa"],
)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "lora_dropout": 0.2, **settings}
    whole = history(make_trainer(tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = make_trainer(tmp_path / "resumed", resume_from_checkpoint="latest", **options)
    assert history(resumed)[-2:] == whole[-2:]
    ends = [tmp_path / run / "checkpoint-4" for run in ("whole", "resumed")]
    for file in ends[0].glob("*.safetensors"):
        assert same_files(file, ends[1] / file.name), file.name
    assert (ends[0] / PROJECTOR_FILE).is_file() == ("supervision" in settings)


def test_auto_takes_the_layer_that_the_probe_ranks_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cameo.training.layer_choice.PROBED_SAMPLES", 2)
    config = make_config(tmp_path, layer="auto")
    with pytest.raises(ValueError, match=r"layer=auto: needs dataset="):
        wrap_denoiser(load_pipeline(config), config)
    with warnings.catch_warnings(action="ignore"):  # fresh weights have nothing to tell
        trainer = make_trainer(tmp_path, layer="auto", max_train_steps=1)
    evidence = trainer.model.cameo_config.layer_choice
    assert evidence is not None
    assert [layer.path for layer in trainer.model.supervised_layers] == [evidence["layer"]]
    assert history(trainer)[0]["supervised"] > 0


def test_a_resumed_run_takes_the_layer_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its data would now tell another."""
    monkeypatch.setattr("cameo.training.layer_choice.PROBED_SAMPLES", 2)
    with warnings.catch_warnings(action="ignore"):  # fresh weights have nothing to tell
        trainer = make_trainer(tmp_path, layer="auto", max_train_steps=1)
    trainer.train()
    paths, evidence = trainer.model.cameo_config.layers, trainer.model.cameo_config.layer_choice
    other = next(layer.path for layer in trainer.model.attention_layers if [layer.path] != paths)
    config = CameoConfig.load(tmp_path / "checkpoint-1")
    assert (config.layers, config.layer_choice) == (paths, evidence)
    replace(config, layers=[other]).save(tmp_path / "checkpoint-1")
    write_state(tmp_path / "checkpoint-1", read_state(tmp_path / "checkpoint-1"))

    def refuse(*args: Any) -> Any:
        raise AssertionError("probed again")

    monkeypatch.setattr("cameo.training.setup.probe_for", refuse)
    resumed = make_trainer(tmp_path, layer="auto", max_train_steps=2, resume_from_checkpoint="latest")
    assert resumed.model.cameo_config.layers == [other]
    assert resumed.model.cameo_config.layer_choice == evidence
    assert [entry["step"] for entry in history(resumed)] == [1, 2]
    with pytest.raises(DataError, match="holds no complete checkpoint"):
        make_trainer(tmp_path / "none", layer="auto", resume_from_checkpoint="latest")
