"""A result of the shared evaluation as a Markdown table, as plots, and as the files of an output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from cameo.evaluation.generated import SampledViews
from cameo.evaluation.pictures import comparison_figure, save_figure
from cameo.files import write_atomically
from cameo.tables import markdown_table

__all__ = [
    "SECTIONS",
    "attention_figure",
    "denoising_figure",
    "describe",
    "is_of_data",
    "number",
    "result_table",
    "sample_figure",
    "scene_figure",
    "write_result",
]

SECTIONS = ("novel_views", "attention", "consistency", "denoising")
# For each figure: its title, whether more (+) or less (-) is better or neither, and its number format.
FIGURES: dict[str, dict[str, tuple[str, str, str]]] = {
    "novel_views": {
        "psnr": ("PSNR of generated views (dB)", "+", ".2f"),
        "psnr_covisible": ("PSNR of generated views, pixels a reference sees (dB)", "+", ".2f"),
        "ssim": ("SSIM of generated views", "+", ".3f"),
        "lpips_alex": ("LPIPS of generated views, AlexNet", "-", ".3f"),
        "lpips_vgg": ("LPIPS of generated views, VGG", "-", ".3f"),
        "lpips_squeeze": ("LPIPS of generated views, SqueezeNet", "-", ".3f"),
        "fid": ("FID of generated views", "-", ".2f"),
    },
    "consistency": {
        "warp_error": ("color error of generated views warped onto each other", "-", ".4f"),
        "warp_error_truth": ("color error of true views warped onto each other: the floor", "", ".4f"),
        "warp_psnr": ("PSNR of generated views warped onto each other (dB)", "+", ".2f"),
        "warp_psnr_truth": ("PSNR of true views warped onto each other: the ceiling (dB)", "", ".2f"),
        "epipolar_consistent": ("share of view pairs with consistent epipolar geometry (TSED)", "+", ".1%"),
        "epipolar_distance": ("median symmetric epipolar distance of SIFT matches (px)", "-", ".2f"),
    },
    "denoising": {
        "loss": ("denoising loss, fixed noise", "-", ".4f"),
        "loss_low": ("denoising loss, low noise", "-", ".4f"),
        "loss_mid": ("denoising loss, mid noise", "-", ".4f"),
        "loss_high": ("denoising loss, high noise", "-", ".4f"),
        "psnr_covisible": ("PSNR of predicted clean image at high noise, pixels a reference sees (dB)", "+", ".2f"),
        "psnr_all": ("PSNR of predicted clean image at high noise, all target pixels (dB)", "+", ".2f"),
    },
}
READOUTS = {
    "mean": ("attention, mean of heads", "+"),
    "best_head": ("attention, best head", "+"),
    "through_head": ("attention, through the alignment head", "+"),
    "chance": ("by chance", ""),
    "ceiling": ("at best, since tokens are larger than that", ""),
}
MISSING = "-"


def describe(section: str, metric: str) -> tuple[str, str]:
    """Return the title of a figure, with an arrow in the direction that is better, and its number format.

    Example:
        >>> describe("denoising", "loss_low")
        ('denoising loss, low noise ↓', '.4f')
        >>> describe("attention", "up_blocks.0.attn1 mean@1")
        ('attention, mean of heads, within 1 token ↑ `up_blocks.0.attn1`', '.1%')
    """
    if section != "attention":
        title, better, digits = FIGURES.get(section, {}).get(metric, (metric, "", ".4g"))
        return f"{title}{_arrow(better)}", digits
    path, _, figure = metric.rpartition(" ")
    readout, _, within = figure.partition("@")
    title, better = READOUTS.get(readout, (readout, ""))
    return f"{title}, {_distance_title(within)}{_arrow(better)} `{path}`", ".1%"


def is_of_data(section: str, metric: str) -> bool:
    """Whether a figure depends on the samples only and is the same for every model: chance, or a bound.

    Example:
        >>> is_of_data("consistency", "warp_error_truth"), is_of_data("consistency", "warp_error")
        (True, False)
    """
    if section == "attention":
        return READOUTS.get(metric.rpartition(" ")[2].partition("@")[0], ("", "+"))[1] == ""
    return metric in FIGURES.get(section, {}) and not FIGURES[section][metric][1]


def _arrow(better: str) -> str:
    return {"+": " ↑", "-": " ↓"}.get(better, "")


def _distance_title(within: str) -> str:
    if within == "view":
        return "view that shows the point"
    if not within.isdecimal():
        return f"within {within.replace('cm', ' cm')}"
    return {"0": "exact token", "1": "within 1 token"}.get(within, f"within {within} tokens")


def number(value: float | None, digits: str, *, sign: bool = False) -> str:
    """Format the value of a figure; None becomes a dash, and a difference of shares is in percentage points.

    Example:
        >>> number(0.25, ".1%"), number(0.25, ".1%", sign=True), number(None, ".2f")
        ('25.0%', '+25.0 pp', '-')
    """
    if value is None:
        return MISSING
    if sign and digits.endswith("%"):
        return f"{100 * value:+{digits[:-1]}f} pp"
    return format(value, f"+{digits}" if sign else digits)


def result_table(result: Mapping[str, Any], *, name: str = "value") -> str:
    """Format a result as a Markdown table, with the number of samples behind each figure; below it the notes."""
    sections = result["sections"]
    rows, notes = [], []
    for section in SECTIONS:
        figures = sections[section]
        notes += [f"- {section}, {figure}: {note}" for figure, note in figures["notes"].items()]
        for metric, value in figures["mean"].items() if section != "attention" else ():
            title, digits = describe(section, metric)
            count = len(figures["per_sample"].get(metric, ())) or MISSING
            rows.append([title, number(value, digits), count])
    tables = [markdown_table(["", name, "samples"], rows), *_attention_table(sections["attention"]["mean"])]
    return "\n\n".join([*tables, "\n".join(notes)]).rstrip()


def _attention_table(mean: Mapping[str, float | None]) -> list[str]:
    """The table of the attention, a row per layer and readout, a column per distance; none if none was measured."""
    if not mean:
        return []
    rows: dict[tuple[str, str], dict[str, float | None]] = {}
    for metric, value in mean.items():
        path, _, figure = metric.rpartition(" ")
        readout, _, within = figure.partition("@")
        rows.setdefault((path, readout), {})[within] = value
    columns = list(dict.fromkeys(within for values in rows.values() for within in values))
    cells = []
    for (path, readout), values in rows.items():
        title = READOUTS[readout][0].removeprefix("attention, ")
        cells.append([f"`{path}`, {title}", *(number(values.get(within), ".1%") for within in columns)])
    return [markdown_table(["attention to the true match", *map(_distance_title, columns)], cells)]


def denoising_figure(result: Mapping[str, Any]) -> Figure:
    """Draw the denoising loss and the PSNR of the predicted clean image over the noise level."""
    by_level = result["sections"]["denoising"]["details"]["by_level"]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels, losses = _curve(by_level["loss"])
    left.plot(levels, losses, marker=".")
    left.set_ylabel("denoising loss")
    for label, name in (("pixels a reference sees", "psnr_covisible"), ("all target pixels", "psnr_all")):
        if name in by_level:
            right.plot(*_curve(by_level[name]), marker=".", label=label)
    right.set_ylabel("PSNR of predicted clean image (dB)")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("noise level (share of the last timestep)")
    return figure


def _curve(by_level: Mapping[str, float]) -> tuple[list[float], list[float]]:
    levels = sorted(by_level, key=float)
    return [float(level) for level in levels], [by_level[level] for level in levels]


def attention_figure(result: Mapping[str, Any], *, readout: str = "mean") -> Figure | None:
    """Draw the precision within one token over the angle between the views and over the noise level, per layer.

    Dotted lines show the chance of uniform attention. None if no attention was measured.
    """
    layers = {
        path: readouts[readout]
        for path, readouts in result["sections"]["attention"]["details"].items()
        if readout in readouts
    }
    if not layers:
        return None
    figure = Figure(figsize=(9, 3.4 + 0.12 * len(layers)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, (path, measured) in enumerate(layers.items()):
        color = f"C{index % 10}"
        bins = {tick: angle_bin for tick, angle_bin in enumerate(measured["by_angle"]) if angle_bin["pairs"]}
        precision, chance = ([angle_bin[name] for angle_bin in bins.values()] for name in ("precision", "chance"))
        left.plot(list(bins), precision, marker="o", color=color, label=path)
        left.plot(list(bins), chance, linestyle=":", color=color)
        by_level = {level: value for level, value in measured["by_level"].items() if value is not None}
        right.plot(*_curve(by_level), marker=".", color=color)
    limits = [angle_bin["degrees"] for angle_bin in next(iter(layers.values()))["by_angle"]]
    left.set_xticks(range(len(limits)), [f"{low:g}-{high:g}" for low, high in limits])
    left.set_ylim(bottom=0)
    left.set_xlabel("angle between the views (degrees)")
    left.set_ylabel("attention precision within 1 token\n(dotted: by chance)")
    right.set_xlabel("noise level (share of the last timestep)")
    figure.legend(loc="outside lower center", fontsize=7, ncols=1 if len(layers) < 6 else 2)
    return figure


def scene_figure(result: Mapping[str, Any]) -> Figure | None:
    """Draw one point per sample: PSNR of the generated views over their color error when warped onto each other.

    None where nothing was generated.
    """
    psnr = result["sections"]["novel_views"]["per_sample"].get("psnr", {})
    error = result["sections"]["consistency"]["per_sample"].get("warp_error", {})
    floor = result["sections"]["consistency"]["per_sample"].get("warp_error_truth", {})
    keys = [key for key in psnr if key in error]
    if not keys:
        return None
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.scatter([error[key] for key in keys], [psnr[key] for key in keys], label="generated views")
    for key in keys:
        axis.plot([floor[key], error[key]], [psnr[key], psnr[key]], color="lightgrey", linewidth=0.8, zorder=0)
    axis.scatter([floor[key] for key in keys], [psnr[key] for key in keys], marker="|", label="true views")
    axis.set_xlabel("color error of views warped onto each other")
    axis.set_ylabel("PSNR of generated views (dB)")
    axis.legend(fontsize=8)
    return figure


def sample_figure(sampled: SampledViews, *, samples: int = 4) -> Figure:
    """Draw references, truth and generated view of the first samples."""
    batches, images = sampled.batches[:samples], torch.cat(sampled.images[:samples])
    truth = torch.cat([batch["images"] for batch in batches])
    batch = {"images": truth, "num_reference_views": batches[0]["num_reference_views"]}
    return comparison_figure(batch, {"generated": images}, samples=len(batches))


def write_result(
    result: Mapping[str, Any], folder: str | Path, *, sampled: SampledViews | None = None, name: str = "value"
) -> list[Path]:
    """Write `result.json`, `table.md` and the plots; plots of an earlier result that this one has not are removed."""
    folder = Path(folder)
    figures = {
        "denoising.png": denoising_figure(result),
        "attention.png": attention_figure(result),
        "scenes.png": scene_figure(result),
        "samples.png": sample_figure(sampled) if sampled and sampled.batches else None,
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "table.md", result_table(result, name=name) + "\n")
    written = [folder / "result.json", folder / "table.md"]
    for file, figure in figures.items():
        if figure is None:
            (folder / file).unlink(missing_ok=True)
        else:
            written.append(save_figure(figure, folder / file))
    return written
