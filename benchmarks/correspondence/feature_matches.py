"""How right are matches that know no geometry? Mutual nearest neighbours of image features against the true matches.

    python -m benchmarks.correspondence.feature_matches                    # DINOv2 from the Hub, on embedded rooms
    python -m benchmarks.correspondence.feature_matches --checkpoint dinov2.safetensors --rgbd path/to/sequence
    python -m benchmarks.correspondence.feature_matches --no-pretrained    # random weights: the control alone

Features are those of `cameo.correspondence.features.FeatureExtractor`; beside them stand the colours of the pixels of
each token, which cost nothing, and the same network with random weights. The truth is given by the matches from depth.
Prints the table with its command, device and date, and writes it to --out.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.correspondence import Correspondence
from cameo.correspondence.features import FeatureExtractor
from cameo.data import collate
from cameo.data.batches import to_device
from cameo.files import write_atomically
from cameo.tables import markdown_table
from cameo.training.data import build_dataset
from cameo.training.settings import TrainingConfig

Features = Callable[[Tensor], Tensor]
HEADER = (
    "features", "cycle threshold", "matched", "exact", "within 1", "within 2", "by chance, within 1", "not visible",
    "found",
)  # fmt: skip
WITHIN = (0, 1, 2)


@dataclass
class Score:
    """Matches by features, counted against the true ones.

    Attributes:
        tokens: ordered pairs of views times tokens.
        visible: of these, the ones with a true match.
        matched: of all, the ones matched by features.
        hits: of the matched ones with a true match, those within 0, 1 and 2 tokens (larger of rows and columns).
        judged: matched ones with a true match.
        chance: what a token drawn uniformly would hit within 1 token, summed over the judged ones.
    """

    tokens: int = 0
    visible: int = 0
    matched: int = 0
    judged: int = 0
    chance: float = 0.0
    hits: tuple[int, ...] = (0, 0, 0)

    def add(self, found: Correspondence, truth: Correspondence) -> None:
        """Count a batch; all views have the same square grid."""
        ((side, _),) = set(truth.token_grids)
        both = found.matched & truth.matched
        there, true = found.index[both], truth.index[both]
        rows, columns = (there // side - true // side).abs(), (there % side - true % side).abs()
        apart = torch.maximum(rows, columns)
        pairs = truth.num_views * (truth.num_views - 1)
        self.tokens += truth.batch_size * pairs * side * side
        self.visible += int(truth.matched.sum())
        self.matched += int(found.matched.sum())
        self.judged += int(both.sum())
        self.hits = tuple(old + int((apart <= k).sum()) for old, k in zip(self.hits, WITHIN, strict=True))
        reach = [3 - (place == 0).int() - (place == side - 1).int() for place in (true // side, true % side)]
        self.chance += float((reach[0] * reach[1]).sum()) / (side * side)

    def row(self, name: str, threshold: float) -> list[str]:
        """Return the cells of one row of the table; shares of nothing are a dash."""

        def share(part: float, whole: float) -> str:
            return f"{part / whole:.1%}" if whole else "-"

        cells = [name, f"{threshold:g}", share(self.matched, self.tokens)]
        cells += [share(hit, self.judged) for hit in self.hits]
        cells += [share(self.chance, self.judged), share(self.matched - self.judged, self.matched)]
        return [*cells, share(self.hits[1], self.visible)]


def colours(grid: int) -> Features:
    """Pixels of each token at 4 x 4 per token, less the mean colour of the image."""

    def features(images: Tensor) -> Tensor:
        small = F.interpolate(images.flatten(0, 1), size=(4 * grid, 4 * grid), mode="bilinear", antialias=True)
        small = small - small.mean(dim=(2, 3), keepdim=True)
        return F.pixel_unshuffle(small, 4).unflatten(0, images.shape[:2])

    return features


def methods(options: argparse.Namespace, device: torch.device) -> dict[str, Features]:
    """Return what is compared, by name."""
    found: dict[str, Features] = {"colours": colours(options.grid)}
    with warnings.catch_warnings(action="ignore"):  # random weights are meant
        random = FeatureExtractor(options.model, pretrained=False, size=options.feature_size).to(device)
    found[f"{options.model}, random weights"] = random
    if options.pretrained:
        extractor = FeatureExtractor(options.model, options.checkpoint, size=options.feature_size).to(device)
        found[f"{options.model}" + (", local weights" if options.checkpoint else "")] = extractor
    return found


@torch.no_grad()
def measure(options: argparse.Namespace, device: torch.device) -> list[list[str]]:
    """Return the rows of the table."""
    config = TrainingConfig(
        train_data_dir=options.rgbd,
        resolution=options.resolution,
        num_views=options.views,
        num_validation_scenes=options.samples,
        max_overlap=0.99,
    )
    data = build_dataset(config, "validation")
    batches = [to_device(collate([data[index]]), device) for index in range(options.samples)]
    truths = [
        Correspondence.from_depth(batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grid=options.grid)
        for batch in batches
    ]
    rows = []
    for name, features in methods(options, device).items():
        seen = [features(batch["images"]) for batch in batches]
        for threshold in options.cycle_thresholds:
            score = Score()
            for one, truth in zip(seen, truths, strict=True):
                found = Correspondence.from_features(one, token_grid=options.grid, cycle_threshold=threshold)
                score.add(found, truth)
            rows.append(score.row(name, threshold))
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=TrainingConfig.feature_model)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--feature-size", type=int, help="side of the images that the network sees, in pixels")
    parser.add_argument("--rgbd", help="folder of an RGB-D sequence in place of the embedded rooms")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--grid", type=int, default=16, help="tokens along a side")
    parser.add_argument("--cycle-thresholds", type=float, nargs="+", default=[1.5, 0.5])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Print the table and write it."""
    options, began = parse(arguments), time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = markdown_table(HEADER, measure(options, device))
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    source = "the held-out part of an RGB-D sequence" if options.rgbd else "embedded rooms"
    shown = " ".join(["python -m benchmarks.correspondence.feature_matches", *arguments]).replace(
        str(options.rgbd), "SEQUENCE"
    )
    text = "\n\n".join(
        [
            "# Matches by image features against true geometry",
            f"`{shown}`, {date.today()}, {hardware}, torch {torch.__version__}, {time.perf_counter() - began:.0f} s.",
            f"{options.samples} samples of {options.views} views of {source} at {options.resolution} px, "
            f"{options.grid} x {options.grid} tokens, all ordered pairs of views; the truth is given by the matches "
            "from depth. *Matched*: share of all tokens that get a match. *Exact*, *within 1*, *within 2*: of the "
            "matched tokens that the other view truly shows, those on the true token or that near (larger of rows and "
            "columns); *by chance*: by a token drawn at random. *Not visible*: share of the matches whose point the "
            "other view does not show. *Found*: share of the truly visible tokens matched to within 1 token.",
            *([] if options.pretrained else ["Without pretrained weights: this says nothing of trained features."]),
            table,
        ]
    )
    print(text)
    write_atomically(options.out, text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
