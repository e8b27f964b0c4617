"""Tables of the training step in docs/performance.md, from its results files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.common.measuring import table_of
from benchmarks.common.page import DEVICES, Script
from benchmarks.step import compiled, measure

__all__ = ["SCRIPT", "TABLES"]

SCRIPT = Script("benchmarks.step.measure", "training_step")
COMPILED = Script("benchmarks.step.compiled", "compiled_step")


def step(device: str) -> str:
    """Whole training steps with and without alignment, and the gates on them."""
    found = SCRIPT.found(device)
    tables = [table_of(measure.check(found)), table_of(measure.table(found))]
    return SCRIPT.section(found, "\n\n".join(tables), device)


def compiled_step(device: str) -> str:
    """Steps with alignment, compiled and not."""
    found = COMPILED.found(device)
    return COMPILED.section(found, table_of(compiled.table(found)), device)


TABLES: dict[str, Callable[[], str]] = {
    f"{name}_{device}": partial(make, device)
    for name, make in (("step", step), ("compiled_step", compiled_step))
    for device in DEVICES
}
