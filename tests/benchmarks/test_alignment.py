"""The benchmark of the alignment loss runs at its smallest size, and its peers compute the same loss."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.alignment import cases, gates, measure, parts, peers, tables
from benchmarks.common import page
from benchmarks.common.page import ROOT
from cameo import alignment_loss


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach() - expected.detach()).norm() / expected.detach().norm())


SMALL = {"tokens": 4, "views": 3, "heads": 2, "batch": 2, "dtype": "float64"}


@pytest.mark.parametrize("head", ["mlp", "mean"])
def test_dense_peer_is_the_released_loss(head: str) -> None:
    case = cases.make_case(cases.Setting(head=head, **SMALL))
    got = peers.released_dense_loss(case)()
    expected, gradients = case.truth("released")
    # The released code adds 1e-8 to every probability.
    assert relative_error(got, expected) < 1e-6
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(case.gradients(got), gradients, strict=True))


@pytest.mark.parametrize("selection", ["released", "per view", "all"])
def test_checkpointed_peer_and_truth_are_the_reference(selection: str) -> None:
    case = cases.make_case(cases.Setting(**SMALL))
    match, options = case.match(selection), case.options(selection)
    expected = alignment_loss(case.query, case.key, match, case.head, implementation="reference", **options)
    gradients = case.gradients(expected)
    truth = case.truth(selection)
    got = peers.checkpointed_loss(case, selection)()
    for loss, found in ((got, case.gradients(got)), truth):
        assert relative_error(loss, expected) < 1e-12
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, gradients, strict=True))


def test_selections_differ_as_they_say() -> None:
    setting = cases.Setting(tokens=16)
    rows = {name: cases.make_case(setting).rows(name) for name in cases.SELECTIONS}
    assert rows["released"] <= setting.rows / (setting.views - 1)
    assert rows["released"] < rows["per view"] < rows["all"] == setting.rows


def test_alignment_runs_at_its_smallest_size_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "alignment.json"
    arguments = ["--smallest", "--gates", "--output", str(path)]
    assert measure.main(arguments) == 0
    first, shown = path.read_text(), capsys.readouterr().out
    assert "| 4x4 | 3 | 2 | 1 | mlp | chunked | all (100 %)" in shown
    (setting,) = (entry for entry in json.loads(first).values() if "runs" in entry)
    # Float32 rounding of a loss of a few hundred pairs.
    assert max(setting["gradient_error"].values()) < 1e-5
    assert all(run["best"] > 0 and run["peak_bytes"] > 0 for run in setting["runs"].values())
    assert re.search(r"chunked, float64 \| <= 1e-12 \| [\d.e-]+ \| met \|", shown)
    assert measure.main(arguments) == 0
    assert path.read_text() == first
    assert "measuring" not in capsys.readouterr().out


def entry(times: dict[str, float], peaks: dict[str, int], **setting: Any) -> dict[str, Any]:
    return {
        "setting": {"tokens": 32, "views": 4, "heads": 10, "batch": 1, "head": "mlp", **setting},
        "runs": {name: {"best": times[name], "peak_bytes": peaks[name]} for name in times},
        "limit": {"released": {"products": 0.2, "gelu": 0.1, "gelu backward": 0.1}},
        "gradient_bytes": 20_000_000,
    }


def test_gates_tell_met_missed_and_not_measured() -> None:
    times = {"dense, released": 20.0, "chunked, released": 0.9, "chunked, all": 4.0}
    peaks = {"dense, released": 5_000_000_000, "chunked, released": 40_000_000, "chunked, all": 100_000_000}
    rows = gates.check({"one": entry(times, peaks)}, "cpu")
    states = {row["gate"]: row["state"] for row in rows}
    assert states["bfloat16, chunked / dense: error of the loss"] == "not measured"
    assert states["memory of dense / chunked, 32x32"] == "met"
    # 100 MB against 1.25 x 20 MB + 64 MB.
    assert states["largest peak / (1.25 x (dq + dk) + 64 MB), over all sizes"] == "missed"
    demanded = {row["demanded"] for row in rows}
    assert {">= 100", "<= 1e-12", "<= 1e-05", "<= 1"} <= demanded


def test_gates_of_a_gpu_compare_with_the_dense_form_and_with_gelu_alone() -> None:
    times = {"dense, released": 20.0, "dense, all": 20.0, "triton, released": 0.9, "triton, all": 4.0}
    found = {"one": entry(times, dict.fromkeys(times, 1), batch=3)}
    states = {row["gate"]: row["state"] for row in gates.check(found, "cuda")}
    assert states["time of dense / triton, only rows with a target, 32x32"] == "met"
    assert states["time of dense / triton, nothing skipped, 32x32"] == "missed"
    assert states["time of triton / a GELU-only kernel, released, 32x32"] == "missed"


def test_the_loss_is_compared_with_its_parts_of_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "parts.json"
    arguments = ["--sides", "4", "--threads", "1", "2", "--seconds", "0.001", "--output", str(path)]
    assert parts.main(arguments) == 0
    assert "product / own portions" in capsys.readouterr().out
    found = json.loads(path.read_text())
    for one in (one for entry in found.values() for one in entry["found"].values()):
        one |= {"product": 1.2, "limit": 0.2, "parts": {"products": 0.6, "gelu": 0.4}}
    states = {row["gate"]: row["state"] for row in parts.check(found)}
    assert states["time of chunked / the sum of its parts alone, all, 4x4, 1 threads"] == "met"
    assert states["time of chunked / its products at the speed of large ones, all, 4x4, 2 threads"] == "missed"


def test_threads_with_portions_of_their_own_compute_the_same() -> None:
    case = cases.make_case(cases.Setting(tokens=4, views=3, heads=2, dtype="float64"))
    expected = parts.product(case, "released")()
    for one, other in zip(parts.own_portions(case, "released", 2)(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_gelu_kernel_evaluates_what_it_says() -> None:
    pytest.importorskip("triton")
    code = """
import torch, torch.nn.functional as F
from benchmarks.alignment import gelu_kernel
start = torch.arange(1024) * (4 / 1024) - 2
got = gelu_kernel.gelu_sums(1025, 3, "cpu")
expected = sum(F.gelu(start + step * 0.01).sum() for step in range(3))
for step in range(3):
    value = (start - step * 0.01).requires_grad_()
    expected = expected + torch.autograd.grad(F.gelu(value).sum(), value)[0].sum()
torch.testing.assert_close(got, expected.expand(2))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_measurement_that_was_interrupted_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(one for one in tables.SCRIPT.found("cpu").items() if one[1]["setting"]["tokens"] == 32)
    (tmp_path / f"{tables.SCRIPT.results}_cpu.json").write_text(json.dumps(dict([first])), encoding="utf-8")
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "PICTURES", tmp_path)
    assert tables.draw("cpu") == tmp_path / "alignment_cpu.png"
    assert (tmp_path / "alignment_cpu.png").stat().st_size > 10_000
