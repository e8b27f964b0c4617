"""Everything that a training needs to go on as if nothing had happened, written to a checkpoint and read from it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from safetensors import SafetensorError

from cameo.errors import DataError
from cameo.training.checkpoints import earlier
from cameo.training.checkpoints.agreement import decided_by_main, gather_bytes
from cameo.training.checkpoints.folder import (
    check_continues,
    prune_checkpoints,
    publish_checkpoint,
    staging_folder,
)
from cameo.training.checkpoints.machines import agreed_checkpoint
from cameo.training.checkpoints.random_states import random_states, set_random_states
from cameo.training.checkpoints.tensors import read_tensors, state_to_bytes, write_tensors
from cameo.training.checkpoints.verify import read_state

__all__ = ["Checkpoints", "Part"]


class Part(Protocol):
    """What has a state: an optimizer, a scheduler, a gradient scaler, averaged weights."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Take a state."""


class Checkpoints:
    """Writes the checkpoints of a run and resumes from them; all processes call each method together.

    The main process writes all files: `NAME.safetensors` for each part, `random_states_RANK.safetensors` for each
    process, and the weights.

    Args:
        output_dir: folder of the run.
        accelerator: the processes of the run.
        parts: what has a state, by the names `optimizer`, `scheduler`, `scaler` and `average`; None where the run has
            no such part.
        save_weights: writes the trained weights to the folder that it is given, which does not exist yet.
        load_weights: reads them from a folder.
    """

    def __init__(
        self,
        output_dir: str | Path,
        accelerator: Accelerator,
        parts: Mapping[str, Part | None],
        *,
        save_weights: Callable[[Path], None],
        load_weights: Callable[[Path], None],
    ) -> None:
        self.output_dir, self.accelerator = Path(output_dir), accelerator
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self._save_weights, self._load_weights = save_weights, load_weights

    def save(self, step: int, settings: Mapping[str, Any], limit: int | None) -> Path:
        """Write `checkpoint-N` whole or not at all, then remove the oldest beyond `limit` if it can be read.

        Raises:
            DataError: if the disk is full or cannot be written to; the earlier checkpoints are still there.
        """
        states = gather_bytes(state_to_bytes(random_states(self.accelerator.device)), self.accelerator)
        return decided_by_main(lambda: self._write(step, settings, limit, states))

    def _write(self, step: int, settings: Mapping[str, Any], limit: int | None, states: list[bytes]) -> Path:
        staged = staging_folder(self.output_dir, step)
        try:
            self._save_weights(staged)
            for name, part in self.parts.items():
                write_tensors(part.state_dict(), _file(staged, name))
            for rank, state in enumerate(states):
                _file(staged, f"random_states_{rank}").write_bytes(state)
            final = publish_checkpoint(staged, step, {"settings": dict(settings)})
            prune_checkpoints(self.output_dir, limit, newest=step)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staged, ignore_errors=True)
            raise DataError(
                f"output_dir={self.output_dir}: checkpoint-{step} cannot be written ({error}). Make room there, or "
                "make it writable, and continue from the checkpoint before with resume_from_checkpoint=latest"
            ) from error
        return final

    def resume(
        self, resume_from_checkpoint: str, settings: Mapping[str, Any], max_train_steps: int
    ) -> tuple[Path, int]:
        """Load the checkpoint that the setting means, on whichever machine it is; returns its folder and step.

        Raises:
            DataError: if there is none, or it is damaged, or does not fit what trains.
            ValueError: if it was written with other settings.
        """
        folder = agreed_checkpoint(self.output_dir, resume_from_checkpoint)
        step = decided_by_main(lambda: check_continues(folder, settings, max_train_steps))
        self._load_weights(folder)
        rank, is_earlier = self.accelerator.process_index, "files" not in read_state(folder)
        for name, part in self.parts.items():
            state = earlier.read_part(folder, name) if is_earlier else read_tensors(_file(folder, name))
            try:
                part.load_state_dict(state)
            except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
                raise DataError(f"{folder}: its {name} does not fit this run ({error})") from error
        if is_earlier:
            states = earlier.read_part(folder, "random_states", rank)
        else:
            states = read_tensors(_file(folder, f"random_states_{rank}"))
        if states is not None:
            for lost in set_random_states(states, self.accelerator.device):
                warnings.warn(f"{folder}: {lost}; with dropout, losses differ from an uninterrupted run", stacklevel=2)
        return folder, step


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
