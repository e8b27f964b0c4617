"""Memory that matches from depth take beside their result, at once and some key views at a time.

    python -m benchmarks.correspondence.workspace --device cpu

One sample of views of a wall, side by side. On CUDA one kernel of Triton computes them, without a workspace.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.common.measuring import Results, peak_memory, table_of
from benchmarks.common.page import RESULTS
from cameo.correspondence import matching

VIEWS, SIDES = (4, 8, 16, 21), (32, 64)
PIXELS = 128  # depth is read at tokens alone, so the size of its image does not matter


def measure(views: int, side: int) -> dict[str, Any]:
    """Bytes at the most beside index and distance, with the bound on the workspace and without."""
    depth = torch.full((1, views, 1, PIXELS, PIXELS), 2.0)
    lens = torch.tensor([[PIXELS, 0, PIXELS / 2], [0, PIXELS, PIXELS / 2], [0, 0, 1.0]])
    extrinsics = torch.eye(4).repeat(1, views, 1, 1)
    extrinsics[0, :, 0, 3] = torch.arange(views) * (-1.0 / views)
    grids = ((side, side),) * views
    result = views**2 * side**2 * (8 + 4)

    def run() -> object:
        return matching.match_depth(depth, lens.expand(1, views, 3, 3), extrinsics, grids, 0.02)

    bounded = peak_memory(run) - result
    with mock.patch.object(matching, "WORKSPACE_BYTES", 1 << 40):
        return {
            "views": views,
            "side": side,
            "result": result,
            "bounded": bounded,
            "at once": peak_memory(run) - result,
        }


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per size."""
    return [
        {
            "views": entry["views"],
            "tokens": f"{entry['side']}x{entry['side']}",
            "index and distance, MB": entry["result"] / 1e6,
            "workspace at once, MB": entry["at once"] / 1e6,
            "workspace, MB": entry["bounded"] / 1e6,
        }
        for entry in found.values()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not in the results file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--views", type=int, nargs="+", default=VIEWS)
    parser.add_argument("--output", type=Path, help="results file")
    options = parser.parse_args(arguments)
    results = Results(options.output or RESULTS / "depth_workspace_cpu.json")
    for side in SIDES:
        for views in options.views:
            results.get(f"{views} views, {side}x{side} tokens", partial(measure, views, side))
    print(table_of(table(results.found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
