"""How right are matches without depth? Tracks of COLMAP and pixels paired by a matcher, against matches from depth.

    python -m benchmarks.correspondence.without_depth path/to/sequence --colmap path/to/model

The sequence is an RGB-D one, whose depth gives the truth. The model is what COLMAP triangulates from its color images
with its poses, without its depth; on a machine without a GPU, with every third frame in the folder `images` and a model
of the known poses in `known`:

    colmap feature_extractor --database_path db --image_path images --SiftExtraction.use_gpu 0
    colmap exhaustive_matcher --database_path db --SiftMatching.use_gpu 0
    colmap point_triangulator --database_path db --image_path images --input_path known --output_path model

Prints the tables with their command, device and date, and writes them to `without_depth.md` and to the results files.
Needs pycolmap and the extra `matching`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.page import RESULTS
from benchmarks.correspondence.feature_matches import Score, share
from cameo import Correspondence, Tracks
from cameo.correspondence.features import FeatureExtractor
from cameo.correspondence.matcher import KeypointMatcher
from cameo.correspondence.xfeat import XFEAT
from cameo.data import MultiViewDataset, RGBDSequence, collate
from cameo.files import write_atomically
from cameo.tables import markdown_table

# Of the views of a sample: from almost the same to so little that the angles become wide.
OVERLAP = (0.05, 0.99)
# Least and largest weight of a match.
BINS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01))
HEADER = (
    "matches", "matched", "exact", "within 1", "not visible", "precision", "recall", "mean weight", "s per sample",
)  # fmt: skip
LEGEND = (
    "All ordered pairs of views; the truth is given by the matches from depth. *Matched*: share of all tokens that get "
    "a match. *Exact*, *within 1*: of the matched tokens that the other view truly shows, those on the true token or "
    "that near (larger of rows and columns). *Not visible*: share of the matches whose point the other view does not "
    "show, or of which the depth camera has no measurement. *Precision*: share of all matches that are within 1 token "
    "of the truth. *Recall*: share of the truly visible tokens that are matched to within 1 token. *Weight*: "
    "`match_weight`. Time: of the processor, for all pairs of views of a sample."
)

Method = Callable[[dict[str, Any]], Correspondence]


@dataclass
class Found:
    """What a method has found in all samples."""

    score: Score = field(default_factory=Score)
    by_weight: list[Score] = field(default_factory=lambda: [Score() for _ in BINS])
    weights: float = 0.0
    seconds: float = 0.0

    def add(self, match: Correspondence, truth: Correspondence) -> None:
        """Count a sample."""
        self.score.add(match, truth)
        weight = match.match_weight if match.match_weight is not None else match.matched.float()
        self.weights += float(weight[match.matched].sum())
        for (low, high), part in zip(BINS, self.by_weight, strict=True):
            inside = match.matched & (weight >= low) & (weight < high)
            part.add(Correspondence(match.index.masked_fill(~inside, -1), match.token_grids), truth)

    def row(self, name: str, samples: int) -> list[str]:
        """Return the cells of a row of the table."""
        score = self.score
        cells = [name, share(score.matched, score.tokens), *(share(hit, score.judged) for hit in score.hits[:2])]
        cells += [share(score.matched - score.judged, score.matched), score.precision, score.recall]
        return [*cells, f"{self.weights / max(1, score.matched):.2f}", f"{self.seconds / samples:.2f}"]


def tracks_of(model: Path, sequence: RGBDSequence) -> Tracks:
    """Read the tracks of a COLMAP model, in pixels of the images of the sequence."""
    import pycolmap

    frames = {name: number for number, name in enumerate(sequence.frame_names)}
    views, points, places = [], [], []
    for image in pycolmap.Reconstruction(str(model)).images.values():
        view = frames[image.name.removesuffix(".color.jpg")]
        seen = [point for point in image.points2D if point.has_point3D()]
        if not seen:
            continue
        # The crop and the new size of an image are in its camera.
        k, wanted = torch.tensor(image.camera.calibration_matrix()), sequence.views(0).intrinsics[view].double()
        rays = (torch.tensor([list(point.xy) for point in seen]) - k[:2, 2]) / k.diagonal()[:2]
        places.append(rays * wanted.diagonal()[:2] + wanted[:2, 2])
        points.append(torch.tensor([point.point3D_id for point in seen]))
        views.append(torch.full((len(seen),), view))
    return Tracks(torch.cat(points), torch.cat(views), torch.cat(places).float(), len(frames))


def methods(options: argparse.Namespace, tracks: Tracks | None) -> dict[str, Method]:
    """Return what is compared, by name."""
    size, grid = (options.resolution,) * 2, options.grid

    def by_matcher(matcher: KeypointMatcher) -> Method:
        def match(batch: dict[str, Any]) -> Correspondence:
            found = matcher(batch["images"], batch["intrinsics"], batch["extrinsics"])
            return Correspondence.from_tracks(found, image_size=size, token_grid=grid)

        return match

    def by_features(images: Tensor) -> Correspondence:
        return Correspondence.from_features(features(images), token_grid=grid)

    features = FeatureExtractor(XFEAT)
    compared: dict[str, Method] = {"features of XFeat": lambda batch: by_features(batch["images"])}
    for error in (None, 2.0, 4.0, 8.0):
        cameras = "without cameras" if error is None else f"to {error:g} px of the epipolar line"
        compared[f"pixels paired by XFeat, {cameras}"] = by_matcher(KeypointMatcher(max_epipolar_error=error))
    compared["the same to 4 px, images of 512 px"] = by_matcher(KeypointMatcher(size=512))
    if tracks is not None:

        def by_tracks(batch: dict[str, Any]) -> Correspondence:
            seen = [tracks.of_views(views) for views in batch["scene_views"]]
            return Correspondence.from_tracks(seen, image_size=size, token_grid=grid)

        compared["tracks of COLMAP"] = by_tracks
    return compared


def measure(options: argparse.Namespace) -> tuple[dict[str, Found], Found]:
    """Return what each method has found, and what the truth holds itself."""
    size = (options.resolution,) * 2
    sequence = RGBDSequence(options.sequence, size=size, stride=options.stride)
    dataset = MultiViewDataset(sequence, options.views, min_overlap=OVERLAP[0], max_overlap=OVERLAP[1])
    tracks = None if options.colmap is None else tracks_of(options.colmap, sequence)
    found = {name: (Found(), method) for name, method in methods(options, tracks).items()}
    exact = Found()
    for number in range(options.samples):
        batch: dict[str, Any] = collate([dataset[number]])
        began = time.process_time()
        cameras = batch["intrinsics"], batch["extrinsics"]
        truth = Correspondence.from_depth(batch["depth"], *cameras, token_grid=options.grid)
        exact.seconds += time.process_time() - began
        exact.add(truth, truth)
        for counted, method in found.values():
            began = time.process_time()
            match = method(batch)
            counted.seconds += time.process_time() - began
            counted.add(match, truth)
    return {name: counted for name, (counted, _) in found.items()}, exact


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sequence", help="folder of an RGB-D sequence")
    parser.add_argument("--colmap", type=Path, help="folder of a COLMAP model of its color images")
    parser.add_argument("--stride", type=int, default=3, help="every how-manieth frame is taken")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--grid", type=int, default=16, help="tokens along a side")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    parser.add_argument("--results", type=Path, default=RESULTS / "matches_without_depth_cpu.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Print the page, and write it and the results file."""
    options, began = parse(arguments), time.perf_counter()
    found, exact = measure(options)
    hidden = {options.sequence: "SEQUENCE", str(options.colmap): "MODEL"}
    command = "python -m benchmarks.correspondence.without_depth"
    command = " ".join([command, *(hidden.get(argument, argument) for argument in arguments)])
    device = f"{platform.machine()} CPU with {torch.get_num_threads()} thread(s)"
    rows = [exact.row("depth, the truth", options.samples)]
    rows += [counted.row(name, options.samples) for name, counted in found.items()]
    weighted = [
        [name, *(f"{share(part.hits[0], part.judged)} of {part.judged}" for part in counted.by_weight)]
        for name, counted in found.items()
        if counted.weights < counted.score.matched
    ]
    titles = [f"{low:g} to {min(high, 1):g}" for low, high in BINS]
    text = "\n\n".join(
        [
            "# Matches without depth, against matches from depth",
            f"`{command}`, {date.today()}, {device}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s.",
            f"{options.samples} samples of {options.views} views of an RGB-D sequence of a room, every frame number "
            f"{options.stride}, images of {options.resolution} px, {options.grid} x {options.grid} tokens, overlap "
            f"{OVERLAP[0]} to {OVERLAP[1]}. {LEGEND}",
            markdown_table(HEADER, rows),
            "Share of exact matches by their weight, of those that the other view truly shows:",
            markdown_table(["matches", *titles], weighted),
        ]
    )
    print(text)
    write_atomically(options.out, text + "\n")
    environment = {"command": command, "device": device, "date": str(date.today()), "torch": torch.__version__}
    table = {name: dict(zip(HEADER[1:], cells, strict=True)) for name, *cells in rows}
    exactness = {name: dict(zip(titles, cells, strict=True)) for name, *cells in weighted}
    results = {"environment": environment, "matches": table, "exact by weight": exactness}
    write_atomically(options.results, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
