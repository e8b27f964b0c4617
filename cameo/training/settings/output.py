"""Settings of what a run writes: logs, checkpoints, validation, pictures."""

from __future__ import annotations

from dataclasses import dataclass

from cameo.settings import Settings, setting

__all__ = ["OutputSettings"]


@dataclass
class OutputSettings(Settings):
    """Output: logs, checkpoints, validation, pictures."""

    # Folder of the run. outputs/run by default; the settings files name one each.
    output_dir: str = setting("outputs/run", path=True, changeable=True)
    # Folder of the tracker's files, in output_dir or absolute. logs by default.
    logging_dir: str = setting("logs", path=True, changeable=True)
    # Tracker of accelerate, as tensorboard (the default, which needs no account) or wandb; all takes every one that is
    # installed, none or null none.
    report_to: str = setting("tensorboard", null="none", changeable=True)
    # Name under which trackers group runs. cameo by default.
    tracker_project_name: str = setting("cameo", changeable=True)
    # Steps from one checkpoint to the next, >= 1; the last step always writes one. 500 by default.
    checkpointing_steps: int = setting(500, at_least=1, changeable=True)
    # Newest checkpoints that are kept, >= 1. null, the default, keeps all.
    checkpoints_total_limit: int | None = setting(None, at_least=1, changeable=True)
    # Checkpoint from which an interrupted run goes on: a path, a name in output_dir, or latest. null, the default,
    # starts a new run.
    resume_from_checkpoint: str | None = setting(None, path=True, changeable=True)
    # Whether a new run may remove the checkpoints of an earlier one in output_dir. false by default: nothing is lost.
    overwrite_output_dir: bool = setting(False, changeable=True)
    # Steps from one validation to the next, >= 1; the start and the end are always validated. 500 by default.
    validation_steps: int = setting(500, at_least=1, changeable=True)
    # Samples that are validated on, >= 1. 32 by default: enough to tell runs apart, seconds on a tiny model.
    num_validation_samples: int = setting(32, at_least=1, changeable=True)
    # Samples that are drawn as pictures, >= 0; 0 draws none. 3 by default.
    num_validation_images: int = setting(3, at_least=0, changeable=True)
    # Steps in which pictures are sampled, >= 1. 25 by default: half the usual 50, half the time.
    num_inference_steps: int = setting(25, at_least=1, changeable=True)
    # Factor of classifier-free guidance in the pictures, >= 0. 1, the default, is without guidance.
    guidance_scale: float = setting(1.0, at_least=0, changeable=True)
