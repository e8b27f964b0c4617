"""Compare results of the shared evaluation: differences over common scenes, with confidence intervals.

Two models are measured on the same samples with the same noise, so their differences vary less than their values. The
bootstrap resamples scenes: samples of one scene are alike and are averaged first.
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
# Settings that may differ between two results, since they do not change what is measured.
FREE_SETTINGS = frozenset({"batch_size"})
# The same image, decoded or rendered on another machine, may differ in its last bits.
SAMPLE_TOLERANCE = 1e-3

FigureName = tuple[str, str]  # section and metric


@dataclass(frozen=True)
class Comparison:
    """One figure of two runs over their common scenes.

    Attributes:
        section, metric: section and name of the figure in the result files.
        baseline, other: mean of each run over the common units.
        difference: `other - baseline`.
        low, high: ends of its 95 % interval; NaN with a single unit.
        units: number of units: scenes, or samples if all are of one scene.
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
        """Whether the interval does not contain zero, over enough units to be trusted."""
        return self.units >= FEW_SCENES and (self.low > 0 or self.high < 0)


def load_result(path: str | Path) -> dict[str, Any]:
    """Read a result file of the shared evaluation, `result.json` or the folder that contains it.

    Raises:
        DataError: if the file is missing, is not JSON, or is no result of the evaluation; names the path.
    """
    path = Path(path)
    path = path / "result.json" if path.is_dir() else path
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; cameo evaluate writes result.json") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error
    missing = [name for name in ("settings", "data", "sections") if not isinstance(result, dict) or name not in result]
    if missing:
        raise DataError(f"{path}: is no result of cameo evaluate, {', '.join(missing)} missing")
    return result


def compare_results(
    baseline: Mapping[str, Any], other: Mapping[str, Any], *, resamples: int = 10_000, seed: int = 0
) -> list[Comparison]:
    """Compare two results of `evaluate` figure by figure, over the scenes for which both have a value.

    Example:
        >>> def result(values):
        ...     section = {"mean": {"loss": 0.0}, "per_sample": {"loss": values}}
        ...     return {"settings": {"seed": 1}, "data": {"samples": {}}, "sections": {"denoising": section}}
        >>> values = {f"room-{n}/0-1": 0.1 * n for n in range(12)}
        >>> better = {key: value - 0.01 for key, value in values.items()}
        >>> comparison = compare_results(result(values), result(better))[0]
        >>> comparison.metric, round(comparison.difference, 4), comparison.units, comparison.is_clear
        ('loss', -0.01, 12, True)

    Warns if fewer than 10 scenes are common, and if the results are of two backbones. Figures that only one of the two
    results has are left out.

    Raises:
        ValueError: if settings or data differ, naming the field, or if no sample is common.
    """
    _check_comparable(baseline, other)
    comparisons = []
    for section, metric, *values in _common_figures(baseline["sections"], other["sections"]):
        unit, first, second = _by_unit(*values)
        if not first:
            continue
        if len(first) > 1:
            difference, low, high = paired_bootstrap(first, second, resamples=resamples, seed=seed)
        else:
            difference, low, high = second[0] - first[0], math.nan, math.nan
        means = float(np.mean(first)), float(np.mean(second))
        comparisons.append(Comparison(section, metric, *means, difference, low, high, len(first), unit))
    if not comparisons:
        raise ValueError("results: no figure is common to both; evaluate both with the same sections and layers")
    if any(comparison.unit == "sample" for comparison in comparisons):
        warnings.warn(
            "all samples are of one scene, so the intervals are over its samples and say nothing about other scenes",
            stacklevel=2,
        )
    elif (fewest := min(comparison.units for comparison in comparisons)) < FEW_SCENES:
        warnings.warn(
            f"{fewest} common scenes for some figures: with fewer than {FEW_SCENES} the intervals are too narrow; "
            "raise num_samples and num_validation_scenes",
            stacklevel=2,
        )
    return comparisons


