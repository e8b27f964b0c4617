"""Tables and picture of the alignment loss in docs/performance.md, from its results files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.alignment import gates, measure, parts
from benchmarks.alignment.cases import Setting
from benchmarks.alignment.peers import dense_bytes
from benchmarks.common.measuring import table_of
from benchmarks.common.page import DEVICES, PICTURES, Script

__all__ = ["PARTS", "SCRIPT", "TABLES", "draw"]

SCRIPT = Script("benchmarks.alignment.measure", "alignment")
PARTS = Script("benchmarks.alignment.parts", "alignment_parts")
EXPANSION = 4  # of the head's hidden layer

# Released models: grid, views, heads and batch of the supervised layer.
MODELS = {
    "CAMEO on SD 2.1, 4 views at 512 px": Setting(32, 4, 10, 3, dtype="bfloat16"),
    "MVDream, 4 views at 256 px": Setting(16, 4, 10, 1, dtype="bfloat16"),
    "Zero123++, 6 views at 320 px": Setting(20, 6, 10, 1, dtype="bfloat16"),
    "SV3D, 21 views at 576 px, 20 heads": Setting(18, 21, 20, 1, dtype="bfloat16"),
    "SV3D, 21 views at 576 px, 10 heads": Setting(36, 21, 10, 1, dtype="bfloat16"),
}


def counts() -> str:
    """Count the work of the loss, if no row is skipped, and the tensors of its dense form."""
    rows = []
    for name, setting in MODELS.items():
        heads, dimension, hidden = setting.heads, setting.dimension, EXPANSION * setting.heads
        # Forward one product of queries and keys and one through the head; backward two of each.
        work = 3 * 2 * (heads * dimension + hidden * heads + hidden)
        tokens = setting.batch * setting.views * setting.tokens**2
        rows.append(
            {
                "setting": name,
                "pairs, million": setting.pairs / 1e6,
                "GFLOP": setting.pairs * work / 1e9,
                "GELUs and derivatives, billion": 2 * setting.pairs * hidden / 1e9,
                "q, k, dq, dk in bf16, MB": 4 * tokens * heads * dimension * 2 / 1e6,
                "dense form holds, GB": dense_bytes(setting, hidden) / 1e9,
            }
        )
    return table_of(rows) + "\n"


def demanded(device: str) -> str:
    """What was demanded and what was measured."""
    found = SCRIPT.found(device)
    return SCRIPT.section(found, table_of(gates.check(found, device)), device)


def own_parts(device: str) -> str:
    """The loss against its own parts, and what is demanded of the ratios."""
    found = PARTS.found(device)
    tables = [table_of(parts.table(found)), table_of(parts.check(found))]
    return PARTS.section(found, "\n\n".join(tables), device)


def sizes(device: str) -> str:
    """All methods and selections at the sizes of the gates."""
    found = SCRIPT.found(device)
    names = [setting.name for setting in measure.gate_settings(device)]
    kept = {name: found[name] for name in names if name in found}
    rows = [
        {key: row[key] for key in row if key not in ("views", "heads", "batch", "head", "gradient error")}
        for row in measure.table(kept)
    ]
    return SCRIPT.section(kept, table_of(rows), device)


def growth(device: str) -> str:
    """The rows with a target only, over growing sizes."""
    found = SCRIPT.found(device)
    rows = [row for row in measure.table(found) if row["rows"].startswith("released")]
    hidden = ("rows", "median ms")
    return SCRIPT.section(
        found,
        table_of([{key: row[key] for key in row if key not in hidden} for row in rows]),
        device,
    )


def linear(device: str) -> str:
    """A head that averages, against linear cross-entropy."""
    found = {name: entry for name, entry in SCRIPT.found(device).items() if ", mean, " in name}
    rows = [
        {key: row[key] for key in row if key not in ("views", "heads", "batch", "head", "gradient error")}
        for row in measure.table(found)
    ]
    return SCRIPT.section(found, table_of(rows), device)


def exactness(device: str) -> str:
    """Errors against float64, largest over loss and gradients."""
    found = {name: entry for name, entry in SCRIPT.found(device).items() if "errors" in entry}
    rows = []
    for entry in found.values():
        for key, errors in entry["errors"].items():
            method, selection, dtype = key.split(", ")
            gradients = [value for name, value in errors.items() if name != "loss"]
            rows.append(
                {
                    "method": method,
                    "rows": selection,
                    "precision": dtype,
                    "loss": errors["loss"],
                    "gradients": max(value["relative"] for value in gradients),
                    "1 - cosine": max(abs(value["one_minus_cosine"]) for value in gradients),
                    "signed bias": max((value["bias"] for value in gradients), key=abs),
                    "repeats bit by bit": "yes" if entry["bitwise"][key] else "no",
                }
            )
    return SCRIPT.section(found, table_of(rows), device)


def resident(device: str) -> str:
    """The allocator's count beside the growth of the process, where both were taken."""
    found = {name: entry for name, entry in SCRIPT.found(device).items() if entry.get("resident_bytes")}
    rows = [
        {
            "tokens": f"{entry['setting']['tokens']}x{entry['setting']['tokens']}",
            "run": run,
            "allocated MB": entry["runs"][run]["peak_bytes"] / 1e6,
            "process grew by MB": grown / 1e6 if grown is not None else None,
        }
        for entry in found.values()
        for run, grown in entry["resident_bytes"].items()
    ]
    return SCRIPT.section(found, table_of(rows), device)


