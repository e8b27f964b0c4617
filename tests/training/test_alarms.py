"""Planted faults: a training says in its progress bar, its records and at its end that it is useless."""

from __future__ import annotations

import io
import math
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest

from cameo.alarms import watch
from cameo.training import trainer
from cameo.training.checkpoints.folder import list_checkpoints
from tests.helpers import data_faults
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import REPA, RecipeProcess, make_trainer, read_lines

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")
SHORT: dict[str, Any] = {"target_modules": ["to_q"], "train_batch_size": 1}


@pytest.fixture
def judged_early(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FIRST": 6, "WINDOW": 5, "FIRST_COUNTED": 3}.items():
        monkeypatch.setattr(watch, name, value)


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the progress bar draws."""
    shown = io.StringIO()
    plain = trainer.tqdm
    monkeypatch.setattr(trainer, "tqdm", lambda **options: plain(**options, file=shown, mininterval=0, ncols=240))
    return shown


def alarms_of(run: trainer.Trainer) -> list[str]:
    with warnings.catch_warnings(action="ignore"):
        return [alarm.word for alarm in run.train().alarms]


@pytest.mark.usefixtures("judged_early")
def test_frozen_attention_stays_at_chance(
    tmp_path: Path, screen: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_trainer(tmp_path, **SHORT, learning_rate=0.0, max_train_steps=8)
    assert alarms_of(run) == ["alignment at chance"]
    steps = run.metrics.read()
    assert [entry.get("alarm") for entry in steps] == [None] * 5 + ["alignment at chance"] * 3
    bars = [line for line in screen.getvalue().split("\r") if "/8" in line]
    assert "alarm=alignment at chance" in bars[-1]
    assert "alarm=" not in next(line for line in bars if "4/8" in line)
    printed = capsys.readouterr().out
    assert printed.count("Alarm, alignment at chance: after 8 supervised steps the alignment loss of ") == 1
    assert f"cameo check-data config={tmp_path / 'config.yaml'}" in printed


@pytest.mark.usefixtures("judged_early")
def test_views_that_hardly_overlap_have_few_matches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequence = write_sequence(tmp_path / "wall", spacing=2.0)  # each view shows 2.13 meters of it
    settings = {"train_data_dir": str(sequence), "data_format": "rgbd", "min_overlap": 0.0, "max_overlap": 1.0}
    run = make_trainer(tmp_path / "run", **SHORT, **settings, max_train_steps=4)
    assert "few matches" in alarms_of(run)  # the check of the data, which sees no overlap either, may ring too
    rings = ["few matches" in entry.get("alarm", "") for entry in run.metrics.read()]
    assert rings == [False, False, True, True]
    printed = capsys.readouterr().out
    assert "Alarm, few matches: of the tokens that could have had a match in the last 4 steps" in printed


def test_wrong_cameras_are_told_from_the_first_step_on(
    room: Any, tmp_path: Path, screen: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = data_faults.write_seven_scenes(data_faults.in_opengl_axes(room), tmp_path / "opengl")
    settings = {"train_data_dir": str(folder), "data_format": "rgbd", "min_overlap": 0.0, "max_overlap": 1.0}
    run = make_trainer(tmp_path / "run", **SHORT, **settings, max_train_steps=2)
    assert alarms_of(run) == ["data check: wrong"]
    assert [entry["alarm"] for entry in run.metrics.read()] == ["data check: wrong"] * 2
    assert "alarm=data check: wrong" in screen.getvalue()
    assert "do not fit together: it looks like OpenGL axes" in capsys.readouterr().out


@pytest.mark.usefixtures("judged_early")
def test_a_resumed_run_remembers_its_steps(tmp_path: Path) -> None:
    settings = {**SHORT, "learning_rate": 0.0}
    assert alarms_of(make_trainer(tmp_path, **settings, max_train_steps=4)) == []
    (checkpoint,) = list_checkpoints(tmp_path)
    run = make_trainer(tmp_path, **settings, max_train_steps=7, resume_from_checkpoint=checkpoint.name)
    assert alarms_of(run) == ["alignment at chance"]
    assert ["alarm" in entry for entry in run.metrics.read()] == [False] * 5 + [True] * 2


@pytest.mark.usefixtures("judged_early")
@pytest.mark.parametrize(
    ("changes", "counted"),
    [({"loss_weight": 0.0}, False), (REPA, False), ({"alignment_until": 2}, True)],
    ids=["without CAMEO", "repa", "aligned for two steps"],
)
def test_a_run_that_is_not_judged(tmp_path: Path, changes: dict[str, Any], counted: bool) -> None:
    run = make_trainer(tmp_path, **SHORT, **changes, learning_rate=0.0, max_train_steps=8)
    assert alarms_of(run) == []
    assert ["matchable" in entry for entry in run.metrics.read()] == [counted] * 8


def test_records_add_up_over_micro_steps(tmp_path: Path) -> None:
    """Chance is a mean over micro steps, as the loss is; matches are a sum."""
    run = make_trainer(tmp_path, **SHORT, gradient_accumulation_steps=3, max_train_steps=2, num_views=3)
    run.train()
    for entry in run.metrics.read():
        assert entry["alignment_chance"] == pytest.approx(math.log(16), abs=1e-5)
        assert entry["matchable"] == 3 * 3 * 16 * 2
        assert 0 < entry["supervised"] < entry["matchable"]


@pytest.mark.usefixtures("judged_early")
def test_a_run_that_learns_is_silent(
    tmp_path: Path, screen: io.StringIO, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judged from its 15th step on, on one sample over and over."""
    monkeypatch.setattr(watch, "FIRST", 15)
    run = make_trainer(tmp_path, max_train_steps=20, loss_weight=1.0, rank=16, num_views=3, condition_dropout=0.0)
    sample = run.dataset[0]
    run.dataset = type("Same", (), {"__len__": lambda _: 10**6, "__getitem__": lambda _, index: sample})()
    assert alarms_of(run) == []
    assert run.metrics.read()[-1]["alignment_loss"] < 0.9 * run.metrics.read()[0]["alignment_loss"]
    assert "alarm" not in screen.getvalue()
    assert "Alarm" not in capsys.readouterr().out
    assert all("alarm" not in entry for entry in run.metrics.read())


@pytest.mark.long
@pytest.mark.parametrize(("learning_rate", "alarms"), [(0.0, ["alignment at chance"]), (1e-2, [])])
def test_the_rule_as_it_is(tmp_path: Path, learning_rate: float, alarms: list[str]) -> None:
    run = make_trainer(tmp_path, learning_rate=learning_rate, max_train_steps=watch.FIRST + 1, num_scenes=16)
    assert alarms_of(run) == alarms


@pytest.mark.long
def test_the_main_process_speaks_for_all(room: Any, tmp_path: Path) -> None:
    folder = data_faults.write_seven_scenes(data_faults.in_opengl_axes(room), tmp_path / "opengl")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = {"train_data_dir": str(folder), "data_format": "rgbd", "min_overlap": 0.0, "max_overlap": 1.0}
    runs = [
        RecipeProcess(
            "lora_finetune",
            tmp_path / "out",
            environment={**together, "RANK": rank, "LOCAL_RANK": rank},
            **settings,
            max_train_steps=2,
        )
        for rank in "01"
    ]
    for run in runs:
        assert run.wait(120) == 0, run.output
    assert [run.output.count("Alarm, data check: wrong") for run in runs] == [1, 0]
    assert "alarm=data check: wrong" in runs[0].output
    assert [entry["alarm"] for entry in read_lines(tmp_path / "out" / "metrics.jsonl")] == ["data check: wrong"] * 2
    report = (tmp_path / "out" / "report.html").read_text()
    assert 'role="alert"' in report
    assert "it looks like OpenGL axes" in report
    assert str(tmp_path) not in report
