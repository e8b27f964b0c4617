"""The benchmarks run at their smallest size, peers compute the same loss, and the page agrees with the results."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cameo import alignment_loss

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
NAMES = [path.stem for path in FOLDER.glob("*.py")]


class Scripts:
    """The scripts by name; they import each other by name, as `python benchmarks/NAME.py` lets them."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        before = set(sys.modules)
        yield Scripts()
        for name in set(NAMES) & (set(sys.modules) - before):
            del sys.modules[name]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.detach() - expected.detach()).norm() / expected.detach().norm())


def test_interleaved_goes_round_and_keeps_to_its_budget(scripts: Scripts) -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = scripts.measure.interleaved(runs, repeats=2, warm_up=1)
    assert order == list("ababab")
    assert [len(seconds) for seconds in found.values()] == [2, 2]
    found = scripts.measure.interleaved(runs, repeats=5, warm_up=0, budget=0.0)
    assert [len(seconds) for seconds in found.values()] == [1, 1]
    with pytest.raises(ValueError, match="repeats"):
        scripts.measure.interleaved(runs, repeats=0)


@torch.library.custom_op("cameo_benchmarks::hidden_copy", mutates_args=())
def hidden_copy(value: torch.Tensor) -> torch.Tensor:
    return (value.double() + 1).float()


def test_peak_memory_sees_into_custom_operators(scripts: Scripts) -> None:
    value = torch.zeros(1 << 22)
    size = value.numel() * 4
    # Inside, a copy in double precision and the same plus 1 are held at a time, besides scalars.
    assert scripts.measure.peak_memory(lambda: hidden_copy(value)) == pytest.approx(4 * size, rel=1e-6)
    assert scripts.measure.peak_memory(lambda: value + 1) == pytest.approx(size, rel=1e-6)


def test_peak_memory_agrees_with_the_process(scripts: Scripts) -> None:
    def run() -> None:
        value = torch.ones(1 << 24, requires_grad=True)
        torch.nn.functional.gelu(value * 2).sum().backward()

    allocated, resident = scripts.measure.peak_memory(run), scripts.measure.peak_resident(run)
    if resident is None:
        pytest.skip("the system does not tell")
    assert resident == pytest.approx(allocated, rel=0.1)


def test_results_continue_and_are_measured_again_on_request(scripts: Scripts, tmp_path: Path) -> None:
    path, calls = tmp_path / "results.json", []

    def run() -> dict[str, Any]:
        calls.append(1)
        return {"best": len(calls)}

    assert scripts.measure.Results(path).get("one", run)["best"] == 1
    assert scripts.measure.Results(path).get("one", run)["best"] == 1
    assert scripts.measure.Results(path, again=True).get("one", run)["best"] == 2
    stored = json.loads(path.read_text())
    stored["one"]["environment"]["device"] = "another"
    scripts.measure.write_results(path, stored)
    assert scripts.measure.Results(path).get("one", run)["best"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_markdown_table_shows_dashes_and_three_figures(scripts: Scripts) -> None:
    rows = [{"a": 1, "b": 0.12345}, {"a": None, "b": 23456.7}]
    assert scripts.measure.table_of(rows).splitlines()[2:] == ["| 1 | 0.123 |", "| - | 23457 |"]
    assert scripts.measure.table_of([]) == ""


SMALL = {"tokens": 4, "views": 3, "heads": 2, "batch": 2, "dtype": "float64"}


@pytest.mark.parametrize("head", ["mlp", "mean"])
def test_dense_peer_is_the_released_loss(scripts: Scripts, head: str) -> None:
    case = scripts.alignment_cases.make_case(scripts.alignment_cases.Setting(head=head, **SMALL))
    got = scripts.alignment_peers.released_dense_loss(case)()
    expected, gradients = case.truth("released")
    # The released code adds 1e-8 to every probability.
    assert relative_error(got, expected) < 1e-6
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(case.gradients(got), gradients, strict=True))


@pytest.mark.parametrize("selection", ["released", "per view", "all"])
def test_checkpointed_peer_and_truth_are_the_reference(scripts: Scripts, selection: str) -> None:
    case = scripts.alignment_cases.make_case(scripts.alignment_cases.Setting(**SMALL))
    match, options = case.match(selection), case.options(selection)
    expected = alignment_loss(case.query, case.key, match, case.head, implementation="reference", **options)
    gradients = case.gradients(expected)
    truth = case.truth(selection)
    got = scripts.alignment_peers.checkpointed_loss(case, selection)()
    for loss, found in ((got, case.gradients(got)), truth):
        assert relative_error(loss, expected) < 1e-12
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, gradients, strict=True))


def test_selections_differ_as_they_say(scripts: Scripts) -> None:
    setting = scripts.alignment_cases.Setting(tokens=16)
    rows = {name: scripts.alignment_cases.make_case(setting).rows(name) for name in scripts.alignment_cases.SELECTIONS}
    assert rows["released"] <= setting.rows / (setting.views - 1)
    assert rows["released"] < rows["per view"] < rows["all"] == setting.rows


