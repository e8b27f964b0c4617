"""Two machines on one: what each rank writes, ranks that are exchanged, and what one lost process does to the others.

    OMP_NUM_THREADS=1 python -m benchmarks.reliability.machines [--work FOLDER]

The machines are network namespaces with folders of their own (see `namespaces.py`), which take root and iproute2. A
LoRA of the smallest model is trained with dropout and averaged weights by `torchrun --nnodes 2` with gloo. Losses and
the last checkpoint are compared, bit for bit, with those of two processes of one machine that nobody disturbs. The page
`machines.md` is written beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.measuring import place_and_date
from benchmarks.reliability import kills
from benchmarks.reliability.namespaces import (
    Machine,
    cannot_join_machines,
    exchange_addresses,
    joined_machines,
    one_machine,
    pull_cable,
)
from cameo.files import write_atomically
from cameo.tables import markdown_table

__all__ = [
    "PATIENCE",
    "PRECOMPUTE",
    "RUN",
    "STEPS",
    "TRAINING",
    "Timeline",
    "disturbed",
    "finished",
    "has_steps",
    "kill",
    "last_words",
    "written",
]

PAGE = Path(__file__).with_suffix(".md")
TRAINING, PRECOMPUTE = "cameo.recipes.lora_finetune", "cameo.recipes.precompute_correspondence"
STEPS = kills.STEPS
RUN: dict[str, Any] = {
    **kills.SETTINGS,
    "pretrained_model_name_or_path": None,
    "validation_steps": 4,
    "checkpointing_steps": 2,
    "output_dir": "run",
}
PATIENCE = 280.0  # seconds until a run that does not end counts as hung
# What a process prints when it ends because of another one.
WORD = "This process ends too"


def finished(
    machines: Sequence[Machine], settings: dict[str, Any], *, module: str = TRAINING, processes: int = 1
) -> float:
    """Run a module on all machines; returns the seconds that it took.

    Raises:
        RuntimeError: if it ends with an error or not at all; shows what was printed.
    """
    begun = time.monotonic()
    launchers = [machine.launch(module, settings, machines=machines, processes=processes) for machine in machines]
    try:
        codes = [launcher.wait(PATIENCE) for launcher in launchers]
    except subprocess.TimeoutExpired:
        codes = [-1]
    if any(codes):
        raise RuntimeError("\n".join(f"{machine.folder}:\n{machine.printed()[-4000:]}" for machine in machines))
    return time.monotonic() - begun


def written(machine: Machine) -> dict[str, int]:
    """Files below each folder of a machine, `run` for the output folder; checkpoints are counted as one each."""
    counts: dict[str, int] = {}
    for path in machine.folder.rglob("*"):
        parts = path.relative_to(machine.folder).parts
        if path.is_file() and len(parts) > 1:
            place = "/".join(parts[:2]) if parts[1].startswith("checkpoint-") else parts[0]
            counts[place] = counts.get(place, 0) + 1
    return counts


def has_steps(folder: Path, count: int) -> bool:
    """Tell whether a run has taken so many steps."""
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= count


@dataclass
class Timeline:
    """Seconds from a disturbance to the end of each process and launcher, None for those that have not ended.

    Attributes:
        processes: by rank, that of the disturbed one included.
        launchers: of each machine.
        words: what the others printed about it.
    """

    processes: dict[int, float | None]
    launchers: list[float | None]
    words: list[str]


def disturbed(
    machines: Sequence[Machine],
    settings: dict[str, Any],
    disturb: Callable[[dict[int, int]], object],
    *,
    processes: int = 1,
    steps: int = 5,
    limit: float = 100,
) -> Timeline:
    """Start a run that does not end by itself, disturb it in the middle of a step, and watch how its processes end.

    Args:
        machines: of the run; the first one has the main process.
        settings: of the training.
        disturb: gets the ids of the processes by their ranks.
        processes: on each machine.
        steps: after which the disturbance comes.
        limit: seconds that are waited for the ends.

    Raises:
        RuntimeError: if the run does not get that far.
    """
    endless = {**settings, "max_train_steps": 100_000}
    launchers = [machine.launch(TRAINING, endless, machines=machines, processes=processes) for machine in machines]
    begun = time.monotonic()
    while not has_steps(machines[0].folder / settings["output_dir"], steps):
        if time.monotonic() - begun > PATIENCE or any(launcher.poll() is not None for launcher in launchers):
            raise RuntimeError("\n".join(machine.printed()[-4000:] for machine in machines))
        time.sleep(0.02)
    time.sleep(0.1)  # in the step after the one that was recorded
    ids = {rank: process for machine in machines for rank, process in machine.processes().items()}
    begun = time.monotonic()
    disturb(ids)
    found = Timeline(dict.fromkeys(sorted(ids)), [None] * len(launchers), [])
    while None in (*found.processes.values(), *found.launchers) and time.monotonic() - begun < limit:
        for rank, process in ids.items():
            if found.processes[rank] is None and _has_ended(process):
                found.processes[rank] = time.monotonic() - begun
        for number, launcher in enumerate(launchers):
            if found.launchers[number] is None and launcher.poll() is not None:
                found.launchers[number] = time.monotonic() - begun
        time.sleep(0.02)
    found.words = [word for machine in machines for word in last_words(machine)]
    return found


def _has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def last_words(machine: Machine) -> list[str]:
    """Return why processes say that they end because of another one, and how to go on, in their order."""
    lines = [line.strip() for line in machine.printed().splitlines() if WORD in line]
    return [line.removeprefix("lora_finetune.py: ") for line in lines]


def _files(machine: Machine) -> str:
    return ", ".join(f"{place} ({count})" for place, count in sorted(written(machine).items()))


def _compared(folder: Path, reference: Path) -> str:
    differing = kills.difference(folder, reference)
    return "equal" if differing is None else f"differs in {differing}"


def _last_losses(folder: Path) -> str:
    """Denoising and alignment loss of the last step, with all digits that are kept."""
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return f"{last['loss']}, {last['alignment_loss']}"


def exchanges(work: Path, reference: Path) -> list[list[object]]:
    """Train in three parts, each with the ranks exchanged, with folders of their own and with one output folder."""
    rows: list[list[object]] = []
    for name, parts in {"own": (4, 8, STEPS), "shared": (4, STEPS)}.items():
        with joined_machines(work / name) as pair:
            order, resumed = list(pair), None
            output = "run" if name == "own" else str(work / "drive" / "run")
            for until in parts:
                settings = {**RUN, "max_train_steps": until, "output_dir": output, "resume_from_checkpoint": resumed}
                seconds = finished(order, settings)
                main = order[0].folder / output
                state = _compared(main, reference) if until == STEPS else ""
                places = "<br>".join(f"rank {rank}, {one.folder.name}: {_files(one)}" for rank, one in enumerate(order))
                rows.append([name, f"to step {until}", f"{seconds:.0f}", _last_losses(main), places, state])
                order, resumed = exchange_addresses(order), "latest"
    return rows


def matches(work: Path, reference: Path) -> list[list[object]]:
    """Compute the matches on two machines into a shared folder, and train from there."""
    with joined_machines(work / "matches") as pair:
        settings = {**RUN, "max_train_steps": STEPS, "precomputed_correspondence": str(work / "drive" / "matches")}
        seconds = finished(pair, settings, module=PRECOMPUTE)
        shards = len(list((work / "drive" / "matches").rglob("*.safetensors")))
        rows: list[list[object]] = [
            ["shared", "matches", f"{seconds:.0f}", "", f"{shards} shards in the shared folder", ""]
        ]
        seconds = finished(pair, settings)
        run = pair[0].folder / "run"
        same = (run / "metrics.jsonl").read_text() == (reference / "metrics.jsonl").read_text()
        state = "equal" if same else "differs"
        rows.append(["own", "trained from these", f"{seconds:.0f}", _last_losses(run), "", state])
    return rows


def kill(rank: int, number: int) -> Callable[[dict[int, int]], object]:
    """Return a disturbance that sends a signal to a process."""
    return lambda ids: os.kill(ids[rank], number)


def lost_processes(work: Path, reference: Path) -> list[list[object]]:
    """Disturb runs of two processes, on one machine and on two, and resume them with the ranks exchanged."""
    rows: list[list[object]] = []
    cases: list[tuple[str, int, Callable[[list[Machine]], Callable[[dict[int, int]], object]]]] = [
        ("SIGKILL of rank 1", 1, lambda _: kill(1, signal.SIGKILL)),
        ("SIGSTOP of rank 1", 1, lambda _: kill(1, signal.SIGSTOP)),
        ("SIGKILL of rank 1", 2, lambda _: kill(1, signal.SIGKILL)),
        ("SIGKILL of rank 0", 2, lambda _: kill(0, signal.SIGKILL)),
        ("SIGSTOP of rank 1", 2, lambda _: kill(1, signal.SIGSTOP)),
        ("cable of rank 1 pulled", 2, lambda pair: lambda _: pull_cable(pair[1])),
    ]
    for number, (name, count, disturb) in enumerate(cases):
        folder = work / f"lost-{number}"
        with one_machine(folder) if count == 1 else joined_machines(folder) as place:
            machines = [place] if isinstance(place, Machine) else list(place)
            found = disturbed(machines, RUN, disturb(machines), processes=2 // count)
        with one_machine(folder) if count == 1 else joined_machines(folder) as place:
            machines = [place] if isinstance(place, Machine) else exchange_addresses(list(place))
            # The folders are those of before.
            settings = {**RUN, "resume_from_checkpoint": "latest"}
            finished(machines, settings, processes=2 // count)
            state = _compared(machines[0].folder / "run", reference)
        times = [found.processes[rank] for rank in sorted(found.processes)]
        shown = [*times, max((one for one in found.launchers if one is not None), default=None)]
        seconds = ["not in 100" if one is None else f"{one:.1f}" for one in shown]
        rows.append([name, count, *seconds, " ".join(found.words) or "nothing", state])
        print(rows[-1], flush=True)
    return rows


def page(trained: list[list[object]], lost: list[list[object]], seconds: float) -> str:
    """Return the page of a campaign."""
    losses = "loss and alignment loss of the last step"
    header = ["output folder", "part", "seconds", losses, "files on each machine afterwards", "against one machine"]
    ends = ["what", "machines", "rank 0 ended after", "rank 1", "last launcher", "what the others said", "resumed"]
    return f"""# Two machines

