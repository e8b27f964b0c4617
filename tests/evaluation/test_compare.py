"""Results side by side: bootstrap intervals, what may be compared, tables."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cameo.errors import DataError
from cameo.evaluation.compare import (
    compare_results,
    comparison_figure,
    comparison_table,
    load_result,
    name_results,
)
from cameo.evaluation.settings import EvaluationSettings
from cameo.probing.bootstrap import paired_bootstrap, scene_of

LOSS, PSNR = ("denoising", "loss"), ("novel_views", "psnr")


def pairs(count: int, shift: float = 0.3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Values with standard deviation 1 between units, and 0.5 between two runs on the same unit."""
    rng = np.random.default_rng(seed)
    first = rng.normal(size=count)
    return first, first + shift + 0.5 * rng.normal(size=count)


def test_interval_is_that_of_a_plain_loop() -> None:
    a, b = pairs(25)
    assert paired_bootstrap(a, b)[0] == pytest.approx((b - a).mean(), abs=1e-12)
    generator, means = np.random.default_rng(7), []
    for _ in range(300):
        drawn = generator.integers(25, size=25)
        means.append(sum(b[i] - a[i] for i in drawn) / 25)
    expected = np.quantile(means, [0.05, 0.95])
    assert paired_bootstrap(a, b, resamples=300, seed=7, confidence=0.9)[1:] == pytest.approx(expected, abs=1e-12)


def test_pairs_that_all_differ_alike_have_no_spread_and_pairing_matters() -> None:
    a = np.random.default_rng(0).normal(size=12)
    assert paired_bootstrap(a, a) == (0.0, 0.0, 0.0)
    assert paired_bootstrap(a, a + 2) == pytest.approx((2.0, 2.0, 2.0))
    shuffled = np.roll(a, 1) + 2  # the same values in other pairs
    _, low, high = paired_bootstrap(a, shuffled)
    assert high - low > 0.5


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_95_percent_intervals_hold_the_truth_95_percent_of_the_time(scale: float) -> None:
    """Also where the spread of a pair grows with its value."""
    held, trials = 0, 600
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        a = rng.normal(size=50)
        b = a + 0.3 + 0.5 * rng.normal(size=50) * (1 + scale * np.abs(a))
        _, low, high = paired_bootstrap(a, b, resamples=500, seed=trial)
        held += low <= 0.3 <= high
    # Standard error of the share: 0.009. With 50 pairs the expected share is 0.94.
    assert 0.91 <= held / trials <= 0.97


def test_the_seed_decides_and_the_block_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pairs(30)
    first = paired_bootstrap(a, b)
    assert first == paired_bootstrap(list(a), list(b))
    assert first != paired_bootstrap(a, b, seed=1)
    mirrored = paired_bootstrap(b, a)
    assert mirrored == pytest.approx((-first[0], -first[2], -first[1]))
    monkeypatch.setattr("cameo.probing.bootstrap.BLOCK_ENTRIES", 1000)
    assert paired_bootstrap(a, b) == pytest.approx(first, abs=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([1.0, 2.0], [1.0], {}, r"\[n\] and \[n\], got \(2,\) and \(1,\)"),
        ([[1.0], [2.0]], [[1.0], [2.0]], {}, r"got \(2, 1\)"),
        ([1.0], [2.0], {}, "at least 2 pairs, got 1; one scene says nothing about others"),
        ([1.0, math.nan], [1.0, 2.0], {}, "expected finite values"),
        ([1.0, 2.0], [1.0, math.inf], {}, "expected finite values"),
        ([1.0, 2.0], [1.0, 2.0], {"resamples": 0}, "expected at least 1 and a share between 0 and 1, got 0 and 0.95"),
        ([1.0, 2.0], [1.0, 2.0], {"confidence": 1.0}, "got 10000 and 1.0"),
    ],
)
def test_bad_input_of_the_bootstrap(a: Any, b: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b, **options)


def make_result(values: dict[str, float], *, psnr: dict[str, float] | None = None, **settings: Any) -> dict[str, Any]:
    """A result as `evaluate` returns it, with a denoising loss per sample."""
    sections: dict[str, Any] = {
        name: {"mean": {}, "per_sample": {}, "notes": {}, "details": {}}
        for name in ("novel_views", "attention", "consistency", "denoising")
    }
    sections["denoising"]["per_sample"]["loss"] = values
    if psnr is not None:
        sections["novel_views"]["per_sample"]["psnr"] = psnr
    result = {
        "settings": vars(EvaluationSettings(**settings)),
        "data": {"num_views": 3, "samples": {key: [0.5, 2.0] for key in values}},
        "sections": sections,
    }
    return dict(json.loads(json.dumps(result)))


