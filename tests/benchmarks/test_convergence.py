"""The study: its curves and intervals, a run at the smallest size with every arm, and the page of the results."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.convergence import curves, study, tables
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


def a_run(qualities: list[float], *, seed: int = 0, seconds: float = 1.0, losses: list[float] | None = None) -> dict:
    validations = [
        {
            "step": 10 * place,
            "psnr_covisible": value,
            "psnr_all": value - 1,
            "loss": (losses or qualities)[place],
            "precision": {"mean@1": value / 100},
            "seconds": 99.0,
            "busy_seconds": 10 * place * seconds,
        }
        for place, value in enumerate(qualities)
    ]
    return {"seed": seed, "validations": validations, "device": "x86_64 CPU", "layer": "mid_block.attentions.0.attn1"}


def test_steps_to_a_quality_against_a_fine_grid() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        values = generator.normal(size=8).cumsum()
        run = a_run(values.tolist())
        grid = np.linspace(0, 70, 700_001)
        curve = np.interp(grid, np.arange(8) * 10, values)
        for goal in (values[0] - 1, values.max() - 0.1, values.mean()):
            expected = grid[np.argmax(curve >= goal)]
            assert curves.steps_to(run, goal) == pytest.approx(expected, abs=2e-4)
        assert curves.steps_to(run, values.max() + 0.1) == math.inf


def test_the_interval_is_students() -> None:
    values = [1.0, 1.7, 0.4]
    mean, low, high = curves.interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(values), *expected), abs=1e-3)
    for count, quantile in enumerate(curves.T_QUANTILES, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, count), abs=1e-3)
    assert math.isnan(curves.interval([2.0])[1])


def test_a_ratio_compares_runs_of_the_same_seed() -> None:
    slow, fast = [10.0, 11.0, 12.0, 13.0, 14.0, 14.0, 14.0], [10.0, 12.0, 14.0, 14.0, 14.0, 14.0, 14.0]
    base = [a_run(slow, seed=0), a_run(slow, seed=1), a_run(slow, seed=2)]
    arm = [a_run(fast, seed=1), a_run(fast, seed=0)]
    assert curves.speedups(base, arm) == pytest.approx([2.0, 2.0])
    assert curves.show_speedup([2.0, 2.0]) == "2.00 [2.00, 2.00]"
    assert curves.speedups(base[:1], [a_run([10.0] * 7)]) == [0.0]
    assert curves.show_speedup([0.0, 1.5]) == "reached by 1 of 2 seeds (1.50)"
    assert curves.speedups([a_run([10.0, 9.0, 9.0, 9.0])], [a_run(fast)]) == []
    assert "learns nothing" in curves.show_speedup([])


def test_the_table_shows_differences_seed_by_seed() -> None:
    none = [a_run([10.0, 11.0, 11.0, 11.0], seed=0), a_run([10.0, 15.0, 15.0, 15.0], seed=1)]
    other = [a_run([10.0, 12.0, 12.0, 12.0], seed=0, seconds=2.0), a_run([10.0, 16.0, 16.0, 16.0], seed=1, seconds=2.0)]
    lines = curves.table_of_arms({"none": none, "cameo": other}).splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[:6] == ["cameo", "2", "mid 0", "14.00", "+1 [+1, +1]", "13.00"]
    assert cells[-1] == "2.000"
    ratio, in_seconds = (float(cell.split()[0]) for cell in cells[-3:-1])
    assert in_seconds == pytest.approx(ratio / 2, abs=0.01)


@pytest.fixture(scope="module")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("study")
    (folder / "trial.yaml").write_text(SETTINGS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "PRESETS", folder)
        patch.setattr(study, "RESULTS", folder / "results")
        common = ["--preset", "trial", "--subjects", "cat3d", "--work", str(folder / "work")]
        yield SimpleNamespace(folder=folder, study=study, main=lambda *more: study.main([*common, *more]))


@pytest.mark.slow
def test_every_arm_runs_once_and_leaves_a_whole_record(small_study: Any, capsys: pytest.CaptureFixture) -> None:
    arms = [*small_study.study.ARMS, "loss_weight=0.3,softness=0.5", "layers=2"]
    small_study.main("--seeds", "0", "--arms", *arms)
    assert "the same command" not in capsys.readouterr().out
    records = {arm: json.loads((small_study.folder / f"results/trial/cat3d/{arm}-0.json").read_text()) for arm in arms}
    assert [entry["step"] for entry in records["none"]["validations"]] == [0, 2, 4]
    first = {arm: record["validations"][0]["psnr_covisible"] for arm, record in records.items()}
    assert len(set(first.values())) == 1  # the same weights to begin with
    ranking = [layer["path"] for layer in records["none"]["probe"]["layers"]]
    assert {records["cameo"]["layer"], records["wrong_layer"]["layer"]} < set(ranking)
    assert records["cameo"]["layer"] != records["wrong_layer"]["layer"]
    assert records["loss_weight=0.3,softness=0.5"]["settings"]["loss_weight"] == 0.3
    assert len(records["layers=2"]["settings"]["layer"]) == 2
    assert len(records["cameo"]["effects"]) == len(ranking)
    finals = {arm: record["losses"] or record["validations"][-1]["loss"] for arm, record in records.items()}
    assert len({json.dumps(value) for value in finals.values()}) == len(arms)  # every arm does something else
    stamps = {path: path.stat().st_mtime_ns for path in small_study.folder.rglob("*-0.json")}
    small_study.main("--seeds", "0", "--arms", *arms)
    assert stamps == {path: path.stat().st_mtime_ns for path in small_study.folder.rglob("*-0.json")}


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    small_study: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small_study.main("--seeds", "1", "--arms", "none")
    path = small_study.folder / "results/trial/cat3d/none-1.json"
    whole = json.loads(path.read_text())
    path.unlink()
    run = small_study.study.run

    def stopped(config: Any, *rest: Any, **options: Any) -> None:
        run(type(config)(**{**vars(config), "max_train_steps": 2}), *rest, **options)

    monkeypatch.setattr(small_study.study, "run", stopped)
    small_study.main("--seeds", "1", "--arms", "none", "--work", str(small_study.folder / "again"))
    assert "1 runs are left" in capsys.readouterr().out
    monkeypatch.setattr(small_study.study, "run", run)
    small_study.main("--seeds", "1", "--arms", "none", "--work", str(small_study.folder / "again"))
    continued = json.loads(path.read_text())
    times = ("seconds", "busy_seconds")
    for entry, other in zip(whole["validations"], continued["validations"], strict=True):
        assert {k: v for k, v in entry.items() if k not in times} == {k: v for k, v in other.items() if k not in times}


def test_an_rgbd_sequence_is_one_scene_and_is_studied_without_cuts(
    small_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS.replace("data_format: bare_rooms", "data_format: rgbd, train_data_dir: null")
    (small_study.folder / "room.yaml").write_text(settings, encoding="utf-8")
    monkeypatch.setattr(small_study.study, "RESULTS", tmp_path / "results")
    data = ["--data", str(write_sequence(tmp_path / "office"))]
    small_study.main("--preset", "room", "--seeds", "0", "--arms", "none", "cameo", *data)
    for arm in ("none", "cameo"):
        record = json.loads((tmp_path / f"results/room/cat3d/{arm}-0.json").read_text())
        assert "effects" not in record
        assert record["probe"]["scenes"]
        assert "office" not in json.dumps(record["settings"])


def test_an_arm_that_needs_the_ranking_says_so(
    small_study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_study.study, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="run that first"):
        small_study.main("--arms", "cameo", "--seeds", "0")
    with pytest.raises(SystemExit, match="expected some of cat3d"):
        small_study.study.settings_of("trial", "cat4d", None)
    with pytest.raises(SystemExit, match="key=value"):
        small_study.study.free_arm("cameos", ["a"])


def test_repa_is_named_with_the_network_of_its_features() -> None:
    none, other = [a_run([1.0, 2.0], seed=0)], a_run([1.0, 2.5], seed=0)
    xfeat = {**other, "settings": {"feature_model": "xfeat", "feature_pretrained": True}}
    untrained = {**other, "settings": {"feature_model": "test_vit", "feature_pretrained": False}}
    assert "| REPA with XFeat features | 1 |" in curves.table_of_arms({"none": none, "repa": [xfeat]})
    mixed = {"none": none, "repa": [xfeat, untrained]}
    assert "| REPA with XFeat and untrained test_vit features | 2 |" in curves.table_of_arms(mixed)
    (legend,) = [axis.get_legend() for axis in curves.draw_curves({"cat3d": mixed}, "").axes if axis.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["none", curves.arm_name("repa", mixed["repa"])]


def test_longer_runs_stand_in_a_table_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny" / "cat3d"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tables, "STUDY", tmp_path)
    facts = {"preset": "tiny", "subject": "cat3d", "threads": 1, "torch": "2", "date": "2026-01-01", "parameters": 1e6}
    arms = ["none", "cameo", "weight=0.2", "max_train_steps=2", "max_train_steps=9,layers=2"]
    arms += ["max_train_steps=9", "max_train_steps=9,weight=0.0"]  # `weight` is what earlier results call loss_weight
    arms += ["max_train_steps=20", "max_train_steps=20,loss_weight=0.0"]
    arms += ["max_train_steps=30"]
    for place, arm in enumerate(arms):
        steps = int(arm.split(",")[0].split("=")[1]) if arm.startswith("max") else 4
        run = {**facts, **a_run([1.0, 2.0 + place]), "arm": arm}
        run["settings"] = {"max_train_steps": steps, "train_batch_size": 1, "weight": 0.0 if "0.0" in arm else 0.1}
        (folder / f"{place}.json").write_text(json.dumps(run))
    named, varied = (tables.arms("tiny", "cat3d", named=named) for named in (True, False))
    assert [line.split(" | ")[0] for line in named.splitlines()[4:]] == ["| none", "| cameo"]
    shown = [line.split(" | ")[0] for line in varied.splitlines()[4:]]
    assert shown == ["| none", "| max_train_steps=2", "| max_train_steps=9,layers=2", "| weight=0.2"]
    assert "--arms max_train_steps=2 max_train_steps=9,layers=2 weight=0.2 --seeds 0`" in varied
    long = tables.longer_tables("tiny", "cat3d")
    assert [line.split(" | ")[0] for line in long.splitlines() if line.startswith(("| none", "| cameo"))] == [
        "| none",
        "| cameo",
    ] * 2
    assert long.count("--arms max_train_steps=9 max_train_steps=9,weight=0.0") == 1
    (folder / "0.json").unlink()
    assert tables.longer_tables("tiny", "cat3d").startswith("Not run yet")  # nothing to be longer than
