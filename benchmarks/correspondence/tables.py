"""Tables of the correspondence in docs/performance.md, from its results files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.common.measuring import gate, table_of
from benchmarks.common.page import DEVICES, Script
from benchmarks.correspondence import measure, workspace

__all__ = ["SCRIPT", "TABLES", "check"]

SCRIPT = Script("benchmarks.correspondence.measure", "correspondence")
WORKSPACE = Script("benchmarks.correspondence.workspace", "depth_workspace")


def matches(device: str) -> str:
    """Correspondence: the gates on it, then all forms and sizes."""
    found = SCRIPT.found(device)
    tables = [check(found, device), measure.table(found)]
    return SCRIPT.section(found, "\n\n".join(map(table_of, tables)), device)


def depth_workspace() -> str:
    """Memory of matches from depth beside their result."""
    found = WORKSPACE.found("cpu")
    return WORKSPACE.section(found, table_of(workspace.table(found)), "cpu")


def check(found: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """Compare with what is demanded at 32x32 tokens and 4 views; on CUDA at batch 3."""

    def figure(name: str, form: str, key: str = "best") -> float | None:
        return found.get(name, {}).get(form, {}).get(key)

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    size = "32x32 tokens, 4 views, batch {}, {}".format
    ours = measure.OURS
    equal = figure(size(1, "float64"), ours, "equal_index_and_mask")
    rows = [gate("share of equal index and mask in float64, 32x32", ">= 1", equal)]
    if device == "cuda":
        for name, key in {"correspondence at batch 3, ms": "best", "the same, kernels alone, ms": "kernels"}.items():
            seconds = figure(size(3, "float32"), ours, key)
            rows.append(gate(name, "<= 0.15", None if seconds is None else 1e3 * seconds))
        return rows
    name = size(1, "float32")
    dense = ratio(figure(name, measure.DENSE), figure(name, ours))
    tree = ratio(figure(name, ours), figure(name, "scipy cKDTree, 2 workers"))
    return [
        gate("time of the broadcast form / correspondence, 32x32", ">= 20", dense),
        gate("time of correspondence / scipy cKDTree, 32x32", "<= 1.25", tree),
        *rows,
        gate("workspace of correspondence, 32x32, MB", "<= 8", figure(name, ours, "workspace_megabytes")),
    ]


TABLES: dict[str, Callable[[], str]] = {f"matches_{device}": partial(matches, device) for device in DEVICES} | {
    "depth_workspace": depth_workspace
}
