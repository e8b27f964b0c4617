"""A training run with `layer=auto` probes its own data, on its own device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import recipes.lora_finetune
from cameo.adapters.common.latent_pipeline import LatentPipeline
from cameo.backbone import get_backbone
from cameo.probing.layer_probe import LayerProbe
from cameo.training import setup
from cameo.training.data import build_dataset
from cameo.training.layer_choice import probe_for
from cameo.training.setup import load_pipeline
from tests.helpers.training_runs import make_config, scene_cache


def test_a_training_run_probes_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    config = make_config(tmp_path, train_batch_size=5)
    data = build_dataset(config, "train")
    pipeline = load_pipeline(config)
    found = probe_for(pipeline, data, config)
    assert len(found.samples) == 16
    assert len(found.scene_names) == config.num_scenes
    assert [layer.index for layer in found.layers] == list(
        range(len(get_backbone("cat3d").attention_layers(pipeline.denoiser)))
    )


def test_the_layers_are_probed_on_the_device_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    config, order = make_config(tmp_path, layer="auto"), []
    data, device = build_dataset(config, "train"), torch.device("meta")
    monkeypatch.setattr(setup, "make_accelerator", lambda _config: SimpleNamespace(device=device))
    monkeypatch.setattr(LatentPipeline, "to", lambda _self, place: order.append(place))

    def probe(*_given: Any) -> None:
        order.append("probe")
        raise KeyboardInterrupt  # nothing after this is tested

    monkeypatch.setattr(setup, "probe_for", probe)
    with pytest.raises(KeyboardInterrupt):
        setup.train_lora(config, data, data)
    assert order == [device, "probe"]


def test_all_processes_take_the_probe_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    config = make_config(tmp_path)
    data, pipeline = build_dataset(config, "train"), load_pipeline(config)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda shared: shared.__setitem__(0, "the first"))
    assert probe_for(pipeline, data, config) == "the first"


def test_the_runs_of_a_comparison_share_one_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    runs: list[setup.LoraRun] = []
    probed: list[LayerProbe] = []

    def probe(*given: Any) -> LayerProbe:
        probed.append(probe_for(*given))
        return probed[-1]

    def train(*given: Any, **options: Any) -> setup.LoraRun:
        runs.append(train_lora(*given, **options))
        if len(runs) == 2:
            runs[-1].result.stopped_by = "the test"  # nothing after this is tested
        return runs[-1]

    train_lora = setup.train_lora
    monkeypatch.setattr(setup, "probe_for", probe)
    monkeypatch.setattr(setup, "train_lora", train)
    recipes.lora_finetune.train_and_compare(
        make_config(tmp_path, layer="auto", compare_without_cameo=True, max_train_steps=1)
    )
    first, second = (run.model.cameo_config for run in runs)
    assert len(probed) == 1
    assert first.layers == second.layers
    assert first.layer_choice == second.layer_choice is not None