TABLES: dict[str, Callable[[], str]] = {"counts": counts, "parts_cpu": partial(own_parts, "cpu")} | {
    f"{name}_{device}": partial(function, device)
    for name, function in (
        ("gates", demanded),
        ("sizes", sizes),
        ("growth", growth),
        ("linear", linear),
        ("exactness", exactness),
        ("resident", resident),
    )
    for device in DEVICES
}

METHODS = {  # name of a run: label and style
    "dense, released": ("dense", {"color": "tab:red", "marker": "o"}),
    "dense compiled, released": ("dense, compiled", {"color": "tab:orange", "marker": "x", "linestyle": "none"}),
    "checkpoint, released": ("chunks + checkpoint", {"color": "tab:purple", "marker": "^"}),
    "chunked, released": ("chunked, rows with a target", {"color": "tab:blue", "marker": "s"}),
    "chunked, all": ("chunked, nothing skipped", {"color": "tab:blue", "marker": "s", "linestyle": "--"}),
    "triton, released": ("Triton, rows with a target", {"color": "tab:green", "marker": "D"}),
    "triton, all": ("Triton, nothing skipped", {"color": "tab:green", "marker": "D", "linestyle": "--"}),
}
AXES = {"tokens": "tokens per view", "views": "views", "heads": "heads", "batch": "batch"}


def draw(device: str) -> Path | None:
    """Draw time and memory against tokens, views, heads and batch; None without results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = SCRIPT.found(device)
    entries = {name: entry for name, entry in found.items() if "runs" in entry}
    if not entries:
        return None
    any_entry = next(iter(entries.values()))
    figure, panels = plt.subplots(2, len(AXES), figsize=(15, 7.5), sharey="row", layout="constrained")
    for column, (axis, label) in enumerate(AXES.items()):
        kept = _along(entries, axis, device)
        if not kept:  # a measurement that was interrupted, or made for the gates alone
            panels[0, column].set_title(f"{label}: not measured", fontsize=10)
            continue
        positions = [value**2 if axis == "tokens" else value for value in kept]
        for name, (legend, style) in METHODS.items():
            shown = [(x, e["runs"][name]) for x, e in zip(positions, kept.values(), strict=True) if name in e["runs"]]
            if not shown:
                continue
            where = [x for x, _ in shown]
            panels[0, column].plot(where, [run["best"] for _, run in shown], label=legend, **style)
            panels[1, column].plot(where, [run["peak_bytes"] / 1e6 for _, run in shown], label=legend, **style)
        bytes_ = [entry["gradient_bytes"] / 1e6 for entry in kept.values()]
        panels[1, column].plot(positions, bytes_, color="black", linestyle="-.", label="dq + dk")
        limits = [sum(entry["limit"].get("released", {}).values()) for entry in kept.values()]
        shown_limits = [(x, limit) for x, limit in zip(positions, limits, strict=True) if limit]
        panels[0, column].plot(
            *zip(*shown_limits, strict=True), color="black", linestyle=":", label="limit, rows with a target"
        )
        for row, unit in enumerate(("seconds, forward and backward", "MB above the inputs")):
            panel = panels[row, column]
            panel.set(xscale="log", yscale="log", xlabel=label)
            panel.set_xticks(positions, [str(x) for x in positions], rotation=45 if axis == "tokens" else 0)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if column == 0:
                panel.set_ylabel(unit)
        panels[0, column].set_title(_others(kept, axis), fontsize=10)
    legend = {
        label: line for panel in panels[:, 0] for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=5)
    environment = any_entry["environment"]
    figure.suptitle("{device}, {threads} threads, torch {torch}, {date}".format(**environment))
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / f"alignment_{device}.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _along(entries: Mapping[str, Any], axis: str, device: str) -> dict[int, dict[str, Any]]:
    """Entries that differ from the middle of the growth in one axis only, by their value on it."""
    settings = [entry["setting"] for entry in entries.values()]
    middle = measure.gate_settings(device)[0 if device == "cuda" else 1]
    if axis == "views":
        middle = replace(middle, batch=1)
    fixed = {name: getattr(middle, name) for name in (*AXES, "head", "dtype") if name != axis}
    kept = {
        setting[axis]: entry
        for setting, entry in zip(settings, entries.values(), strict=True)
        if all(setting[name] == value for name, value in fixed.items())
    }
    return dict(sorted(kept.items()))


def _others(kept: Mapping[int, Any], axis: str) -> str:
    setting = next(iter(kept.values()))["setting"]
    facts = {
        "tokens": f"{setting['tokens']}x{setting['tokens']} tokens",
        "views": f"{setting['views']} views",
        "heads": f"{setting['heads']} heads",
        "batch": f"batch {setting['batch']}",
    }
    return ", ".join(text for name, text in facts.items() if name != axis)
