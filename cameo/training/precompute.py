"""Matches of a run's training set, computed before the training and written to a folder.

The work is divided into groups of a few views of a scene that are matched together. The groups, and the process that
computes each, follow from the settings, so processes need not communicate; pairs of views that the folder already holds
are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations, permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from cameo.data import MultiViewDataset
from cameo.data.batches import match_batch, to_device
from cameo.data.matches import GridPair, MatchReader, MatchWriter, TokenGrids, view_checksum
from cameo.data.shards import FORMAT_VERSION, check_settings, finish_share, is_finished, shard_files
from cameo.errors import unknown_name
from cameo.processes.launch import Launch
from cameo.scenes.views import images_to_float
from cameo.training.data import build_dataset, match_settings, supervised_grids
from cameo.training.settings import TrainingConfig, continued_settings

if TYPE_CHECKING:
    from cameo.correspondence import Tracks
    from cameo.correspondence.matcher import KeypointMatcher

__all__ = ["PAIRS", "Share", "Summary", "precompute"]

PAIRS = ("auto", "drawn", "all")
# If the first scene has at most this many views, "auto" takes all pairs.
FEW_VIEWS = 16
# Views of a long scene are matched in blocks of this size, two blocks with each other at a time.
BLOCK = 8


@dataclass(frozen=True)
class Share:
    """The share of the work that a process does; processes may run at the same time, on several machines, or in turn.

    Example:
        >>> [Share(process, 2).owns(number) for process in (0, 1) for number in (4, 5)]
        [True, False, False, True]
    """

    process: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.num_processes:
            raise ValueError(f"process: expected 0 to {self.num_processes - 1}, got {self.process}")

    @classmethod
    def from_environment(cls) -> Share:
        """Read what `accelerate launch`, `torchrun` or MPI have set; without any of them there is one process."""
        launch = Launch.from_environment()
        return cls(launch.process, launch.num_processes)

    def owns(self, number: int) -> bool:
        """Return whether a scene or a group of views is in the share of this process."""
        return number % self.num_processes == self.process


@dataclass(frozen=True)
class Summary:
    """The work that a process has done.

    Attributes:
        num_pairs, num_bytes: numbers of pairs of views and of bytes that it wrote.
        num_kept: pairs of its share that the folder already held; None if the folder was finished and was not read.
        seconds: time that it took.
        waiting: numbers of the processes that have not finished yet; if there are none, the folder is complete.
    """

    num_pairs: int = 0
    num_bytes: int = 0
    num_kept: int | None = None
    seconds: float = 0.0
    waiting: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _ViewGroup:
    """Views of a scene with their token grids, and the ordered pairs of them to match, by position.

    `progress` is its share of the progress of its scene.
    """

    scene: int
    views: list[tuple[int, tuple[int, int]]]
    pairs: list[tuple[int, int]]
    progress: float

    def keys(self, pair: tuple[int, int]) -> tuple[int, int, GridPair]:
        """Return the numbers of the two views and their grids."""
        (first, first_grid), (second, second_grid) = self.views[pair[0]], self.views[pair[1]]
        return first, second, (first_grid, second_grid)


def precompute(
    config: TrainingConfig,
    *,
    pairs: str = "auto",
    training_processes: int = 1,
    shard_bytes: int = 128 << 20,
    share: Share | None = None,
    progress: bool = True,
) -> Summary:
    """Write the matches that a training with these settings reads into `config.precomputed_correspondence`.

    Args:
        config: settings of the training.
        pairs: "drawn": the pairs of views that the samples of the run have; "all": all pairs of every scene, which
            serve runs of any length and seed; "auto": all if the first scene has at most 16 views, else drawn.
        training_processes: how many processes will train; which samples a run draws depends on it.
        shard_bytes: size that a shard does not exceed.
        share: part of this process; None takes it from the environment.
        progress: whether the first process shows a bar.

    Raises:
        DataError: if the folder was made with other settings or from other data, is damaged or cannot be written.
        ValueError: for settings under which training reads no matches, or options out of range.
    """
    start, share = time.monotonic(), share or Share.from_environment()
    folder = config.precomputed_correspondence
    if folder is None:
        raise ValueError("precomputed_correspondence: expected the folder to write to, got none")
    if not config.loss_weight:
        raise ValueError(
            "loss_weight=0 trains without CAMEO, which reads no matches; give the loss_weight of the training"
        )
    if pairs not in PAIRS:
        raise unknown_name("pairs", pairs, PAIRS)
    if training_processes < 1:
        raise ValueError(f"training_processes: expected at least 1, got {training_processes}")
    plan = _fingerprint(config, pairs, training_processes)
    if is_finished(folder, plan):
        return Summary(seconds=time.monotonic() - start)
    from cameo.training.setup import load_pipeline, wrap_denoiser  # slow to import
    from cameo.training.supervision import make_matcher

    settings, written = match_settings(config), None
    if shard_files(folder):
        written = MatchReader(folder, complete=False)
        check_settings(folder, written.settings, settings)
    dataset = build_dataset(config, "train")
    token_grids = supervised_grids(wrap_denoiser(load_pipeline(config), config, dataset), config)
    samples = config.max_train_steps * config.gradient_accumulation_steps * config.train_batch_size
    planner = _Planner(dataset, token_grids, share, pairs, samples * training_processes)
    bar = tqdm(
        total=len(planner.scenes),
        desc="matches",
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
        disable=not progress or share.process > 0,
    )
    matcher = make_matcher(config).to(_device()) if config.correspondence == "matcher" else None
    kept = 0
    with bar, MatchWriter(folder, settings, process=share.process, shard_bytes=shard_bytes) as writer:
        for group in planner.groups():
            kept += _write(group, dataset, config, matcher, written, writer)
            bar.update(group.progress)
            bar.set_postfix_str(f"{writer.num_pairs:,} pairs", refresh=False)
    waiting = finish_share(folder, settings, plan, process=share.process, num_processes=share.num_processes)
    return Summary(writer.num_pairs, writer.num_bytes, kept, time.monotonic() - start, waiting)


def _fingerprint(config: TrainingConfig, pairs: str, training_processes: int) -> str:
    """Hexadecimal digits of everything that must be equal for a finished folder to be kept without reading the data."""
    data = config.train_data_dir and str(Path(config.train_data_dir).resolve())
    facts = continued_settings(config) | {"train_data_dir": data, "max_train_steps": config.max_train_steps}
    facts |= {"version": FORMAT_VERSION, "pairs": pairs, "training_processes": training_processes}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


class _Planner:
    """Lists the groups of views of a process, scene by scene, so that the views of a scene are loaded once.

    With fewer scenes than processes, as for one long sequence, each process lists all groups and keeps every n-th.
    """

    def __init__(
        self, dataset: MultiViewDataset, token_grids: list[TokenGrids], share: Share, pairs: str, num_samples: int
    ) -> None:
        self.dataset, self.token_grids, self.share = dataset, token_grids, share
        count = len(dataset.source)
        take_all = pairs == "all" or (pairs == "auto" and len(dataset.scenes.cameras(0)) <= FEW_VIEWS)
        self.by_scene = count >= share.num_processes
        self.scenes = [scene for scene in range(count) if not self.by_scene or share.owns(scene)]
        self.all_pairs = take_all and dataset.selection == "overlap"
        # A sample in order is a whole scene, so one pass over the scenes draws every pair.
        self.num_samples = count if take_all else num_samples
        epochs = range(0 if self.all_pairs else -(-self.num_samples // count))
        # The position of each scene in each pass.
        self.positions = [np.argsort(dataset.scene_order(epoch)).astype(np.int32) for epoch in epochs]

    def groups(self) -> Iterator[_ViewGroup]:
        """Yield the groups of this process, with each pair of views of a scene once."""
        number = 0
        for scene in self.scenes:
            planned: set[tuple[int, tuple[int, int, GridPair]]] = set()
            for group in self._all_views(scene) if self.all_pairs else self._drawn_views(scene):
                keys = {pair: (group.scene, group.keys(pair)) for pair in group.pairs}
                new_pairs = [pair for pair in group.pairs if keys[pair] not in planned]
                planned.update(keys.values())
                is_owned = self.by_scene or self.share.owns(number)
                number += bool(new_pairs)
                yield _ViewGroup(group.scene, group.views, new_pairs if is_owned else [], group.progress)

    def _all_views(self, scene: int) -> Iterator[_ViewGroup]:
        """All views of a scene, at each of the grids that a view may have in a sample."""
        views = list(range(len(self.dataset.scenes.cameras(scene))))
        blocks = [views[start : start + BLOCK] for start in range(0, len(views), BLOCK)]
        pairs_of_blocks = [first + second for first, second in combinations(blocks, 2)] or blocks
        for token_grids in self.token_grids:
            wanted = {(token_grids[i], token_grids[j]) for i, j in permutations(range(len(token_grids)), 2)}
            for chosen in pairs_of_blocks:
                placed = [(view, size) for view in chosen for size in dict.fromkeys(token_grids)]
                pairs = [
                    (i, j)
                    for i, j in permutations(range(len(placed)), 2)
                    if placed[i][0] != placed[j][0] and (placed[i][1], placed[j][1]) in wanted
                ]
                yield _ViewGroup(scene, placed, pairs, 1 / len(pairs_of_blocks) / len(self.token_grids))

    def _drawn_views(self, scene: int) -> Iterator[_ViewGroup]:
        """The views of each sample drawn from a scene, or from the next scene if this one has no admissible set."""
        count = len(self.dataset.source)
        numbers = [epoch * count + int(positions[scene]) for epoch, positions in enumerate(self.positions)]
        numbers = [index for index in numbers if index < self.num_samples]
        for index in numbers:
            drawn_scene, chosen = scene, self.dataset.views_of(index, scene)
            if chosen is None:
                drawn_scene, chosen = self.dataset.choose(index)
            for token_grids in self.token_grids:
                placed = list(zip(chosen, token_grids, strict=True))
                pairs = list(permutations(range(len(placed)), 2))
                yield _ViewGroup(drawn_scene, placed, pairs, 1 / len(numbers) / len(self.token_grids))


def _write(
    group: _ViewGroup,
    dataset: MultiViewDataset,
    config: TrainingConfig,
    matcher: KeypointMatcher | None,
    written: MatchReader | None,
    writer: MatchWriter,
) -> int:
    """Match the views of a group and write the pairs that the folder lacks; return the number of the others."""
    pairs = group.pairs
    if written is not None:
        pairs = [pair for pair in pairs if not written.contains(group.scene, *group.keys(pair))]
    if not pairs:
        return len(group.pairs)
    numbers = [view for view, _ in group.views]
    scene = dataset.scenes.select(group.scene, numbers)
    sample: dict[str, Any] = {**dataset.geometry(scene), "images": images_to_float(scene.images)}
    if scene.tracks is not None:
        sample["tracks"] = scene.tracks
    if written is not None:
        written.check_views(group.scene, numbers, sample, sample=scene.key)
    for position, view in enumerate(numbers):
        writer.add_view(group.scene, view, view_checksum(sample, position, config.correspondence))
    batch = {name: value[None] if isinstance(value, Tensor) else [value] for name, value in sample.items()}
    batch = {"key": [scene.key], **to_device(batch, _device())}
    if matcher is not None:
        batch["pixel_matches"] = _pixel_matches(matcher, batch, numbers, pairs)
    match = match_batch(
        batch,
        [size for _, size in group.views],
        kind=config.correspondence,
        cycle_threshold=config.cycle_threshold,
    )
    index = match.index[0].cpu().numpy()
    distance = None
    if config.reduction == "released":
        assert match.distance is not None
        distance = match.distance[0].cpu().numpy()
    weight = None if match.match_weight is None else match.match_weight[0].cpu().numpy()
    for i, j in pairs:
        first, second, grids = group.keys((i, j))
        tokens = grids[0][0] * grids[0][1]
        distances = None if distance is None else distance[i, j, :tokens]
        weights = None if weight is None else weight[i, j, :tokens]
        writer.add(group.scene, first, second, grids, index[i, j, :tokens], distances, weights)
    return len(group.pairs) - len(pairs)


def _pixel_matches(
    matcher: KeypointMatcher, batch: dict[str, Any], numbers: list[int], pairs: list[tuple[int, int]]
) -> list[Tracks]:
    """Match the images of the wanted pairs; a view that stands in the group at several grids is matched once."""
    once = list(dict.fromkeys(numbers))
    images, intrinsics, extrinsics = (
        batch[name][:, [numbers.index(view) for view in once]] for name in ("images", "intrinsics", "extrinsics")
    )
    wanted = {tuple(sorted((once.index(numbers[i]), once.index(numbers[j])))) for i, j in pairs}
    (tracks,) = matcher(images, intrinsics, extrinsics, pairs=sorted(wanted))
    return [tracks.of_views([once.index(view) for view in numbers])]


def _device() -> torch.device:
    """The GPU of this process if there is one, so that the matches equal those that the training would compute."""
    if not torch.cuda.is_available() or Launch.from_environment().asks_for_cpu:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