def _check_comparable(baseline: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Refuse results of other settings or data; warn of results of two backbones."""
    first, second = (result.get("run", {}).get("backbone") for result in (baseline, other))
    if first and second and first != second:
        warnings.warn(
            f"results of two backbones, {first} and {second}: they predict different targets, so their denoising "
            "losses cannot be compared",
            stacklevel=3,
        )
    for part, cure in (
        ("settings", "evaluate both with the same evaluation settings"),
        ("data", "evaluate both on the same data"),
    ):
        left, right = baseline[part], other[part]
        for name in sorted((left.keys() | right.keys()) - FREE_SETTINGS - {"samples"}):
            if left.get(name) != right.get(name):
                raise ValueError(
                    f"results: cannot be compared, {part}.{name} is {left.get(name)!r} in one and "
                    f"{right.get(name)!r} in the other; {cure}"
                )
    left, right = baseline["data"]["samples"], other["data"]["samples"]
    for key in sorted(left.keys() & right.keys()):
        if not np.allclose(left[key], right[key], rtol=SAMPLE_TOLERANCE, atol=SAMPLE_TOLERANCE):
            raise ValueError(
                f"results: cannot be compared, sample {key} differs between them (mean color and depth "
                f"{left[key]} and {right[key]}); evaluate both on the same data"
            )
    if left and right and not left.keys() & right.keys():
        raise ValueError(
            f"results: no sample is common, one starts with {min(left)!r} and the other with {min(right)!r}; "
            "evaluate both on the same data"
        )


def _common_figures(
    left: Mapping[str, Any], right: Mapping[str, Any]
) -> Iterator[tuple[str, str, dict[str, float], dict[str, float]]]:
    """Section, metric and both values per sample of each figure that both results have, and that models can change."""
    for section in SECTIONS:
        first, second = (sections.get(section, {}).get("per_sample", {}) for sections in (left, right))
        for metric in first:
            if metric in second and not is_of_data(section, metric):
                yield section, metric, first[metric], second[metric]


def _by_unit(left: Mapping[str, float], right: Mapping[str, float]) -> tuple[str, list[float], list[float]]:
    """Average the values per sample by scene; samples count one by one if all are of one scene.

    Returns:
        The kind of unit, "scene" or "sample", and the values of both results for each common unit.
    """
    keys = [key for key in left if key in right]
    scenes: dict[str, list[str]] = {}
    for key in keys:
        scenes.setdefault(scene_of(key), []).append(key)
    groups, unit = (list(scenes.values()), "scene") if len(scenes) != 1 else ([[key] for key in keys], "sample")
    first, second = ([float(np.mean([values[key] for key in group])) for group in groups] for values in (left, right))
    return unit, first, second


def comparison_table(results: Mapping[str, Mapping[str, Any]], *, resamples: int = 10_000, seed: int = 0) -> str:
    """Format results side by side as a Markdown table; all but the first with their difference from the first.

    Args:
        results: name of a run to what `evaluate` returned or `load_result` read; at least two.
        resamples, seed: arguments of `paired_bootstrap`.

    Raises:
        ValueError: see `compare_results`.
    """
    compared = _against_first(results, resamples, seed)
    first = next(iter(results))
    header = ["", first, *[title for name in compared for title in (name, "difference [95 %]", "n")]]
    rows = []
    note = ""
    for section, metric in _figure_names(compared):
        title, digits = describe(section, metric)
        comparisons = [of_run.get((section, metric)) for of_run in compared.values()]
        baselines = dict.fromkeys(number(known.baseline, digits) for known in comparisons if known)
        cells = [title, " / ".join(baselines)]
        if len(baselines) > 1:
            note = f" Where {first} has several means, it has different samples in common with each of the others."
        for known in comparisons:
            cells += _cells(known, digits) if known else ["-", "-", "-"]
        rows.append(cells)
    caption = (
        f"Means over common {' and '.join(_units(compared))} (n). Difference from {first} with a paired bootstrap "
        f"interval over them ({resamples:,} resamples, seed {seed}); bold where the interval does not contain zero and "
        f"n is at least {FEW_SCENES}. Each interval is for one figure: of many, one in twenty is bold by chance."
        f"{note}"
    )
    return f"{markdown_table(header, rows)}\n\n{caption}"


def _cells(comparison: Comparison, digits: str) -> list[str]:
    return [number(comparison.other, digits), _interval(comparison, digits), str(comparison.units)]


def comparison_figure(
    results: Mapping[str, Mapping[str, Any]], *, resamples: int = 10_000, seed: int = 0, columns: int = 4
) -> Figure:
    """Draw the differences from the first result with their intervals, one panel per figure."""
    compared = _against_first(results, resamples, seed)
    figure_names, first = _figure_names(compared), next(iter(results))
    lines = math.ceil(len(figure_names) / columns)
    height = lines * (1.2 + 0.25 * len(compared)) + 0.4
    figure = Figure(figsize=(3.4 * min(columns, len(figure_names)), height), layout="constrained")
    axes = figure.subplots(lines, min(columns, len(figure_names)), squeeze=False)
    for axis in axes.flat[len(figure_names) :]:
        axis.set_axis_off()
    for axis, (section, metric) in zip(axes.flat, figure_names, strict=False):
        title, _ = describe(section, metric)
        for row, (name, comparisons) in enumerate(compared.items()):
            if comparison := comparisons.get((section, metric)):
                axis.plot([comparison.low, comparison.high], [row, row], color=f"C{row}", linewidth=2)
                axis.plot(comparison.difference, row, "o", color=f"C{row}", label=name)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(compared)), list(compared), fontsize=7)
        axis.set_ylim(len(compared) - 0.5, -0.5)
        axis.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=7)
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(axis="x", labelsize=7)
    figure.suptitle(f"difference from {first}, 95 % interval over {' or '.join(_units(compared))}", fontsize=9)
    return figure


def _against_first(
    results: Mapping[str, Mapping[str, Any]], resamples: int, seed: int
) -> dict[str, dict[FigureName, Comparison]]:
    """For every run but the first, its comparisons with the first one."""
    if len(results) < 2:
        raise ValueError(f"results: expected at least two runs to compare, got {len(results)}")
    (_, baseline), *others = results.items()
    compared = {}
    for name, result in others:
        comparisons = compare_results(baseline, result, resamples=resamples, seed=seed)
        compared[name] = {(comparison.section, comparison.metric): comparison for comparison in comparisons}
    return compared


def _figure_names(compared: Mapping[str, Mapping[FigureName, Comparison]]) -> list[FigureName]:
    """The figures that were compared for any run, in order of the sections."""
    names = dict.fromkeys(name for comparisons in compared.values() for name in comparisons)
    return sorted(names, key=lambda name: SECTIONS.index(name[0]))


def _units(compared: Mapping[str, Mapping[FigureName, Comparison]]) -> list[str]:
    """The kinds of units that were compared, in the plural."""
    return sorted({f"{known.unit}s" for comparisons in compared.values() for known in comparisons.values()})


def _interval(comparison: Comparison, digits: str) -> str:
    difference, *ends = (
        number(value, digits, sign=True) for value in (comparison.difference, comparison.low, comparison.high)
    )
    if math.isnan(comparison.low):
        return difference
    text = f"{difference} [{', '.join(ends)}]"
    return f"**{text}**" if comparison.is_clear else text


def name_results(paths: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Read result files under names that distinguish them: the name of the file or of its folder, or the path.

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
