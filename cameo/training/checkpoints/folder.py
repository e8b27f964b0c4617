"""The checkpoints in an output folder: which there are, which can be resumed from, and which are removed.

A checkpoint is written into a hidden folder and renamed to `checkpoint-N` when it is complete and on the disk, so a
killed process or a power failure leaves the earlier ones untouched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cameo.errors import DataError
from cameo.files import move_into_place
from cameo.settings import current_names
from cameo.training.checkpoints.verify import STATE_NAME, check_checkpoint, damage_of, read_state, write_state
from cameo.training.settings import TrainingConfig

__all__ = [
    "LaterCheckpointsError",
    "check_continues",
    "find_checkpoint",
    "how_to_go_on",
    "list_checkpoints",
    "place_checkpoint",
    "prune_checkpoints",
    "publish_checkpoint",
    "refuse_used_folder",
    "staging_folder",
]

NAME = re.compile(r"checkpoint-(\d+)")
# Folders that a killed process may leave: of a checkpoint that was being written or removed, and of save_pretrained.
# The second number is that of the process; releases before had none.
LEFTOVER = re.compile(
    r"\.checkpoint-\d+(\.\d+)?\.(partial|removed)|\.\.checkpoint-\d+(\.\d+)?\.partial\.[0-9a-f]{8}\.tmp"
)


class LaterCheckpointsError(DataError):
    """The folder holds checkpoints after the one that was to be continued from."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the checkpoints of a run, oldest first: the folders that have a name and a state file of one."""
    return [path for path in _named(output_dir) if (path / STATE_NAME).is_file()]


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str) -> Path:
    """Return the checkpoint that `latest`, a path, or a name within `output_dir` means, after reading it whole.

    `latest` is the newest one that is undamaged; each newer one is named in a warning, with its damaged file.

    Raises:
        DataError: if there is none (a run that is to resume never starts from the beginning instead), if it is damaged,
            or if `output_dir` holds later checkpoints, which would not belong to the continued run.
    """
    if resume_from_checkpoint == "latest":
        return _newest_undamaged(Path(output_dir))
    path = Path(resume_from_checkpoint)
    path = path if path.is_dir() else Path(output_dir) / resume_from_checkpoint
    if not (path / STATE_NAME).is_file():
        names = ", ".join(checkpoint.name for checkpoint in list_checkpoints(output_dir)) or "none"
        raise DataError(
            f"resume_from_checkpoint={resume_from_checkpoint}: not a complete checkpoint folder (it "
            f"has no {STATE_NAME}); in {output_dir}: {names}"
        )
    try:
        step = int(check_checkpoint(path)["step"])
    except DataError as error:
        raise DataError(
            f"resume_from_checkpoint={resume_from_checkpoint}: {error}. Copy that checkpoint again, or continue from "
            "the newest undamaged one with resume_from_checkpoint=latest"
        ) from error
    later = [checkpoint for checkpoint in _named(output_dir) if _step(checkpoint) > step]
    if undamaged := [checkpoint.name for checkpoint in later if damage_of(checkpoint) is None]:
        raise LaterCheckpointsError(
            f"resume_from_checkpoint={resume_from_checkpoint}: {output_dir} holds later checkpoints "
            f"({', '.join(undamaged)}). Remove them, or choose another output_dir for the branch"
        )
    return path


def _newest_undamaged(output_dir: Path) -> Path:
    damaged: list[tuple[str, str]] = []
    for path in reversed(_named(output_dir)):
        reason = damage_of(path)
        if reason is None:
            for name, why in damaged:
                warnings.warn(
                    f"{output_dir}: {name} is damaged and not used ({why}); the run continues from {path.name}",
                    stacklevel=2,  # the same line for every caller, so that it is shown once
                )
            return path
        damaged.append((path.name, reason))
    if damaged:
        shown = "; ".join(f"{name}: {why}" for name, why in damaged)
        raise DataError(
            f"resume_from_checkpoint=latest: {output_dir} holds no undamaged checkpoint-N ({shown}). Copy one of them "
            "again, or begin anew with overwrite_output_dir=true"
        )
    raise DataError(
        f"resume_from_checkpoint=latest: {output_dir} holds no complete checkpoint-N; "
        "leave the setting out to start a new run"
    )


def refuse_used_folder(output_dir: str | Path) -> None:
    """Raise `DataError` if a new run would mix its checkpoints with those of an earlier run."""
    if list_checkpoints(output_dir):
        raise DataError(
            f"output_dir={output_dir} holds checkpoints of an earlier run. Continue it with "
            "resume_from_checkpoint=latest, choose another output_dir, or replace it with overwrite_output_dir=true"
        )


