"""What each setting saves: the step is computed again with that one setting changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cameo.errors import DataError
from cameo.estimate.building import OutlinedRun
from cameo.estimate.step import StepEstimate, estimate_step
from cameo.training.settings import TrainingConfig

__all__ = ["Saving", "changes_of", "savings"]


@dataclass(frozen=True)
class Saving:
    """A step with one setting changed.

    Attributes:
        setting: the change, as it is typed.
        step: what the step takes then; None where the settings do not go together.
        reason: why not.
    """

    setting: str
    step: StepEstimate | None
    reason: str = ""


def changes_of(config: TrainingConfig, *, has_vae: bool) -> dict[str, Any]:
    """Return the settings that decide the memory of a step, each with the value that it does not have.

    Example:
        >>> changes_of(TrainingConfig(train_batch_size=3), has_vae=False)
        {'gradient_checkpointing': True, 'mixed_precision': 'bf16', 'train_batch_size': 1}
    """
    changes: dict[str, Any] = {"gradient_checkpointing": not config.gradient_checkpointing}
    changes["mixed_precision"] = "bf16" if config.mixed_precision == "no" else "no"
    changes["train_batch_size"] = config.train_batch_size // 2 or 2
    if has_vae:
        changes["cache_latents"] = not config.cache_latents
    if config.use_ema:
        changes["use_ema"] = False
    return changes


def savings(
    config: TrainingConfig, outline: Callable[[TrainingConfig], OutlinedRun], device: str, *, has_vae: bool
) -> Iterator[Saving]:
    """Estimate the step again for each of `changes_of`, one after the other, as each takes as long as the first."""
    for name, value in changes_of(config, has_vae=has_vae).items():
        shown = f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        try:
            yield Saving(shown, estimate_step(replace(config, **{name: value}), outline, device))
        except (ValueError, DataError) as error:
            yield Saving(shown, None, str(error))
