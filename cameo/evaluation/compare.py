"""Set results of the shared evaluation side by side: differences over common scenes, with their uncertainty.

Two models are measured on the same samples with the same noise, so their differences scatter less than their values.
What is drawn anew by the bootstrap is the scene: samples of one scene are alike and are averaged first.
"""

from __future__ import annotations

import json
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cameo.errors import DataError
from cameo.evaluation.report import SECTIONS, describe, is_of_data, number
from cameo.probing.bootstrap import paired_bootstrap, scene_of
from cameo.tables import markdown_table

__all__ = [
    "Comparison",
    "compare_results",
    "comparison_figure",
    "comparison_table",
    "load_result",
    "name_results",
]

FEW_SCENES = 10
TITLE_WIDTH = 46  # characters above a panel
# Settings that do not change what is measured.
FREE_SETTINGS = frozenset({"batch_size"})
# The same pixels decoded or rendered on another machine may differ in their last bits.
SAME_SAMPLE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One figure of two runs over their common scenes.

    Attributes:
        section, metric: where the figure stands in the result files.
        baseline, other: mean over the common units of each run.
        difference: `other - baseline`; `low` and `high` bound its 95 % interval, NaN with a single unit.
        units: how many scenes were compared, or samples where there is one scene.
        unit: "scene" or "sample".
    """

    section: str
    metric: str
    baseline: float
    other: float
    difference: float
    low: float
    high: float
    units: int
    unit: str

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out, over enough units that it can be trusted."""
        return self.units >= FEW_SCENES and (self.low > 0 or self.high < 0)


def load_result(path: str | Path) -> dict[str, Any]:
    """Read a result file of the shared evaluation, `result.json` or the folder that holds it.

    Raises:
        DataError: if the file is missing, is not JSON, or is no such result; names the path.
    """
    path = Path(path)
    path = path / "result.json" if path.is_dir() else path
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; recipes/evaluate.py writes result.json") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    missing = [name for name in ("settings", "data", "sections") if not isinstance(result, dict) or name not in result]
    if missing:
        raise DataError(f"{path}: is no result of recipes/evaluate.py, {', '.join(missing)} missing")
    return result


def compare_results(
    baseline: Mapping[str, Any], other: Mapping[str, Any], *, resamples: int = 10_000, seed: int = 0
) -> list[Comparison]:
    """Compare two results of `evaluate` figure by figure, over the scenes in which both have a value.

    Example:
        >>> def result(values):
        ...     section = {"mean": {"loss": 0.0}, "per_sample": {"loss": values}}
        ...     return {"settings": {"seed": 1}, "data": {"samples": {}}, "sections": {"denoising": section}}
        >>> values = {f"room-{n}/0-1": 0.1 * n for n in range(12)}
        >>> better = {key: value - 0.01 for key, value in values.items()}
        >>> found = compare_results(result(values), result(better))[0]
        >>> found.metric, round(found.difference, 4), found.units, found.is_clear
        ('loss', -0.01, 12, True)

    Warns where fewer than 10 scenes are common, and of two backbones. Figures that only one of the two has are left
    out.

    Raises:
        ValueError: if settings or data differ, naming the field, or no sample is common.
    """
    _check_comparable(baseline, other)
    found = []
    for section, metric, left, right in _common(baseline["sections"], other["sections"]):
        unit, first, second = _units(left, right)
        if not first:
            continue
        if len(first) > 1:
            difference, low, high = paired_bootstrap(first, second, resamples=resamples, seed=seed)
        else:
            difference, low, high = second[0] - first[0], math.nan, math.nan
        means = float(np.mean(first)), float(np.mean(second))
        found.append(Comparison(section, metric, *means, difference, low, high, len(first), unit))
    if not found:
        raise ValueError("results: no figure is common to both; evaluate both with the same sections and layers")
    if any(one.unit == "sample" for one in found):
        warnings.warn(
            "all samples are of one scene, so the intervals are over its samples and say nothing about other scenes",
            stacklevel=2,
        )
    elif (fewest := min(one.units for one in found)) < FEW_SCENES:
        warnings.warn(
            f"{fewest} common scenes for some figures: with fewer than {FEW_SCENES} the intervals are too narrow; "
            "raise num_samples and num_validation_scenes",
            stacklevel=2,
        )
    return found


