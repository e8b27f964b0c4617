"""A run that was to be supervised and meets no match says so, once, and no other run does."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from cameo.attention.layout import TokenLayout
from cameo.training import supervision, trainer
from cameo.training.supervision import PATIENCE, MatchWatch
from tests.helpers.training_runs import REPA, make_trainer

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")
SHORT: dict[str, Any] = {"target_modules": ["to_q"], "max_train_steps": 3, "train_batch_size": 1}


class WithoutDepth(Dataset):
    """The first sample over and over, without a single measurement, from sample `until` on as it is."""

    def __init__(self, base: Any, until: int = 10**6) -> None:
        self.base, self.until, self.sample = base, until, dict(base[0])

    def __len__(self) -> int:
        return len(self.base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        known = torch.zeros_like if index < self.until else torch.clone
        return {**self.sample, "depth": known(self.sample["depth"])}


@pytest.fixture(autouse=True)
def two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "PATIENCE", 2)


def messages_of(run: trainer.Trainer) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    return [
        str(warning.message) for warning in caught if "optimizer steps that were to have some" in str(warning.message)
    ]


def test_data_without_matches(tmp_path: Path) -> None:
    run = make_trainer(tmp_path, **SHORT)
    run.dataset = WithoutDepth(run.dataset)
    (message,) = messages_of(run)
    path = run.model.supervised_layers[0].path
    assert message.startswith("no match in the first 2 optimizer steps that were to have some")
    assert f'Backbone cat3d, layer {path} with TokenLayout("b (v h w)"); data: scenes, num_views=2' in message
    assert "Their batches have no match between any two views. Likely causes: views that do not show" in message


def test_a_layer_that_reaches_no_match(tmp_path: Path) -> None:
    """The matches of two views alone, of which the layout leaves the reference out."""
    run = make_trainer(tmp_path, **SHORT)
    (layer,) = run.model.supervised_layers
    hidden = TokenLayout("b (v h w)", unsupervised_views=1, references_last=1)
    run.model._supervised = [type(layer)(**{**vars(layer), "layout": hidden})]
    (message,) = messages_of(run)
    assert repr(hidden) in message
    assert re.search(r"Their batches have [1-9]\d* matches, and the layer supervises none of them", message)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_weight": 0.0},
        {"alignment_until": 1},
        {"alignment_min_noise": 0.999, "seed": 3},
        {"gradient_accumulation_steps": 2, "alignment_until": 1},
    ],
    ids=str,
)
def test_no_alarm_where_nothing_was_to_be_supervised(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = make_trainer(tmp_path, **SHORT, **changes)
    run.dataset = WithoutDepth(run.dataset)
    assert messages_of(run) == []


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2}, REPA], ids=["plain", "accumulated", "repa"]
)
def test_no_alarm_where_something_is_supervised(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = make_trainer(tmp_path, **SHORT, **changes)
    if changes is not REPA:  # the second step, of 1 or 2 samples, has matches
        run.dataset = WithoutDepth(run.dataset, until=changes.get("gradient_accumulation_steps", 1))
    assert messages_of(run) == []
    supervised = [entry["supervised"] > 0 for entry in run.metrics.read()]
    assert supervised == ([True] * 3 if changes is REPA else [False, True, True])


def test_batches_that_are_not_aligned_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_trainer(tmp_path, **SHORT)
    run.dataset = WithoutDepth(run.dataset)
    plain = trainer.noisy_inputs

    def apart(*args: Any) -> Any:
        inputs = plain(*args)
        inputs.aligned = False
        return inputs

    monkeypatch.setattr(trainer, "noisy_inputs", apart)
    assert messages_of(run) == []


def watch_of(tmp_path: Path) -> MatchWatch:
    return make_trainer(tmp_path, **SHORT).supervision.watch


def test_steps_are_counted_until_the_first_match(tmp_path: Path) -> None:
    watch = watch_of(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for wanted, supervised in ((0, 0), (0, 0), (1, 0), (0, 0), (1, 5), (1, 0), (1, 0), (1, 0)):
            watch.see(wanted, supervised)
    assert caught == []


def test_one_process_warns(tmp_path: Path) -> None:
    """All processes see the sums over all of them, and the first speaks."""
    first, second = watch_of(tmp_path), watch_of(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            first.see(2, 0)
            second.see(2, 0, warn=False)
    assert len(caught) == 1
    assert first.ended
    assert second.ended


def test_the_patience_is_ten_steps() -> None:
    assert PATIENCE == 10


@pytest.mark.parametrize(("changes", "shown"), [({}, "matches="), (REPA, "tokens="), ({"loss_weight": 0.0}, None)])
def test_the_progress_bar_shows_the_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], shown: str | None
) -> None:
    screen = io.StringIO()
    plain = trainer.tqdm
    monkeypatch.setattr(trainer, "tqdm", lambda **options: plain(**options, file=screen, mininterval=0, ncols=200))
    run = make_trainer(tmp_path, **SHORT, **changes)
    run.train()
    last = screen.getvalue().split("\r")[-1]
    assert "loss=" in last
    if shown is None:
        assert "matches=" not in last
    else:
        assert f"{shown}{run.metrics.read()[-1]['supervised']:.0f}" in last
