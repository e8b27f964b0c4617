"""Runs whose folder is taken, full, read-only, moved away or oddly named: is it said, and does the run go on after it?

    OMP_NUM_THREADS=1 python -m benchmarks.reliability.folders [--trials 10] [--seed 0] [--work FOLDER]

Each trial makes one run go wrong at a random place, removes the cause and resumes. A trial is good if the run ends with
an error that names the folder and the cure, without a traceback, and if in the end its figures, averaged weights,
optimizer, random states and weights are those of a run without any of this, bit for bit:

- `two runs`: a second run of the same folder begins a random time after the first, anew, over it, or to resume it;
- `disk full`: a file system of its own of a random size (with the right to mount one), or a largest size of any file;
- `read-only`: the file system is read-only when the run begins or resumes (with the right to mount one);
- `moved away`: the folder is renamed while the run goes on, as where a drive is lost;
- `odd path`: a name of random characters, given relative or absolute; the run is killed once.

The runs are forked from a process that has imported everything. The table is written into
`benchmarks/reliability/README.md`.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.common.measuring import place_and_date
from benchmarks.common.page import fill
from benchmarks.reliability import kills
from benchmarks.reliability.kills import PAGE, STEPS, Data, difference, newest, options, start, undisturbed, wait_for
from cameo.tables import markdown_table

__all__ = ["TRIALS", "NotTriedError", "main", "table"]


class NotTriedError(Exception):
    """The fault cannot be made on this machine; the message says why."""


class Run:
    """One output folder of a trial, the processes that work in it, and what they print."""

    def __init__(self, data: Data, folder: Path, log: Path) -> None:
        self.data, self.folder, self.log = data, folder, log

    def start(self, *, resume: bool = False, overwrite: bool = False, **options: object) -> int:
        """Fork a process of this run; returns its id."""
        settings = {
            "resume_from_checkpoint": "latest" if resume and newest(self.folder) else None,
            "overwrite_output_dir": overwrite,
        }
        return start(self.data, self.folder, log=self.log, **settings, **options)

    def finish(self) -> None:
        """Go on from the newest checkpoint, or begin again where there is none, and compare with the reference.

        Raises:
            AssertionError: if this ends with an error or with another result.
        """
        before = len(self.said)
        code = wait_for(self.start(resume=True, overwrite=not newest(self.folder)))
        assert code == 0, f"after it, the run ended with {code}: {self.said[before:].strip()[-200:]}"
        self.compare()

    def compare(self) -> None:
        """Refuse another result than that of a run that was not disturbed.

        Raises:
            AssertionError: naming the first file that differs.
        """
        differing = difference(self.folder, self.log.parent / "reference")
        assert differing is None, f"differs in {differing}"

    @property
    def said(self) -> str:
        """All that was printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def expect(self, code: int, *words: str) -> None:
        """Refuse a run that ended without an error, or with one that says too little.

        Raises:
            AssertionError: with the end of what it printed.
        """
        said = self.said
        last = said.strip()[-300:]
        assert code != 0, f"ended without an error: {last}"
        errors = [line for line in said.splitlines() if "DataError" in line]
        assert errors, f"ended with {code} by another error than cameo's: {last}"
        assert all(word in errors[-1] for word in words), f"does not say {words}: {errors[-1]}"


def two_runs(run: Run, dice: random.Random) -> None:
    """A second run begins while the first is at work."""
    how = dice.choice([{}, {"overwrite": True}, {"resume": True}])
    first = run.start()
    time.sleep(dice.choice([0.0, dice.uniform(0, 4)]))
    second = run.start(**how)
    codes = wait_for(first), wait_for(second)
    if codes == (0, 0):  # the second began when the first had ended: it did all again, or found nothing left to do
        assert how, "two runs without overwrite_output_dir or resume_from_checkpoint both ended well"
    else:
        assert 0 in codes, f"both ended with an error: {run.said.strip()[-300:]}"
        run.expect(max(codes), str(run.folder), "overwrite_output_dir" if "another run" not in run.said else "Wait")
    run.compare()


def disk_full(run: Run, dice: random.Random) -> None:
    """There is room for some of the run only."""
    try:
        with mounted(run.folder.parent, f"{dice.randint(1, 900)}k") as remount:
            run.expect(wait_for(run.start()), str(run.folder), "Make room there")
            remount("size=1g")
            run.finish()
    except NotTriedError:
        size = dice.randint(0, 20000)
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))  # noqa: E731
        run.expect(wait_for(run.start(first=limit)), "Make room there")
        run.finish()


def read_only(run: Run, dice: random.Random) -> None:
    """Nothing can be written when the run begins, or when it resumes."""
    with mounted(run.folder.parent, "1g") as remount:
        begun = dice.random() < 0.5
        if begun:
            process = run.start()
            kill_at(process, run, dice)
        remount("ro")
        run.expect(wait_for(run.start(resume=begun)), str(run.folder), "writ")
        remount("rw")
        run.finish()


