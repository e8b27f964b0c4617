"""The figures that a run measures, step by step, in files with one JSON object per line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from cameo.alarms import Alarm
from cameo.errors import DataError
from cameo.files import flush, write_atomically

__all__ = ["Records", "TrainingResult"]


class Records:
    """A file of entries in the order of their `step`, which stays readable if the process is killed at any moment.

    Example:
        >>> import tempfile
        >>> records = Records(Path(tempfile.mkdtemp()) / "metrics.jsonl")
        >>> for step in (1, 2, 3):
        ...     records.append({"step": step, "loss": 1 / step})
        >>> records.keep_until(2)
        >>> [entry["step"] for entry in records.read()]
        [1, 2]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> list[dict[str, Any]]:
        """Read all entries; an unfinished last line, which a killed process may leave, is skipped.

        Raises:
            DataError: if a line is damaged; names the file and the line.
        """
        return list(self._entries())

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one entry.

        Raises:
            DataError: if the disk is full or the file cannot be written; names it.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written ({error}). Make room there, or make it writable, and continue with "
                "resume_from_checkpoint=latest"
            ) from error

    def flush(self) -> None:
        """Wait until the entries are on the disk, so that a power failure does not take them."""
        if self.path.is_file():
            flush(self.path)

    def keep_until(self, step: int, *, every_step: bool = False) -> None:
        """Remove the entries after `step`, from which a resumed run continues; 0 removes all of them.

        What follows the entry of `step` is not read: the run writes it anew, damaged or not.

        Args:
            step: of the last entry that stays.
            every_step: whether each step up to `step` has an entry; steps without one are named in a warning.

        Raises:
            DataError: if a line up to that of `step` is damaged.
        """
        kept = list(takewhile(lambda entry: entry["step"] <= step, self._entries(last=step))) if step else []
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        if every_step and (lost := sorted(set(range(1, step + 1)) - {entry["step"] for entry in kept})):
            shown = str(lost[0]) if len(lost) == 1 else f"{lost[0]} to {lost[-1]}, {len(lost)} in all"
            warnings.warn(
                f"{self.path}: the figures of steps that were taken before are lost (step {shown}); the run goes on, "
                "and its curve lacks them",
                stacklevel=3,
            )

    def _entries(self, last: int | None = None) -> Iterator[dict[str, Any]]:
        """Read the entries in their order, up to the one of the step `last`."""
        if not self.path.is_file():
            return
        complete, _, _ = self.path.read_bytes().rpartition(b"\n")
        for number, line in enumerate(complete.split(b"\n") if complete else (), start=1):
            try:
                entry = json.loads(line)
                if type(entry["step"]) is not int:
                    raise TypeError("its step is no number")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise DataError(
                    f"{self.path}: line {number} is damaged ({error}). Copy the file again, or delete the line, which "
                    "holds the figures of one step and nothing that the training needs"
                ) from error
            yield entry
            if entry["step"] == last:
                return


@dataclass
class TrainingResult:
    """The result of a training run.

    Attributes:
        step: optimizer steps done.
        metrics: path of `metrics.jsonl`: per step `step, loss, alignment_loss, learning_rate` (losses are means over
            micro steps and processes) and `supervised`, the number of matches behind the step; with matches also
            `alignment_chance`, the alignment loss that uniform attention would have, and `matchable`, the number of
            matches that there could have been; where an alarm stands, `alarm`, its words.
        validations: what `on_validation` returned, each with its `step`; on the main process only.
        stopped_by: name of the signal that ended the run early, or None.
        alarms: what most likely makes the run useless, as its latest steps show it.
        seconds: how long it took; of a run that was resumed, since then.
    """

    step: int
    metrics: Path
    validations: list[dict[str, Any]] = field(default_factory=list)
    stopped_by: str | None = None
    alarms: list[Alarm] = field(default_factory=list)
    seconds: float = 0.0

    def history(self) -> list[dict[str, Any]]:
        """Read the entries of all steps."""
        return Records(self.metrics).read()
