"""Markdown tables."""

from __future__ import annotations

import pytest

from cameo.evaluation.report import result_table
from cameo.probing.ablation import LayerEffect, effects_table
from cameo.tables import markdown_table
from cameo.training.report import metrics_table


def cells(line: str) -> list[str]:
    """Split a line as a Markdown reader does: a `|` behind a backslash is part of the cell."""
    parts = line.replace(r"\|", "\0").split("|")[1:-1]
    return [part.strip().replace("\0", "|") for part in parts]


def test_no_content_ends_a_cell_or_a_row() -> None:
    table = markdown_table(["rows | columns", "note"], [["a|b", "two\nlines"], [1, None]])
    assert [cells(line) for line in table.splitlines()] == [
        ["rows | columns", "note"],
        ["---", "---"],
        ["a|b", "two lines"],
        ["1", "None"],
    ]


def test_rows_have_the_length_of_the_header() -> None:
    with pytest.raises(ValueError, match="rows: expected 2 cells as in the header, got 1 in row 1"):
        markdown_table(["layer", "note"], [[0, ""], [1]])


def test_names_that_users_give_stay_one_cell() -> None:
    sections = {name: {"mean": {}, "per_sample": {}, "notes": {}} for name in ("novel_views", "consistency")}
    denoising = {"mean": {"loss": 0.5}, "per_sample": {"loss": {"a/0": 0.5}}, "notes": {}}
    attention = {"mean": {"up|down mean@1": 0.25}, "per_sample": {}, "notes": {}}
    lines = result_table({"sections": {**sections, "denoising": denoising, "attention": attention}}, name="a|b")
    assert cells(lines.splitlines()[0]) == ["", "a|b", "samples"]
    assert cells(lines.splitlines()[-1])[0].startswith("`up|down`, mean")
    figures = {"loss": 0.5, "psnr_covisible": None, "psnr_all": 20.0, "precision": None}
    assert cells(metrics_table({"a|b": figures}).splitlines()[0]) == ["", "a|b"]
    effect = LayerEffect(3, "up|down", None, None, None, None, None, None)
    assert cells(effects_table([effect]).splitlines()[2])[:2] == ["3", "up|down"]
