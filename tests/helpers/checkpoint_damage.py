"""Damage of the files of a checkpoint, and runs that have left some to be damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.training_runs import make_trainer

# Averaged weights, dropout and a second kind of state each: everything that a checkpoint can hold on one CPU.
RUN: dict[str, Any] = {
    "checkpointing_steps": 1,
    "lora_dropout": 0.2,
    "use_ema": True,
    "ema_decay": 0.9,
    "validation_steps": 100,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 4,
    "train_batch_size": 1,
}
FILES = (
    "README.md",
    "alignment_head.safetensors",
    "average.safetensors",
    "cameo_config.json",
    "optimizer.safetensors",
    "pytorch_lora_weights.safetensors",
    "random_states_0.safetensors",
    "scheduler.safetensors",
    "trainer_state.json",
)


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": lambda path: flip(path, path.stat().st_size * 4),
    "gone": Path.unlink,
}


def train(folder: Path, steps: int, **changes: Any) -> None:
    """Run the training of these tests up to a step."""
    make_trainer(folder, max_train_steps=steps, **{**RUN, **changes}).train()
