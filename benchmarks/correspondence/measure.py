"""Time, memory and exactness of correspondence against other ways to find it.

    python -m benchmarks.correspondence.measure [--device cuda] [--again]

Everything of one size is measured in turn in one process, on points that are already on the token grid: the library's
nearest neighbours with their cycle check, its readable form, the dense form of the released path (all tokens against
all, then a reverse map), `torch.cdist`, and on a CPU scipy's k-d tree with 2 workers, faiss and KeOps where they are
installed; the peers find the neighbours both ways between all views, without the cycle check. Beside them the other
definition, projection of depth, from images of 256 px. What is in `benchmarks/results/correspondence_cpu.json`
(on CUDA `correspondence_cuda.json`) is not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.measuring import (
    Results,
    interleaved,
    kernel_columns,
    kernel_time,
    peak_memory,
    summary,
    table_of,
)
from benchmarks.common.page import RESULTS
from benchmarks.correspondence.accuracy import HALF_ROOM, Room
from cameo import Correspondence
from cameo.correspondence.matching import _token_points
from cameo.correspondence.neighbors.nearest import match_tokens
from cameo.geometry import unproject

CYCLE_THRESHOLD = 1.5
PIXELS = 256
OURS, READABLE, DENSE, PROJECTION = "ours", "readable", "dense, released form", "projection of depth"
# Entries of the largest tensor of the dense form and of distances of one pair of views.
MOST_ENTRIES = {"cpu": 1 << 24, "cuda": 1 << 31}
REPEATS, SECONDS = 15, {"cpu": 20.0, "cuda": 3.0}
MEGABYTE = 1e6

Run = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Size of one measurement; `tokens` is the side of a view's token grid."""

    tokens: int = 32
    views: int = 4
    batch: int = 1
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Name of the measurement in a results file."""
        return f"{self.tokens}x{self.tokens} tokens, {self.views} views, batch {self.batch}, {self.dtype}"


SETTINGS = (
    Setting(32),
    Setting(32, dtype="float64"),
    Setting(8),
    Setting(8, batch=8),
    Setting(16),
    Setting(24),
    Setting(48),
    Setting(64),
    Setting(32, views=2),
    Setting(32, views=8),
    Setting(32, views=21),
    Setting(32, batch=3),
)


def make_scene(setting: Setting, device: torch.device) -> dict[str, Tensor]:
    """Depth and cameras in a box room with a sphere, a different arc of views in each sample."""
    rooms = [_room(setting.views, sample) for sample in range(setting.batch)]
    kind = getattr(torch, setting.dtype)
    parts = {
        "depth": [room.depth(PIXELS) for room in rooms],
        "intrinsics": [room.intrinsics_at(PIXELS) for room in rooms],
        "extrinsics": [room.extrinsics for room in rooms],
    }
    return {name: torch.cat(tensors).to(device, kind) for name, tensors in parts.items()}


def _room(views: int, sample: int) -> Room:
    degrees = torch.linspace(-45, 45, views, dtype=torch.float64).deg2rad() + 0.3 * sample
    ahead = torch.stack([-degrees.sin(), torch.zeros(views), -degrees.cos()], dim=-1)  # towards the sphere
    centres = -0.8 * HALF_ROOM[0] * ahead
    down = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).expand(views, 3)
    right = torch.linalg.cross(down, ahead)
    extrinsics = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    extrinsics[:, :3, :3] = torch.stack([right, down, ahead], dim=1)
    extrinsics[:, :3, 3] = -(extrinsics[:, :3, :3] @ centres[..., None])[..., 0]
    intrinsics = torch.tensor([[0.9, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]], dtype=torch.float64)
    spheres = torch.tensor([[0.0, 0.2, 0.0, 0.7]], dtype=torch.float64)
    return Room(spheres, intrinsics.expand(1, views, 3, 3), extrinsics[None])


def dense(tokens: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Index and mask in the released way: negative distances of all tokens to all, and a reverse map per pair."""
    batch, views, count, _ = tokens.shape
    flat = tokens.flatten(1, 2)
    cost = -torch.linalg.vector_norm(flat[:, :, None] - flat[:, None], dim=-1)
    nearest = cost.unflatten(2, (views, count)).argmax(-1).unflatten(1, (views, count))  # [B, i, x, j]
    place = torch.stack([torch.arange(count) // side, torch.arange(count) % side], dim=-1).to(tokens)
    mask = torch.zeros(batch, views, views, count, dtype=torch.bool, device=tokens.device)
    for b in range(batch):
        for i in range(views):
            for j in range(views):
                reverse = place[nearest[b, j, :, i]]
                apart = torch.linalg.vector_norm(reverse[nearest[b, i, :, j]] - place, dim=-1)
                mask[b, i, j] = apart < CYCLE_THRESHOLD
    return nearest.permute(0, 1, 3, 2), mask


def pairs_both_ways(tokens: Tensor) -> Iterator[tuple[int, int, int]]:
    """Sample and ordered pair of views."""
    batch, views = tokens.shape[:2]
    return ((b, i, j) for b in range(batch) for i in range(views) for j in range(views) if i != j)


def by_cdist(tokens: Tensor) -> Tensor:
    """Neighbours by `torch.cdist` by differences, each unordered pair once."""
    batch, views, count, _ = tokens.shape
    index = torch.zeros(batch, views, views, count, dtype=torch.int64, device=tokens.device)
    mode = "donot_use_mm_for_euclid_dist"
    for b, i, j in pairs_both_ways(tokens):
        if i < j:
            distance = torch.cdist(tokens[b, i], tokens[b, j], compute_mode=mode)
            index[b, i, j], index[b, j, i] = distance.argmin(1), distance.argmin(0)
    return index


def by_tree(tokens: Tensor) -> Tensor:
    """Neighbours by scipy's k-d tree, one tree per view, 2 workers."""
    from scipy.spatial import cKDTree

    index = torch.zeros(*tokens.shape[:2], *tokens.shape[1:3], dtype=torch.int64)
    points = tokens.numpy()
    trees = [[cKDTree(view) for view in sample] for sample in points]
    for b, i, j in pairs_both_ways(tokens):
        index[b, i, j] = torch.from_numpy(trees[b][j].query(points[b, i], workers=2)[1])
    return index


def by_faiss(tokens: Tensor) -> Tensor:
    """Neighbours by faiss's exact flat index, which holds float32."""
    import faiss

    index = torch.zeros(*tokens.shape[:2], *tokens.shape[1:3], dtype=torch.int64)
    points = tokens.float().numpy()
    flat = [[faiss.IndexFlatL2(3) for _ in sample] for sample in points]
    for sample, indices in zip(points, flat, strict=True):
        for view, one in zip(sample, indices, strict=True):
            one.add(view)
    for b, i, j in pairs_both_ways(tokens):
        index[b, i, j] = torch.from_numpy(flat[b][j].search(points[b, i], 1)[1][:, 0])
    return index


def by_keops(tokens: Tensor) -> Tensor:
    """Neighbours by KeOps, a symbolic matrix of distances."""
    from pykeops.torch import LazyTensor

    index = torch.zeros(*tokens.shape[:2], *tokens.shape[1:3], dtype=torch.int64, device=tokens.device)
    for b, i, j in pairs_both_ways(tokens):
        first, second = LazyTensor(tokens[b, i, :, None]), LazyTensor(tokens[b, j, None])
        index[b, i, j] = ((first - second) ** 2).sum(-1).argmin(1)[:, 0]
    return index


def forms(setting: Setting, tokens: Tensor, scene: Mapping[str, Tensor]) -> dict[str, Run]:
    """What is measured at this size, by name."""
    device = tokens.device.type
    widths = (setting.tokens,) * setting.views
    runs: dict[str, Run] = {OURS: partial(match_tokens, tokens, widths, CYCLE_THRESHOLD)}
    runs[READABLE] = partial(match_tokens, tokens, widths, CYCLE_THRESHOLD, implementation="differences")
    if setting.batch * (setting.views * setting.tokens**2) ** 2 <= MOST_ENTRIES[device]:
        runs[DENSE] = partial(dense, tokens, setting.tokens)
    if setting.tokens**4 <= MOST_ENTRIES[device]:
        runs["torch.cdist"] = partial(by_cdist, tokens)
    if device == "cpu" and importlib.util.find_spec("scipy"):
        runs["scipy cKDTree, 2 workers"] = partial(by_tree, tokens)
    if device == "cpu" and importlib.util.find_spec("faiss"):
        runs["faiss"] = partial(by_faiss, tokens)
    if importlib.util.find_spec("pykeops"):
        runs["KeOps"] = partial(by_keops, tokens)
    size = setting.tokens
    runs[PROJECTION] = lambda: Correspondence.from_depth(**scene, token_grid=size, check_values=False)
    return runs


def measure_setting(setting: Setting, device: torch.device) -> dict[str, Any]:
    """Seconds, workspace beyond the result and equality with the readable form, of everything at one size."""
    scene = make_scene(setting, device)
    tokens = _token_points(unproject(**scene), ((setting.tokens, setting.tokens),) * setting.views).contiguous()
    runs = forms(setting, tokens, scene)
    seconds = interleaved(runs, REPEATS, device, budget=SECONDS[device.type])
    raw = _neighbours(tokens)
    kept, distance = match_tokens(
        tokens, (setting.tokens,) * setting.views, CYCLE_THRESHOLD, implementation="differences"
    )
    result = kept.nbytes + distance.nbytes
    found: dict[str, Any] = {"visible": (kept >= 0).double().mean().item()}
    other = ~torch.eye(setting.views, dtype=torch.bool, device=device)
    for name, run in runs.items():
        row: dict[str, Any] = dict(summary(seconds[name]))
        if not name.startswith(("scipy", "faiss", "KeOps")):  # these allocate past torch
            row["workspace_megabytes"] = max(0, peak_memory(run, device) - result) / MEGABYTE
        if device.type == "cuda":
            row.update(kernel_time(run))
        got = run()
        if name in (OURS, READABLE):
            row["equal_index_and_mask"] = _share(got[0] == kept, other)
            row["equal_distance"] = _share(got[1] == distance, other)
        elif name == DENSE:
            row["equal_index_and_mask"] = _share(torch.where(got[1], got[0], -1) == kept, other)
        elif name != PROJECTION:
            row["equal_index"] = _share(got == raw, other)
        found[name] = row
    return found


def _neighbours(tokens: Tensor) -> Tensor:
    # A cycle of any length is kept, so this is every token's neighbour.
    return match_tokens(tokens, (1,) * tokens.shape[1], 1e9, implementation="differences")[0]


def _share(equal: Tensor, other: Tensor) -> float:
    return equal[:, other].double().mean().item()


def table(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per size and form, with its best and its median time over ours."""
    rows = []
    for size, measured in found.items():
        ours = measured[OURS]["best"]
        for name, row in measured.items():
            if isinstance(row, Mapping) and "best" in row:
                rows.append(
                    {
                        "size": size,
                        "form": name,
                        "best ms": row["best"] * 1e3,
                        "median ms": row["median"] * 1e3,
                        **kernel_columns(row),
                        "best / ours": row["best"] / ours,
                        "median / ours": row["median"] / measured[OURS]["median"],
                        "workspace MB": row.get("workspace_megabytes"),
                        "equal": row.get("equal_index_and_mask", row.get("equal_index")),
                    }
                )
    return rows


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("scipy", "faiss-cpu", "pykeops"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not in the results file yet and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--again", action="store_true", help="measure also what is in the results file")
    parser.add_argument("--smallest", action="store_true", help="one tiny size, to try the script; needs --output")
    parser.add_argument("--output", type=Path, help="results file")
    options = parser.parse_args(arguments)
    if options.smallest and options.output is None:
        parser.error("--smallest tries the script: it needs an --output beside the results")
    device = torch.device(options.device)
    file = RESULTS / f"correspondence_{device.type}.json"
    results = Results(options.output or file, device, again=options.again)
    results.environment.update(versions())
    for setting in (Setting(4, views=3),) if options.smallest else SETTINGS:
        print(f"{setting.name}: {'in the results file' if results.has(setting.name) else 'measuring'}", flush=True)
        results.get(setting.name, partial(measure_setting, setting, device))
    print(f"\n{results.environment}\n\n{table_of(table(results.found))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
