"""Tables of the training step in docs/performance.md, from its results files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.common.measuring import table_of
from benchmarks.common.page import DEVICES, Script
from benchmarks.step import compiled, latents, measure

__all__ = ["LATENTS", "SCRIPT", "TABLES"]

SCRIPT = Script("benchmarks.step.measure", "training_step")
LATENTS = Script("benchmarks.step.latents", "latents")
COMPILED = Script("benchmarks.step.compiled", "compiled_step")


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


TABLES: dict[str, Callable[[], str]] = {
    f"{name}_{device}": partial(write, device)
    for name, write in {"step": step, "latents": cached, "compiled_step": compiled_step}.items()
    for device in DEVICES
}
