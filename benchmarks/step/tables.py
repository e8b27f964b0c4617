"""Tables of the training step in docs/performance.md, from its results files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.common.measuring import table_of
from benchmarks.common.page import DEVICES, Script
from benchmarks.step import compiled, dry_run, latents, measure

__all__ = ["DRY_RUN", "LATENTS", "SCRIPT", "TABLES", "count_table"]

SCRIPT = Script("benchmarks.step.measure", "training_step")
LATENTS = Script("benchmarks.step.latents", "latents")
DRY_RUN = Script("benchmarks.step.dry_run", "dry_run")
OF_GPU = Script("benchmarks.step.dry_run --gpu", "dry_run_gpu")
RELEASED = Script("benchmarks.step.dry_run --released", "dry_run_released")
COMPILED = Script("benchmarks.step.compiled", "compiled_step")
COUNTS = Script("benchmarks.step.counts", "step_counts")


def step(device: str) -> str:
    """Whole training steps with and without alignment, and the gates on them."""
    found = SCRIPT.found(device)
    tables = [table_of(measure.check(found)), table_of(measure.table(found))]
    return SCRIPT.section(found, "\n\n".join(tables), device)


def cached(device: str) -> str:
    """Steps that encode their views, and steps that read latents encoded before."""
    found = LATENTS.found(device)
    return LATENTS.section(found, table_of(latents.table(found)), device)


def compiled_step(device: str) -> str:
    """Steps with alignment, compiled and not."""
    found = COMPILED.found(device)
    return COMPILED.section(found, table_of(compiled.table(found)), device)


def estimated() -> str:
    """What a dry run says of steps, and what they take."""
    found = DRY_RUN.found("cpu")
    return DRY_RUN.section(found, table_of(dry_run.table(found)), "cpu")


def estimated_on_gpu() -> str:
    """What a dry run says of steps that were measured on a GPU."""
    found = OF_GPU.found("cpu")
    return OF_GPU.section(found, table_of(dry_run.gpu_table(found)), "cpu")


def released() -> str:
    """What a dry run says of the released sizes: computed, not measured."""
    found = RELEASED.found("cpu")
    return RELEASED.section(found, table_of(dry_run.released_table(found)), "cpu")


def count_table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per part of a step, and their sum."""
    parts = sorted({*found["launches"], *found["syncs"]})
    count = {kind: {part: sum(found[kind].get(part, {}).values()) for part in parts} for kind in ("launches", "syncs")}
    rows = [{"part": part, "launches": count["launches"][part], "waits": count["syncs"][part]} for part in parts]
    total = {"part": "together"} | {name: sum(row[name] for row in rows) for name in ("launches", "waits")}
    return [*rows, total]


def counts() -> str:
    """Launches and waits that CAMEO adds to a step, by part."""
    found = COUNTS.found("cpu")
    tables = [f"{name}:\n\n{table_of(count_table(entry))}" for name, entry in found.items()]
    return COUNTS.section(found, "\n\n".join(tables), "cpu")


TABLES: dict[str, Callable[[], str]] = (
    {"step_counts": counts}
    | {
        f"{name}_{device}": partial(write, device)
        for name, write in {"step": step, "latents": cached, "compiled_step": compiled_step}.items()
        for device in DEVICES
    }
    | {"dry_run_cpu": estimated, "dry_run_gpu": estimated_on_gpu, "dry_run_released": released}
)
