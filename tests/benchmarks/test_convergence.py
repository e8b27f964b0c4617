"""The study: what its presets declare, the order of its runs, runs at the smallest size, and runs made again."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.convergence import arms, repeat, runs, schedule, study
from tests.helpers.sequences import write_sequence

SETTINGS = """
common: {resolution: 16, num_scenes: 4, num_validation_scenes: 2, views_per_scene: 3, train_batch_size: 2, num_views: 2,
  max_train_steps: 4, validation_steps: 2, checkpointing_steps: 2, report_to: none, loss_weight: 0.1, min_overlap: 0.0,
  max_overlap: 1.0, data_format: bare_rooms, feature_model: test_vit.r160_in1k, feature_pretrained: false,
  feature_size: 32, validation: {num_samples: 2, batch_size: 2, noise_levels: [0.5, 1.0]}}
subjects:
  cat3d: {backbone: cat3d, preset: tiny, preset_options: {image_size: 16, block_out_channels: [16],
    attention_levels: [true], norm_num_groups: 4, heads: 2}}
"""


@pytest.fixture(scope="module")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("study")
    (folder / "trial.yaml").write_text(SETTINGS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arms, "PRESETS", folder)
        patch.setattr(runs, "RESULTS", folder / "results")
        common = ["--preset", "trial", "--subjects", "cat3d", "--work", str(folder / "work")]
        yield SimpleNamespace(folder=folder, main=lambda *more: study.main([*common, *more]))


@pytest.mark.slow
def test_every_arm_runs_once_and_leaves_a_whole_record(small_study: Any, capsys: pytest.CaptureFixture) -> None:
    names = [*arms.ARMS, "loss_weight=0.3,softness=0.5", "layers=2"]
    small_study.main("--seeds", "0", "--arms", *names)
    assert "the same command" not in capsys.readouterr().out
    records = {arm: json.loads((small_study.folder / f"results/trial/cat3d/{arm}-0.json").read_text()) for arm in names}
    assert [entry["step"] for entry in records["none"]["validations"]] == [0, 2, 4]
    first = {arm: record["validations"][0]["psnr_covisible"] for arm, record in records.items()}
    assert len(set(first.values())) == 1  # the same weights to begin with
    ranking = [layer["path"] for layer in records["none"]["probe"]["layers"]]
    assert {records["cameo"]["layer"], records["wrong_layer"]["layer"]} < set(ranking)
    assert records["cameo"]["layer"] != records["wrong_layer"]["layer"]
    assert records["loss_weight=0.3,softness=0.5"]["settings"]["loss_weight"] == 0.3
    assert len(records["layers=2"]["settings"]["layer"]) == 2
    assert len(records["linear"]["effects"]) == len(ranking)
    assert {arm for arm, record in records.items() if "probe" in record} == {"none", "linear"}
    finals = {arm: record["losses"] or record["validations"][-1]["loss"] for arm, record in records.items()}
    assert len({json.dumps(value) for value in finals.values()}) == len(names)  # every arm does something else
    stamps = {path: path.stat().st_mtime_ns for path in small_study.folder.rglob("*-0.json")}
    small_study.main("--seeds", "0", "--arms", *names)
    assert stamps == {path: path.stat().st_mtime_ns for path in small_study.folder.rglob("*-0.json")}


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    small_study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small_study.main("--seeds", "1", "--arms", "none")
    path = small_study.folder / "results/trial/cat3d/none-1.json"
    whole = json.loads(path.read_text())
    path.unlink()
    run = study.run

    def stopped(config: Any, *rest: Any, **options: Any) -> None:
        run(type(config)(**{**vars(config), "max_train_steps": 2}), *rest, **options)

    monkeypatch.setattr(study, "run", stopped)
    small_study.main("--seeds", "1", "--arms", "none", "--work", str(small_study.folder / "again"))
    assert "1 runs are left" in capsys.readouterr().out
    monkeypatch.setattr(study, "run", run)
    small_study.main("--seeds", "1", "--arms", "none", "--work", str(small_study.folder / "again"))
    continued = json.loads(path.read_text())
    assert not repeat.differences(whole, continued)
    for entry in continued["validations"]:
        assert list(entry["psnr_covisible_by_level"]) == ["0.5", "1.0"]
        assert len(entry["precision_by_layer"]) == 4  # the layers that the probe of `none` will choose from


def test_an_rgbd_sequence_is_one_scene_and_is_studied_without_cuts(
    small_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.replace("data_format: bare_rooms", "data_format: rgbd, train_data_dir: null")
    (small_study.folder / "room.yaml").write_text(settings, encoding="utf-8")
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    data = ["--data", str(write_sequence(tmp_path / "office"))]
    small_study.main("--preset", "room", "--seeds", "0", "--arms", "none", "linear", *data)
    for arm in ("none", "linear"):
        record = json.loads((tmp_path / f"results/room/cat3d/{arm}-0.json").read_text())
        assert "effects" not in record
        assert record["probe"]["scenes"]
        assert "office" not in json.dumps(record["settings"])


def test_an_arm_that_needs_the_ranking_says_so(
    small_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="run that first"):
        small_study.main("--arms", "cameo", "--seeds", "0")
    with pytest.raises(SystemExit, match="expected some of cat3d"):
        arms.settings_of("trial", "cat4d", None)
    with pytest.raises(SystemExit, match="key=value"):
        arms.free_arm("cameos", ["a"])


@pytest.mark.parametrize(
    ("arm", "expected"), [("rank=2", "rank in 0..1"), ("rank=-1", "rank in"), ("layers=3", "1..2")]
)
def test_an_arm_beyond_the_ranking_is_refused(arm: str, expected: str) -> None:
    with pytest.raises(SystemExit, match=rf"--arms {arm}: expected .*{re.escape(expected)}.* has 2 layers"):
        arms.free_arm(arm, ["a", "b"])
    assert arms.free_arm("rank=1", ["a", "b"]) == {"layer": "b"}
    assert arms.free_arm("layers=2", ["a", "b"]) == {"layer": ["a", "b"]}


RANKED = SimpleNamespace(ranking=[SimpleNamespace(path=path) for path in ("best", "second", "last")])


@pytest.mark.parametrize(("shown", "schedule_of_controls"), [("cameo", "constant"), ("linear", "linear")])
def test_controls_have_the_schedule_of_the_shown_arm(shown: str, schedule_of_controls: str) -> None:
    changes = {arm: arms.arm_settings(arm, arms.Declared(shown=shown), RANKED) for arm in arms.ARMS}  # type: ignore[arg-type]
    assert changes["none"] == {"loss_weight": 0.0}
    assert {arm: changes[arm]["weight_schedule"] for arm in ("cameo", "linear")} == {
        "cameo": "constant",
        "linear": "linear",
    }
    for arm in ("other_scene", "random", "wrong_layer", "repa"):
        assert changes[arm]["weight_schedule"] == schedule_of_controls
        assert changes[arm]["layer"] == ("last" if arm == "wrong_layer" else "best")
    free = arms.arm_settings("rank=1,weight_schedule=cosine", arms.Declared(shown=shown), RANKED)  # type: ignore[arg-type]
    assert free == {"layer": "second", "weight_schedule": "cosine"}


def test_a_subject_overrides_what_the_preset_declares_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trial.yaml").write_text(
        "common: {shown: cameo, num_views: 2, validation: {num_samples: 4}}\n"
        "subjects:\n"
        "  a: {title: The first, num_views: 3}\n"
        "  b: {shown: linear, layer_rule: 'probe of none, seed 2'}\n"
        "  room: {data_format: rgbd}\n"
    )
    monkeypatch.setattr(arms, "PRESETS", tmp_path)
    assert arms.subjects_of("trial") == ["a", "b", "room"]
    assert arms.families("trial") == ["a", "b"]
    assert arms.declared("trial", "a") == arms.Declared("The first", "cameo", "probe of none, seed 0")
    assert arms.declared("trial", "b") == arms.Declared("b", "linear", "probe of none, seed 2")
    settings = arms.settings_of("trial", "a", None)
    assert settings == {"num_views": 3, "validation": {"num_samples": 4}}
    with pytest.raises(ValueError, match=r"layer_rule: expected 'probe of none, seed N', got 'the middle'"):
        arms.Declared(layer_rule="the middle")


def options_of(**given: Any) -> argparse.Namespace:
    defaults = {"preset": "trial", "arms": list(arms.ARMS), "seeds": [0, 1, 2], "data": None, "results": None}
    return argparse.Namespace(**{**defaults, "work": "work", "jobs": 2, **given})


@pytest.fixture
def two_subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preset of two subjects, of which the first looks into the run with seed 1."""
    (tmp_path / "trial.yaml").write_text(
        "common: {validation: {num_samples: 4}}\n"
        "subjects: {a: {layer_rule: 'probe of none, seed 1'}, b: {num_views: 2}}"
    )
    monkeypatch.setattr(arms, "PRESETS", tmp_path)
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    return tmp_path


