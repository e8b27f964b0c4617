"""How right are matches that know no geometry? Mutual nearest neighbors of image features against the true matches.

    python -m benchmarks.correspondence.feature_matches                          # on embedded rooms
    python -m benchmarks.correspondence.feature_matches --rgbd path/to/sequence  # and on a real one
    python -m benchmarks.correspondence.feature_matches --models vit_small_patch14_dinov2.lvd142m --checkpoint FILE

Features are those of `cameo.correspondence.features.FeatureExtractor`; beside them stand the colors of the pixels of
each token, which cost nothing, and the same networks with random weights. The truth is given by the matches from depth.
Prints the tables with their command, device and date, and writes them to --out. Needs the extra `matching`.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.correspondence import Correspondence
from cameo.correspondence.features import FeatureExtractor
from cameo.correspondence.xfeat import XFEAT
from cameo.data import collate
from cameo.data.batches import to_device
from cameo.errors import WeightsUnavailable
from cameo.files import write_atomically
from cameo.probing.truth import ANGLE_BINS, angle_bins
from cameo.tables import markdown_table
from cameo.training.data import build_dataset
from cameo.training.settings import TrainingConfig

Features = Callable[[Tensor], Tensor]
HEADER = (
    "features", "cycle threshold", "least cosine", "matched", "exact", "within 1", "within 2", "by chance, within 1",
    "not visible", "precision", "recall",
)  # fmt: skip
WITHIN = (0, 1, 2)
# Cycle threshold and least cosine similarity of a match; the first are those of the method.
TESTS = ((1.5, None), (0.5, None), (1.5, 0.9))
RGBD = "RGB-D room"
# Of the views of a sample: from almost the same to so little that the angles become wide.
OVERLAP = (0.05, 0.99)
# Images whose features are timed together: those of a step of the convergence study.
TIMED = 16
LEGEND = (
    "All ordered pairs of views; the truth is given by the matches from depth. *Matched*: share of all tokens that "
    "get a match. *Exact*, *within 1*, *within 2*: of the matched tokens that the other view truly shows, those on "
    "the true token or that near (larger of rows and columns); *by chance*: by a token drawn at random. *Not "
    "visible*: share of the matches whose point the other view does not show. *Precision*: share of all matches that "
    "are within 1 token of the truth, so that matches of what is not visible are false ones. *Recall*: share of the "
    "truly visible tokens that are matched to within 1 token. *Random weights* are a control, which says nothing of "
    "trained features."
)


@dataclass
class Score:
    """Matches by features, counted against the true ones.

    Attributes:
        pairs: ordered pairs of views.
        tokens: of all pairs.
        visible: of these, the ones with a true match.
        matched: of all, the ones matched by features.
        hits: of the matched ones with a true match, those within 0, 1 and 2 tokens (larger of rows and columns).
        judged: matched ones with a true match.
        chance: what a token drawn uniformly would hit within 1 token, summed over the judged ones.
    """

    pairs: int = 0
    tokens: int = 0
    visible: int = 0
    matched: int = 0
    judged: int = 0
    chance: float = 0.0
    hits: tuple[int, ...] = (0, 0, 0)

    def add(self, found: Correspondence, truth: Correspondence, pairs: Tensor | None = None) -> None:
        """Count a batch, or those pairs of views of it that `pairs`, bool `[B, V, V]`, selects.

        All views have the same square grid.
        """
        ((side, _),) = set(truth.token_grids)
        others = ~torch.eye(truth.num_views, dtype=torch.bool, device=truth.device).expand(truth.index.shape[:3])
        counted = others if pairs is None else others & pairs.to(truth.device)
        matched, visible = found.matched & counted[..., None], truth.matched & counted[..., None]
        both = matched & visible
        there, true = found.index[both], truth.index[both]
        rows, columns = (there // side - true // side).abs(), (there % side - true % side).abs()
        apart = torch.maximum(rows, columns)
        self.pairs += int(counted.sum())
        self.tokens += int(counted.sum()) * side * side
        self.visible += int(visible.sum())
        self.matched += int(matched.sum())
        self.judged += int(both.sum())
        self.hits = tuple(old + int((apart <= k).sum()) for old, k in zip(self.hits, WITHIN, strict=True))
        reach = [3 - (place == 0).int() - (place == side - 1).int() for place in (true // side, true % side)]
        self.chance += float((reach[0] * reach[1]).sum()) / (side * side)

    @property
    def precision(self) -> str:
        """Share of all matches that are within 1 token of the truth."""
        return share(self.hits[1], self.matched)

    @property
    def recall(self) -> str:
        """Share of the truly visible tokens that are matched to within 1 token."""
        return share(self.hits[1], self.visible)

    def row(self, name: str, threshold: float, least: float | None) -> list[str]:
        """Return the cells of one row of the table."""
        cells = [name, f"{threshold:g}", "-" if least is None else f"{least:g}", share(self.matched, self.tokens)]
        cells += [share(hit, self.judged) for hit in self.hits]
        cells += [share(self.chance, self.judged), share(self.matched - self.judged, self.matched)]
        return [*cells, self.precision, self.recall]


def share(part: float, whole: float) -> str:
    """Show a share in percent; a share of nothing is a dash."""
    return f"{part / whole:.1%}" if whole else "-"


@dataclass
class Scores:
    """Scores of one kind of features with one test of its matches, over all pairs of views and by their angle."""

    whole: Score = field(default_factory=Score)
    by_angle: list[Score] = field(default_factory=lambda: [Score() for _ in ANGLE_BINS])


@dataclass
class Data:
    """Samples of one kind of data, with their true matches."""

    batches: list[dict[str, Any]]
    truths: list[Correspondence]
    grid: int

    def score(self, features: Features, tests: Sequence[tuple[float, float | None]] = TESTS) -> list[Scores]:
        """Match the features of every sample, and count the matches of each test."""
        scores = [Scores() for _ in tests]
        for batch, truth in zip(self.batches, self.truths, strict=True):
            seen, bins = features(batch["images"]), angle_bins(batch["extrinsics"])
            for (threshold, least), score in zip(tests, scores, strict=True):
                found = Correspondence.from_features(
                    seen, token_grid=self.grid, cycle_threshold=threshold, min_similarity=least
                )
                score.whole.add(found, truth)
                for number, part in enumerate(score.by_angle):
                    part.add(found, truth, bins == number)
        return scores


def load(options: argparse.Namespace, name: str, resolution: int, grid: int, device: torch.device) -> Data:
    """Build samples of the data `name`."""
    config = TrainingConfig(
        train_data_dir=options.rgbd if name == RGBD else None,
        data_format="rgbd" if name == RGBD else name,
        resolution=resolution,
        num_views=options.views,
        num_validation_scenes=options.samples,
        min_overlap=OVERLAP[0],
        max_overlap=OVERLAP[1],
    )
    # Of a sequence the larger part, whose views differ more in their angle: nothing is trained here.
    samples = build_dataset(config, "train" if name == RGBD else "validation")
    batches = [to_device(collate([samples[index]]), device) for index in range(options.samples)]
    truths = [
        Correspondence.from_depth(batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grid=grid)
        for batch in batches
    ]
    return Data(batches, truths, grid)


def colors(grid: int) -> Features:
    """Pixels of each token at 4 x 4 per token, less the mean color of the image."""

    def features(images: Tensor) -> Tensor:
        small = F.interpolate(images.flatten(0, 1), size=(4 * grid, 4 * grid), mode="bilinear", antialias=True)
        small = small - small.mean(dim=(2, 3), keepdim=True)
        return F.pixel_unshuffle(small, 4).unflatten(0, images.shape[:2])

    return features


def methods(options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Features], list[str]]:
    """Return what is compared, by name, and what cannot be."""
    found: dict[str, Features] = {"colors": colors(options.grids[0])}
    missing = []
    for name in options.models:
        size = options.xfeat_size if name == XFEAT else options.vit_size
        found[f"{name}, random weights"] = random_weights(name, size).to(device)
        try:
            found[name] = FeatureExtractor(name, options.checkpoint, size=size).to(device)
        except WeightsUnavailable:
            missing.append(name)
    return found, missing


def random_weights(name: str, size: int | None) -> FeatureExtractor:
    """Return the control: the same network, untrained."""
    with warnings.catch_warnings(action="ignore"):  # random weights are meant
        return FeatureExtractor(name, pretrained=False, size=size)


def compared(options: argparse.Namespace, sets: dict[str, Data], device: torch.device) -> Iterator[str]:
    """Yield the tables of all features at the first resolution: over all pairs of views, and by their angle."""
    found, missing = methods(options, device)
    for name in missing:
        yield f"Not measured: {name} with trained weights, which could not be fetched."
    for title, data in sets.items():
        rows, angles = [], []
        for name, features in found.items():
            scores = data.score(features)
            rows += [part.whole.row(name, *test) for test, part in zip(TESTS, scores, strict=True)]
            bins = scores[0].by_angle
            angles.append([name, *(f"{part.precision}, {part.recall}" if part.pairs else "-" for part in bins)])
        titles = [
            f"{low:g} to {high:g} degrees, {part.pairs} pairs"
            for (low, high), part in zip(ANGLE_BINS, bins, strict=True)
        ]
        yield f"### {title}"
        yield markdown_table(HEADER, rows)
        yield (
            f"Precision and recall by the angle between the optical axes of the two views, cycle threshold "
            f"{TESTS[0][0]:g}:"
        )
        yield markdown_table(["features", *titles], angles)


def by_size(options: argparse.Namespace, sets: dict[str, Data], model: str, device: torch.device) -> str:
    """Table of one trained network over the size to which it enlarges or reduces the images."""
    rows = []
    images = torch.cat([batch["images"].flatten(0, 1) for data in sets.values() for batch in data.batches])
    images = images.repeat(-(-TIMED // len(images)), 1, 1, 1)[None, :TIMED]
    for size in options.sizes:
        features = FeatureExtractor(model, options.checkpoint, size=size).to(device)
        scores = [data.score(features, TESTS[:1])[0].whole for data in sets.values()]
        cells = [f"{score.precision}, {score.recall}" for score in scores]
        rows.append([str(size), *cells, f"{1000 * seconds(lambda f=features: f(images)):.0f}"])
    return markdown_table(
        ["size in pixels", *(f"{name}: precision, recall" for name in sets), f"ms for {TIMED} images"], rows
    )


def seconds(compute: Callable[[], object]) -> float:
    """Least processor time of a call, of all threads; on a GPU the least time of the clock."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    spent = []
    for _ in range(5):
        began = clock()
        compute()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.append(clock() - began)
    return min(spent)


