"""A probe as a table and as a picture."""

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
PANEL = 2.6  # inches, width of a panel
SHOWN = {"mean": "mean of the heads", "best_head": "best head", "through_head": "through the alignment head"}


def probe_table(probe: ProbeResult, columns: Mapping[str, Mapping[str, str]]) -> str:
    """Format what `LayerProbe.table` shows."""
    limits = [f"within {limit} token{'' if limit == 1 else 's'}" for limit in probe.within if limit != NEAR]
    header = ["rank", "layer", "module", "tokens", "skill within 1 [95 %]", "behind the first [95 %]", *limits]
    header += ["chance within 1", "best head within 1"]
    through = any("through_head" in layer.hits for layer in probe.layers)
    header += ["through the head within 1"] if through else []
    bins = [f"{low:g}-{high:g} deg" for low, high in probe.angle_bins]
    header += [f"within 1, {name}" for name in bins]
    header += ["within 2 cm (of the true tokens)"] if NEAR in probe.within else []
    rows = [_row(probe, number, place, through) for number, place in enumerate(probe.ranking, start=1)]
    header += columns
    for row, place in zip(rows, probe.ranking, strict=True):
        row += [texts.get(place.path, NOT_MEASURED) for texts in columns.values()]
    parts = [markdown_table(header, rows), _caption(probe)]
    ranked = {place.path for place in probe.ranking}
    left = [layer for layer in probe.layers if layer.path not in ranked]
    if left:
        reasons = [f"- {layer.index} `{layer.path}`: {layer.reason or 'chance is already 1'}" for layer in left]
        parts.append("Not ranked:\n\n" + "\n".join(reasons))
    blocked = [layer for layer in probe.layers if layer.path in ranked and layer.unsupervised]
    if blocked:
        reasons = [f"- {layer.index} `{layer.path}`: {layer.unsupervised}" for layer in blocked]
        parts.append("Cannot be supervised:\n\n" + "\n".join(reasons))
    return "\n\n".join(parts)


def _row(probe: ProbeResult, number: int, place: RankedLayer, through: bool) -> list[str]:
    layer = probe.layer(place.path)
    cells = layer.reach == "cell"
    row = [str(number), str(place.index), place.path, layer.tokens]
    row += [f"{place.skill:.3f} {_interval(place.interval)}".strip(), _interval(place.behind) or NOT_MEASURED]
    for limit in probe.within:
        if limit != NEAR:
            shown = not cells or limit == 1
            row.append(_percent(probe.precision(place.path, within=limit)) if shown else NOT_MEASURED)
    row.append(_percent(probe.chance(place.path)))
    row.append(_percent(probe.precision(place.path, readout="best_head")))
    if through:
        present = "through_head" in layer.hits
        row.append(_percent(probe.precision(place.path, readout="through_head")) if present else NOT_MEASURED)
    row += [_percent(probe.precision(place.path, angle_bin=number)) for number in range(len(probe.angle_bins))]
    if NEAR in probe.within:
        known = not cells and layer.ceiling is not None
        precise = _percent(probe.precision(place.path, within=NEAR)) if known else NOT_MEASURED
        row.append(f"{precise} ({_percent(probe.ceiling(place.path))})" if known else NOT_MEASURED)
    return row


def _caption(probe: ProbeResult) -> str:
    counted = max((probe.pairs(place.path) for place in probe.ranking), default=0)
    levels = ", ".join(f"{level:g}" for level in probe.timesteps)
    text = (
        f"{len(probe.samples)} samples of {len(probe.scene_names)} scenes, up to {counted} pairs of tokens a layer, at "
        f"time steps {levels} of the last one. Precision: share of visible query tokens whose most-attended token of "
        "the other view, in the mean over heads, lies within so many tokens of the true match. Skill: (precision - "
        "chance) / (1 - chance), where chance is uniform attention. Intervals: scenes resampled; a layer is not told "
        "apart from the first where its second interval holds 0, and with few scenes the intervals are too narrow. "
        "Best head: the head of most hits on these same samples, so with many heads and few pairs somewhat too high."
    )
    if any(layer.reach == "cell" for layer in probe.layers):
        text += " Where a query reaches one token of each view, precision is the share that look at a view which shows "
        text += "the same surface point."
    return text


def probe_figure(probe: ProbeResult, *, within: int | str, readout: str, kind: str) -> Figure:
    """Draw what `LayerProbe.heat_map` shows."""
    from matplotlib.figure import Figure

    figures = {"precision": probe.precision, "chance": probe.chance, "skill": probe.skill}
    if kind not in figures:
        raise unknown_name("kind", kind, figures)
    layers = [layer for layer in probe.layers if layer.reason is None and readout in layer.hits]
    if not layers:
        raise ValueError(f"readout: no probed layer has {readout!r}")
    panels = [(None, "all pairs"), *((at, f"{low:g}-{high:g} deg") for at, (low, high) in enumerate(probe.angle_bins))]
    selection = {"within": within, "readout": readout}
    values = np.array(
        [
            [
                [figures[kind](layer.path, timestep=level, angle_bin=at, **selection) for level in probe.timesteps]
                for layer in layers
            ]
            for at, _ in panels
        ],
        dtype=float,  # None, where there is no pair, is NaN
    )
    top = max(0.01, float(np.nanmax(np.abs(values)))) if np.isfinite(values).any() else 1.0
    colours = {"cmap": "RdBu_r", "vmin": -top, "vmax": top} if kind == "skill" else {"vmin": 0, "vmax": top}
    figure = Figure(figsize=(PANEL * len(panels) + 1.2, 1.6 + 0.26 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, grid, (_, title) in zip(axes, values, panels, strict=True):
        image = axis.imshow(grid, aspect="auto", **colours)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("time step", fontsize=8)
        axis.set_xticks(range(len(probe.timesteps)), [f"{level:g}" for level in probe.timesteps], fontsize=7)
        axis.set_facecolor("0.6")  # seen where there is no pair
    first = probe.ranking[0].path if probe.ranking else None
    names = [f"{'* ' if layer.path == first else ''}{layer.index}  {layer.tokens}" for layer in layers]
    axes[0].set_yticks(range(len(layers)), names, fontsize=7)
    axes[0].set_ylabel("layer, tokens per view\n(* ranked first)", fontsize=8)
    distance = within if isinstance(within, str) else f"{within} token{'' if within == 1 else 's'}"
    bar = figure.colorbar(image, ax=list(axes), fraction=0.03)
    bar.set_label(f"{kind} within {distance},\n{SHOWN[readout]}", fontsize=8)
    name = f"{probe.backbone or 'model'}{', layers as if joined' if probe.inflate else ''}"
    figure.suptitle(f"{name}: {len(probe.samples)} samples of {len(probe.scene_names)} scenes", fontsize=9)
    return figure


def _percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.1%}"


def _interval(limits: tuple[float, float] | None) -> str:
    return "" if limits is None else f"[{limits[0]:.3f}, {limits[1]:.3f}]"
