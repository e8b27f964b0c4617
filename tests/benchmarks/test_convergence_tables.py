"""What the study says of its runs: steps to a quality, intervals, the tables and pictures of docs/results.md."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.convergence import arms, curves, runs, summary, tables


def a_run(qualities: list[float], *, seed: int = 0, seconds: float = 1.0, losses: list[float] | None = None) -> dict:
    validations = [
        {
            "step": 10 * place,
            "psnr_covisible": value,
            "psnr_all": value - 1,
            "loss": (losses or qualities)[place],
            "precision": {"mean@1": value / 100, "best_head@1": value / 80, "through_head@1": value / 50},
            "loss_by_level": {"0.15": (losses or qualities)[place]},
            "seconds": 99.0,
            "busy_seconds": 10 * place * seconds,
        }
        for place, value in enumerate(qualities)
    ]
    facts = {"seed": seed, "validations": validations, "device": "x86_64 CPU", "layer": "mid_block.attentions.0.attn1"}
    return {**facts, "settings": {"loss_weight": 0.1, "supervision": "cameo"}}


NO_HEAD: tuple[dict[str, Any], ...] = ({"loss_weight": 0.0}, {"supervision": "repa"})


def test_steps_to_a_quality_against_a_fine_grid() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        values = generator.normal(size=8).cumsum()
        run = a_run(values.tolist())
        grid = np.linspace(0, 70, 700_001)
        curve = np.interp(grid, np.arange(8) * 10, values)
        for goal in (values[0] - 1, values.max() - 0.1, values.mean()):
            expected = grid[np.argmax(curve >= goal)]
            assert runs.steps_to(run, goal) == pytest.approx(expected, abs=2e-4)
        assert runs.steps_to(run, values.max() + 0.1) == math.inf


def test_the_interval_is_students() -> None:
    values = [1.0, 1.7, 0.4]
    mean, low, high = runs.interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((np.mean(values), *expected), abs=1e-3)
    for count, quantile in enumerate(runs.T_QUANTILES, start=1):
        assert quantile == pytest.approx(stats.t.ppf(0.975, count), abs=1e-3)
    assert math.isnan(runs.interval([2.0])[1])


def test_a_ratio_compares_runs_of_the_same_seed() -> None:
    slow, fast = [10.0, 11.0, 12.0, 13.0, 14.0, 14.0, 14.0], [10.0, 12.0, 14.0, 14.0, 14.0, 14.0, 14.0]
    base = [a_run(slow, seed=0), a_run(slow, seed=1), a_run(slow, seed=2)]
    arm = [a_run(fast, seed=1), a_run(fast, seed=0)]
    assert runs.speedups(base, arm) == pytest.approx([2.0, 2.0])
    assert summary.shown_speedup([2.0, 2.0]) == "2.00 [2.00, 2.00]"
    assert runs.speedups(base[:1], [a_run([10.0] * 7)]) == [0.0]
    assert summary.shown_speedup([0.0, 1.5]) == "reached by 1 of 2 seeds (1.50)"
    assert runs.speedups([a_run([10.0, 9.0, 9.0, 9.0])], [a_run(fast)]) == []
    assert "learns nothing" in summary.shown_speedup([])


def test_the_table_shows_differences_seed_by_seed() -> None:
    none = [a_run([10.0, 11.0, 11.0, 11.0], seed=0), a_run([10.0, 15.0, 15.0, 15.0], seed=1)]
    other = [a_run([10.0, 12.0, 12.0, 12.0], seed=0, seconds=2.0), a_run([10.0, 16.0, 16.0, 16.0], seed=1, seconds=2.0)]
    lines = tables.table_of_arms({"none": none, "cameo": other}, "cameo").splitlines()
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[:6] == ["cameo", "2", "mid 0", "14.00", "+1.00 [+1.00, +1.00]", "13.00"]
    assert cells[-1] == "2.000"
    ratio, in_seconds = (float(cell.split()[0]) for cell in cells[-3:-1])
    assert in_seconds == pytest.approx(ratio / 2, abs=0.01)


def test_the_precision_is_read_as_it_is_trained() -> None:
    entry = {
        "precision": {"mean@1": 0.1, "best_head@1": 0.2, "through_head@1": 0.3},
        "precision_view": None,
        "precision_by_layer": {"a": {"mean@1": 0.4, "best_head@1": 0.5}, "b": {"mean@1": 0.6, "best_head@1": 0.7}},
    }
    layers: Any = {"layer": "a", "validations": [entry] * 3}
    trained = {**layers, "settings": {"loss_weight": 0.1, "supervision": "cameo"}}
    none, repa = ({**layers, "settings": {**trained["settings"], **change}} for change in NO_HEAD)
    assert runs.precision(trained, entry, "b") == 0.3  # of its own layer, whichever is asked for
    assert runs.precision(none, entry, "b") == runs.precision(repa, entry, "b") == 0.6
    assert runs.precision(none, entry, "b", untrained="best_head") == 0.7
    assert tables.shown_precision([trained], "b") == "30.0 %"
    assert tables.shown_precision([none], "b") == "60.0 % / 70.0 %"
    # Results of before have the default layer of `none` alone, which is another one than the probed.
    del entry["precision_by_layer"]
    assert runs.precision(none, entry, "a") == 0.1
    assert tables.shown_precision([none], "b") == "-"
    # A query that reaches one token of each view finds the right view or not.
    entry |= {"precision": None, "precision_view": {"mean": 0.8, "through_head": 0.9}}
    assert runs.precision(trained, entry, "b") == 0.9
    assert runs.precision(none, entry, "a") == 0.8
    assert math.isnan(runs.precision(none, entry, "b"))


def test_repa_is_named_with_the_network_of_its_features() -> None:
    none, other = [a_run([1.0, 2.0])], a_run([1.0, 2.5])
    xfeat, untrained = (
        {**other, "settings": {**other["settings"], "feature_model": name, "feature_pretrained": name == "xfeat"}}
        for name in ("xfeat", "test_vit")
    )
    assert "| REPA with XFeat features | 1 |" in tables.table_of_arms({"none": none, "repa": [xfeat]}, "linear")
    mixed = {"none": none, "repa": [xfeat, untrained]}
    assert "| REPA with XFeat and untrained test_vit features | 2 |" in tables.table_of_arms(mixed, "linear")
    figure = curves.draw_curves({"cat3d": mixed}, {"cat3d": ""}, "")
    (legend,) = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    assert [text.get_text() for text in legend.get_texts()] == ["none", runs.arm_name("repa", mixed["repa"])]


def test_a_share_of_the_gain_needs_a_gain() -> None:
    none = [a_run([10.0] * 4, seed=seed) for seed in range(3)]
    gaining = [a_run([10.0, *[12.0 + 0.1 * seed] * 3], seed=seed) for seed in (2, 0, 1)]
    control = [a_run([10.0, *[10.5] * 3], seed=seed) for seed in range(2)]
    assert runs.share_of_gain(none, gaining, control) == pytest.approx(0.5 / 2.05)  # over the seeds 0 and 1
    open_gain = [a_run([10.0, *[10.0 + 2 * seed] * 3], seed=seed) for seed in range(3)]
    for shown in (control[:0], none, open_gain):
        assert math.isnan(runs.share_of_gain(none, shown, none))
    assert runs.share_of_gain(none[:1], gaining, control) == pytest.approx(0.25)  # one seed has no interval


FACTS = {"preset": "trial", "threads": 1, "torch": "2", "date": "2026-01-01", "parameters": 1e6}


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes results of a preset with the families `a` and `b` and a room; returns the function that writes a run."""
    (tmp_path / "trial.yaml").write_text(
        "common: {max_train_steps: 60, validation: {noise_levels: [0.15, 0.7, 1.0], high_noise: 0.7}}\n"
        "subjects: {a: {title: Family A, head: mean}, b: {shown: cameo}, room: {data_format: rgbd}}"
    )
    monkeypatch.setattr(arms, "PRESETS", tmp_path)
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")

    def write(subject: str, arm: str, qualities: list[float], seed: int = 0, **more: Any) -> None:
        losses = more.pop("losses", None)
        run = {**FACTS, **a_run(qualities, seed=seed, losses=losses), "subject": subject, "arm": arm, **more}
        run["settings"] |= {"max_train_steps": 60, "train_batch_size": 1, "loss_weight": 0.0 if arm == "none" else 0.1}
        path = runs.result_path("trial", (subject, arm, seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run))

    return write


