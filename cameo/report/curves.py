"""The curves of runs that are compared: which are drawn, and what there is to see in each."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cameo.report.charts import COLORS, DASHES, Series, line_chart

__all__ = ["ReportedRun", "curves", "mean"]


@dataclass(frozen=True)
class ReportedRun:
    """What a run has recorded.

    - `steps`: the entries of metrics.jsonl.
    - `validations`: the entries of validations.jsonl.
    - `alarms`: what most likely makes the run useless; of each the parts of its text by what stands before them.
    """

    steps: Sequence[Mapping[str, Any]]
    validations: Sequence[Mapping[str, Any]]
    alarms: Sequence[Mapping[str, str]] = field(default=())


def mean(entries: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the mean of a figure over entries of the records.

    Example:
        >>> mean([{"loss": 1.0}, {"loss": 2.0}], "loss")
        1.5
    """
    return sum(float(entry[key]) for entry in entries) / len(entries)


def curves(runs: Mapping[str, ReportedRun]) -> str:
    """Draw the curves of all runs, one line for each, as HTML with a legend and captions.

    Example:
        >>> run = ReportedRun([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], [])
        >>> "Denoising loss over the steps 1 to 2: with CAMEO from 2 to 1" in curves({"with CAMEO": run})
        True
    """
    styles = {name: place + (len(runs) == 1) for place, name in enumerate(runs)}
    legend = "".join(
        f'<li><svg viewBox="0 0 44 10" aria-hidden="true"><path class="line" stroke="{COLORS[style % len(COLORS)]}" '
        f'stroke-dasharray="{DASHES[style % len(DASHES)]}" d="M0 5H44"/></svg>{html.escape(name)}</li>'
        for name, style in styles.items()
    )
    charts = [*_step_charts(runs, styles), *_validation_charts(runs, styles)]
    figures = "".join(
        f"<figure><h3>{html.escape(title)}</h3>{chart}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for title, chart, caption in charts
    )
    return (
        f'<ul class="legend">{legend}</ul>'
        '<p class="note">Thin: each step. Thick: moving mean over a tenth of the run. Dots: validations.</p>'
        f'<div class="charts">{figures}</div>'
    )


def _step_charts(runs: Mapping[str, ReportedRun], styles: Mapping[str, int]) -> Iterator[tuple[str, str, str]]:
    def lines(key: str, condition: str) -> list[Series]:
        """The figures of each run, of the steps at which that of the condition is not 0."""
        points = {name: [(e["step"], e[key]) for e in run.steps if e.get(condition)] for name, run in runs.items()}
        return [Series(name, drawn, styles[name]) for name, drawn in points.items() if drawn]

    if losses := lines("loss", "step"):
        title = "Denoising loss"
        caption = "Noise levels differ from step to step, and the loss with them: the moving mean tells."
        yield title, line_chart(losses, title=title, unit="loss"), caption
    steps = [entry for run in runs.values() for entry in run.steps if entry.get("alignment_chance")]
    if aligned := lines("alignment_loss", "supervised"):
        title = "Alignment loss"
        chance = ("chance", mean(steps, "alignment_chance")) if steps else None
        caption = (
            "Chance is the loss of attention that looks at all tokens alike. Below it the attention finds matches; a "
            "line that stays there has learned nothing from them."
            if chance
            else "The negative cosine similarity between what the layer computes and the image features."
        )
        yield title, line_chart(aligned, title=title, unit="nats" if chance else "loss", level=chance), caption
    if counts := lines("supervised", "matchable"):
        title, caption = "Matches per step", "How many matches the alignment loss of a step is about."
        yield title, line_chart(counts, title=title, unit="matches", from_zero=True), caption


def _validation_charts(runs: Mapping[str, ReportedRun], styles: Mapping[str, int]) -> Iterator[tuple[str, str, str]]:
    metrics = {
        "Validation: PSNR": (
            "psnr_covisible",
            "dB",
            "Higher is better: the predicted view, where the reference sees it.",
        ),
        "Validation: matches found": (
            "precision/mean@1",
            "share of matches",
            "Higher is better: tokens whose most-attended token is the match or next to it, mean of the heads.",
        ),
        "Validation: denoising loss": ("loss", "loss", "Lower is better. The same samples and noise at every step."),
    }
    for title, (key, unit, caption) in metrics.items():
        lines = []
        for name, run in runs.items():
            points = [(entry["step"], value) for entry in run.validations if (value := _value(entry, key)) is not None]
            if points:
                lines.append(Series(name, points, styles[name], smooth=False, dots=True))
        if lines:
            yield title, line_chart(lines, title=title, unit=unit), caption


def _value(entry: Mapping[str, Any], key: str) -> float | None:
    value: Any = entry
    for part in key.split("/"):
        value = (value or {}).get(part)
    return None if value is None else float(value)
