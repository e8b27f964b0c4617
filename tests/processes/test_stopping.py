"""A second signal ends a run at once, also in the middle of its checkpoint."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from cameo.processes.stopping import ECHO_SECONDS
from cameo.training.checkpoints import folder as checkpoint
from tests.helpers.training_runs import (
    RecipeProcess,
)


def test_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    settings = {"max_train_steps": 500, "checkpointing_steps": 500}
    run = RecipeProcess("lora_finetune", tmp_path, **settings, signal_at=(2, signal.SIGINT), stall="checkpoint-")
    run.reach(lambda: any(tmp_path.glob(".*checkpoint-*/*.half")))  # hangs in its checkpoint for ten minutes
    time.sleep(ECHO_SECONDS + 0.2)
    run.signal(signal.SIGINT)
    assert run.wait(timeout=20) != 0
    assert "KeyboardInterrupt" in run.output
    assert checkpoint.list_checkpoints(tmp_path) == []
