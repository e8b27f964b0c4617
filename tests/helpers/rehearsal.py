"""A rehearsal: whole runs of the recipes on a pretended device, in a process of their own.

    python -m tests.helpers.rehearsal SUBJECT FOLDER

trains a LoRA of a backbone in bfloat16, then all its weights (of one backbone once more, from the checkpoint before the
last step), each with validation, sampling, checkpoints and report; prints as JSON what each step launched and where the
host waited.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import recipes.full_finetune
import recipes.lora_finetune
from benchmarks.step.pretend_device import PretendDevice
from cameo.probing.denoising import ValidationSettings
from cameo.training import setup
from cameo.training.trainer import Trainer
from tests.helpers.training_runs import SETTINGS, SHORT, fresh_accelerate, read_lines

STEPS = 3
COMMON = {
    **SHORT,
    "max_train_steps": STEPS,
    "train_batch_size": 2,
    "num_validation_images": 1,
    "mixed_precision": "bf16",
}
# Of a kind of training: its recipe, and what is changed of the settings that ship with it.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (recipes.lora_finetune, {}),
    "full": (recipes.full_finetune, {"loss_weight": 0.1, "lr_warmup_steps": 1, "checkpointing_steps": STEPS - 1}),
}
U_NET = {"preset": "tiny", "preset_options": json.dumps(SETTINGS["preset_options"])}
# A backbone, and what is changed for each kind: no layer is probed, and the views attend to each other in all steps.
SUBJECTS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "cat3d": ("cat3d", {"lora": {"pretrained_model_name_or_path": "null", **U_NET}, "full": U_NET}),
    "cat3d-transformer": ("cat3d", {"lora": {}, "full": {"preset_options": "{}"}}),
    "mvdream": ("mvdream", {"lora": {"layer": "null"}, "full": {}}),
    "zero123plus": ("zero123plus", {"lora": {"layer": "null"}, "full": {}}),
    "sv3d": ("sv3d", {"lora": {}, "full": {"inflate": "true"}}),
}
RESUMED = "cat3d-transformer"


@contextlib.contextmanager
def counted_steps(device: PretendDevice) -> Iterator[list[dict[str, Any]]]:
    """Collect what each step of a trainer asks of the device."""
    steps: list[dict[str, Any]] = []
    take = Trainer._train_step

    def counted(trainer: Trainer, *arguments: Any) -> Any:
        device.clear()
        with device.counted():
            found = take(trainer, *arguments)
        waits = sum(map(Counter, device.syncs.values()), Counter[str]())
        steps.append({"launches": sum(part.total() for part in device.launches.values()), "waits": dict(waits)})
        return found

    with mock.patch.object(Trainer, "_train_step", counted), device.uncounted():  # counting takes long
        yield steps


def rehearse(subject: str, kind: str, output: Path, **changes: Any) -> dict[str, Any]:
    """Run a recipe; returns what was counted in each step, and the records of the run."""
    backbone, own = SUBJECTS[subject]
    recipe, settings = KINDS[kind]
    settings = {**COMMON, **settings, **own[kind], **changes, "output_dir": output}
    arguments = [f"backbone={backbone}", *(f"{name}={value}" for name, value in settings.items())]
    # One noise level of seven: the levels differ in their noise alone.
    one_level = mock.patch.object(setup, "ValidationSettings", partial(ValidationSettings, noise_levels=(1.0,)))
    with one_level, fresh_accelerate(), PretendDevice() as device, counted_steps(device) as steps:
        recipe.main(arguments)
    return {"steps": steps, "metrics": read_lines(output / "metrics.jsonl")}


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    with contextlib.redirect_stdout(sys.stderr):
        found = {kind: rehearse(name, kind, folder / kind) for kind in KINDS}
        if name == RESUMED:
            shutil.rmtree(folder / "full" / f"checkpoint-{STEPS}")
            checkpoint = f"checkpoint-{STEPS - 1}"
            found["resumed"] = rehearse(name, "full", folder / "full", resume_from_checkpoint=checkpoint)
    print(json.dumps(found))
