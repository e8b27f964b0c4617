"""A short form of benchmarks/reliability/bad_input.py: random bad input is refused clearly or has a defined value."""

from __future__ import annotations

import pytest

from benchmarks.reliability.bad_input import GROUPS, Case, SilentWrongError, campaign, outcome_of, table


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_no_bad_input_is_wrong_in_silence(seed: int) -> None:
    cases = list(campaign(100, seed))
    assert {case.group for case in cases} == set(GROUPS)
    assert sum(case.outcome == "clear error" for case in cases) > 50
    bad = [case for case in cases if case.outcome in ("silent wrong", "library error", "hang")]
    assert not bad, "\n".join(f"{case.outcome}: {case.what}: {case.said}" for case in bad)


def test_outcomes_are_told_apart() -> None:
    import cameo

    def wrong() -> None:
        raise SilentWrongError("other matches")

    assert outcome_of(lambda: cameo.AlignmentHead(0))[0] == "clear error"
    assert outcome_of(lambda: cameo.AlignmentHead(2))[0] == "defined value"
    assert outcome_of(lambda: {}["x"])[0] == "library error"
    assert outcome_of(wrong) == ("silent wrong", "other matches")
    shown = table([Case("settings", "x", "silent wrong", "y")])
    assert "| settings | 1 | 0 | 0 | 0 | 0 | 1 | 0 |" in shown