def scenes(count: int, shift: float = 0.0, seed: int = 0) -> dict[str, float]:
    noise = np.random.default_rng(seed).normal(size=count)
    return {f"room-{n}/0-{n}": 0.1 + 0.01 * n + shift + 0.002 * noise[n] for n in range(count)}


def by_figure(baseline: dict[str, Any], other: dict[str, Any], **options: Any) -> dict[tuple[str, str], Any]:
    return {(one.section, one.metric): one for one in compare_results(baseline, other, **options)}


def test_comparison_is_the_bootstrap_over_common_scenes() -> None:
    first, second = scenes(14), scenes(13, shift=-0.01, seed=1)
    del second["room-3/0-3"]
    common = [key for key in first if key in second]
    found = by_figure(make_result(first), make_result(second), seed=3)[LOSS]
    expected = paired_bootstrap([first[key] for key in common], [second[key] for key in common], seed=3)
    assert (found.difference, found.low, found.high) == pytest.approx(expected)
    assert (found.units, found.unit) == (12, "scene")
    assert found.baseline == pytest.approx(np.mean([first[key] for key in common]))
    assert found.other - found.baseline == pytest.approx(found.difference)
    assert found.is_clear


def test_samples_of_one_scene_do_not_narrow_the_interval() -> None:
    first, second = scenes(12), scenes(12, shift=0.001, seed=5)
    again = [{**part, **{f"{key}-7": value for key, value in part.items()}} for part in (first, second)]
    alone, doubled = (by_figure(*map(make_result, both))[LOSS] for both in ((first, second), again))
    assert doubled.units == 12
    assert (doubled.low, doubled.high) == pytest.approx((alone.low, alone.high))
    assert scene_of("rgbd/office/3-4") == "rgbd/office"


def test_few_scenes_and_a_single_scene_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="9 common scenes for some figures: with fewer than 10"):
        found = by_figure(make_result(scenes(9)), make_result(scenes(9, shift=1.0)))[LOSS]
    assert found.low > 0
    assert not found.is_clear
    views = [{f"office/{n}-{n + 1}": 0.1 * n + 0.01 * seed * n for n in range(6)} for seed in range(2)]
    with pytest.warns(UserWarning, match="of one scene, so the intervals are over its samples"):
        found = by_figure(*map(make_result, views))[LOSS]
    assert (found.units, found.unit) == (6, "sample")
    single = [{"office/0-1": value} for value in (0.1, 0.3)]
    with pytest.warns(UserWarning, match="of one scene"):
        found = by_figure(*map(make_result, single))[LOSS]
    assert found.difference == pytest.approx(0.2)
    assert math.isnan(found.low)
    assert not found.is_clear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_results(make_result(scenes(10)), make_result(scenes(10, seed=1)))


def changed(part: str, name: str, value: Any) -> dict[str, Any]:
    result = make_result(scenes(10))
    result[part][name] = value
    return result


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_result(scenes(10), noise_seed=5), r"settings.noise_seed is 1234 in one and 5 in the other"),
        (make_result(scenes(10), noise_levels=(1.0,)), r"settings.noise_levels is \[0.1, .*\] in one and \[1.0\]"),
        (changed("data", "num_views", 4), r"data.num_views is 3 in one and 4 in the other; evaluate both on the same"),
        (changed("data", "source", "office"), r"data.source is None in one and 'office' in the other"),
        (
            changed("data", "samples", {key: [0.6, 2.0] for key in scenes(10)}),
            r"sample room-0/0-0 differs between them \(mean color and depth \[0.5, 2.0\] and \[0.6, 2.0\]\)",
        ),
        (make_result({"shed/0-1": 0.1}), r"no sample is common, one starts with 'room-0/0-0' and the other with 'shed"),
    ],
)
def test_what_was_not_measured_alike_is_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_results(make_result(scenes(10)), other)


def test_results_may_differ_in_batch_size_and_last_bits() -> None:
    other = make_result(scenes(10), batch_size=2)
    other["data"]["samples"] = {key: [0.5000001, 2.0] for key in scenes(10)}
    assert by_figure(make_result(scenes(10)), other)[LOSS].difference == 0


