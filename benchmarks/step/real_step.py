"""What one step of a real training takes, measured without anything of the estimate: the profiler's memory events.

The step is that of the library's own `Trainer`, the second of the run, on rendered rooms and with fresh weights. Its
batch is loaded before, so that what the loader does is not in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from benchmarks.common.measuring import peak_memory, peak_resident
from cameo.processes.stopping import StopSignal
from cameo.training.data import StepSampler, build_dataset, training_batches, with_matches
from cameo.training.settings import TrainingConfig
from cameo.training.setup import add_lora, load_pipeline, wrap_denoiser
from cameo.training.trainer import Trainer

__all__ = ["measure_step"]


def measure_step(config: TrainingConfig, *, full: bool) -> dict[str, Any]:
    """Train two steps, and return the bytes held before the third and what it adds at its peak, both on a CPU.

    Returns:
        `held`: parameters, buffers, optimizer state, averaged weights and batch; `added`: the largest number of bytes
        beyond; `resident`: how much the process grew in a fourth step; `parameters` and `trained`: their numbers.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # the run before may have had another precision
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output_dir=folder, report_to="none", max_train_steps=4)
        pipeline = load_pipeline(config)
        if full:
            pipeline.denoiser.requires_grad_(True)
        else:
            add_lora(pipeline.denoiser, config)
        dataset = build_dataset(config, "train")
        model = wrap_denoiser(pipeline, config, dataset)
        trainer = Trainer(model, pipeline, dataset, config)
        trainer.prepared.train()
        parts = config.gradient_accumulation_steps
        sampler = StepSampler(start=0, stop=4 * parts, batch_size=config.train_batch_size)
        samples = with_matches(dataset, model, config)
        with StopSignal() as stop, training_batches(samples, sampler, config) as batches:
            for _ in range(2):
                trainer._train_step(_next(batches, parts), stop)
            loaded = list(_next(batches, parts))
            held = _held(trainer, pipeline, [batch for _, batch in loaded])
            added = peak_memory(lambda: trainer._train_step(iter(loaded), stop))
            loaded = list(_next(batches, parts))
            resident = peak_resident(lambda: trainer._train_step(iter(loaded), stop))
    return {
        "held": held,
        "added": added,
        "resident": resident,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained": sum(parameter.numel() for parameter in trainer.trained),
    }


def _next(batches: Iterator[tuple[int, Any]], count: int) -> Iterator[tuple[int, Any]]:
    return iter([next(batches) for _ in range(count)])


def _held(trainer: Trainer, pipeline: Any, batches: list[Any]) -> int:
    modules = [trainer.model, *(part for part in pipeline.components.values() if isinstance(part, nn.Module))]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    tensors += [value for state in trainer.optimizer.state.values() for value in state.values()]
    tensors += trainer.ema.shadow_params if trainer.ema is not None else []
    for batch in batches[:1]:  # the others are loaded when they are needed, outside of the step
        tensors += [value for value in batch.values() if isinstance(value, Tensor)]
        tensors += [part for match in batch.get("correspondences", ()) for part in (match.index, match.distance)]
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors if torch.is_tensor(one)
    }
    return sum(storages.values())