def how_to_go_on(output_dir: str | Path) -> str:
    """Say how a run is continued whose processes have ended.

    Example:
        >>> import tempfile
        >>> how_to_go_on(tempfile.mkdtemp())
        'Start it again on all machines, with resume_from_checkpoint=latest if it has written a checkpoint'
    """
    if known := list_checkpoints(output_dir):
        return f"Start it again on all machines, with resume_from_checkpoint=latest ({known[-1].name})"
    return "Start it again on all machines, with resume_from_checkpoint=latest if it has written a checkpoint"


def staging_folder(output_dir: str | Path, step: int) -> Path:
    """Return the folder in which this process writes a checkpoint before it is published; there is none yet."""
    folder = Path(output_dir) / f".checkpoint-{step}.{os.getpid()}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def publish_checkpoint(staged: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write the state file of a staged checkpoint, and give it its final name as `place_checkpoint` does."""
    staged.mkdir(parents=True, exist_ok=True)
    write_state(staged, {**state, "step": step})
    return place_checkpoint(staged, step)


def place_checkpoint(staged: Path, step: int) -> Path:
    """Wait until a staged folder is on the disk, and rename it to `checkpoint-N`.

    What has that name already gives way: a damaged checkpoint of this run is removed, and anything else is kept under
    another name, with a warning.
    """
    final = staged.parent / f"checkpoint-{step}"
    in_the_way = None
    if final.is_symlink() or final.exists():
        in_the_way = _free_name(final) if not _is_own(final) else _removed_name(final)
        final.rename(in_the_way)
    try:
        move_into_place(staged, final)
    except OSError:
        if in_the_way is not None:
            in_the_way.rename(final)
        raise
    if in_the_way is None:
        return final
    if LEFTOVER.fullmatch(in_the_way.name):
        shutil.rmtree(in_the_way)
    else:
        warnings.warn(f"{final}: was there and is no whole checkpoint; it is now {in_the_way.name}", stacklevel=2)
    return final


def prune_checkpoints(output_dir: str | Path, limit: int | None, *, newest: int | None = None) -> None:
    """Remove the oldest checkpoints beyond `limit`, and what killed processes left.

    With `newest`, the step of the latest one that was written, nothing is removed unless that one is undamaged, and
    damaged later ones do not count. Folders whose state file does not make them a checkpoint of a training stay.
    """
    if limit is not None:
        own = [path for path in list_checkpoints(output_dir) if _is_own(path)]
        own = [path for path in own if newest is None or _step(path) <= newest]
        damage = damage_of(Path(output_dir) / f"checkpoint-{newest}") if newest is not None else None
        if damage is not None:
            warnings.warn(
                f"{output_dir}: checkpoint-{newest} is damaged as soon as it is written ({damage}), so the earlier "
                "ones are kept. Check the disk",
                stacklevel=2,
            )
            own = []
        for path in own[: max(len(own) - limit, 0)]:
            # Renamed first: a process killed while deleting leaves nothing that looks like a checkpoint.
            path.rename(_removed_name(path))
    for leftover in Path(output_dir).glob(".*checkpoint-*"):
        if LEFTOVER.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)


def check_continues(checkpoint: Path, settings: Mapping[str, Any], max_train_steps: int) -> int:
    """Return the step of a checkpoint that was written with `settings`.

    Raises:
        ValueError: if a setting differs, so that another run would continue, or the checkpoint lies beyond the end.
    """
    state = read_state(checkpoint)
    # A setting that the checkpoint does not know had its default value. Tuples come back from JSON as lists.
    given, saved = json.loads(
        json.dumps([dict(settings), {name: getattr(TrainingConfig, name, None) for name in settings}])
    )
    saved |= current_names(TrainingConfig, state["settings"], warn=False)
    differing = sorted(name for name in given.keys() | saved.keys() if given.get(name) != saved.get(name))
    if differing:
        shown = ", ".join(f"{name}: {saved.get(name)} -> {given.get(name)}" for name in differing)
        raise ValueError(
            f"{checkpoint}: the run cannot continue with other settings ({shown}). Restore them, or start a new run "
            "in another output_dir"
        )
    if state["step"] > max_train_steps:
        raise ValueError(f"max_train_steps={max_train_steps}: {checkpoint} is already at step {state['step']}")
    return int(state["step"])


def _named(output_dir: str | Path) -> list[Path]:
    """List the folders with the name of a checkpoint, oldest first."""
    folders = Path(output_dir).glob("checkpoint-*")
    return sorted((path for path in folders if NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def _is_own(path: Path) -> bool:
    """Tell whether a folder is a checkpoint of a training, be it damaged, by its state file."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        return int(read_state(path)["step"]) == _step(path)
    except DataError:
        return False


def _removed_name(path: Path) -> Path:
    """Return the name under which a checkpoint is removed."""
    return path.with_name(f".{path.name}.{os.getpid()}.removed")


def _free_name(path: Path) -> Path:
    """Return a name for what is in the way of a checkpoint."""
    number = 1
    while (free := path.with_name(f"{path.name}.aside-{number}")).exists() or free.is_symlink():
        number += 1
    return free


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