def _check_comparable(baseline: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    ours, theirs = (part.get("run", {}).get("backbone") for part in (baseline, other))
    if ours and theirs and ours != theirs:
        warnings.warn(
            f"results of two backbones, {ours} and {theirs}: each predicts another target, so their denoising losses "
            "do not compare",
            stacklevel=3,
        )
    for part, cure in (
        ("settings", "evaluate both with the same evaluation settings"),
        ("data", "evaluate both on the same data"),
    ):
        left = {name: value for name, value in baseline[part].items() if name != "samples"}
        right = {name: value for name, value in other[part].items() if name != "samples"}
        for name in sorted(left.keys() | right.keys()):
            if name not in FREE_SETTINGS and left.get(name) != right.get(name):
                raise ValueError(
                    f"results: cannot be compared, {part}.{name} is {left.get(name)!r} in one and "
                    f"{right.get(name)!r} in the other; {cure}"
                )
    ours, theirs = baseline["data"]["samples"], other["data"]["samples"]
    for key in sorted(ours.keys() & theirs.keys()):
        if not np.allclose(ours[key], theirs[key], rtol=SAME_SAMPLE, atol=SAME_SAMPLE):
            raise ValueError(
                f"results: cannot be compared, sample {key} is another one in each (mean colour and depth "
                f"{ours[key]} and {theirs[key]}); evaluate both on the same data"
            )
    if ours and theirs and not ours.keys() & theirs.keys():
        raise ValueError(
            f"results: no sample is common, one starts with {min(ours)!r} and the other with {min(theirs)!r}; "
            "evaluate both on the same data"
        )


def _common(
    left: Mapping[str, Any], right: Mapping[str, Any]
) -> Iterator[tuple[str, str, dict[str, float], dict[str, float]]]:
    for section in SECTIONS:
        ours, theirs = (part.get(section, {}).get("per_sample", {}) for part in (left, right))
        for metric in ours:
            if metric in theirs and not is_of_data(section, metric):
                yield section, metric, ours[metric], theirs[metric]


def _units(left: Mapping[str, float], right: Mapping[str, float]) -> tuple[str, list[float], list[float]]:
    """Return the kind of unit and its values in both: scenes, or samples where there is only one scene."""
    keys = [key for key in left if key in right]
    scenes: dict[str, list[str]] = {}
    for key in keys:
        scenes.setdefault(scene_of(key), []).append(key)
    groups, unit = (list(scenes.values()), "scene") if len(scenes) != 1 else ([[key] for key in keys], "sample")
    first, second = ([float(np.mean([part[key] for key in group])) for group in groups] for part in (left, right))
    return unit, first, second


def comparison_table(results: Mapping[str, Mapping[str, Any]], *, resamples: int = 10_000, seed: int = 0) -> str:
    """Format results side by side as Markdown; each but the first with its difference from the first.

    Args:
        results: name of a run to what `evaluate` returned or `load_result` read; at least two.
        resamples, seed: of `paired_bootstrap`.

    Raises:
        ValueError: see `compare_results`.
    """
    found = _against_first(results, resamples, seed)
    (first, *_), others = results, list(found)
    heads = ["", first, *[head for name in others for head in (name, "difference [95 %]", "n")]]
    rows = []
    several = ""
    for section, metric in _rows(found):
        title, form = describe(section, metric)
        at = {name: found[name].get((section, metric)) for name in others}
        baselines = dict.fromkeys(number(one.baseline, form) for one in at.values() if one)
        cells = [title, " / ".join(baselines)]
        if len(baselines) > 1:
            several = f" Where {first} has several means, it has different values in common with each of the others."
        for one in at.values():
            cells += ["-", "-", "-"] if one is None else [number(one.other, form), _interval(one, form), str(one.units)]
        rows.append(cells)
    units = {one.unit for part in found.values() for one in part.values()}
    caption = (
        f"Means over common {' and '.join(f'{unit}s' for unit in sorted(units))} (n). Difference from {first} with a "
        f"paired bootstrap interval over them ({resamples:,} resamples, seed {seed}); bold where it leaves zero out "
        f"and n is at least {FEW_SCENES}. Intervals hold figure by figure: of many one in twenty is bold by chance."
        f"{several}"
    )
    return f"{markdown_table(heads, rows)}\n\n{caption}"


def comparison_figure(
    results: Mapping[str, Mapping[str, Any]], *, resamples: int = 10_000, seed: int = 0, columns: int = 4
) -> Figure:
    """Draw the differences from the first result with their intervals, one panel per figure."""
    found = _against_first(results, resamples, seed)
    rows, first = _rows(found), next(iter(results))
    lines = math.ceil(len(rows) / columns)
    height = lines * (1.2 + 0.25 * len(found)) + 0.4
    figure = Figure(figsize=(3.4 * min(columns, len(rows)), height), layout="constrained")
    axes = figure.subplots(lines, min(columns, len(rows)), squeeze=False)
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    for axis, (section, metric) in zip(axes.flat, rows, strict=False):
        title, _ = describe(section, metric)
        for place, (name, part) in enumerate(found.items()):
            if one := part.get((section, metric)):
                axis.plot([one.low, one.high], [place, place], color=f"C{place}", linewidth=2)
                axis.plot(one.difference, place, "o", color=f"C{place}", label=name)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(found)), list(found), fontsize=7)
        axis.set_ylim(len(found) - 0.5, -0.5)
        axis.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=7)
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(axis="x", labelsize=7)
    units = sorted({f"{one.unit}s" for part in found.values() for one in part.values()})
    figure.suptitle(f"difference from {first}, 95 % interval over {' or '.join(units)}", fontsize=9)
    return figure


