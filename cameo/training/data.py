"""The data sets of a run, the order in which its processes draw samples, and the noise that is added to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from cameo.choices import POSED_FORMATS
from cameo.correspondence import DEPTH_TOLERANCE
from cameo.correspondence.settings import MatcherSettings
from cameo.data import EmbeddedScenes, MultiViewDataset, RoomRig, SceneSource, collate, open_views, rig_views
from cameo.data.batches import MatchedDataset
from cameo.data.estimated_depth import EstimatedDepth
from cameo.data.matches import MatchReader, TokenGrids
from cameo.data.prefetch import on_device
from cameo.data.readers.source import PosedScenes
from cameo.data.settings import data_format, room_rig
from cameo.data.shards import RECIPE, check_settings
from cameo.errors import DataError
from cameo.latents.encode import encode_missing, latent_settings
from cameo.latents.samples import LatentDataset
from cameo.latents.store import LatentReader
from cameo.model import CameoModel
from cameo.pipeline import LatentEncoder, MultiViewPipeline, TrainingInputs
from cameo.processes.stopping import leave_signals_to_parent
from cameo.renamed import old_functions
from cameo.scenes.cache import default_cache_dir, fingerprint
from cameo.scenes.views import MultiViewSample, images_to_bytes
from cameo.training.settings import TrainingConfig

__all__ = [
    "StepSampler",
    "build_dataset",
    "data_format",
    "match_settings",
    "noisy_inputs",
    "step_generator",
    "supervised_grids",
    "training_batches",
    "with_latents",
    "with_matches",
]

if not TYPE_CHECKING:  # a type checker is to see the new names alone
    __getattr__ = old_functions(__name__)

ENDLESS = 2**40
CPU = torch.device("cpu")
# Kinds of correspondence that are computed from depth.
FROM_DEPTH = ("depth", "point_map")


def build_dataset(config: TrainingConfig, split: str) -> MultiViewDataset:
    """Build the training or validation set of a run; both are pure functions of their seed and an index.

    Raises:
        DataError: if `train_data_dir` is missing or cannot be read.
        ValueError: if `camera_rig` does not have `num_views` views.
    """
    kind = data_format(config)
    rig = room_rig(config) or (config.camera_rig if kind in ("objects", "meshes") else None)
    if isinstance(rig, str):
        try:
            rig_views(rig, config.num_views)
        except ValueError as error:
            raise ValueError(f"camera_rig={rig} with num_views={config.num_views}: {error}") from error
    elif config.camera_rig and rig is None:
        warnings.warn(
            f"camera_rig={config.camera_rig} does not apply to {config.train_data_dir}: the cameras are those of the "
            "data. A backbone with fixed poses learns from the poses of the data",
            stacklevel=2,
        )
    dataset = MultiViewDataset(
        _source(config, split, kind, rig),
        num_views=config.num_views,
        num_reference_views=config.num_reference_views,
        selection="in_order" if rig else "overlap",
        min_overlap=config.min_overlap,
        max_overlap=config.max_overlap,
        # Validation samples must not depend on the seed of the run, or runs could not be compared.
        seed=config.seed if split == "train" else config.data_seed,
        length=ENDLESS,
    )
    if kind in POSED_FORMATS and len(dataset.source) == 1:
        dataset.overlap(0)  # measured once, before processes that load data would each do it
    return dataset


def _source(config: TrainingConfig, split: str, kind: str, rig: str | RoomRig | None) -> SceneSource:
    size = (config.resolution, config.resolution)
    if kind in POSED_FORMATS:
        if not config.train_data_dir:
            raise DataError(f"data_format={kind} needs train_data_dir=, the folder of the scenes")
        opened = open_views(
            config.train_data_dir,
            size,
            data_format=config.data_format,
            split=split,
            intrinsics=config.intrinsics,
            depth_scale=config.depth_scale,
            background=config.image_background,
            cache_bytes=config.view_cache_mb << 20,
        )
        if config.estimated_depth is not None:
            if not isinstance(opened, PosedScenes):
                raise DataError(
                    f"estimated_depth={config.estimated_depth}: is for photographs, not for {opened.format}"
                )
            return EstimatedDepth(opened, config.estimated_depth)
        if config.uses_matches and config.correspondence in FROM_DEPTH and not opened.cameras(0).has_depth:
            raise DataError(
                f"train_data_dir={config.train_data_dir}: {opened.format} data without depth, which "
                f"correspondence={config.correspondence} needs; give correspondence=matcher or features, or tracks for "
                "a COLMAP model, estimated_depth=, or loss_weight=0 to train without CAMEO"
            )
        return opened
    if kind == "meshes" and not config.train_data_dir:
        raise DataError("data_format=meshes needs train_data_dir=, a folder of .glb, .obj or .ply files")
    return EmbeddedScenes(
        content={"objects": "objects", "bare_rooms": "bare_rooms"}.get(kind, "rooms"),
        rig=rig,
        split=split,
        num_scenes=config.num_scenes if split == "train" else config.num_validation_scenes,
        views_per_scene=config.num_views if rig else config.views_per_scene,
        size=size,
        seed=config.data_seed,
        mesh_dir=config.train_data_dir if kind == "meshes" else None,
    )


def match_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings that decide the matches of a run's training views, as a folder of them notes them.

    The token grids are not among them, since a folder may hold matches for several grids. Nor are the paths of the
    files, which may have moved: the data are compared view by view when the matches are read.
    """
    kind = data_format(config)
    embedded, in_room = kind not in POSED_FORMATS, room_rig(config)
    rigged = in_room is not None or (kind in ("objects", "meshes") and config.camera_rig is not None)
    from_depth = config.correspondence == "depth"
    from_matcher = config.correspondence == "matcher"
    return {
        "correspondence": config.correspondence,
        **{entry.name: getattr(config, entry.name) if from_matcher else None for entry in fields(MatcherSettings)},
        "cycle_threshold": None if from_depth else config.cycle_threshold,
        "depth_tolerance": DEPTH_TOLERANCE if from_depth else None,
        "distances": config.reduction == "released",
        "resolution": config.resolution,
        "data_format": kind,
        "data_seed": config.data_seed if embedded else None,
        "camera_rig": asdict(in_room) if in_room else config.camera_rig if rigged else None,
        "views_per_scene": (config.num_views if rigged else config.views_per_scene) if embedded else None,
        "intrinsics": None if embedded else config.intrinsics,
        "depth_scale": None if embedded else config.depth_scale,
    }


