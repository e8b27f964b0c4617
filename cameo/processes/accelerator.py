"""The accelerator of a run, with its processes and trackers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration
from PIL import Image

from cameo.errors import unknown_name
from cameo.processes.launch import Launch
from cameo.settings import shown_settings
from cameo.training.settings import TrainingConfig

__all__ = ["log_pictures", "make_accelerator", "numbers_in", "start_trackers"]

# The other processes wait this long for the main process, which validates alone.
PATIENCE = timedelta(hours=6)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Create the accelerator of a run, with the processes that were launched for it.

    Raises:
        ValueError: for an unknown tracker, a precision that the device does not have, or a launcher that asks for
            what the run does not support (see `Launch.check`).
        ImportError: if the tracker's package is not installed.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(kind) for kind in LoggerType]
    if config.report_to not in (*known, "none"):
        raise unknown_name("report_to", config.report_to, [*known, "none"])
    available = [str(kind) for kind in get_available_trackers()]
    if config.report_to not in ("none", "all", *available):  # accelerate would skip it without a message
        raise ImportError(
            f"report_to={config.report_to}: not installed; pip install {config.report_to}, or report_to=none"
        )
    launch = Launch.from_environment()
    launch.check(config)
    output = Path(config.output_dir)
    accelerator = Accelerator(
        cpu=launch.needs_cpu,
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / config.logging_dir)),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        # The trainer accumulates by itself. Without this, accelerate divides the loss by a number from the launcher.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    launch.check_came(accelerator, config)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would ignore it
        raise ValueError("mixed_precision=fp16 needs a GPU; on the CPU use mixed_precision=bf16 or no")
    return accelerator


def start_trackers(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Open the run in its tracker, with all plain settings but secrets."""
    if config.report_to == "none":
        return
    plain = {name: value for name, value in shown_settings(config).items() if isinstance(value, int | float | str)}
    accelerator.init_trackers(config.tracker_project_name, config=plain)


def log_pictures(accelerator: Accelerator, paths: Sequence[str | Path], *, step: int) -> None:
    """Show picture files in TensorBoard and Weights & Biases; other trackers show no pictures."""
    for tracker in accelerator.trackers:
        for path in map(Path, paths):
            picture = Image.open(path).convert("RGB")
            if tracker.name == "tensorboard":
                images = np.asarray(picture)[None]
                tracker.log_images({f"validation/{path.stem}": images}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({f"validation/{path.stem}": [picture]}, step=step)


def numbers_in(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """List the floats of a result for a tracker, also those in groups that hold only floats.

    Example:
        >>> list(numbers_in({"loss": 0.5, "precision": {"mean@0": 0.25}, "settings": {"seed": 1}}))
        [('loss', 0.5), ('precision/mean@0', 0.25)]
    """
    for name, value in values.items():
        if isinstance(value, float):
            yield name, value
        elif isinstance(value, Mapping) and all(isinstance(one, float) for one in value.values()):
            yield from ((f"{name}/{key}", one) for key, one in value.items())
