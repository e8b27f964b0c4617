"""Checkpoints that are either complete or absent.

A checkpoint is written into a hidden folder and renamed to `checkpoint-N` when it is complete, so a killed process
leaves the earlier ones untouched. It holds the trained weights in the format in which they are published, the
alignment head, and the states of the optimizer, the scheduler and the random generators, as accelerate saves them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from cameo.backbone import get_backbone, unwrap_peft
from cameo.config import CameoConfig
from cameo.errors import DataError
from cameo.files import move_into_place
from cameo.hub.weights import ADAPTER_FORMATS, HEAD_FILE, LORA_FILE, MODULE_FILE, PEFT_FILE, adapter_name, format_in
from cameo.model import CameoModel
from cameo.settings import current_names
from cameo.training.settings import TrainingConfig

__all__ = [
    "check_continues",
    "find_checkpoint",
    "list_checkpoints",
    "load_trained",
    "prune_checkpoints",
    "publish_checkpoint",
    "read_state",
    "refuse_used_folder",
    "staging_folder",
]

NAME = re.compile(r"checkpoint-(\d+)")
# Folders that a killed process may leave: of a checkpoint that was being written or removed, and of save_pretrained.
LEFTOVER = re.compile(r"\.checkpoint-\d+\.(partial|removed)|\.\.checkpoint-\d+\.partial\.[0-9a-f]{8}\.tmp")
STATE_NAME = "trainer_state.json"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    folders = Path(output_dir).glob("checkpoint-*")
    complete = [path for path in folders if NAME.fullmatch(path.name) and (path / STATE_NAME).is_file()]
    return sorted(complete, key=_step)


def find_checkpoint(output_dir: str | Path, resume_from_checkpoint: str) -> Path:
    """Return the checkpoint that `latest`, a path, or a name within `output_dir` means.

    Raises:
        DataError: if there is none (a run that is to resume never starts from the beginning instead), or `output_dir`
            holds later checkpoints, which would not belong to the continued run.
    """
    known = list_checkpoints(output_dir)
    if resume_from_checkpoint == "latest":
        if not known:
            raise DataError(
                f"resume_from_checkpoint=latest: {output_dir} holds no complete checkpoint-N; "
                "leave the setting out to start a new run"
            )
        return known[-1]
    path = Path(resume_from_checkpoint)
    path = path if path.is_dir() else Path(output_dir) / resume_from_checkpoint
    if not (path / STATE_NAME).is_file():
        names = ", ".join(checkpoint.name for checkpoint in known) or "none"
        raise DataError(
            f"resume_from_checkpoint={resume_from_checkpoint}: not a complete checkpoint folder; "
            f"in {output_dir}: {names}"
        )
    step = int(read_state(path)["step"])
    if later := [checkpoint.name for checkpoint in known if _step(checkpoint) > step]:
        raise DataError(
            f"resume_from_checkpoint={resume_from_checkpoint}: {output_dir} holds later checkpoints "
            f"({', '.join(later)}). Remove them, or choose another output_dir for the branch"
        )
    return path


def refuse_used_folder(output_dir: str | Path) -> None:
    """Raise `DataError` if a new run would mix its checkpoints with those of an earlier run."""
    if list_checkpoints(output_dir):
        raise DataError(
            f"output_dir={output_dir} holds checkpoints of an earlier run. Continue it with "
            "resume_from_checkpoint=latest, choose another output_dir, or replace it with overwrite_output_dir=true"
        )


def staging_folder(output_dir: str | Path, step: int) -> Path:
    """Return the empty folder in which a checkpoint is written before it is published."""
    folder = Path(output_dir) / f".checkpoint-{step}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish_checkpoint(staged: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write the trainer's state and rename the staged folder to `checkpoint-N`."""
    (staged / STATE_NAME).write_text(json.dumps({**state, "step": step}, indent=2) + "\n", encoding="utf-8")
    final = staged.parent / f"checkpoint-{step}"
    move_into_place(staged, final)
    return final


def prune_checkpoints(output_dir: str | Path, limit: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, and partial ones that a killed process left."""
    if limit is not None:
        checkpoints = list_checkpoints(output_dir)
        for path in checkpoints[: max(len(checkpoints) - limit, 0)]:
            # Renamed first: a process killed while deleting leaves nothing that looks like a checkpoint.
            path.rename(path.with_name(f".{path.name}.removed"))
    for leftover in Path(output_dir).glob(".*checkpoint-*"):
        if LEFTOVER.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the trainer's state of a complete checkpoint."""
    return json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))


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


def load_trained(model: CameoModel, folder: str | Path) -> None:
    """Load the trained weights and the heads of a checkpoint into the modules that are being trained, in place.

    They get the checkpoint's map of positions too, since a preset of an earlier release may have had none.

    Raises:
        DataError: if the folder does not hold exactly the weights that the model trains.
    """
    folder = Path(folder)
    core, weight_format = unwrap_peft(model.base_model), format_in(folder)
    try:
        if weight_format in ADAPTER_FORMATS:
            _load_adapter(model.base_model, folder, weight_format)
        elif weight_format == "module":
            load_model(core, str(folder / MODULE_FILE))
        else:
            state: dict[str, Tensor] = {}
            for path in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
                state |= load_file(str(path))
            core.load_state_dict(state)
        heads = model.alignment_heads.state_dict()
        model.alignment_heads.load_state_dict(load_file(str(folder / HEAD_FILE)) if heads else {})
        if model.cameo_config.backbone is not None:
            position = CameoConfig.load(folder).position
            get_backbone(model.cameo_config.backbone).set_position(core, position)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n\t")[:2])  # torch lists every parameter
        raise DataError(f"{folder}: does not fit the model that trains: {first}") from error


def _load_adapter(base: nn.Module, folder: Path, weight_format: str) -> None:
    path = folder / (LORA_FILE if weight_format == "diffusers_lora" else PEFT_FILE)
    state, name = load_file(str(path)), adapter_name(base)
    if not hasattr(base, "get_base_model"):  # only the keys of a PeftModel carry the prefix of the file themselves
        prefix = next(iter(state), "").split(".")[0] if weight_format == "diffusers_lora" else "base_model.model"
        state = {key.removeprefix(f"{prefix}."): value for key, value in state.items()}
    expected = get_peft_model_state_dict(base, adapter_name=name)
    if differing := sorted(expected.keys() ^ state.keys()):
        raise DataError(f"{path}: does not fit the model that trains; in one of them only: {', '.join(differing[:3])}")
    set_peft_model_state_dict(base, state, adapter_name=name)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
