"""The setting `layer=auto` of a run: the layers of the model are probed on its training data before the training."""

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

    Call it before the denoiser is wrapped. The probe runs on the device of the denoiser. All processes of a run take
    the result of the first one, since on another kind of device a close ranking might come out differently. For a
    denoiser with fresh weights the ranking carries almost no information.

    Args:
        pipeline: holds the denoiser, with or without LoRA (which changes nothing before the training).
        dataset: training samples with depth.
        config: settings of the run; `backbone`, `inflate`, `own_view` and `train_batch_size` are used.

    Raises:
        DataError: if the samples carry no depth.
    """

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, PROBED_SAMPLES, config.train_batch_size):
            indices = range(start, min(start + config.train_batch_size, PROBED_SAMPLES))
            yield collate([dataset[index] for index in indices])

    probe = probe_layers(
        pipeline, batches(), backbone=config.backbone, inflate=config.inflate, own_view=config.own_view
    )
    if torch.distributed.is_initialized():
        shared = [probe]
        torch.distributed.broadcast_object_list(shared)
        probe = shared[0]
    return probe