def test_runs_are_made_arm_by_arm_and_first_the_seed_that_others_wait_for(two_subjects: Path) -> None:
    options = options_of(subjects=["a", "b"], arms=["softness=1.0", "random", "linear", "none", "cameo"])
    wanted = schedule.wanted_runs(options)
    assert [(subject, seed) for subject, arm, seed in wanted if arm == "none"] == [
        ("b", 0), ("a", 1), ("a", 0), ("b", 1), ("a", 2), ("b", 2)
    ]  # fmt: skip
    order = list(dict.fromkeys(arm for _, arm, _ in wanted))
    assert order == ["none", "cameo", "linear", "random", "softness=1.0"]
    assert len(set(wanted)) == len(wanted) == 30


class Processes:
    """Stands in for `subprocess.Popen`: a run takes `durations` looks at it, and fails if it is one of `failing`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **given: Any) -> None:
        self.durations, self.failing = given.get("durations", {}), given.get("failing", ())
        self.started: list[tuple[str, str, int]] = []
        self.finished: list[tuple[str, str, int]] = []
        self.beside: list[int] = []  # runs that go on when one is started, itself included
        self.threads: list[str] = []
        monkeypatch.setattr(schedule.subprocess, "Popen", self.start)
        monkeypatch.setattr(schedule.time, "sleep", lambda _: None)
        # A layer is known once the run of `none` has ended, as in the results.
        monkeypatch.setattr(
            schedule, "known_probe", lambda _, subject: RANKED if (subject, "none", 0) in self.finished else None
        )

    def start(self, command: list[str], env: dict[str, str]) -> Any:
        subject, arm, seed = (command[command.index(f"--{name}") + 1] for name in ("subjects", "arms", "seeds"))
        run_of = (subject, arm, int(seed))
        self.started.append(run_of)
        self.threads.append(env["OMP_NUM_THREADS"])
        self.beside.append(len(self.started) - len(self.finished))
        looks = iter(range(self.durations.get(run_of, 1)))

        def poll() -> int | None:
            if next(looks, None) is not None:
                return None
            if run_of not in self.finished:
                self.finished.append(run_of)
            process.returncode = int(run_of in self.failing)
            return process.returncode

        process = SimpleNamespace(poll=poll, returncode=None)
        return process


def test_a_run_that_is_ready_goes_ahead_of_one_that_waits(monkeypatch: pytest.MonkeyPatch, two_subjects: Path) -> None:
    processes = Processes(monkeypatch, durations={("a", "none", 0): 20})
    wanted = [(subject, arm, 0) for arm in ("none", "cameo", "linear") for subject in ("a", "b")]
    assert not schedule.run_in_processes(options_of(), wanted)
    assert processes.started == [
        ("a", "none", 0), ("b", "none", 0), ("b", "cameo", 0), ("b", "linear", 0), ("a", "cameo", 0), ("a", "linear", 0)
    ]  # fmt: skip
    assert processes.beside == [1, 2, 2, 2, 1, 2]


def test_a_run_that_fails_does_not_keep_the_others_from_being_made(
    monkeypatch: pytest.MonkeyPatch, two_subjects: Path
) -> None:
    processes = Processes(monkeypatch, failing=[("b", "none", 1)])
    wanted = [("a", "none", 0), ("b", "none", 1), ("a", "cameo", 0)]
    assert schedule.run_in_processes(options_of(), wanted, threads={("a", "cameo", 0): 7}) == [("b", "none", 1)]
    assert processes.started == wanted
    assert processes.threads[-1] == "7"
    with pytest.raises(
        SystemExit, match=r"--arms cameo: its layer comes from the probe of none, seed 0; run that first"
    ):
        schedule.run_in_processes(options_of(), [("b", "cameo", 0)])


def test_runs_made_again_are_compared_to_the_last_digit(
    two_subjects: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    kept = {
        "date": "1",
        "threads": 3,
        "layer": "x",
        "validations": [{"loss": 0.1, "seconds": 1.0}],
        "losses": [[1, 2.0]],
    }
    changes: dict[str, Any] = {"date": "2"}

    def make(options: Any, wanted: list[Any], *, threads: dict[Any, int]) -> list[Any]:
        assert set(threads.values()) == {3}
        for run_of in wanted:
            write(run_of, {**kept, **changes}, options.results)
        return []

    def write(run_of: Any, run: Any, results: Path | None = None) -> None:
        path = runs.result_path("trial", run_of, results)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))

    monkeypatch.setattr(schedule, "run_in_processes", make)
    options = options_of(subjects=["a", "b"], arms=None, seeds=None)
    with pytest.raises(SystemExit, match="not run yet: a linear seed 0; b linear seed 0"):
        repeat.main(options)
    for subject in ("a", "b"):
        write((subject, "linear", 0), kept)
    changes["validations"] = [{"loss": 0.1, "seconds": 2.0}]
    assert repeat.main(options) == 0
    assert "| b | linear | 0 | 4 | yes |" in capsys.readouterr().out
    changes["validations"] = [{"loss": 0.1 + 2**-56, "seconds": 1.0}]
    assert repeat.main(options) == 1
    assert "no: validations.0.loss: 0.1, then 0.10000000000000002 |" in capsys.readouterr().out
    changes["validations"] = [{"loss": 0.1}, {"loss": 0.1}]
    assert repeat.main(options) == 1
    assert "validations.1.loss: nothing, then 0.1" in capsys.readouterr().out
    monkeypatch.setattr(schedule, "run_in_processes", lambda *_, **__: [("a", "linear", 0)])
    assert repeat.main(options) == 1
    assert "no: the run failed" in capsys.readouterr().out
