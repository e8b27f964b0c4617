"""Checkpoints that are either whole or not there.

A checkpoint is written into a hidden folder and renamed to `checkpoint-N` when it is complete, so a killed process
leaves the earlier ones untouched. It holds the trained weights in the format they are published in, the alignment
head, and accelerate's optimizer, scheduler and random states.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file, load_model

from cameo.backbone import core_module
from cameo.errors import DataError
from cameo.weights import ADAPTER_FORMATS, HEAD_FILE, LORA_FILE, MODULE_FILE, PEFT_FILE, adapter_name, format_in
from cameo.wrap import CameoModel

__all__ = [
    "find_checkpoint",
    "list_checkpoints",
    "load_trained",
    "prune_checkpoints",
    "publish_checkpoint",
    "read_state",
    "staging_folder",
]

NAME = re.compile(r"checkpoint-(\d+)")
STATE_NAME = "trainer_state.json"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and (path / STATE_NAME).is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str) -> Path:
    """Return the checkpoint that `latest` or a path names.

    Raises:
        DataError: if there is none; a run that was told to resume never starts anew in silence.
    """
    if resume_from_checkpoint == "latest":
        found = list_checkpoints(output_dir)
        if not found:
            raise DataError(
                f"resume_from_checkpoint=latest: {output_dir} holds no complete checkpoint-N; "
                "leave the setting out to start a new run"
            )
        return found[-1]
    path = Path(resume_from_checkpoint)
    path = path if path.is_dir() else Path(output_dir) / resume_from_checkpoint
    if not (path / STATE_NAME).is_file():
        raise DataError(f"resume_from_checkpoint={resume_from_checkpoint}: not a complete checkpoint folder")
    return path


def staging_folder(output_dir: str | Path, step: int) -> Path:
    """Where a checkpoint is written before it is published; leftovers of a killed process are removed."""
    folder = Path(output_dir) / f".checkpoint-{step}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish_checkpoint(staged: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the trainer's state and rename the staged folder to `checkpoint-N`."""
    (staged / STATE_NAME).write_text(json.dumps({**state, "step": step}, indent=2) + "\n", encoding="utf-8")
    final = staged.parent / f"checkpoint-{step}"
    replaced = final.with_name(f".{final.name}.removed")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # resumed from an older one: the new folder replaces that of the abandoned run
        final.rename(replaced)
    staged.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def prune_checkpoints(output_dir: str | Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, and partial ones that a killed process left."""
    for leftover in Path(output_dir).glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if limit is not None:
        for path in list_checkpoints(output_dir)[: -limit or None]:
            _remove(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the trainer's state of a complete checkpoint."""
    return json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))


def _remove(checkpoint: Path) -> None:
    # Renamed first: a process killed while deleting leaves no folder that looks like a checkpoint.
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def load_trained(model: CameoModel, folder: str | Path) -> None:
    """Load the trained weights and the heads of a checkpoint into the modules that are being trained, in place.

    Raises:
        DataError: if the folder does not hold exactly the weights that the model trains.
    """
    folder, base = Path(folder), model.base_model
    form = format_in(folder)
    if form in ADAPTER_FORMATS:
        path = folder / (LORA_FILE if form == "diffusers_lora" else PEFT_FILE)
        state = load_file(str(path))
        if not hasattr(base, "get_base_model"):  # the keys of a PeftModel carry the prefix of the file themselves
            prefix = next(iter(state), "").split(".")[0] if form == "diffusers_lora" else "base_model.model"
            state = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
        result = set_peft_model_state_dict(base, state, adapter_name=adapter_name(base))
        if result.unexpected_keys:
            raise DataError(f"{path}: does not fit the model that trains: {list(result.unexpected_keys)[:3]}")
    elif form == "module":
        load_model(core_module(base), str(folder / MODULE_FILE))
    else:
        state = {}
        for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
            state |= load_file(str(path))
        core_module(base).load_state_dict(state)
    model.alignment_heads.load_state_dict(load_file(str(folder / HEAD_FILE)))