def supervised_grids(model: CameoModel, config: TrainingConfig) -> list[TokenGrids]:
    """Return the token grids of a run's views in its supervised layers; layers with the same grids share an entry."""
    grids = [
        layer.token_grids(config.resolution, config.resolution, config.num_views) for layer in model.supervised_layers
    ]
    return list(dict.fromkeys(grids))


def with_matches(
    dataset: MultiViewDataset, model: CameoModel, config: TrainingConfig, *, num_processes: int = 1
) -> MultiViewDataset | MatchedDataset:
    """Let the data loader of one of `num_processes` return the matches, if the settings of the run say so.

    Raises:
        DataError: if `precomputed_correspondence` is no folder of matches, or was made with other settings.
    """
    in_step = config.correspondence_in == "step" and config.correspondence != "tracks"
    if not config.uses_matches or (in_step and config.precomputed_correspondence is None):
        return dataset
    token_grids, reader, until = supervised_grids(model, config), None, None
    if config.alignment_until is not None:
        samples_per_step = config.gradient_accumulation_steps * config.train_batch_size * num_processes
        until = config.alignment_until * samples_per_step
    if config.precomputed_correspondence is not None:
        reader = _open_matches(config, token_grids)
    return MatchedDataset(
        dataset,
        token_grids,
        kind=config.correspondence,
        cycle_threshold=config.cycle_threshold,
        distances=config.reduction == "released",
        precomputed=reader,
        until=until,
    )


def _open_matches(config: TrainingConfig, token_grids: list[TokenGrids]) -> MatchReader:
    folder = str(config.precomputed_correspondence)
    reader, expected = MatchReader(folder), match_settings(config)
    if not expected["distances"]:  # a run that needs no distances does not read them
        expected["distances"] = reader.settings.get("distances")
    check_settings(folder, reader.settings, expected)
    needed = {
        (grids[i], grids[j]) for grids in token_grids for i in range(len(grids)) for j in range(len(grids)) if i != j
    }
    if missing := sorted(needed - set(reader.grids)):
        raise DataError(
            f"precomputed_correspondence={folder}: expected matches between the token grids of the supervised layers, "
            f"{missing}, got {reader.grids}. Restore layer= (and num_views=), or run {RECIPE} with the new one; the "
            "folder may stay the same"
        )
    return reader


