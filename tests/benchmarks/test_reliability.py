"""A short form of benchmarks/reliability/folders.py, and how its pages are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.page import ROOT, fill
from benchmarks.reliability.folders import TRIALS, Run, table

CAMPAIGN = """
import json, sys
from pathlib import Path
from benchmarks.reliability.folders import campaign
from benchmarks.reliability.kills import undisturbed

with undisturbed(Path(sys.argv[1])) as (work, data):
    outcomes = list(campaign(data, work, trials=1, seed=3))
print(json.dumps(outcomes))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_fault_of_the_folder_is_said_and_the_run_goes_on_after_it(tmp_path: Path) -> None:
    # In a process of its own: a process that has computed a gradient cannot fork another one that does.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CAMPAIGN, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert [kind for kind, _, _ in outcomes] == list(TRIALS)
    assert not [outcome for outcome in outcomes if outcome[1] == "bad"]
    assert {kind: outcome for kind, outcome, _ in outcomes if kind != "read-only"} == dict.fromkeys(
        [kind for kind in TRIALS if kind != "read-only"], "good"
    )


def test_a_run_that_says_too_little_counts_as_bad(tmp_path: Path) -> None:
    run = Run((), tmp_path / "run", tmp_path / "run.log")
    for said, wrong in {
        "OSError: no space": "by another error than cameo's",
        "DataError: no space": "does not say",
    }.items():
        run.log.write_text(said)
        with pytest.raises(AssertionError, match=wrong):
            run.expect(1, "Make room there")
    run.log.write_text("DataError: Make room there")
    run.expect(1, "Make room there")
    with pytest.raises(AssertionError, match="without an error"):
        run.expect(0)


def test_the_table_counts_and_gives_each_reason_once() -> None:
    shown = table([("two runs", "good", ""), *[("read-only", "not tried", "no right to mount")] * 2], "command", 1)
    assert "| two runs | 1 | 0 | 0 |" in shown
    assert "| read-only | 0 | 0 | 2 |" in shown
    assert shown.count("no right to mount") == 1


def test_one_table_of_a_page_is_written_anew(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    form = "# A\n\n<!-- table: a -->\n\n{}\n<!-- end -->\n\n<!-- table: b -->\nb\n<!-- end -->\n"
    page.write_text(form.format("old"))
    fill(page, "a", "new")
    assert page.read_text() == form.format("new")
    with pytest.raises(KeyError, match="has no table c"):
        fill(page, "c", "new")
