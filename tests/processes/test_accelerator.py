"""Trackers of a run: unknown and missing ones are refused, and none receives the token of the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from cameo.processes.accelerator import make_accelerator, start_trackers
from cameo.training.settings import TrainingConfig
from tests.helpers.training_runs import make_config


def test_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown report_to 'tensorbord': did you mean 'tensorboard'"):
        make_accelerator(make_config(tmp_path, report_to="tensorbord"))
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ImportError, match=r"report_to=wandb: not installed; pip install wandb"):
        make_accelerator(make_config(tmp_path, report_to="wandb"))


def test_token_reaches_no_tracker() -> None:
    seen = {}

    class Accelerator:
        def init_trackers(self, name: str, config: dict) -> None:
            seen.update(config)

    config = TrainingConfig(max_train_steps=10, hub_token="hf_secret")
    start_trackers(Accelerator(), config)
    assert seen["max_train_steps"] == 10
    assert "hf_secret" not in str(seen)
