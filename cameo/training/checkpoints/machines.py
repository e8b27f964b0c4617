"""Checkpoints of a run whose machines have folders of their own: the newest one is found on any, and given to all.

The main process writes all checkpoints. When a run is started again its ranks may be exchanged, so that the main
process is on a machine that has none, or older ones. Machines that share a drive find the checkpoint where it is, and
nothing is sent.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed

from cameo.errors import DataError
from cameo.files import write_atomically
from cameo.training.checkpoints.agreement import decided_by_main, gathered, has_group
from cameo.training.checkpoints.folder import (
    LaterCheckpointsError,
    find_checkpoint,
    place_checkpoint,
    prune_checkpoints,
    staging_folder,
)
from cameo.training.checkpoints.verify import check_checkpoint, read_state

__all__ = ["RECORDS", "agreed_checkpoint", "remove_checkpoints"]

# The figures of a run, which its main process writes beside its checkpoints and continues.
RECORDS = ("metrics.jsonl", "validations.jsonl")
PORTION = 1 << 24  # bytes that are sent at a time


@dataclass(frozen=True)
class _Offer:
    """What the first process of a machine has found: an undamaged checkpoint, or why there is none to resume from."""

    path: Path | None = None
    step: int = -1
    checksum: str | None = None
    is_elsewhere: bool = False
    problem: str = ""
    refuses: bool = False


def agreed_checkpoint(output_dir: str | Path, resume_from_checkpoint: str) -> Path:
    """Find the checkpoint that all processes resume from, see `find_checkpoint`; returns it as this process sees it.

    All processes have to call this. Each machine looks into its own folder; of several undamaged checkpoints the newest
    is taken, and the machines that do not have it get a copy of it and of `RECORDS`.

    Raises:
        DataError: the same on all processes, if no machine has one, or a machine cannot write its copy.
    """
    if not has_group():
        return find_checkpoint(output_dir, resume_from_checkpoint)
    # The processes of a machine see the same files.
    offers = gathered(_offer(output_dir, resume_from_checkpoint) if PartialState().is_local_main_process else _Offer())
    sender = max(range(len(offers)), key=lambda rank: (offers[rank].step, -rank))
    chosen = offers[sender]
    problems = [offer.problem for offer in offers if offer.refuses or (offer.problem and chosen.path is None)]
    if problems:
        raise DataError("; on another machine: ".join(dict.fromkeys(problems)))
    mine = _copy_of(chosen, output_dir)
    if not all(gathered(mine is not None)):
        _share(chosen, sender, output_dir, lacks_it=mine is None and PartialState().is_local_main_process)
        mine = _copy_of(chosen, output_dir)
    sees_it = gathered(mine is not None)
    if mine is None or not all(sees_it):
        raise DataError(
            f"{chosen.path}: process {sees_it.index(False)} does not see this checkpoint, which process {sender} has "
            "found; the processes of a machine need one output_dir"
        )
    return mine


def _offer(output_dir: str | Path, resume_from_checkpoint: str) -> _Offer:
    try:
        path = find_checkpoint(output_dir, resume_from_checkpoint)
        state = read_state(path)
    except DataError as error:
        return _Offer(problem=str(error), refuses=isinstance(error, LaterCheckpointsError))
    is_elsewhere = path.parent.resolve() != Path(output_dir).resolve()
    return _Offer(path, state["step"], state.get("crc32"), is_elsewhere)


def _copy_of(offer: _Offer, output_dir: str | Path) -> Path | None:
    """Return where this process has the checkpoint of an offer: in its output folder, or where it was found."""
    assert offer.path is not None
    # The first process of a machine reads it whole, for all of them; what it has just read it reads only once.
    read = check_checkpoint if PartialState().is_local_main_process else read_state
    own = Path(output_dir) / f"checkpoint-{offer.step}"
    for path in (own, offer.path) if offer.is_elsewhere else (own,):
        try:
            state = read(path)
        except DataError:
            continue
        if (state["step"], state.get("crc32")) == (offer.step, offer.checksum):
            return path
    return None


def _share(chosen: _Offer, sender: int, output_dir: str | Path, *, lacks_it: bool) -> None:
    """Send a checkpoint to the processes that are to write a copy of it."""
    assert chosen.path is not None
    pieces = _pieces(chosen.path, Path(output_dir)) if distributed.get_rank() == sender else None
    copy = _Copy(Path(output_dir), chosen.step) if lacks_it else None
    problem = None
    while True:
        shared: list[tuple[str, bytes] | str | None] = [None if pieces is None else next(pieces, None)]
        broadcast_object_list(shared, from_process=sender)
        piece = shared[0]
        if piece is None or isinstance(piece, str):
            break
        if copy is not None and problem is None:
            problem = copy.attempt(partial(copy.add, *piece))
    if isinstance(piece, str):
        problem = piece
    elif copy is not None and problem is None:
        problem = copy.attempt(copy.finish)
    if copy is not None and problem is not None:
        copy.remove()
    for found in gathered(problem):
        if found is not None:
            raise DataError(found)


def _pieces(checkpoint: Path, output_dir: Path) -> Iterator[tuple[str, bytes] | str]:
    """The files of a checkpoint and the records beside it, in portions with their names; or why they cannot be read."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    files |= {f"../{name}": output_dir / name for name in RECORDS if (output_dir / name).is_file()}
    try:
        for name, path in files.items():
            with path.open("rb") as file:
                portion = file.read(PORTION)
                while True:  # an empty file has one portion
                    yield name, portion
                    if not (portion := file.read(PORTION)):
                        break
    except OSError as error:
        yield f"{checkpoint}: cannot be read, so the other machines get no copy ({error})"


class _Copy:
    """A copy of a checkpoint that is being received; it gets its name when it is whole."""

    def __init__(self, output_dir: Path, step: int) -> None:
        self.output_dir, self.step = output_dir, step
        self.staged = staging_folder(output_dir, step)
        self.records: dict[str, bytes] = {}

    def add(self, name: str, portion: bytes) -> None:
        """Append a portion to a file."""
        if name.startswith("../"):
            record = name.removeprefix("../")
            self.records[record] = self.records.get(record, b"") + portion
            return
        path = self.staged / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(portion)

    def finish(self) -> None:
        """Compare the checkpoint with its checksums; write the records first, since they are not asked for again."""
        check_checkpoint(self.staged)
        for name, content in self.records.items():
            write_atomically(self.output_dir / name, content)
        place_checkpoint(self.staged, self.step)

    def attempt(self, action: Callable[[], object]) -> str | None:
        """Do something, and return what went wrong, since the other processes still send and receive."""
        try:
            action()
        except (OSError, DataError) as error:
            return (
                f"output_dir={self.output_dir}: a copy of checkpoint-{self.step}, which another machine has sent, "
                f"cannot be written ({error}). Make room there, or make it writable"
            )
        return None

    def remove(self) -> None:
        """Remove what was received."""
        shutil.rmtree(self.staged, ignore_errors=True)


def remove_checkpoints(output_dir: str | Path) -> None:
    """Remove the checkpoints of an earlier run on all machines, since a later resume would find them; for all to call.

    Example:
        >>> import tempfile
        >>> remove_checkpoints(tempfile.mkdtemp())
    """
    decided_by_main(lambda: prune_checkpoints(output_dir, 0))
    if has_group() and PartialState().is_local_main_process and not PartialState().is_main_process:
        prune_checkpoints(output_dir, 0)  # nothing is left where the main process has the same folder
    gathered(None)  # nobody writes a checkpoint before all are removed
