"""Draw the pictures and fill the tables of docs/performance.md from the results files.

    python benchmarks/report.py

Everything between `<!-- table: NAME -->` and `<!-- end -->` is written anew; the rest of the page is text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import alignment
import alignment_gates
import correspondence
import training_step
from alignment_cases import Setting
from alignment_peers import dense_bytes
from measure import read_results, table_of

__all__ = ["TABLES", "draw", "filled"]

ROOT = Path(__file__).parent.parent
PAGE, PICTURES, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "images", ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = "Not measured yet: `{command}`.\n"
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


def gates(device: str) -> str:
    """What was demanded and what was measured."""
    found = _found("alignment", device)
    return _page(found, table_of(alignment_gates.check(found, device)), "alignment", device)


def sizes(device: str) -> str:
    """All methods and selections at the sizes of the gates."""
    found = _found("alignment", device)
    names = [setting.name for setting in alignment.gate_settings(device)]
    kept = {name: found[name] for name in names if name in found}
    rows = [
        {key: row[key] for key in row if key not in ("views", "heads", "batch", "head", "gradient error")}
        for row in alignment.table(kept)
    ]
    return _page(kept, table_of(rows), "alignment", device)


def growth(device: str) -> str:
    """The rows with a target only, over growing sizes."""
    found = _found("alignment", device)
    rows = [row for row in alignment.table(found) if row["rows"].startswith("released")]
    hidden = ("rows", "median ms")
    return _page(
        found,
        table_of([{key: row[key] for key in row if key not in hidden} for row in rows]),
        "alignment",
        device,
    )


def linear(device: str) -> str:
    """A head that averages, against linear cross-entropy."""
    found = {name: entry for name, entry in _found("alignment", device).items() if ", mean, " in name}
    rows = [
        {key: row[key] for key in row if key not in ("views", "heads", "batch", "head", "gradient error")}
        for row in alignment.table(found)
    ]
    return _page(found, table_of(rows), "alignment", device)


def exactness(device: str) -> str:
    """Errors against float64, largest over loss and gradients."""
    found = {name: entry for name, entry in _found("alignment", device).items() if "errors" in entry}
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
    return _page(found, table_of(rows), "alignment", device)


def resident(device: str) -> str:
    """The allocator's count beside the growth of the process, where both were taken."""
    found = {name: entry for name, entry in _found("alignment", device).items() if entry.get("resident_bytes")}
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
    return _page(found, table_of(rows), "alignment", device)


def step(device: str) -> str:
    """Whole training steps with and without alignment, and the gates on them."""
    found = _found("training_step", device)
    tables = [table_of(training_step.check(found)), table_of(training_step.table(found))]
    return _page(found, "\n\n".join(tables), "training_step", device)


def matches(device: str) -> str:
    """Correspondence: the gates on it, then all forms and sizes."""
    found = _found("correspondence", device)
    tables = [_correspondence_gates(found, device), correspondence.table(found)]
    return _page(found, "\n\n".join(map(table_of, tables)), "correspondence", device)


def _correspondence_gates(found: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """Compare with what is demanded at 32x32 tokens and 4 views; on CUDA at batch 3."""

    def figure(name: str, form: str, key: str = "best") -> float | None:
        return found.get(name, {}).get(form, {}).get(key)

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    size = "32x32 tokens, 4 views, batch {}, {}".format
    ours = correspondence.OURS
    equal = figure(size(1, "float64"), ours, "equal_index_and_mask")
    rows = [alignment_gates.row("share of equal index and mask in float64, 32x32", ">= 1", equal)]
    if device == "cuda":
        best = figure(size(3, "float32"), ours)
        milliseconds = best * 1e3 if best is not None else None
        return [*rows, alignment_gates.row("correspondence at batch 3, ms", "<= 0.15", milliseconds)]
    name = size(1, "float32")
    dense = ratio(figure(name, correspondence.DENSE), figure(name, ours))
    tree = ratio(figure(name, ours), figure(name, "scipy cKDTree, 2 workers"))
    return [
        alignment_gates.row("time of the broadcast form / correspondence, 32x32", ">= 20", dense),
        alignment_gates.row("time of correspondence / scipy cKDTree, 32x32", "<= 1.25", tree),
        *rows,
        alignment_gates.row(
            "workspace of correspondence, 32x32, MB", "<= 8", figure(name, ours, "workspace_megabytes")
        ),
    ]


def missed(device: str) -> str:
    """What falls short of what was demanded."""
    found = _found("alignment", device)
    rows = alignment_gates.check(found, device) if found else []
    steps = _found("training_step", device)
    rows += training_step.check(steps) if steps else []
    matched = _found("correspondence", device)
    rows += _correspondence_gates(matched, device) if matched else []
    states = {state: [row for row in rows if row["state"] == state] for state in ("missed", "not measured")}
    lines = [
        f"- {row['gate']}: demanded {row['demanded']}, measured {row['measured']:.3g}." for row in states["missed"]
    ]
    lines += [f"- {row['gate']}: not measured." for row in states["not measured"]]
    if not rows:
        return NOT_MEASURED.format(command=_command("alignment", device))
    return "\n".join(lines or ["Nothing that was measured."]) + "\n"


TABLES: dict[str, Callable[[], str]] = {"counts": counts} | {
    f"{function.__name__}_{device}": (lambda function=function, device=device: function(device))
    for function in (gates, sizes, growth, linear, exactness, resident, matches, step, missed)
    for device in ("cpu", "cuda")
}


def _found(script: str, device: str) -> dict[str, Any]:
    return read_results(RESULTS / f"{script}_{device}.json")


def _command(script: str, device: str) -> str:
    return f"python benchmarks/{script}.py --device {device}"


def _page(found: Mapping[str, Any], table: str, script: str, device: str) -> str:
    """A table under what it was measured on, or how to measure it."""
    if not found:
        return NOT_MEASURED.format(command=_command(script, device))
    places = dict.fromkeys(
        "{device}, {threads} threads, torch {torch}, {date}".format(**entry["environment"]) for entry in found.values()
    )
    return f"`{_command(script, device)}`: {'; '.join(places)}.\n\n{table}\n"


def filled(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """Return the page with every table as the results files have it.

    Raises:
        KeyError: the page asks for a table that is not in `tables`.
    """
    return TABLE.sub(lambda match: f"{match[1]}\n{tables[match[2]]()}\n{match[3]}", text)


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

    found = _found("alignment", device)
    entries = {name: entry for name, entry in found.items() if "runs" in entry}
    if not entries:
        return None
    any_entry = next(iter(entries.values()))
    figure, panels = plt.subplots(2, len(AXES), figsize=(15, 7.5), sharey="row", layout="constrained")
    for column, (axis, label) in enumerate(AXES.items()):
        kept = _along(entries, axis, device)
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
    middle = alignment.gate_settings(device)[0 if device == "cuda" else 1]
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


def main() -> None:
    """Draw, then fill the page."""
    from cameo.files import write_atomically

    for device in ("cpu", "cuda"):
        if path := draw(device):
            print(path.relative_to(ROOT))
    write_atomically(PAGE, filled(PAGE.read_text(encoding="utf-8")))
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