def _against_first(
    results: Mapping[str, Mapping[str, Any]], resamples: int, seed: int
) -> dict[str, dict[tuple[str, str], Comparison]]:
    if len(results) < 2:
        raise ValueError(f"results: expected at least two runs to compare, got {len(results)}")
    (_, baseline), *others = results.items()
    return {
        name: {
            (one.section, one.metric): one for one in compare_results(baseline, result, resamples=resamples, seed=seed)
        }
        for name, result in others
    }


def _rows(found: Mapping[str, Mapping[tuple[str, str], Comparison]]) -> list[tuple[str, str]]:
    rows = dict.fromkeys(row for part in found.values() for row in part)
    return sorted(rows, key=lambda row: SECTIONS.index(row[0]))


def _interval(one: Comparison, form: str) -> str:
    if math.isnan(one.low):
        return number(one.difference, form, sign=True)
    shown = f"{number(one.difference, form, sign=True)} [{number(one.low, form, sign=True)}, "
    shown += f"{number(one.high, form, sign=True)}]"
    return f"**{shown}**" if one.is_clear else shown


def name_results(paths: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Read result files under names that tell them apart: that of the file or of its folder.

    Raises:
        DataError: see `load_result`.
        ValueError: if the same file is given twice.
    """
    files = [Path(path) for path in paths]
    files = [path / "result.json" if path.is_dir() else path for path in files]
    if len({path.resolve() for path in files}) < len(files):
        raise ValueError(f"results: expected different files, got {', '.join(map(str, files))}")
    for names in ([path.stem for path in files], [path.parent.name for path in files], [str(path) for path in files]):
        if len(set(names)) == len(files):
            break
    return {name: load_result(path) for name, path in zip(names, files, strict=True)}