def sections(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Yield the page, part by part."""
    names = [*options.data, *([RGBD] if options.rgbd else [])]
    sizes = list(zip(options.resolutions, options.grids, strict=True))
    for number, (resolution, grid) in enumerate(sizes):
        sets = {name: load(options, name, resolution, grid, device) for name in names}
        yield f"## Images of {resolution} px, {grid} x {grid} tokens"
        if number == 0:
            yield from compared(options, sets, device)
        try:
            table = by_size(options, sets, options.models[0], device)
        except WeightsUnavailable:
            continue
        yield f"### By `feature_size`, {options.models[0]}"
        yield table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[XFEAT, TrainingConfig.feature_model], help="feature_model")
    parser.add_argument("--checkpoint", type=Path, help="weights of the one that --models names")
    parser.add_argument("--xfeat-size", type=int, help="side of the images that XFeat sees, in pixels")
    parser.add_argument("--vit-size", type=int, help="the same for vision transformers")
    parser.add_argument("--data", nargs="*", default=["bare_rooms", "scenes"], help="embedded data")
    parser.add_argument("--rgbd", help="folder of an RGB-D sequence, beside the embedded data")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[256, 32], help="all features at the first")
    parser.add_argument("--grids", type=int, nargs="+", default=[16, 8], help="tokens along a side, per resolution")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 96, 128, 192, 256, 384], help="feature_size")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args(arguments)
    if len(options.grids) != len(options.resolutions):
        parser.error(f"--grids: expected one for each of {len(options.resolutions)} --resolutions")
    if options.checkpoint is not None and len(options.models) != 1:
        parser.error("--checkpoint: is of one network; give one with --models")
    return options


def main(arguments: Sequence[str]) -> None:
    """Print the page and write it."""
    options, began = parse(arguments), time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = list(sections(options, device))
    hardware = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()} CPU with {torch.get_num_threads()} thread(s)"
    )
    shown = ["SEQUENCE" if argument == options.rgbd else argument for argument in arguments]
    head = [
        "# Matches by image features against true geometry",
        f"`{' '.join(['python -m benchmarks.correspondence.feature_matches', *shown])}`, {date.today()}, {hardware}, "
        f"torch {torch.__version__}, {time.perf_counter() - began:.0f} s.",
        f"{options.samples} samples of {options.views} views of each kind of data, overlap {OVERLAP[0]} to "
        f"{OVERLAP[1]}; *{RGBD}* is an RGB-D sequence, without its last fifth. {LEGEND}",
    ]
    text = "\n\n".join([*head, *parts])
    print(text)
    write_atomically(options.out, text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
