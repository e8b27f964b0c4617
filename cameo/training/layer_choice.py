"""`layer: auto` in a training run: probe the model that is about to be trained on its own training data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset

from cameo.data import MultiViewSample, collate
from cameo.pipeline import MultiViewPipeline
from cameo.probing import probe_layers
from cameo.probing.layer_probe import LayerProbe
from cameo.training.settings import TrainingConfig

__all__ = ["PROBED_SAMPLES", "probe_for"]

PROBED_SAMPLES = 16


def probe_for(pipeline: MultiViewPipeline, dataset: Dataset[MultiViewSample], config: TrainingConfig) -> LayerProbe:
    """Probe the pipeline's denoiser on the first samples of a training set, for `cameo.wrap(layer="auto")`.

    Call it before the denoiser is wrapped. It runs where the denoiser stands; the processes of a run all take what the
    first one found, since on another kind of device a close ranking might turn. A denoiser with fresh weights has
    nothing to tell, and its ranking is close to noise.

    Args:
        pipeline: holds the denoiser, with or without LoRA (which changes nothing before the training).
        dataset: training samples with depth.
        config: settings of the run; `backbone`, `inflate` and `train_batch_size` are used.

    Raises:
        DataError: if the samples carry no depth.
    """

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, PROBED_SAMPLES, config.train_batch_size):
            indices = range(start, min(start + config.train_batch_size, PROBED_SAMPLES))
            yield collate([dataset[index] for index in indices])

    probe = probe_layers(pipeline, batches(), backbone=config.backbone, inflate=config.inflate)
    if torch.distributed.is_initialized():
        shared = [probe]
        torch.distributed.broadcast_object_list(shared)
        probe = shared[0]
    return probe
