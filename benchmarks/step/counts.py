"""How many launches and host waits CAMEO adds to a training step on an accelerator, counted without one.

    python -m benchmarks.step.counts --device cpu [--batch 3] [--views 4] [--grid 32] [--resolution 512] [--lines]

A supervised layer of the paper's setting (Stable Diffusion 2.1: 10 heads of 64, 32x32 tokens, in bfloat16) runs on the
pretended device of `benchmarks.step.pretend_device`, with matches from depth and softmax per view. The kernels of
Triton are counted and not run; what the matches are computed for is computed by their twins. A launch is an operator
that is no view and does more than to allocate, or a kernel; a wait is a value that the host reads, or a copy that
blocks it. Some operators of torch launch several kernels of CUDA, which cannot be seen here.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.measuring import Results, table_of
from benchmarks.common.page import RESULTS
from benchmarks.step.pretend_device import NAME, PretendDevice
from benchmarks.step.pretend_kernels import Counted, WithoutAttention
from benchmarks.step.tables import count_table
from cameo.alignment import heads, loss, sweep, triton_heads, triton_rows
from cameo.correspondence import matching, triton_depth
from cameo.data.batches import match_layers, to_device
from cameo.wrap import wrap

PARTS = {
    "benchmarks/step/counts.py": "training loop",
    "cameo/alignment/rows.py": "planning",
    "cameo/alignment/supervision.py": "weights",
    "cameo/alignment/sweep.py": "sweep",
    "cameo/alignment/heads.py": "sweep",
    "cameo/alignment/operator.py": "sweep",
    "cameo/alignment/loss.py": "loss",
    "cameo/model.py": "loss",
    "cameo/attention": "capture",
    "cameo/geometry/cameras.py": "checks",
    "cameo/correspondence": "correspondence",
    "cameo/data/batches.py": "correspondence",
}
HEADS, DIMENSION = 10, 64
MEMORY = 80 << 30
KERNELS = ("pack_weights_kernel", "_tuned_scores_kernel", "softmax_kernel", "gradient_kernel", "add_partial_kernel")


class Supervised(nn.Module):
    """An attention with queries and keys of their own weights."""

    heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = (nn.Linear(HEADS * DIMENSION, HEADS * DIMENSION, bias=False) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend among all tokens `[B, L, C]`."""
        query, key = (one(tokens).unflatten(2, (HEADS, -1)).transpose(1, 2) for one in (self.to_q, self.to_k))
        return F.scaled_dot_product_attention(query, key, query)


def wall(batch: int, views: int, resolution: int) -> dict[str, Any]:
    """A wall seen by cameras side by side."""
    side = float(resolution)
    intrinsics = torch.tensor([[side, 0, side / 2], [0, side, side / 2], [0, 0, 1]])
    extrinsics = torch.eye(4).repeat(batch, views, 1, 1)
    extrinsics[:, :, 0, 3] = -1.0 / views * torch.arange(views)
    return {
        "images": torch.rand(batch, views, 3, 1, 1).expand(-1, -1, -1, resolution, resolution),
        "intrinsics": intrinsics.expand(batch, views, 3, 3).clone(),
        "extrinsics": extrinsics,
        "depth": torch.full((batch, views, 1, resolution, resolution), 2.0),
    }


@contextlib.contextmanager
def as_on_cuda(device: PretendDevice) -> Iterator[None]:
    """Let the pretended device take the ways of a CUDA device, with kernels that are counted and do nothing."""
    with contextlib.ExitStack() as stack:
        for name in KERNELS:
            stack.enter_context(mock.patch.object(triton_heads, name, Counted(device, name)))
        rows = Counted(device, "add_to_queries_kernel")
        stack.enter_context(mock.patch.object(triton_rows, "add_to_queries_kernel", rows))
        kernel = Counted(device, "depth_kernel", match_by_twin)
        stack.enter_context(mock.patch.object(triton_depth, "depth_kernel", kernel))
        stack.enter_context(mock.patch.object(matching, "triton_refusal", return_value=None))
        stack.enter_context(mock.patch.object(triton_heads, "_processors", return_value=132))
        stack.enter_context(mock.patch.object(loss, "triton_refusal", return_value=None))
        stack.enter_context(mock.patch.object(sweep, "multiplies_wide", return_value=True))
        stack.enter_context(mock.patch.object(heads, "device_bytes", return_value=MEMORY))
        yield


def match_by_twin(
    depth: Any, intrinsics: Any, extrinsics: Any, grids: Any, index: Any, distance: Any, *numbers: Any, **_: Any
) -> None:
    """Do what the kernel of `cameo.correspondence.triton_depth` does on the CPU, where the pretended tensors are."""
    views = [tensor.held for tensor in (depth, intrinsics, extrinsics)]
    found = matching.match_depth(*views, tuple(map(tuple, grids.held.tolist())), numbers[-1])
    for target, result in zip((index, distance), found, strict=True):
        target.held.copy_(result)


def count_step(options: argparse.Namespace) -> dict[str, Any]:
    """What a step with CAMEO launches and waits for more than one without, by part."""
    model = wrap(nn.Sequential(Supervised()), layer="0", layout="b (v h w)", stride=options.resolution // options.grid)
    model.implementation, model.check_unseen = "triton", False
    model.base_model.to(torch.bfloat16)
    with PretendDevice(PARTS) as device, as_on_cuda(device), WithoutAttention():
        model.to(NAME)
        batch = to_device(wall(options.batch, options.views, options.resolution), torch.device(NAME))
        length = options.views * options.grid**2
        tokens = torch.randn(options.batch, length, HEADS * DIMENSION, dtype=torch.bfloat16).to(NAME)

        def step(aligned: bool) -> None:
            matches = match_layers(model.supervised_layers, batch) if aligned else None
            loss = model(tokens, correspondence=matches).float().square().mean()
            if aligned:
                loss = loss + model.weight * model.alignment_loss
            with device.part("backward"):
                loss.backward()

        counted = []
        for aligned in (False, True):
            step(aligned)
            device.clear()
            step(aligned)
            counted.append((device.launches, device.syncs))
            device.clear()
    (launches, syncs), (more_launches, more_syncs) = counted
    return {"launches": _difference(more_launches, launches), "syncs": _difference(more_syncs, syncs)}


def _difference(of: Mapping[str, Counter[str]], without: Mapping[str, Counter[str]]) -> dict[str, dict[str, int]]:
    found = {}
    for part in sorted({*of, *without}):
        counts = Counter(of.get(part, {}))
        counts.subtract(without.get(part, {}))
        found[part] = {name: count for name, count in counts.items() if count}
    return {part: counts for part, counts in found.items() if counts}


def main(arguments: list[str] | None = None) -> int:
    """Count, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="where the pretended device has its memory")
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--grid", type=int, default=32, help="rows and columns of the supervised tokens")
    parser.add_argument("--resolution", type=int, default=512, help="pixels")
    parser.add_argument("--lines", action="store_true", help="print each operator and each wait with its line")
    parser.add_argument("--output", type=Path, help="results file")
    options = parser.parse_args(arguments)
    name = f"batch {options.batch}, {options.views} views, {options.grid}x{options.grid} tokens"
    results = Results(options.output or RESULTS / "step_counts_cpu.json", "cpu", again=True)
    found = results.get(name, partial(count_step, options))
    print(table_of(count_table(found)))
    if options.lines:
        for kind in ("launches", "syncs"):
            for part, entries in found[kind].items():
                for entry, count in sorted(entries.items(), key=lambda item: -item[1]):
                    print(f"{kind} {part}: {count} x {entry}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