Two network namespaces as two machines, each with its own address, `HOME`, `TMPDIR` and scene cache, joined by a virtual
cable; `torchrun --nnodes 2 --rdzv_backend c10d`, gloo, one process on each. They share a processor, so seconds say what
waits and not what is fast.

`OMP_NUM_THREADS=1 python -m benchmarks.reliability.machines`: {place_and_date()}, {seconds:.0f} s in all.

## Ranks exchanged

Each part after the first resumes from `latest`, and the machine that was rank 0 is rank 1. "Equal" is bit for bit:
losses, weights, averaged weights, optimizer and random states of both ranks, against two processes of one machine that
ran through. With folders of its own the machine that lacks the newest checkpoint gets a copy; with a shared one nothing
is sent.

{markdown_table(header, trained)}

## A process that is lost

In the middle of a step, of a run with a checkpoint every second step and `process_timeout=40`; then the run is resumed
to its end, on two machines with the ranks exchanged. Seconds are counted from the disturbance.

{markdown_table(ends, lost)}

torchrun waits 30 s for a process that was stopped before it kills it, so the launcher on that machine ends later.
"""


def main() -> None:
    """Run the campaign and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the machines; default: one that is removed")
    given = parser.parse_args()
    if reason := cannot_join_machines():
        sys.exit(f"two machines on one: {reason}")
    torch.set_num_threads(1)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        work = (given.work or Path(temporary)).resolve()
        shutil.rmtree(work, ignore_errors=True)
        with one_machine(work / "reference") as alone:
            seconds = finished([alone], RUN, processes=2)
            reference = alone.folder / "run"
            first = ["one machine", f"to step {STEPS}", f"{seconds:.0f}", _last_losses(reference), _files(alone), ""]
            trained: list[list[object]] = [first]
        for part in (exchanges, matches):
            for row in part(work, reference):
                print(row, flush=True)
                trained.append(row)
        found = page(trained, lost_processes(work, reference), time.monotonic() - begun)
    print(found)
    write_atomically(PAGE, found)


if __name__ == "__main__":
    main()
