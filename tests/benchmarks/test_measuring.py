"""Times, memory, results files and tables that all benchmarks share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import measuring


def test_interleaved_goes_round_and_keeps_to_its_budget() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = measuring.interleaved(runs, repeats=2, warm_up=1)
    assert order == list("ababab")
    assert [len(seconds) for seconds in found.values()] == [2, 2]
    found = measuring.interleaved(runs, repeats=5, warm_up=0, budget=0.0)
    assert [len(seconds) for seconds in found.values()] == [1, 1]
    with pytest.raises(ValueError, match="repeats"):
        measuring.interleaved(runs, repeats=0)


@torch.library.custom_op("cameo_benchmarks::hidden_copy", mutates_args=())
def hidden_copy(value: torch.Tensor) -> torch.Tensor:
    return (value.double() + 1).float()


def test_peak_memory_sees_into_custom_operators() -> None:
    value = torch.zeros(1 << 22)
    size = value.numel() * 4
    # Inside, a copy in double precision and the same plus 1 are held at a time, besides scalars.
    assert measuring.peak_memory(lambda: hidden_copy(value)) == pytest.approx(4 * size, rel=1e-6)
    assert measuring.peak_memory(lambda: value + 1) == pytest.approx(size, rel=1e-6)


def test_peak_memory_agrees_with_the_process() -> None:
    def run() -> None:
        # Nothing is released before the last tensor: the allocator may find a gap too small and take new pages.
        value = torch.ones(1 << 24)
        double = value.double()
        (double + 1).sum()

    allocated, resident = measuring.peak_memory(run), measuring.peak_resident(run)
    if resident is None:
        pytest.skip("the system does not tell")
    assert resident == pytest.approx(allocated, rel=0.1)


def test_results_continue_and_are_measured_again_on_request(tmp_path: Path) -> None:
    path, calls = tmp_path / "results.json", []

    def run() -> dict[str, Any]:
        calls.append(1)
        return {"best": len(calls)}

    assert measuring.Results(path).get("one", run)["best"] == 1
    assert measuring.Results(path).get("one", run)["best"] == 1
    assert measuring.Results(path, again=True).get("one", run)["best"] == 2
    stored = json.loads(path.read_text())
    stored["one"]["environment"]["device"] = "another"
    measuring.write_results(path, stored)
    assert measuring.Results(path).get("one", run)["best"] == 3
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_markdown_table_shows_dashes_and_three_figures() -> None:
    rows = [{"a": 1, "b": 0.12345}, {"a": None, "b": 23456.7}]
    assert measuring.table_of(rows).splitlines()[2:] == ["| 1 | 0.123 |", "| - | 23457 |"]
    assert measuring.table_of([]) == ""
