"""Data sets of a run, the order in which processes draw from them, and the noise that is added."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from cameo.data import EmbeddedScenes, MultiViewDataset, RGBDSequence, SceneSource, collate, rig_views
from cameo.errors import DataError
from cameo.pipeline import MultiViewPipeline, TrainingInputs
from cameo.training.config import TrainingConfig
from cameo.training.stopping import leave_signals_to_parent

__all__ = ["StepSampler", "build_dataset", "noisy_inputs", "to_device", "training_batches"]

MESH_ENDINGS = (".glb", ".obj", ".ply")
ENDLESS = 2**40


def build_dataset(config: TrainingConfig, split: str) -> MultiViewDataset:
    """Build the training or validation set of a run; both are pure functions of their seed and an index."""
    form = _data_format(config)
    rig = config.camera_rig if form in ("objects", "meshes") else None
    if rig:
        try:
            rig_views(rig, config.num_views)
        except ValueError as error:
            raise ValueError(f"camera_rig={rig} with num_views={config.num_views}: {error}") from error
    elif config.camera_rig:
        warnings.warn(
            f"camera_rig={config.camera_rig} does not apply to {config.train_data_dir}: the cameras are those of the "
            "sequence. A backbone whose poses are fixed learns them as they come",
            stacklevel=2,
        )
    return MultiViewDataset(
        _source(config, split, form, rig),
        num_views=config.num_views,
        num_reference_views=config.num_reference_views,
        selection="in_order" if rig else "overlap",
        min_overlap=config.min_overlap,
        max_overlap=config.max_overlap,
        # Validation samples must not depend on the seed of the run, or runs could not be compared.
        seed=config.seed if split == "train" else config.data_seed,
        length=ENDLESS,
    )


def _data_format(config: TrainingConfig) -> str:
    if config.data_format != "auto":
        return config.data_format
    if config.train_data_dir:
        return _detect(Path(config.train_data_dir))
    return "objects" if config.camera_rig else "scenes"


def _source(config: TrainingConfig, split: str, form: str, rig: str | None) -> SceneSource:
    size = (config.resolution, config.resolution)
    if form == "rgbd":
        if not config.train_data_dir:
            raise DataError("data_format=rgbd needs train_data_dir=, the folder of the sequence")
        calibration = {"intrinsics": config.intrinsics, "depth_scale": config.depth_scale}
        return RGBDSequence(config.train_data_dir, size=size, split=split, **calibration)
    if form == "meshes" and not config.train_data_dir:
        raise DataError("data_format=meshes needs train_data_dir=, a folder of .glb, .obj or .ply files")
    return EmbeddedScenes(
        content="objects" if form == "objects" else "rooms",
        rig=rig,
        split=split,
        num_scenes=config.num_scenes if split == "train" else config.num_validation_scenes,
        views_per_scene=config.num_views if rig else config.views_per_scene,
        size=size,
        seed=config.data_seed,
        mesh_dir=config.train_data_dir if form == "meshes" else None,
    )


def _detect(folder: Path) -> str:
    if not folder.is_dir():
        raise DataError(f"train_data_dir={folder}: no such folder")
    if any(path.suffix.lower() in MESH_ENDINGS for path in folder.rglob("*")):
        return "meshes"
    return "rgbd"


class StepSampler(Sampler[list[int]]):
    """Batches of sample numbers for one process, from any step on.

    Every micro step takes the next `batch_size * num_processes` numbers, so the order is the same whether or not a
    run was interrupted.

    Example:
        >>> list(StepSampler(start=1, stop=3, batch_size=2, process=1, num_processes=2))
        [[6, 7], [10, 11]]
    """

    def __init__(self, *, start: int, stop: int, batch_size: int, process: int = 0, num_processes: int = 1) -> None:
        self.steps = range(start, stop)
        self.batch_size, self.process, self.num_processes = batch_size, process, num_processes

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = (step * self.num_processes + self.process) * self.batch_size
            yield list(range(first, first + self.batch_size))


@contextmanager
def training_batches(
    dataset: MultiViewDataset, sampler: StepSampler, config: TrainingConfig
) -> Iterator[Iterator[tuple[int, dict[str, Any]]]]:
    """Load the batches of `sampler` in order, each with the number of its micro step; ends the workers on leaving."""
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.dataloader_num_workers,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_parent,
        # A loader draws a seed when it starts: from torch's own generator, a resumed run would go on shifted.
        generator=torch.Generator().manual_seed(config.seed),
    )
    batches = iter(loader)
    try:
        yield zip(sampler.steps, batches, strict=True)
    finally:
        if config.dataloader_num_workers:
            # Not left to the garbage collector: the traceback of an error keeps the iterator alive.
            batches._shutdown_workers()  # type: ignore[attr-defined]


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def noisy_inputs(
    pipeline: MultiViewPipeline, batch: Mapping[str, Any], config: TrainingConfig, micro_step: int, process: int = 0
) -> TrainingInputs:
    """Noise a batch with time steps and noise that are functions of seed, step and process alone."""
    state = np.random.SeedSequence((config.seed, micro_step, process)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    uniform = torch.rand(batch["images"].shape[0], generator=generator)
    level = uniform if config.timestep_sampling == "uniform" else 1 - uniform.square()
    timesteps = (level * pipeline.num_train_timesteps).long().clamp(max=pipeline.num_train_timesteps - 1)
    return pipeline.training_inputs(
        batch, generator=generator, timesteps=timesteps, condition_dropout=config.condition_dropout
    )
