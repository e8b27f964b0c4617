"""Data sets of a run, and the order in which processes draw from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader, Sampler

from cameo.data import EmbeddedScenes, MultiViewDataset, MultiViewSample, RGBDSequence, SceneSource, collate
from cameo.errors import DataError
from cameo.training.config import TrainingConfig

__all__ = ["StepSampler", "build_dataset", "training_loader"]

MESH_ENDINGS = (".glb", ".obj", ".ply")
ENDLESS = 2**40


def build_dataset(config: TrainingConfig, split: str) -> MultiViewDataset:
    """Build the training or validation set of a run; both are pure functions of their seed and an index."""
    return MultiViewDataset(
        _source(config, split),
        num_views=config.num_views,
        num_reference_views=config.num_reference_views,
        min_overlap=config.min_overlap,
        max_overlap=config.max_overlap,
        # Validation samples must not depend on the seed of the run, or runs could not be compared.
        seed=config.seed if split == "train" else config.data_seed,
        length=ENDLESS,
    )


def _source(config: TrainingConfig, split: str) -> SceneSource:
    size = (config.resolution, config.resolution)
    form = config.data_format
    if form == "auto":
        form = _detect(Path(config.train_data_dir)) if config.train_data_dir else "scenes"
    if form == "rgbd":
        if not config.train_data_dir:
            raise DataError("data_format=rgbd needs train_data_dir=, the folder of the sequence")
        return RGBDSequence(config.train_data_dir, size=size, split=split)
    if form == "meshes" and not config.train_data_dir:
        raise DataError("data_format=meshes needs train_data_dir=, a folder of .glb, .obj or .ply files")
    return EmbeddedScenes(
        split=split,
        num_scenes=config.num_scenes if split == "train" else config.num_validation_scenes,
        views_per_scene=config.views_per_scene,
        size=size,
        seed=config.data_seed,
        mesh_dir=config.train_data_dir if form == "meshes" else None,
    )


def _detect(folder: Path) -> str:
    if not folder.is_dir():
        raise DataError(f"train_data_dir={folder}: no such folder")
    if any(path.suffix.lower() in MESH_ENDINGS for path in folder.iterdir()):
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


def training_loader(
    dataset: MultiViewDataset, sampler: StepSampler, config: TrainingConfig
) -> DataLoader[MultiViewSample]:
    """Load the batches of `sampler` in order."""
    workers = config.dataloader_num_workers
    return DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
    )