def test_figures_of_the_data_and_of_one_run_alone_are_left_out() -> None:
    first, second = make_result(scenes(10), psnr=scenes(10)), make_result(scenes(10))
    for result in (first, second):
        result["sections"]["attention"]["per_sample"]["attn chance@1"] = scenes(10)
        result["sections"]["consistency"]["per_sample"]["warp_error_truth"] = scenes(10)
    assert set(by_figure(first, second)) == {LOSS}
    nothing = copy.deepcopy(second)
    nothing["sections"]["denoising"]["per_sample"] = {}
    with pytest.raises(ValueError, match="no figure is common to both; evaluate both with the same sections"):
        compare_results(first, nothing)


def test_table_of_three_runs() -> None:
    base, worse = make_result(scenes(12), psnr=scenes(12, 20)), make_result(scenes(12, 0.05), psnr=scenes(12, 19))
    table = comparison_table({"base": base, "worse": worse, "same": make_result(scenes(12))})
    head, _, psnr, loss, _, note = table.splitlines()
    assert head == "| | base | worse | difference [95 %] | n | same | difference [95 %] | n |"
    cells = [cell.strip() for cell in psnr.split("|")[1:-1]]
    assert cells[0] == "PSNR of generated views (dB) ↑"
    assert cells[3:] == ["**-1.00 [-1.00, -1.00]**", "12", "-", "-", "-"]
    cells = [cell.strip() for cell in loss.split("|")[1:-1]]
    assert cells[3] == "**+0.0500 [+0.0500, +0.0500]**"
    assert cells[6] == "+0.0000 [+0.0000, +0.0000]"
    assert note.startswith("Means over common scenes (n). Difference from base with a paired bootstrap interval")
    figure = comparison_figure({"base": base, "worse": worse})
    assert [axis.get_title() for axis in figure.axes if axis.lines] == [
        "PSNR of generated views (dB) ↑",
        "denoising loss, fixed noise ↓",
    ]
    with pytest.raises(ValueError, match="expected at least two runs to compare, got 1"):
        comparison_table({"base": base})


def test_table_has_a_mean_of_the_first_run_for_each_set_of_common_scenes() -> None:
    base, near = make_result({f"room-{n}/0": float(n) for n in range(12)}), {f"room-{n}/0": n + 1.0 for n in range(12)}
    few = {key: value for key, value in near.items() if key not in ("room-10/0", "room-11/0")}
    lines = comparison_table({"base": base, "all": make_result(near), "few": make_result(few)}).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[1] == "5.5000 / 4.5000"
    assert (cells[2], cells[4], cells[5], cells[7]) == ("6.5000", "12", "5.5000", "10")
    assert "Where base has several means" in lines[-1]
    assert "several means" not in comparison_table({"base": base, "all": make_result(near)})


def test_two_backbones_are_warned_about_and_a_figure_names_its_units() -> None:
    first, second = ({**make_result(scenes(10)), "run": {"backbone": name}} for name in ("cat3d", "sv3d"))
    with pytest.warns(UserWarning, match="two backbones, cat3d and sv3d: .*denoising losses cannot be compared"):
        compare_results(first, second)
    assert "over scenes" in comparison_figure({"a": first, "b": first}).get_suptitle()
    office = make_result({f"office/{n}": 0.1 * n for n in range(3)})
    with pytest.warns(UserWarning, match="of one scene"):
        assert "over samples" in comparison_figure({"a": office, "b": office}).get_suptitle()


def test_files_are_read_under_names_that_tell_them_apart(tmp_path: Path) -> None:
    for folder in ("with", "without"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "result.json").write_text(json.dumps(make_result(scenes(2))))
    assert list(name_results([tmp_path / "with", tmp_path / "without" / "result.json"])) == ["with", "without"]
    (tmp_path / "a.json").write_text(json.dumps(make_result(scenes(2))))
    assert list(name_results([tmp_path / "a.json", tmp_path / "with"])) == ["a", "result"]
    with pytest.raises(ValueError, match="expected different files"):
        name_results([tmp_path / "with", tmp_path / "with" / "result.json"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"none.json: no such file; cameo evaluate writes result.json"),
        ("{", r"none.json: not valid JSON"),
        ("[]", r"none.json: is no result of cameo evaluate, settings, data, sections missing"),
        ('{"settings": {}, "data": {}}', r"sections missing"),
    ],
)
def test_files_that_are_no_results(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_result(path)
