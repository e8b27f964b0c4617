"""A short form of benchmarks/reliability/bad_input.py: random bad input is refused clearly or has a defined value."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cameo
from benchmarks.reliability.bad_input import GROUPS, Case, SilentWrongError, drawn_cases, outcome_of, table, try_one


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_no_bad_input_is_wrong_in_silence(group: str) -> None:
    outcomes = set()

    @settings(max_examples=40, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def try_many(drawn: st.DataObject) -> None:
        case = try_one(group, drawn)
        outcomes.add(case.outcome)
        assert case.outcome not in ("silent wrong", "library error", "hang"), case

    try_many()
    assert "clear error" in outcomes


def test_the_campaign_draws_the_same_for_the_same_number() -> None:
    cases = [[case.what for case in drawn_cases("folders of matches", 5, number)] for number in (0, 0, 1)]
    assert cases[0] == cases[1] != cases[2]
    assert len(cases[0]) == 5


def test_outcomes_are_told_apart() -> None:
    def wrong() -> None:
        raise SilentWrongError("other matches")

    assert outcome_of(lambda: cameo.AlignmentHead(0))[0] == "clear error"
    assert outcome_of(lambda: cameo.AlignmentHead(2))[0] == "defined value"
    assert outcome_of(lambda: {}["x"])[0] == "library error"
    assert outcome_of(wrong) == ("silent wrong", "other matches")
    shown = table([Case("settings", "x", "silent wrong", "y")])
    assert "| settings | 1 | 0 | 0 | 0 | 0 | 1 | 0 |" in shown
