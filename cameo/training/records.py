"""The figures that a run measures, step by step, in files with one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cameo.alarms import Alarm
from cameo.files import write_atomically

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
        """Read all entries; an unfinished last line, which a killed process may leave, is skipped."""
        if not self.path.is_file():
            return []
        complete, _, _ = self.path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in complete.splitlines()]

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one entry."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def keep_until(self, step: int) -> None:
        """Remove the entries after `step`, from which a resumed run continues; 0 removes all of them."""
        kept = [entry for entry in self.read() if entry["step"] <= step] if step else []
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))


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
