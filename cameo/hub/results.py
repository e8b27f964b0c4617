"""The figures on a model card: one table for people, and the same as the Hub's `model-index`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cameo.config import CameoConfig
from cameo.tables import markdown_table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["Metrics", "eval_results", "number", "results_section"]

# Figures of a model by name; or columns of them to compare, of which the last is the model's own.
Metrics = Mapping[str, float | str | Mapping[str, float | str]]

# What the columns of the recipes are, for a reader who has seen no other run.
COLUMNS = {
    "base": "`base` is the model before this training",
    "without CAMEO": "`without CAMEO` is the same training without the alignment loss",
    "with CAMEO": "`with CAMEO` is the training with it",
    "with REPA": "`with REPA` is a training with another alignment loss, to features of a frozen network",
}


def results_section(metrics: Metrics | None, config: CameoConfig) -> str:
    """Write the section with the table, a row per figure and a column per model; empty without figures.

    Example:
        >>> metrics = {"base": {"PSNR (dB)": 11.8}, "with CAMEO": {"PSNR (dB)": 13.25}}
        >>> print(results_section(metrics, CameoConfig(None, [])))
        ## Results
        <BLANKLINE>
        | | base | with CAMEO |
        | --- | --- | --- |
        | PSNR (dB) | 11.8 | 13.25 |
        <BLANKLINE>
        `base` is the model before this training; `with CAMEO` is the training with it, which is this model.
    """
    columns = _columns(metrics)
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    if not names:
        return ""
    rows = [(name, *(number(figures.get(name, "")) for figures in columns.values())) for name in names]
    parts = ["## Results", markdown_table(("", *(columns if len(columns) > 1 else ["this model"])), rows)]
    explained = [COLUMNS[name] for name in columns if name in COLUMNS]
    if len(columns) > 1 and explained:
        this = ", which is this model" if list(columns)[-1] in COLUMNS else ""
        parts.append("; ".join(explained) + f"{this}.")
    if samples := config.training.get("validation samples"):
        data = config.training.get("data", "the data")
        parts.append(
            f"Measured on {samples} samples of the validation set ({data}), with the same noise for every column. A "
            "predicted view is what the model makes of pure noise, or nearly so, in one step."
        )
    return "\n\n".join(parts)


def eval_results(metrics: Metrics | None, config: CameoConfig, task: str) -> list[EvalResult]:
    """List the model's own figures for the Hub's `model-index`; text and what is not finite stay out.

    Example:
        >>> [result] = eval_results({"PSNR (dB)": 13.25}, CameoConfig(None, []), "image-to-3d")
        >>> result.metric_type, result.metric_name, result.metric_value
        ('psnr', 'PSNR (dB)', 13.25)
    """
    from huggingface_hub import EvalResult

    data = str(config.training.get("data", "not stated"))
    columns = _columns(metrics)
    own = columns[list(columns)[-1]] if columns else {}
    return [
        EvalResult(
            task_type=task,
            dataset_type=_identifier(data),
            dataset_name=data,
            dataset_split="validation" if "validation samples" in config.training else None,
            metric_type="psnr" if name.startswith("PSNR") else _identifier(name),
            metric_name=name,
            metric_value=value,
        )
        for name, value in own.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ]


def number(value: Any) -> str:
    """Show a figure with four digits, and anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(metrics: Metrics | None) -> dict[str, dict[str, Any]]:
    """Sort figures into columns; what was not measured is left out, and single figures are the model's own."""
    columns: dict[str, dict[str, Any]] = {}
    single: dict[str, Any] = {}
    for name, value in (metrics or {}).items():
        if isinstance(value, Mapping):
            if measured := {key: figure for key, figure in value.items() if figure is not None}:
                columns[name] = measured
        elif value is not None:
            single[name] = value
    if single:
        own = list(columns)[-1] if columns else "this model"
        columns[own] = {**single, **columns.get(own, {})}
    return columns


def _identifier(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower().partition("(")[0]).strip("_") or "unknown"