def cells_of(table: str, first: str) -> list[str]:
    line = next(line for line in table.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_first_table_has_a_row_for_each_family(trial: Any) -> None:
    for seed in range(3):
        shift = 0.1 * seed
        trial("a", "none", [10.0, 11.0, 11.0, 11.0], seed, losses=[1.0, 0.5, 0.5, 0.5])
        losses = [1.0, *[0.4 + shift / 10] * 3]
        trial("a", "linear", [10.0, 13.0 + shift, 13.0 + shift, 13.0 + shift], seed, losses=losses)
        trial("a", "cameo", [10.0, 20.0, 20.0, 20.0], seed)  # not the shown arm
        trial("a", "other_scene", [10.0, 11.5, 11.5, 11.5], seed, control_within_one_token=0.2 + shift)
        trial("a", "random", [10.0, 10.0, 10.0, 10.0], seed)
    found = cells_of(summary.families("trial"), "Family A")
    assert found[:3] == ["Family A", "3", "+2.10<br>[+1.85, +2.35]"]
    # `none` takes 10 steps to 11 dB; in as many the shown arm rises to 13, 13.1 and 13.2 dB.
    assert found[3].startswith("3.10<br>[")
    assert found[5] == found[6] == "-18.0 %<br>[-23.0, -13.0]"
    assert found[7:] == ["+0.50<br>[+0.50, +0.50]<br>24 %", "30 %", "-1.00<br>[-1.00, -1.00]<br>-48 %"]
    assert cells_of(summary.families("trial"), "b") == ["b", "not run yet", *["-"] * 8]
    assert "| room |" not in summary.families("trial")
    assert cells_of(summary.demands("trial"), "Family A")[1:] == ["met", "met", "met", "met", "10.00, 11.00 dB"]
    assert cells_of(summary.demands("trial"), "b")[1:] == ["open"] * 4 + ["-"]


def test_a_demand_that_is_missed_is_named(trial: Any) -> None:
    for seed in range(2):
        trial("a", "none", [10.0, 11.0, 11.0, 11.0], seed, losses=[1.0, 0.5, 0.5, 0.5])
        trial("a", "linear", [10.0, 12.0, 12.0, 12.0], seed, losses=[1.0, *[0.52] * 3])
        trial("a", "other_scene", [10.0, 11.6, 11.6, 11.6], seed)
        trial("b", "none", [10.0, 11.0, 11.0, 11.0], seed)
        trial("b", "cameo", [10.0, 11.0 + seed, 11.0, 11.0], seed)
        trial("b", "random", [10.0, 11.0, 11.0, 11.0], seed)
    assert cells_of(summary.demands("trial"), "Family A")[1:5] == ["met", "missed", "open", "missed"]
    assert cells_of(summary.demands("trial"), "b")[1:4] == ["missed", "no gain to share", "no gain to share"]


def test_what_is_declared_stands_on_the_page_before_any_run(trial: Any) -> None:
    found = cells_of(summary.declared("trial"), "Family A (`a`)")
    assert found[4:] == ["60, 4", "0.02", "mean", "0.7, 1", "0.15, 0.7, 1", "linear", "probe of none, seed 0"]
    assert cells_of(summary.declared("trial"), "b (`b`)")[-2] == "cameo"


@pytest.mark.parametrize("name", [name for name in tables.TABLES if "_tiny" in name])
def test_without_results_the_tables_say_what_to_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    text = tables.TABLES[name]()
    if not name.startswith(("declared", "demands")):
        assert "not run yet" in text.lower()
    assert tables.draw("tiny") == []


def test_every_noise_level_is_reported(trial: Any) -> None:
    for arm, value in (("none", 10.0), ("linear", 12.0)):
        entry = a_run([value])["validations"][0]
        entry |= {
            "loss_by_level": {"0.15": value, "1.0": 2 * value},
            "psnr_all_by_level": {"0.15": 1.0, "1.0": 2.0},
            "psnr_covisible_by_level": {"0.15": 3 * value, "1.0": None},
        }
        trial("a", arm, [value], validations=[entry] * 3)
    losses, psnr = tables.levels("trial", "a").split("PSNR, covisible (dB):")
    assert cells_of(losses, "linear") == ["linear", "12.0000 (+2.0000)", "24.0000 (+4.0000)"]
    assert cells_of(psnr, "linear") == ["linear", "36.00 (+6.00)", "-"]


def test_the_first_figure_has_a_panel_for_each_family_and_the_seeds_that_all_arms_have(trial: Any) -> None:
    for seed in range(3):
        trial("a", "none", [10.0, 11.0 + seed, 11.0], seed)
        trial("a", "linear", [10.0, 12.0, 13.0 + seed], seed)
    for seed in range(2):
        trial("a", "other_scene", [10.0, 10.0, 10.0], seed)
    figure = summary.draw("trial")
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert list(panels) == ["Family A", "b"]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in panels["Family A"].lines}
    assert drawn == {
        "without CAMEO": [10.0, 11.5, 11.0],
        "CAMEO": [10.0, 12.0, 13.5],
        "with another scene's matches (control)": [10.0, 10.0, 10.0],
    }
    bands = [collection.get_paths()[0].get_extents().bounds for collection in panels["Family A"].collections]
    assert [height for *_, height in bands] == [2.0, 4.0, 0.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(drawn)
    assert not panels["b"].lines
    assert [text.get_text() for text in panels["b"].texts] == ["not run yet"]


def test_longer_runs_stand_in_a_table_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny" / "cat3d"
    folder.mkdir(parents=True)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    facts = {"preset": "tiny", "subject": "cat3d", "threads": 1, "torch": "2", "date": "2026-01-01", "parameters": 1e6}
    names = ["none", "cameo", "weight=0.2", "max_train_steps=2", "max_train_steps=9,layers=2"]
    names += ["max_train_steps=9", "max_train_steps=9,weight=0.0"]  # `weight` is what earlier results call loss_weight
    names += ["max_train_steps=20", "max_train_steps=20,loss_weight=0.0"]
    names += ["max_train_steps=30"]
    for place, arm in enumerate(names):
        steps = int(arm.split(",")[0].split("=")[1]) if arm.startswith("max") else 4
        run = {**facts, **a_run([1.0, 2.0 + place]), "arm": arm}
        run["settings"] = {"max_train_steps": steps, "train_batch_size": 1, "weight": 0.0 if "0.0" in arm else 0.1}
        (folder / f"{place}.json").write_text(json.dumps(run))
    named, varied = (tables.of_arms("tiny", "cat3d", named=named) for named in (True, False))
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
