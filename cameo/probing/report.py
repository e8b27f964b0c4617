"""The table and the picture of a probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from cameo.errors import unknown_name
from cameo.probing.result import NEAR, ProbeResult, RankedLayer
from cameo.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["probe_figure", "probe_table"]

NOT_MEASURED = "-"
PANEL_WIDTH = 2.6  # inches
READOUT_TITLES = {"mean": "mean of the heads", "best_head": "best head", "through_head": "through the alignment head"}


def probe_table(probe: ProbeResult, columns: Mapping[str, Mapping[str, str]]) -> str:
    """Format the table of `LayerProbe.table`."""
    limits = [f"within {limit} token{'' if limit == 1 else 's'}" for limit in probe.within if limit != NEAR]
    header = ["rank", "layer", "module", "tokens", "skill within 1 [95 %]", "behind the first [95 %]", *limits]
    header += ["chance within 1", "best head within 1"]
    has_trained_head = any("through_head" in layer.hits for layer in probe.layers)
    header += ["through the head within 1"] if has_trained_head else []
    header += [f"within 1, {low:g}-{high:g} deg" for low, high in probe.angle_bins]
    header += ["within 2 cm (of the true tokens)"] if NEAR in probe.within else []
    rows = [_row(probe, rank, ranked, has_trained_head) for rank, ranked in enumerate(probe.ranking, start=1)]
    header += columns
    for row, ranked in zip(rows, probe.ranking, strict=True):
        row += [texts.get(ranked.path, NOT_MEASURED) for texts in columns.values()]
    parts = [markdown_table(header, rows), _caption(probe)]
    ranked_paths = {ranked.path for ranked in probe.ranking}
    not_ranked = {
        layer: layer.reason or "chance is already 1" for layer in probe.layers if layer.path not in ranked_paths
    }
    unsupervised = {
        layer: layer.unsupervised for layer in probe.layers if layer.path in ranked_paths and layer.unsupervised
    }
    for title, reasons in (("Not ranked", not_ranked), ("Cannot be supervised", unsupervised)):
        if reasons:
            lines = [f"- {layer.index} `{layer.path}`: {reason}" for layer, reason in reasons.items()]
            parts.append(f"{title}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _row(probe: ProbeResult, rank: int, ranked: RankedLayer, has_trained_head: bool) -> list[str]:
    path, layer = ranked.path, probe.layer(ranked.path)
    finds_views = layer.reach == "cell"
    row = [str(rank), str(ranked.index), path, layer.tokens]
    row += [f"{ranked.skill:.3f} {_interval(ranked.interval)}".strip(), _interval(ranked.behind) or NOT_MEASURED]
    for distance in probe.within:
        if distance != NEAR:
            measured = not finds_views or distance == 1
            row.append(_percent(probe.precision(path, within=distance)) if measured else NOT_MEASURED)
    row.append(_percent(probe.chance(path)))
    row.append(_percent(probe.precision(path, readout="best_head")))
    if has_trained_head:
        measured = "through_head" in layer.hits
        row.append(_percent(probe.precision(path, readout="through_head")) if measured else NOT_MEASURED)
    row += [_percent(probe.precision(path, angle_bin=number)) for number in range(len(probe.angle_bins))]
    if NEAR in probe.within:
        measured = not finds_views and layer.ceiling is not None
        row.append(
            f"{_percent(probe.precision(path, within=NEAR))} ({_percent(probe.ceiling(path))})"
            if measured
            else NOT_MEASURED
        )
    return row


def _caption(probe: ProbeResult) -> str:
    most = max((probe.pairs(ranked.path) for ranked in probe.ranking), default=0)
    levels = ", ".join(f"{level:g}" for level in probe.noise_levels)
    text = (
        f"{len(probe.samples)} samples of {len(probe.scene_names)} scenes, up to {most} matches per layer, at noise "
        f"levels {levels}. Precision: share of matches whose most-attended token of the other view, in the mean over "
        "heads, lies within so many tokens of the matched one. Skill: (precision - chance) / (1 - chance), where "
        "chance is the precision of uniform attention. Intervals: 95 %, over resampled scenes; where the second one "
        "contains 0, the layer cannot be told apart from the first, and with few scenes the intervals are too narrow. "
        "Best head: the head with most hits on these same samples; with many heads and few matches its precision is "
        "somewhat too high."
    )
    if any(layer.reach == "cell" for layer in probe.layers):
        text += " Where a query reaches one token of each view, precision is the share of queries whose most-attended "
        text += "view shows the same surface point."
    return text


def probe_figure(probe: ProbeResult, *, within: int | str, readout: str, kind: str) -> Figure:
    """Draw the picture of `LayerProbe.heat_map`."""
    from matplotlib.figure import Figure

    figures = {"precision": probe.precision, "chance": probe.chance, "skill": probe.skill}
    if kind not in figures:
        raise unknown_name("kind", kind, figures)
    layers = [layer for layer in probe.layers if layer.reason is None and readout in layer.hits]
    if not layers:
        raise ValueError(f"readout: no probed layer has {readout!r}")
    bins = enumerate(probe.angle_bins)
    panels = [(None, "all pairs"), *((number, f"{low:g}-{high:g} deg") for number, (low, high) in bins)]
    selection = {"within": within, "readout": readout}
    values = np.array(
        [
            [
                [
                    figures[kind](layer.path, noise_level=level, angle_bin=number, **selection)
                    for level in probe.noise_levels
                ]
                for layer in layers
            ]
            for number, _ in panels
        ],
        dtype=float,  # None, where there is no match, becomes NaN
    )
    highest = max(0.01, float(np.nanmax(np.abs(values)))) if np.isfinite(values).any() else 1.0
    colors = {"cmap": "RdBu_r", "vmin": -highest, "vmax": highest} if kind == "skill" else {"vmin": 0, "vmax": highest}
    figure = Figure(figsize=(PANEL_WIDTH * len(panels) + 1.2, 1.6 + 0.26 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, grid, (_, title) in zip(axes, values, panels, strict=True):
        image = axis.imshow(grid, aspect="auto", **colors)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("noise level", fontsize=8)
        axis.set_xticks(range(len(probe.noise_levels)), [f"{level:g}" for level in probe.noise_levels], fontsize=7)
        axis.set_facecolor("0.6")  # where there is no match
    first = probe.ranking[0].path if probe.ranking else None
    names = [f"{'* ' if layer.path == first else ''}{layer.index}  {layer.tokens}" for layer in layers]
    axes[0].set_yticks(range(len(layers)), names, fontsize=7)
    axes[0].set_ylabel("layer, tokens per view\n(* ranked first)", fontsize=8)
    distance = within if isinstance(within, str) else f"{within} token{'' if within == 1 else 's'}"
    bar = figure.colorbar(image, ax=list(axes), fraction=0.03)
    bar.set_label(f"{kind} within {distance},\n{READOUT_TITLES[readout]}", fontsize=8)
    way = ", layers as if inflated" if probe.inflate else ", within each view" if probe.own_view else ""
    name = f"{probe.backbone or 'model'}{way}"
    figure.suptitle(f"{name}: {len(probe.samples)} samples of {len(probe.scene_names)} scenes", fontsize=9)
    return figure


def _percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1%}"


def _interval(limits: tuple[float, float] | None) -> str:
    return "" if limits is None else f"[{limits[0]:.3f}, {limits[1]:.3f}]"