def test_alignment_runs_at_its_smallest_size_and_continues(
    scripts: Scripts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "alignment.json"
    arguments = ["--smallest", "--gates", "--output", str(path)]
    assert scripts.alignment.main(arguments) == 0
    first, shown = path.read_text(), capsys.readouterr().out
    assert "| 4x4 | 3 | 2 | 1 | mlp | chunked | all (100 %)" in shown
    (setting,) = (entry for entry in json.loads(first).values() if "runs" in entry)
    # Float32 rounding of a loss of a few hundred pairs.
    assert max(setting["gradient_error"].values()) < 1e-5
    assert all(run["best"] > 0 and run["peak_bytes"] > 0 for run in setting["runs"].values())
    assert re.search(r"chunked, float64 \| <= 1e-12 \| [\d.e-]+ \| met \|", shown)
    assert scripts.alignment.main(arguments) == 0
    assert path.read_text() == first
    assert "measuring" not in capsys.readouterr().out


def entry(times: dict[str, float], peaks: dict[str, int], **setting: Any) -> dict[str, Any]:
    return {
        "setting": {"tokens": 32, "views": 4, "heads": 10, "batch": 1, "head": "mlp", **setting},
        "runs": {name: {"best": times[name], "peak_bytes": peaks[name]} for name in times},
        "limit": {"released": {"products": 0.2, "gelu": 0.1, "gelu backward": 0.1}},
        "gradient_bytes": 20_000_000,
    }


def test_gates_tell_met_missed_and_not_measured(scripts: Scripts) -> None:
    times = {"dense, released": 20.0, "chunked, released": 0.9, "chunked, all": 4.0}
    peaks = {"dense, released": 5_000_000_000, "chunked, released": 40_000_000, "chunked, all": 100_000_000}
    rows = scripts.alignment_gates.check({"one": entry(times, peaks)}, "cpu")
    states = {row["gate"]: row["state"] for row in rows}
    assert states["time of dense / chunked, only rows with a target, 32x32"] == "met"
    assert states["time of dense / chunked, nothing skipped, 32x32"] == "missed"
    assert states["time of dense / chunked, nothing skipped, 16x16"] == "not measured"
    assert states["memory of dense / chunked, 32x32"] == "met"
    # 100 MB against 1.25 x 20 MB + 64 MB.
    assert states["largest peak / (1.25 x (dq + dk) + 64 MB), over all token_grids"] == "missed"
    assert states["time of chunked / the same products + GELU + GELU backward alone, released, 32x32"] == "met"
    demanded = {row["demanded"] for row in rows}
    assert {">= 20", ">= 9", ">= 6", ">= 3.5", ">= 100", "<= 2.5", "<= 1e-12", "<= 1e-05", "<= 1"} <= demanded


def test_training_step_runs_at_its_smallest_size_and_continues(
    scripts: Scripts, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "step.json"
    kind = scripts.training_step.Kind("cat3d", checkpointing=False)
    monkeypatch.setattr(scripts.training_step, "kinds", lambda backbones: [kind])
    size = ["--width", "0.05", "--resolution", "64", "--batch", "1", "--repeats", "1"]
    arguments = ["--device", "cpu", "--gates", *size, "--output", str(path)]
    assert scripts.training_step.main(arguments) == 0
    first, shown = path.read_text(), capsys.readouterr().out
    (found,) = json.loads(first).values()
    assert len(found["steps"]) == 4
    assert found["left_out"] == {}
    assert "time of a step, cat3d, LoRA, no checkpointing, with alignment, matches from depth / without" in shown
    assert scripts.training_step.main(arguments) == 0
    assert path.read_text() == first


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("alignment", ["--smallest"]),
        ("correspondence", ["--smallest"]),
        ("training_step", ["--width", "0.05"]),
        ("training_step", ["--resolution", "64"]),
    ],
)
def test_a_trial_is_not_written_among_the_results(
    scripts: Scripts, name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script = getattr(scripts, name)
    monkeypatch.setattr(script, "Results", lambda *_, **__: pytest.fail("the results file is opened"))
    with pytest.raises(SystemExit):
        script.main([*arguments, "--device", "cpu"])
    assert "--output" in capsys.readouterr().err


def test_training_step_has_the_released_size(scripts: Scripts) -> None:
    config = scripts.training_step.settings(scripts.training_step.Kind("cat3d"), 1.0, None, None)
    assert (config.resolution, config.num_views, config.train_batch_size) == (512, 4, 3)
    assert config.mixed_precision == "bf16"
    assert config.preset_options["block_out_channels"] == [320, 640, 1280, 1280]


def test_the_page_agrees_with_the_results(scripts: Scripts) -> None:
    page = scripts.report.PAGE.read_text(encoding="utf-8")
    assert scripts.report.filled(page) == page, "run `python benchmarks/report.py`"
    named = {name for _, name, _ in scripts.report.TABLE.findall(page)}
    assert named <= set(scripts.report.TABLES)
    assert {"counts", "gates_cpu", "step_cuda", "missed_cpu"} <= named


def test_the_gelu_kernel_evaluates_what_it_says() -> None:
    pytest.importorskip("triton")
    code = """
import torch, torch.nn.functional as F, gelu_kernel
start = torch.arange(1024) * (4 / 1024) - 2
got = gelu_kernel.gelu_sums(1025, 3, "cpu")
expected = sum(F.gelu(start + step * 0.01).sum() for step in range(3))
for step in range(3):
    value = (start - step * 0.01).requires_grad_()
    expected = expected + torch.autograd.grad(F.gelu(value).sum(), value)[0].sum()
torch.testing.assert_close(got, expected.expand(2))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(FOLDER)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
