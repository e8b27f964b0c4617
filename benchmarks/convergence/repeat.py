"""Does a run give the same figures again, to the last digit?"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.convergence import arms, schedule
from benchmarks.convergence.runs import Run, RunOf, read_run, result_path
from cameo.tables import markdown_table

__all__ = ["differences", "figures", "main"]

# What a run says of itself beside its figures, and the times among these.
FACTS = ("date", "device", "threads", "torch", "settings", "validation_settings", "preset")
TIMES = ("seconds", "busy_seconds")


def main(options: argparse.Namespace) -> int:
    """Make runs that are kept once more, each with the threads that it had, and print whether they are the same.

    Returns:
        1 if a figure differs or a run failed, else 0.

    Raises:
        SystemExit: if a run is not kept.
    """
    runs = wanted(options)
    if missing := [run_of for run_of in runs if not result_path(options.preset, run_of).is_file()]:
        raise SystemExit("--repeat: not run yet: " + "; ".join("{} {} seed {}".format(*run_of) for run_of in missing))
    kept = {run_of: read_run(result_path(options.preset, run_of)) for run_of in runs}
    threads = {run_of: run["threads"] for run_of, run in kept.items()}
    with tempfile.TemporaryDirectory() as scratch:
        options = argparse.Namespace(
            **{**vars(options), "work": f"{scratch}/work", "results": Path(scratch, "results")}
        )
        schedule.run_in_processes(options, runs, threads=threads)
        again = {run_of: result_path(options.preset, run_of, options.results) for run_of in runs}
        made = {run_of: read_run(path) for run_of, path in again.items() if path.is_file()}
    rows, all_equal = [], True
    for run_of in runs:
        subject, arm, seed = run_of
        differs = differences(kept[run_of], made[run_of]) if run_of in made else ["the run failed"]
        all_equal &= not differs
        title = arms.declared(options.preset, subject).title
        verdict = "yes" if not differs else f"no: {differs[0]}" + (f" and {len(differs) - 1} more" * (len(differs) > 1))
        rows.append([title, arm, seed, len(dict(figures(kept[run_of]))), verdict])
    print(markdown_table(["family", "arm", "seed", "figures", "equal?"], rows))
    return 0 if all_equal else 1


def wanted(options: argparse.Namespace) -> list[RunOf]:
    """List the runs to repeat: by default those of the shown arm with seed 0."""
    return [
        (subject, arm, seed)
        for subject in options.subjects
        for arm in options.arms or [arms.declared(options.preset, subject).shown]
        for seed in options.seeds or [0]
    ]


def figures(run: Run) -> Iterator[tuple[str, str]]:
    """List everything that a run measured but times, as place and text, in the order of the file.

    Example:
        >>> run = {"date": "2026-11-28", "layer": "mid", "validations": [{"step": 0, "loss": 0.1, "seconds": 3.0}]}
        >>> list(figures(run))
        [('layer', '"mid"'), ('validations.0.step', '0'), ('validations.0.loss', '0.1')]
    """
    yield from _leaves({name: value for name, value in run.items() if name not in FACTS}, ())


def differences(kept: Run, again: Run) -> list[str]:
    """List the figures in which two runs differ, as "place: value, then value"; empty if they are the same."""
    first, second = dict(figures(kept)), dict(figures(again))
    return [
        f"{place}: {first.get(place, 'nothing')}, then {second.get(place, 'nothing')}"
        for place in {**first, **second}
        if first.get(place) != second.get(place)
    ]


def _leaves(value: Any, place: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if name not in TIMES:
                yield from _leaves(entry, (*place, str(name)))
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _leaves(entry, (*place, str(number)))
    else:
        yield ".".join(place), json.dumps(value)
