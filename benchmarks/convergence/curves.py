"""What the runs of `study.py` say: curves with bands, steps to a quality, ratios with intervals.

A run is one result file, a mapping; runs of an arm differ in their seed. Runs with the same seed saw the same samples
in the same order with the same noise, so arms are compared seed by seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cameo.correspondence.xfeat import XFEAT
from cameo.tables import markdown_table

Run = Mapping[str, Any]
ARM_ORDER = ("none", "cameo", "wrong_layer", "other_scene", "random", "repa")
COLOURS = {
    "none": "tab:blue",
    "cameo": "tab:orange",
    "wrong_layer": "tab:brown",
    "other_scene": "tab:green",
    "random": "tab:gray",
    "repa": "tab:purple",
}
# Validations whose mean is the final quality of a run.
FINAL = 3
# Quantiles 0.975 of Student's t with 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NOT_REACHED = math.inf


def load_results(folder: Path) -> dict[str, list[Run]]:
    """Read the runs of a folder: arm to its runs in the order of their seeds, the named arms first."""
    runs: dict[str, list[Run]] = {}
    for path in folder.glob("*.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs.setdefault(run["arm"], []).append(run)
    known = [arm for arm in ARM_ORDER if arm in runs] + sorted(runs.keys() - set(ARM_ORDER))
    return {arm: sorted(runs[arm], key=lambda run: run["seed"]) for arm in known}


def arm_name(arm: str, runs: Sequence[Run]) -> str:
    """Name of an arm in tables and pictures: REPA is named with the network whose features it aligns with.

    Example:
        >>> arm_name("repa", [{"settings": {"feature_model": "xfeat", "feature_pretrained": True}}])
        'REPA with XFeat features'
        >>> arm_name("repa", [{"settings": {"feature_model": "test_vit", "feature_pretrained": False}}])
        'REPA with untrained test_vit features'
    """
    if arm != "repa":
        return arm
    shown = {XFEAT: "XFeat"}
    names = dict.fromkeys(
        ("" if settings["feature_pretrained"] else "untrained ")
        + shown.get(settings["feature_model"], settings["feature_model"])
        for settings in (run["settings"] for run in runs)
    )
    return f"REPA with {' and '.join(names)} features"


def quality(entry: Mapping[str, Any]) -> float:
    """PSNR in dB of the predicted clean image at high noise, on pixels that a reference sees where there is one."""
    value = entry["psnr_covisible"]
    return float(entry["psnr_all"] if value is None else value)


def precision(entry: Mapping[str, Any]) -> float:
    """Share of hits within one token, mean of heads; in temporal layers the share of the right view."""
    if entry["precision"] is not None:
        return float(entry["precision"]["mean@1"])
    return float((entry["precision_view"] or {"mean": math.nan})["mean"])


def final(run: Run, value: Callable[[Mapping[str, Any]], float]) -> float:
    """Mean of a figure over the last validations of a run."""
    return float(np.mean([value(entry) for entry in run["validations"][-FINAL:]]))


def steps_to(run: Run, goal: float) -> float:
    """Steps after which a run first reaches a quality, linear between validations; infinite if it never does.

    Example:
        >>> validations = [{"step": 10 * i, "psnr_covisible": p} for i, p in enumerate((10.0, 12.0, 11.0, 14.0))]
        >>> steps_to({"validations": validations}, 11.0), steps_to({"validations": validations}, 13.0)
        (5.0, 26.666666666666668)
    """
    before = None
    for entry in run["validations"]:
        now = quality(entry)
        if now >= goal:
            if before is None:
                return float(entry["step"])
            step, value = before
            return step + (entry["step"] - step) * (goal - value) / (now - value)
        before = float(entry["step"]), now
    return NOT_REACHED


def seconds_per_step(runs: Sequence[Run]) -> float:
    """Median over the runs of an arm of the processor seconds of a step (of the wall clock on a GPU)."""
    name = "busy_seconds" if runs[0]["device"].endswith("CPU") else "seconds"
    return float(np.median([run["validations"][-1][name] / run["validations"][-1]["step"] for run in runs]))


def speedups(base: Sequence[Run], arm: Sequence[Run]) -> list[float]:
    """By seed, steps of `none` to its own final quality over steps of the arm to the same; 0 if it is never reached.

    Both are read from their curves in the same way: `none` too may pass its final quality before its end. Seeds in
    which `none` ends no better than it begins say nothing and are left out.
    """
    by_seed = {run["seed"]: run for run in arm}
    ratios = []
    for run in base:
        if run["seed"] in by_seed:
            goal = final(run, quality)
            if goal <= quality(run["validations"][0]):
                continue
            ratios.append(steps_to(run, goal) / steps_to(by_seed[run["seed"]], goal))
    return ratios


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval from Student's t; the interval is NaN with fewer than two values.

    Example:
        >>> [round(value, 2) for value in interval([1.0, 2.0, 3.0])]
        [2.0, -0.48, 4.48]
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = T_QUANTILES[len(values) - 2] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def show_speedup(ratios: Sequence[float], factor: float = 1.0) -> str:
    """Geometric mean of the ratios with its interval; says how many seeds reached the quality where not all did."""
    if not ratios:
        return "none learns nothing"
    reached = [ratio * factor for ratio in ratios if ratio > 0]
    if len(reached) < len(ratios):
        values = ", ".join(f"{ratio:.2f}" for ratio in reached)
        return f"reached by {len(reached)} of {len(ratios)} seeds" + (f" ({values})" if values else "")
    mean, low, high = (math.exp(value) for value in interval([math.log(ratio) for ratio in reached]))
    return f"{mean:.2f}" + ("" if math.isnan(low) else f" [{low:.2f}, {high:.2f}]")


def show_difference(base: Sequence[Run], arm: Sequence[Run], value: Callable[[Mapping[str, Any]], float]) -> str:
    """Mean over the common seeds of `arm - none` at the end, with its interval."""
    by_seed = {run["seed"]: final(run, value) for run in base}
    mean, low, high = interval([final(run, value) - by_seed[run["seed"]] for run in arm if run["seed"] in by_seed])
    return f"{mean:+.3g}" + ("" if math.isnan(low) else f" [{low:+.3g}, {high:+.3g}]")


def table_of_arms(results: Mapping[str, Sequence[Run]]) -> str:
    """Format the arms of a subject as a Markdown table; differences are to `none` with the same seed."""
    header = (
        "arm", "seeds", "layer", "PSNR, covisible (dB)", "difference", "PSNR, all (dB)", "loss", "difference",
        "precision", "steps to the final quality of none, ratio", "the same in seconds", "seconds per step",
    )  # fmt: skip
    rows = []
    base = results.get("none", [])
    for arm, runs in results.items():
        compared = [run for run in runs if run["seed"] in {one["seed"] for one in base}]
        differs = arm != "none" and bool(compared)
        ratios = speedups(base, compared) if differs else []
        cost = seconds_per_step(base) / seconds_per_step(runs) if differs else 1.0
        layers = sorted({run["layer"] for run in runs})
        cells = (
            arm_name(arm, runs),
            str(len(runs)),
            "-" if arm == "none" else ", ".join(short(layer) for layer in layers),
            f"{np.mean([final(run, quality) for run in runs]):.2f}",
            show_difference(base, compared, quality) if differs else "-",
            f"{np.mean([final(run, lambda entry: entry['psnr_all']) for run in runs]):.2f}",
            f"{np.mean([final(run, lambda entry: entry['loss']) for run in runs]):.4f}",
            show_difference(base, compared, lambda entry: entry["loss"]) if differs else "-",
            f"{100 * np.mean([final(run, precision) for run in runs]):.1f} %",
            show_speedup(ratios) if differs else "1",
            show_speedup(ratios, cost) if differs else "1",
            f"{seconds_per_step(runs):.3f}",
        )
        rows.append(cells)
    return markdown_table(header, rows)


def short(path: str) -> str:
    """Shorten the path of a layer of a U-Net.

    Example:
        >>> short("up_blocks.1.attentions.0.transformer_blocks.0.attn1")
        'up 1.0'
    """
    parts = path.split(".")
    numbers = [part for part in parts[1:] if part.isdigit()]
    kept = numbers[: 1 if parts[0].startswith("mid") else 2]
    kind = ", temporal" if "temporal" in path else ""
    return f"{parts[0].partition('_')[0]} {'.'.join(kept)}{kind}"


PANELS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "PSNR at high noise, covisible pixels (dB)": quality,
    "denoising loss": lambda entry: float(entry["loss"]),
    "attention precision within 1 token (%)": lambda entry: 100 * precision(entry),
}


def draw_curves(subjects: Mapping[str, Mapping[str, Sequence[Run]]], title: str) -> Figure:
    """Draw a row per subject: three figures against steps, the first also against seconds; bands span the seeds."""
    columns = len(PANELS) + 1
    figure = Figure(figsize=(3.7 * columns, 2.7 * len(subjects) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(subjects), columns, squeeze=False)
    for row, (subject, results) in zip(axes, subjects.items(), strict=True):
        shown = {arm: runs for arm, runs in results.items() if arm in COLOURS}
        for axis, (name, value) in zip(row, PANELS.items(), strict=False):
            for arm, runs in shown.items():
                draw_band(axis, arm, runs, value, 1.0)
            axis.set_title(f"{subject}:\n{name}", fontsize=8)
            axis.set_xlabel("steps", fontsize=8)
        for arm, runs in shown.items():
            draw_band(row[-1], arm, runs, quality, seconds_per_step(runs))
        row[-1].set_title(f"{subject}:\n{next(iter(PANELS))}", fontsize=8)
        row[-1].set_xlabel("seconds of training", fontsize=8)
        row[0].legend(fontsize=6)
        for axis in row:
            axis.tick_params(labelsize=7)
    return figure


def draw_band(
    axis: Axes, arm: str, runs: Sequence[Run], value: Callable[[Mapping[str, Any]], float], unit: float
) -> None:
    """Draw the mean of an arm's seeds over its span; `unit` is what a step counts on the axis."""
    steps = [entry["step"] * unit for entry in runs[0]["validations"]]
    values = np.array([[value(entry) for entry in run["validations"]] for run in runs])
    axis.plot(steps, values.mean(0), color=COLOURS[arm], label=arm_name(arm, runs), linewidth=1.2)
    axis.fill_between(steps, values.min(0), values.max(0), color=COLOURS[arm], alpha=0.15, linewidth=0)
