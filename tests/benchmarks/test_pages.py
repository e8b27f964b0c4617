"""Pages agree with the results files that they are written from, and a trial does not touch these."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks.common.page import ROOT, TABLE, filled
from benchmarks.convergence.arms import subjects_of
from benchmarks.pages import PAGES

EXPECTED = {
    "performance.md": {
        "counts",
        "gates_cpu",
        "matches_cpu",
        "step_cuda",
        "latents_cpu",
        "compiled_step_cpu",
        "dry_run_cpu",
        "dry_run_gpu",
        "dry_run_released",
        "missed_cpu",
    },
    "results.md": {"families_tiny", "demands_tiny", "declared_tiny"}
    | {f"{name}_tiny_{subject}" for name in ("study", "levels") for subject in subjects_of("tiny")},
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_agrees_with_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text, PAGES[page]) == text, "run `python -m benchmarks.pages`"
    named = {name for _, name, _ in TABLE.findall(text)}
    assert EXPECTED[page.name] <= named <= set(PAGES[page])


def test_every_page_is_written_somewhere_that_is_read() -> None:
    with_tables = {page for page in ROOT.glob("**/*.md") if "<!-- table: " in page.read_text(encoding="utf-8")}
    by_its_campaign = ROOT / "benchmarks" / "reliability" / "README.md"  # which takes longer than to be kept as results
    assert with_tables == {*PAGES, by_its_campaign}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("alignment", ["--smallest"]),
        ("correspondence", ["--smallest"]),
        ("step", ["--width", "0.05"]),
        ("step", ["--resolution", "64"]),
    ],
)
def test_a_trial_is_not_written_among_the_results(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script = importlib.import_module(f"benchmarks.{name}.measure")
    monkeypatch.setattr(script, "Results", lambda *_, **__: pytest.fail("the results file is opened"))
    with pytest.raises(SystemExit):
        script.main([*arguments, "--device", "cpu"])
    assert "--output" in capsys.readouterr().err
