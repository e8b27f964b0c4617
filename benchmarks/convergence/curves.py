"""Pictures of the study: one row of small panels for all families, and the curves of every arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.convergence.runs import Measure, Run, arm_name, common_seeds, loss, precision, quality, seconds_per_step

__all__ = ["FAMILY_ARMS", "draw_curves", "draw_families"]

# Okabe and Ito's colors, which readers with any color vision can tell apart; the lines of the first figure differ in
# their dashes as well.
COLORS = {
    "none": "#000000",
    "cameo": "#D55E00",
    "linear": "#E69F00",
    "other_scene": "#0072B2",
    "random": "#999999",
    "wrong_layer": "#CC79A7",
    "repa": "#009E73",
}
BAND = "line: mean over the seeds; band: lowest to highest seed"
# Inches of the first figure: 830 pixels, the width of a page, at 100 pixels per inch.
PAGE_WIDTH = 8.3
# Role in the first figure: legend, color, line style, line width.
ROLES = {
    "none": ("without CAMEO", "#000000", "-", 1.3),
    "shown": ("CAMEO", "#D55E00", "-", 2.0),
    "other_scene": ("with another scene's matches (control)", "#0072B2", (0, (3, 1.2)), 1.3),
}
FAMILY_ARMS = tuple(ROLES)


def draw_families(panels: Mapping[str, Mapping[str, Sequence[Run]]], notes: Mapping[str, str]) -> Figure:
    """Draw one row of panels, one per family: covisible PSNR against steps of three arms, with bands over the seeds.

    Args:
        panels: title of a family to the runs of `FAMILY_ARMS`; only seeds that all of its arms have are drawn.
        notes: title of a family to a line below the title, such as its gain.
    """
    figure = Figure(figsize=(PAGE_WIDTH, 2.35), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, arms) in zip(axes, panels.items(), strict=True):
        seeds = common_seeds(runs for runs in arms.values() if runs)
        for role, (label, color, style, width) in ROLES.items():
            if runs := [run for run in arms.get(role, ()) if run["seed"] in seeds]:
                draw_band(
                    axis,
                    steps_of(runs),
                    curves_of(runs, quality),
                    color=color,
                    label=label,
                    linestyle=style,
                    linewidth=width,
                )
        axis.set_title(title, fontsize=8.5, fontweight="bold", pad=15)
        axis.text(0.5, 1.03, notes.get(title, ""), transform=axis.transAxes, ha="center", va="bottom", fontsize=7)
        axis.tick_params(labelsize=7, pad=1.5, length=2)
        axis.locator_params(axis="x", nbins=3)
        axis.locator_params(axis="y", nbins=5)
        axis.grid(color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("PSNR where the\nreference sees (dB)", fontsize=7.5)
    drawn: dict[str, Any] = {}
    for axis in axes:
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, line)
    order = [label for label, *_ in ROLES.values() if label in drawn]
    figure.legend(
        [drawn[label] for label in order],
        order,
        loc="outside upper center",
        ncols=3,
        fontsize=8,
        frameon=False,
        handlelength=2.6,
    )
    figure.supxlabel(f"training steps ({BAND})", fontsize=7.5)
    return figure


def draw_curves(subjects: Mapping[str, Mapping[str, Sequence[Run]]], layers: Mapping[str, str], title: str) -> Figure:
    """Draw a row per subject: three figures against steps, the first also against seconds; bands span the seeds.

    Args:
        subjects: title of a subject to the runs of its arms.
        layers: title of a subject to the layer whose attention is read in arms that do not supervise it.
        title: line above all.
    """
    figure = Figure(figsize=(14.8, 2.7 * len(subjects) + 0.4), layout="constrained")
    figure.suptitle(f"{title}; {BAND}", fontsize=10)
    axes = figure.subplots(len(subjects), 4, squeeze=False)
    for row, (subject, results) in zip(axes, subjects.items(), strict=True):
        shown = {arm: runs for arm, runs in results.items() if arm in COLORS}
        draw = [
            ("PSNR at high noise, covisible pixels (dB)", "steps"),
            ("denoising loss", "steps"),
            ("attention precision within 1 token (%)", "steps"),
            ("PSNR at high noise, covisible pixels (dB)", "seconds of training"),
        ]
        for axis, (name, unit) in zip(row, draw, strict=True):
            axis.set_title(f"{subject}:\n{name}", fontsize=8)
            axis.set_xlabel(unit, fontsize=8)
            axis.tick_params(labelsize=7)
        for arm, runs in shown.items():
            line = partial(draw_band, color=COLORS[arm], label=arm_name(arm, runs), linewidth=1.2)
            found = [[100 * precision(run, entry, layers[subject]) for entry in run["validations"]] for run in runs]
            line(row[0], steps_of(runs), curves_of(runs, quality))
            line(row[1], steps_of(runs), curves_of(runs, loss))
            line(row[2], steps_of(runs), found)
            line(row[3], steps_of(runs) * seconds_per_step(runs), curves_of(runs, quality))
        row[0].legend(fontsize=6)
    return figure


def steps_of(runs: Sequence[Run]) -> np.ndarray:
    """Steps of the validations, which are the same in all runs of an arm."""
    return np.array([entry["step"] for entry in runs[0]["validations"]])


def curves_of(runs: Sequence[Run], figure: Measure) -> list[list[float]]:
    """Values of a figure over the validations of each run."""
    return [[figure(entry) for entry in run["validations"]] for run in runs]


def draw_band(axis: Axes, steps: np.ndarray, curves: Sequence[Sequence[float]], *, color: str, **line: Any) -> None:
    """Draw the mean of several curves over the span between the lowest and the highest."""
    values = np.array(curves)
    axis.plot(steps, values.mean(0), color=color, **line)
    axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
