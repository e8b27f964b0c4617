"""Validation: the same numbers each time, and those of an independent computation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cameo.attention.layout import TokenLayout
from cameo.data import MultiViewDataset, collate
from cameo.data.batches import layer_grids, match_batch
from cameo.evaluation.validation import validate
from cameo.probing import probe_layers
from cameo.probing.denoising import ValidationSettings, covisible_pixels
from cameo.probing.mode import evaluation_mode
from cameo.wrap import CameoModel
from tests.helpers.batches import make_batch
from tests.helpers.evaluations import VALIDATION, rig_data
from tests.helpers.planted_attention import PlantedAttention, joined
from tests.helpers.tracked_rooms import TrackedRooms

LEVELS = (0.5, 0.95, 1.0)


def test_photographs_are_validated_by_their_tracks(trained: tuple[CameoModel, Any, Any]) -> None:
    model, pipeline, data = trained
    settings = ValidationSettings(num_samples=2, batch_size=2, noise_levels=LEVELS)

    rooms = TrackedRooms(data.source, with_depth=False)
    photographs = MultiViewDataset(rooms, num_views=3, seed=0)
    found = validate(model, pipeline, photographs, settings)
    assert found["psnr_covisible"] is None
    assert found["psnr_covisible_by_level"] == {}
    assert "no depth" in found["notes"]["psnr_covisible"]
    batch = collate([photographs[0], photographs[1]])
    match = match_batch(batch, layer_grids(model.supervised_layers[0], batch), kind="tracks")
    assert found["pairs"] == len(LEVELS) * int(match.matched.sum()) > 100
    assert 0 <= found["precision"]["mean@0"] <= found["precision"]["mean@1"] <= 1


def test_validation_is_deterministic_and_leaves_the_model_alone(trained: tuple[CameoModel, Any, Any]) -> None:
    model, pipeline, data = trained
    frozen_part = model.base_model.mid_block.eval()  # a user's choice within a model that trains
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    settings = ValidationSettings(num_samples=3, batch_size=3, noise_levels=LEVELS)
    first, second = (validate(model, pipeline, data, settings) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not frozen_part.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen_part.train()

    # Other batch sizes sum float32 in another order: relative differences up to 1e-6 were seen, never 0.001 dB.
    apart = validate(model, pipeline, data, ValidationSettings(num_samples=3, batch_size=1, noise_levels=LEVELS))
    assert apart["pairs"] == first["pairs"]
    assert apart["pixels"] == first["pixels"]
    assert apart["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert apart["psnr_covisible"] == pytest.approx(first["psnr_covisible"], abs=1e-4)
    assert apart["psnr_all"] == pytest.approx(first["psnr_all"], abs=1e-4)
    for name, value in apart["precision"].items():  # rounding may decide an argmax between two equal tokens
        assert value == pytest.approx(first["precision"][name], abs=2 / first["pairs"])


def test_validation_figures_match_an_independent_computation(trained: tuple[CameoModel, Any, Any]) -> None:
    model, pipeline, data = trained
    settings = ValidationSettings(num_samples=2, batch_size=2, noise_levels=(0.5, 1.0), seed=7)
    found = validate(model, pipeline, data, settings, predict_from=0.0)
    losses: list[float] = []
    all_pixels: dict[float, list[float]] = {0.5: [], 1.0: []}
    covisible: dict[float, list[float]] = {0.5: [], 1.0: []}
    for sample in range(2):
        batch = collate([data[sample]])
        shape = pipeline.latent_shape(batch["images"].shape)[1:]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(7 + sample))
        alphas = pipeline.scheduler.alphas_cumprod
        for level in (0.5, 1.0):
            step = torch.tensor([round(level * 999)])
            inputs = pipeline.training_inputs(batch, noise=noise[None], timesteps=step)
            with evaluation_mode(model):
                prediction = model.base_model(*inputs.args, **inputs.kwargs).sample
            views = batch["images"].shape[1]
            velocity = prediction.view(1, views, *shape[1:])
            losses.append((velocity - inputs.target)[:, 1:].square().mean().item())
            alpha = alphas[step]
            clean = alpha.sqrt() * inputs.noisy - (1 - alpha).sqrt() * velocity
            patch = pipeline.config.patch_size
            image = torch.nn.functional.pixel_shuffle(clean, patch) / 2 + 0.5
            squared = (image.clamp(0, 1) - batch["images"])[0, 1:].square()
            all_pixels[level].append(10 * math.log10(1 / squared.mean().item()))
            seen = covisible_pixels(batch)[0, 1:].expand_as(squared)
            covisible[level].append(10 * math.log10(1 / squared[seen].mean().item()))
    assert found["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    for name, expected in (("psnr_all", all_pixels), ("psnr_covisible", covisible)):
        assert found[name] == pytest.approx(sum(expected[1.0]) / 2, abs=1e-4)
        by_level = {str(level): pytest.approx(sum(values) / 2, abs=1e-4) for level, values in expected.items()}
        assert found[f"{name}_by_level"] == by_level
    at_high_noise = validate(model, pipeline, data, settings)
    assert list(at_high_noise["psnr_all_by_level"]) == ["1.0"]
    by_level = {name for name in found if name.startswith("psnr") and name.endswith("by_level")}
    assert {name: value for name, value in at_high_noise.items() if name not in by_level} == {
        name: value for name, value in found.items() if name not in by_level
    }
    assert found["settings"]["seed"] == 7


def test_further_layers_are_read_as_if_each_were_the_supervised_one(trained: tuple[CameoModel, Any, Any]) -> None:
    model, pipeline, data = trained
    settings = ValidationSettings(num_samples=3, batch_size=2, noise_levels=LEVELS)
    found = validate(model, pipeline, data, settings, layers=model.attention_layers)
    by_layer = found.pop("precision_by_layer")
    alone = validate(model, pipeline, data, settings)
    assert found == alone
    assert "precision_by_layer" not in alone
    batches = (collate([data[index] for index in indices]) for indices in ((0, 1), (2,)))
    probe = probe_layers(pipeline, batches, LEVELS, seed=settings.seed)
    assert list(by_layer) == [layer.path for layer in probe.layers]
    for layer in probe.layers:
        for within in (0, 1):
            assert by_layer[layer.path][f"mean@{within}"] == pytest.approx(probe.precision(layer.path, within=within))
    supervised = model.supervised_layers[0].path
    without_head = {name: value for name, value in alone["precision"].items() if not name.startswith("through")}
    assert by_layer[supervised] == without_head


def test_validation_without_anything_visible_is_an_error(trained: tuple[CameoModel, Any, Any]) -> None:
    model, pipeline, _ = trained
    batch = make_batch(samples=1, views=2, size=32)
    batch["extrinsics"][0, 1, :3, :3] = torch.diag(torch.tensor([-1.0, 1.0, -1.0]))  # looks the other way
    sample = {name: value[0] if isinstance(value, (Tensor, list)) else value for name, value in batch.items()}
    settings = ValidationSettings(num_samples=1, noise_levels=(1.0,))
    with pytest.raises(ValueError, match=r"no target pixel is seen by a reference view, .*Raise min_overlap"):
        validate(model, pipeline, [sample], settings)


def test_noise_levels_that_are_all_low_are_refused(tmp_path: Path) -> None:
    data, pipeline = rig_data("mvdream", 0, tmp_path), PlantedAttention(TokenLayout("b (v h w)"), joined)
    settings = ValidationSettings(num_samples=1, noise_levels=(0.5,))
    with pytest.raises(ValueError, match=r"noise level of high_noise=0.95 or more.*got noise_levels=\(0.5,\)"):
        validate(pipeline.wrapped(), pipeline, data, settings)


def test_layer_that_reaches_no_match_has_no_precision(tmp_path: Path) -> None:
    data = rig_data("mvdream", 0, tmp_path)

    class Blind:
        def __getitem__(self, index: int) -> Any:
            return {**data[index], "depth": torch.zeros_like(data[index]["depth"])}

    pipeline = PlantedAttention(TokenLayout("b (v h w)"), joined)
    found = validate(pipeline.wrapped(), pipeline, Blind(), VALIDATION)  # type: ignore[arg-type]
    assert found["precision"] is None
    assert "no query of the layer reaches" in found["notes"]["precision"]
    assert found["pairs"] == 0
    assert found["psnr_all"] is not None
