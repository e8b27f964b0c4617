"""A small model with its pipeline and data, and its evaluation, made once for all tests of the evaluation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cameo.data import MultiViewDataset
from cameo.evaluation.protocol import evaluate
from cameo.training.data import build_dataset
from cameo.training.setup import load_pipeline, wrap_denoiser
from cameo.wrap import CameoModel
from tests.helpers.evaluations import SMALL
from tests.helpers.training_runs import fresh_accelerate, make_config, scene_cache


@pytest.fixture(autouse=True)
def _fresh_accelerate_and_shared_scenes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    with fresh_accelerate():
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[CameoModel, Any, MultiViewDataset]:
    os.environ["CAMEO_CACHE"], before = scene_cache(), os.environ.get("CAMEO_CACHE")
    try:
        config = make_config(tmp_path_factory.mktemp("model"), num_views=3)
        pipeline = load_pipeline(config)
        model = wrap_denoiser(pipeline, config).train()
        return model, pipeline, build_dataset(config, "validation")
    finally:
        os.environ.pop("CAMEO_CACHE") if before is None else os.environ.update(CAMEO_CACHE=before)


@pytest.fixture(scope="session")
def result(trained: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    return evaluate(*trained, SMALL)
