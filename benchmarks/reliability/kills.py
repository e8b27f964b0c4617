"""Runs that are killed at random, and whose newest checkpoint is then damaged: do they go on, with equal losses?

    OMP_NUM_THREADS=1 python -m benchmarks.reliability.kills [--kills 50] [--seed 0] [--work FOLDER]

A LoRA of the smallest model is trained for a few steps with dropout and averaged weights, a checkpoint at each step.
The run gets SIGKILL at a random moment: one half of the kills falls where a checkpoint is being written, the others
anywhere in a step. Then a random file of the newest checkpoint is damaged, as a power failure or a bad disk may do, and
the run is resumed from `latest`, until it is killed again or has ended. In the end its figures, averaged weights,
optimizer, random states and weights are compared with those of a run without any of this, bit for bit. The runs are
forked from a process that has imported everything. The table is written into `benchmarks/reliability/README.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.common.measuring import place_and_date
from benchmarks.common.page import fill
from cameo.data import MultiViewDataset
from cameo.tables import markdown_table
from cameo.training.checkpoints.folder import list_checkpoints
from cameo.training.data import build_dataset
from cameo.training.settings import TrainingConfig
from cameo.training.setup import train_lora

PAGE = Path(__file__).parent / "README.md"
STEPS = 10
SETTINGS: dict[str, Any] = {
    "preset": "tiny",
    "preset_options": {"image_size": 32, "block_out_channels": [32, 32], "heads": 2, "norm_num_groups": 8},
    "resolution": 32,
    "num_scenes": 4,
    "num_validation_scenes": 1,
    "views_per_scene": 6,
    "num_views": 2,
    "train_batch_size": 1,
    "learning_rate": 1e-2,
    "lora_dropout": 0.2,
    "use_ema": True,
    "num_validation_samples": 1,
    "num_validation_images": 0,
    "validation_steps": 1000,
    "report_to": "none",
    "max_train_steps": STEPS,
    "checkpointing_steps": 1,
}
Data = tuple[MultiViewDataset, MultiViewDataset]
PATIENCE = 600  # seconds until a run that does not move counts as hung


def _flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "emptied": lambda path, dice: path.write_bytes(b""),
    "cut in half": lambda path, dice: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "all zeros": lambda path, dice: path.write_bytes(bytes(path.stat().st_size)),
    "one bit flipped": _flip,
    "removed": lambda path, dice: path.unlink(),
}


@dataclass
class Tally:
    """What came of the runs."""

    runs: int = 0
    equal: int = 0
    bare_kills: int = 0
    problems: list[str] = field(default_factory=list)
    damaged: Counter[str] = field(default_factory=Counter)
    went_on: Counter[str] = field(default_factory=Counter)
    named: Counter[str] = field(default_factory=Counter)


def start(
    data: Data, folder: Path, *, log: Path | None = None, first: Callable[[], object] | None = None, **settings: Any
) -> int:
    """Fork a run; returns its process id.

    Args:
        data: of training and of validation.
        folder: its `output_dir`.
        log: file for all that it prints; default: beside the folder.
        first: called in the new process before anything else.
        settings: those that differ from `SETTINGS`.
    """
    process = os.fork()
    if process:
        return process
    code = 2
    try:
        output = os.open(log or log_of(folder), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1, encoding="utf-8")  # whatever they were before
        if first is not None:
            first()
        train_lora(TrainingConfig(**{**SETTINGS, "output_dir": str(folder), **settings}), *data)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def log_of(folder: Path) -> Path:
    """File beside the folder of a run, for what the run prints."""
    return folder.with_suffix(".log")


def wait_for(process: int) -> int:
    """Wait for a run; returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def newest(folder: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    return max((int(path.name.partition("-")[2]) for path in list_checkpoints(folder)), default=0)


def ended(process: int) -> int | None:
    """Exit code of a run, None while it goes on."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def kill_at_random(process: int, folder: Path, target: int, dice: random.Random) -> int | None:
    """Kill a run at about a step; returns the exit code of one that has ended before, None for a killed one."""
    writing, begun = dice.random() < 0.5, time.monotonic()
    left = set(folder.glob(f".*checkpoint-{target}.*"))  # by a run that was killed before
    while True:
        if (code := ended(process)) is not None:
            return code
        staged = set(folder.glob(f".*checkpoint-{target}.*")) - left
        if newest(folder) >= target or (writing and staged):
            break
        if time.monotonic() - begun > PATIENCE:
            raise RuntimeError(f"{folder}: does not reach step {target} in {PATIENCE} s")
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.06 if writing else 0.6))
    if (code := ended(process)) is not None:
        return code
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


@contextlib.contextmanager
def undisturbed(work: Path | None) -> Iterator[tuple[Path, Data]]:
    """Give a folder for runs, in which `reference` has been trained, and the data; a temporary one is removed."""
    with tempfile.TemporaryDirectory() as temporary:
        place = (work or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        config = TrainingConfig(**SETTINGS, output_dir=str(place / "reference"))
        data = build_dataset(config, "train"), build_dataset(config, "validation")
        if code := wait_for(start(data, place / "reference")):
            raise RuntimeError(f"the reference ended with {code}:\n{log_of(place / 'reference').read_text()}")
        yield place, data


def difference(folder: Path, reference: Path) -> str | None:
    """Name the first file in which a finished run differs from the reference."""
    if (folder / "metrics.jsonl").read_text() != (reference / "metrics.jsonl").read_text():
        return "metrics.jsonl"
    last = f"checkpoint-{STEPS}"
    for path in sorted((reference / last).glob("*.safetensors")):
        ours, theirs = load_file(folder / last / path.name), load_file(path)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return path.name
    return None


def one_run(data: Data, folder: Path, kills: int, tally: Tally, dice: random.Random) -> None:
    """Kill, damage and resume one run until it has ended, or has been damaged `kills` times and ends by itself."""
    limit, damage, resume = dice.choice((None, 2, 3)), "", False
    log = log_of(folder)
    while True:
        seen = log.read_text() if log.exists() else ""
        process = start(
            data, folder, checkpoints_total_limit=limit, resume_from_checkpoint="latest" if resume else None
        )
        if sum(tally.damaged.values()) < kills and newest(folder) < STEPS - 1:
            code = kill_at_random(process, folder, dice.randint(newest(folder) + 1, STEPS - 1), dice)
        else:
            code = wait_for(process)
        said = log.read_text()[len(seen) :]
        if damage:
            tally.went_on[damage] += "resumed from" in said
            tally.named[damage] += re.search(r"is damaged and not used \([\w.]+: ", said) is not None
        if code is not None:
            break
        resume, damage = newest(folder) > 0, ""
        found = list_checkpoints(folder)
        if len(found) < 2:  # the one before is to be there
            tally.bare_kills += 1
            continue
        damage = dice.choice(list(DAMAGES))
        file = dice.choice(sorted(path for path in found[-1].iterdir() if path.stat().st_size))
        DAMAGES[damage](file, dice)
        tally.damaged[damage] += 1
        print(f"{folder.name}: killed, {file.relative_to(folder)} {damage}", flush=True)
    tally.runs += 1
    if code:
        tally.problems.append(f"{folder.name} ended with {code}: {said.strip().splitlines()[-1]}")
    elif differing := difference(folder, folder.parent / "reference"):
        tally.problems.append(f"{folder.name} differs in {differing}")
    else:
        tally.equal += 1


def table(tally: Tally, command: str, seconds: float) -> str:
    """Return the page's table with its command, device and date."""
    rows = [
        [damage, count, tally.went_on[damage], tally.named[damage]] for damage, count in sorted(tally.damaged.items())
    ]
    rows.append(["all", *(sum(one.values()) for one in (tally.damaged, tally.went_on, tally.named))])
    header = ["a file of the newest checkpoint", "kills", "went on from the one before", "file named in a warning"]
    problems = "".join(f"- {problem}\n" for problem in tally.problems)
    return (
        f"`{command}`: {place_and_date()}, {seconds:.0f} s.\n\n{markdown_table(header, rows)}\n\n"
        f"{tally.runs} runs of {STEPS} steps; {tally.equal} of them ended with the figures, weights, averages, "
        f"optimizer and random states of a run that was not disturbed, bit for bit. {tally.bare_kills} more kills "
        f"came before there were two checkpoints, and damaged nothing.\n{problems}"
    )


def options(about: str | None, name: str, default: int, what: str) -> argparse.Namespace:
    """Read the command line of a campaign of runs: how many of something, the seed and the folder for the runs."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{name}", type=int, default=default, help=what)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder for the runs; default: one that is removed")
    return parser.parse_args()


def main() -> None:
    """Run the campaign and write its table."""
    given = options(__doc__, "kills", 50, "kills after which a checkpoint is damaged")
    torch.set_num_threads(1)
    dice, tally, begun = random.Random(given.seed), Tally(), time.monotonic()
    with undisturbed(given.work) as (work, data):
        while sum(tally.damaged.values()) < given.kills:
            one_run(data, work / f"run-{tally.runs:03d}", given.kills, tally, dice)
    command = f"OMP_NUM_THREADS=1 python -m benchmarks.reliability.kills --kills {given.kills} --seed {given.seed}"
    found = table(tally, command, time.monotonic() - begun)
    print(found)
    fill(PAGE, "kills", found)


if __name__ == "__main__":
    main()