def moved_away(run: Run, dice: random.Random) -> None:
    """The folder is gone while the run goes on."""
    process, elsewhere = run.start(), run.folder.with_name("elsewhere")
    target = dice.randint(1, STEPS // 2)  # on a busy machine the run would reach its end before it is seen
    while newest(run.folder) < target:
        assert os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, run.said.strip()[-300:]
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.1))
    run.folder.rename(elsewhere)
    run.expect(wait_for(process), str(run.folder))
    assert not run.folder.exists() or not newest(run.folder), "checkpoints in a folder that was made anew"
    if run.folder.exists():
        for path in run.folder.iterdir():
            path.unlink()
        run.folder.rmdir()
    elsewhere.rename(run.folder)
    run.finish()


def odd_path(run: Run, dice: random.Random) -> None:
    """The folder has a name of any characters; the run is killed once."""
    pool = [
        "a",
        " ",
        "'",
        '"',
        "\\",
        "$HOME",
        "#",
        ":",
        ";",
        "%s",
        "*",
        "[x]",
        "{x}",
        "\n",
        "\t",
        "~",
        "-n",
        "é",
        "家",
        "🏠",
    ]
    name = "".join(dice.choice([*pool, chr(dice.randint(0x21, 0xD7FF))]) for _ in range(dice.randint(1, 40)))
    name = name.replace("/", "").encode()[:200].decode(errors="ignore").strip(".") or "~"
    run.folder = run.folder.parent / name
    if dice.random() < 0.5:
        os.chdir(run.folder.parent)
        run.folder = Path(name)
    kill_at(run.start(), run, dice)
    run.finish()


TRIALS: dict[str, Callable[[Run, random.Random], None]] = {
    "two runs": two_runs,
    "disk full": disk_full,
    "read-only": read_only,
    "moved away": moved_away,
    "odd path": odd_path,
}


def kill_at(process: int, run: Run, dice: random.Random) -> None:
    """Kill a process of a run at a random moment."""
    kills.kill_at_random(process, run.folder, dice.randint(1, STEPS - 2), dice)


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Mount a file system in memory on a folder; gives a function that mounts it again with another option.

    Raises:
        NotTriedError: without the right to mount.
    """

    def mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments, str(folder)], check=True, capture_output=True)

    try:
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs")
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotTriedError(f"no right to mount ({error})") from error
    try:
        yield lambda option: mount("-o", f"remount,{option}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def campaign(data: Data, work: Path, trials: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Make so many trials of each kind; gives the kind, `good`, `bad` or `not tried`, and what was wrong."""
    for kind, trial in TRIALS.items():
        dice = random.Random(f"{seed} {kind}")
        for number in range(trials):
            place = work / f"{kind.replace(' ', '-')}-{number}"
            place.mkdir()
            before = Path.cwd()
            try:
                trial(Run(data, place / "run", work / f"{place.name}.log"), dice)
            except NotTriedError as error:
                yield kind, "not tried", str(error)
            except AssertionError as error:
                yield kind, "bad", f"trial {number}: {error}"
            else:
                yield kind, "good", ""
            finally:
                os.chdir(before)


def table(outcomes: list[tuple[str, str, str]], command: str, seconds: float) -> str:
    """Return the page's table with its command, device and date."""
    counts = Counter((kind, outcome) for kind, outcome, _ in outcomes)
    rows = [[kind, *(counts[kind, outcome] for outcome in ("good", "bad", "not tried"))] for kind in TRIALS]
    reasons = dict.fromkeys(f"- {kind}, {outcome}: {why}\n" for kind, outcome, why in outcomes if why)
    found = markdown_table(["what goes wrong", "said, and went on with equal results", "not so", "not tried"], rows)
    return f"`{command}`: {place_and_date()}, {seconds:.0f} s.\n\n{found}\n" + "".join(
        ["\n", *reasons] if reasons else []
    )


def main() -> None:
    """Run the campaign and write its table."""
    given = options(__doc__, "trials", 10, "of each kind")
    torch.set_num_threads(1)
    begun, outcomes = time.monotonic(), []
    with undisturbed(given.work) as (work, data):
        for outcome in campaign(data, work, given.trials, given.seed):
            outcomes.append(outcome)
            print(*outcome, flush=True)
    command = f"OMP_NUM_THREADS=1 python -m benchmarks.reliability.folders --trials {given.trials} --seed {given.seed}"
    found = table(outcomes, command, time.monotonic() - begun)
    print(found)
    fill(PAGE, "folders", found)


if __name__ == "__main__":
    main()
