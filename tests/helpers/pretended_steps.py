"""Steps on a pretended device, in a process of their own: torch must know of it before the first backward pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.step.pretend_device import NAME, PretendDevice
from cameo.processes.stopping import StopSignal
from cameo.training.data import StepSampler, training_batches
from tests.helpers.training_runs import fresh_accelerate, make_trainer

ROOT = Path(__file__).parents[2]


def run_apart(module: str, *arguments: str, **variables: str) -> str:
    """Run a module as a script, with these variables of the environment too, and return what it prints."""
    environment = {**os.environ, "ACCELERATE_TORCH_DEVICE": NAME, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= variables
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def waits_of_trainer(loss_weight: float) -> dict[str, int]:
    """Where the host waits in the second step of a training, by reason and line."""
    with tempfile.TemporaryDirectory() as folder, PretendDevice() as device, fresh_accelerate():
        trainer = make_trainer(Path(folder) / "run", loss_weight=loss_weight)
        trainer.output_dir.mkdir()
        trainer.model.check_unseen = False  # is repeated ever more rarely
        trainer.prepared.train()
        sampler = StepSampler(start=0, stop=2, batch_size=trainer.config.train_batch_size)
        loading: Any = training_batches(trainer.dataset, sampler, trainer.config, trainer.device)
        with StopSignal() as stop, loading as batches:
            for _ in range(2):
                device.clear()
                trainer._train_step(batches, stop)
        found: Counter[str] = Counter()
        for waits in device.syncs.values():
            found += waits
        return dict(found)


if __name__ == "__main__":
    print(json.dumps([waits_of_trainer(weight) for weight in (0.0, 0.1)]))