def with_latents(
    samples: MultiViewDataset | MatchedDataset,
    dataset: MultiViewDataset,
    pipeline: MultiViewPipeline,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> Dataset[MultiViewSample]:
    """Let the data loader return latents, if the settings of the run say so; encodes those that are missing first.

    Args:
        samples: what the loader returns so far.
        dataset: the training set, all of whose views are encoded.
        pipeline: on the device of this process.
        config: settings of the run.
        accelerator: of this process, which encodes its share and waits for the others.

    Raises:
        DataError: if the folder cannot be written or has a damaged shard.
        ValueError: if the pipeline has no VAE, or encodes views together that are drawn anew for each sample.
    """
    if not config.cache_latents:
        return samples
    if not isinstance(pipeline, LatentEncoder) or pipeline.vae is None:
        reason = "works on pixels, without a VAE" if isinstance(pipeline, LatentEncoder) else "does not offer it"
        raise ValueError(
            f"cache_latents=true: keeps what the VAE makes of the views, and this pipeline of backbone "
            f"{config.backbone} {reason}; give cache_latents=false"
        )
    settings = latent_settings(pipeline, resolution=config.resolution, stored=config.latent_precision)
    root = Path(config.latents_dir) if config.latents_dir else default_cache_dir() / "latents"
    folder = root / fingerprint(settings)
    encoded = encode_missing(
        pipeline,
        dataset,
        folder,
        settings,
        batch_size=config.train_batch_size,
        stored=config.latent_precision,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
        progress=accelerator.is_main_process,
    )
    accelerator.wait_for_everyone()
    reader = LatentReader(folder)
    accelerator.print(f"latents of {len(reader):,} views in {folder}, {encoded:,} of them encoded now by this process")
    return LatentDataset(samples, reader, pipeline.encoded_together)


class StepSampler(Sampler[list[int]]):
    """Batches of sample numbers for one process, from a given step on.

    Every micro step takes the next `batch_size * num_processes` numbers, so the order is the same whether or not the
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
    dataset: Dataset[MultiViewSample],
    sampler: StepSampler,
    config: TrainingConfig,
    device: torch.device = CPU,
) -> Iterator[Iterator[tuple[int, dict[str, Any]]]]:
    """Load the batches of `sampler` in order, each on the device and with the number of its micro step.

    Images are kept in 8 bits until they are on the device. The workers live as long as the run, since the loader
    is iterated over once; they end on leaving. Warns if matches that were expected in a folder had to be computed: the
    first time, and on leaving.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.dataloader_num_workers,
        collate_fn=_collate_bytes,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=device.type == "cuda",
        # A loader draws a seed when it starts. From the default generator of torch, that would change the random
        # numbers of a resumed run.
        generator=torch.Generator().manual_seed(config.seed),
    )
    batches, missing = iter(loader), _MissingMatches(config)
    try:
        yield zip(sampler.steps, on_device(missing.watch(batches), device), strict=True)
    finally:
        missing.report()
        if config.dataloader_num_workers:
            # The garbage collector may be late: the traceback of an error keeps the iterator alive.
            batches._shutdown_workers()  # type: ignore[attr-defined]


def _collate_bytes(samples: list[MultiViewSample]) -> dict[str, Any]:
    """Stack samples, with images in a quarter of the memory where they have 8 bits."""
    batch = collate(samples)
    batch["images"] = images_to_bytes(batch["images"])  # type: ignore[arg-type]
    return batch


class _MissingMatches:
    """Counts the samples whose matches were not in the folder."""

    def __init__(self, config: TrainingConfig) -> None:
        self.folder, self.samples, self.missing, self.reported = config.precomputed_correspondence, 0, 0, 0

    def watch(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            flags = batch.pop("not_precomputed", [])
            self.samples, self.missing = self.samples + len(flags), self.missing + sum(flags)
            if self.missing and not self.reported:
                self.report()
            yield batch

    def report(self) -> None:
        if self.missing > self.reported:
            self.reported = self.missing
            warnings.warn(
                f"precomputed_correspondence={self.folder}: {self.missing} of {self.samples} samples have pairs of "
                f"views that are not in the folder; their matches are computed while loading. {RECIPE} with the "
                "settings of this run adds them",
                stacklevel=3,
            )


def step_generator(config: TrainingConfig, micro_step: int, process: int, *purpose: int) -> torch.Generator:
    """Random numbers that are a function of seed, step and process alone; each `purpose` > 0 has its own."""
    state = np.random.SeedSequence((config.seed, micro_step, process, *purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def noisy_inputs(
    pipeline: MultiViewPipeline, batch: Mapping[str, Any], config: TrainingConfig, micro_step: int, process: int = 0
) -> TrainingInputs:
    """Add noise to a batch; timesteps and noise are functions of seed, step and process alone."""
    generator = step_generator(config, micro_step, process)
    uniform = torch.rand(batch["images"].shape[0], generator=generator)
    noise_levels = uniform if config.timestep_sampling == "uniform" else 1 - uniform.square()
    timesteps = (noise_levels * pipeline.num_train_timesteps).long().clamp(max=pipeline.num_train_timesteps - 1)
    return pipeline.training_inputs(
        batch, generator=generator, timesteps=timesteps, condition_dropout=config.condition_dropout
    )
