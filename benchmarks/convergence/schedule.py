"""Which runs of the study are made, in which order, and several of them at a time."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from benchmarks.convergence import arms
from benchmarks.convergence.runs import RunOf, result_path
from cameo.probing.layer_probe import LayerProbe

__all__ = ["RunOf", "known_probe", "missing_runs", "run_in_processes", "wanted_runs"]

MODULE = "benchmarks.convergence.study"


def known_probe(preset: str, subject: str) -> LayerProbe | None:
    """Return the ranking of the layers by the preset's rule, if the run that it looks into is finished."""
    path = result_path(preset, (subject, "none", arms.declared(preset, subject).probe_seed))
    return LayerProbe.from_dict(json.loads(path.read_text(encoding="utf-8"))["probe"]) if path.is_file() else None


def wanted_runs(options: argparse.Namespace) -> list[RunOf]:
    """List the runs that are asked for, arm by arm; in each arm first the seed whose probe chooses the layers."""
    order = [*(arm for arm in arms.ARMS if arm in options.arms), *(arm for arm in options.arms if arm not in arms.ARMS)]
    probed = {subject: arms.declared(options.preset, subject).probe_seed for subject in options.subjects}
    return [
        (subject, arm, seed)
        for arm in order
        for is_probed in (True, False)
        for seed in options.seeds
        for subject in options.subjects
        if (seed == probed[subject]) == is_probed
    ]


def missing_runs(options: argparse.Namespace) -> list[RunOf]:
    """List the runs without a result file, in the order in which they are to be made."""
    wanted = wanted_runs(options)
    return [run_of for run_of in wanted if not result_path(options.preset, run_of, options.results).is_file()]


def run_in_processes(
    options: argparse.Namespace,
    runs: Sequence[RunOf],
    stop_at: float | None = None,
    threads: Mapping[RunOf, int] | None = None,
) -> list[RunOf]:
    """Make the result files of runs, `--jobs` at a time, each in a process of its own.

    A run whose layer is still to be found waits, and the next one that is ready goes ahead. A run that fails does not
    keep the others from being made.

    Args:
        options: those of the command line.
        runs: the runs, in the order in which they are to be made.
        stop_at: time on the monotonic clock, in seconds, at which the runs are to have stopped.
        threads: number of threads of each run; default: each has the same share of the cores.

    Returns:
        The runs that failed.

    Raises:
        SystemExit: if all that is left waits for a run that is neither kept nor among `runs`.
    """
    share = max(1, (os.cpu_count() or 1) // options.jobs)
    waiting, failed = list(runs), list[RunOf]()
    going: dict[RunOf, subprocess.Popen[bytes]] = {}
    while waiting or going:
        for run_of, process in list(going.items()):
            if process.poll() is not None:
                failed += [run_of] if process.returncode else []
                del going[run_of]
        while len(going) < options.jobs and (stop_at is None or time.monotonic() < stop_at):
            ready = next((run_of for run_of in waiting if is_ready(options.preset, run_of)), None)
            if ready is None:
                break
            waiting.remove(ready)
            environment = {**os.environ, "OMP_NUM_THREADS": str((threads or {}).get(ready, share))}
            going[ready] = subprocess.Popen(command_of(options, ready, stop_at), env=environment)
        if not going:
            if waiting and not failed and (stop_at is None or time.monotonic() < stop_at):
                subject, arm, _ = waiting[0]
                arms.arm_settings(arm, arms.declared(options.preset, subject), None)  # says what is to be run first
            break
        time.sleep(0.5)
    return failed


def is_ready(preset: str, run_of: RunOf) -> bool:
    """Whether the layer of a run is known; the arm without supervision has none."""
    subject, arm, _ = run_of
    return arm == "none" or known_probe(preset, subject) is not None


def command_of(options: argparse.Namespace, run_of: RunOf, stop_at: float | None) -> list[str]:
    """Return the command that makes one run."""
    subject, arm, seed = run_of
    command = [sys.executable, "-m", MODULE, "--preset", options.preset, "--subjects", subject, "--arms", arm]
    command += ["--seeds", str(seed), "--work", str(options.work), "--quiet"]
    for name in ("data", "results"):
        command += [f"--{name}", str(value)] if (value := getattr(options, name)) is not None else []
    return command + (["--minutes", str((stop_at - time.monotonic()) / 60)] if stop_at is not None else [])
