"""What a recipe shows of a run: pictures of its models, the table of its validations, the metrics of a model card."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cameo.data import MultiViewDataset, collate
from cameo.data.batches import to_device
from cameo.evaluation.pictures import attention_figure, comparison_figure, save_figure
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline, TrainingInputs
from cameo.probing.mode import evaluation_mode, generate_views, native_precision
from cameo.tables import markdown_table
from cameo.training.settings import TrainingConfig

__all__ = ["card_metrics", "metrics_table", "write_pictures"]

NOT_MEASURED = "-"


def write_pictures(
    models: Mapping[str, CameoModel],
    pipeline: MultiViewPipeline,
    dataset: MultiViewDataset,
    config: TrainingConfig,
    folder: str | Path,
) -> list[Path]:
    """Draw predictions and attention maps of one or several models, by name; returns the files.

    Each model is shown twice: the clean image it predicts from pure noise in one step, which the validation measures,
    and sampled in `num_inference_steps`. All models get the same samples and the same noise. Where no attention can be
    drawn, a warning says why; `num_validation_images=0` draws nothing.
    """
    if not config.num_validation_images:
        return []
    device = next(next(iter(models.values())).parameters()).device
    batch = to_device(collate([dataset[index] for index in range(config.num_validation_images)]), device)
    with evaluation_mode(pipeline.denoiser):  # without what a pipeline does in training only
        inputs = pipeline.training_inputs(
            batch,
            timesteps=torch.full((len(batch["images"]),), pipeline.num_train_timesteps - 1),
            generator=torch.Generator().manual_seed(config.data_seed),
        )
    predictions = {f"{name} one step".strip(): _in_one_step(model, pipeline, inputs) for name, model in models.items()}
    predictions |= {
        f"{name} sampled".strip(): _sampled(model, pipeline, batch, config) for name, model in models.items()
    }
    folder = Path(folder)
    written = [save_figure(comparison_figure(batch, predictions, samples=len(batch["images"])), folder / "views.png")]
    try:
        figure = attention_figure(models, batch, inputs)
    except ValueError as error:
        warnings.warn(f"attention.png is left out: {error}", stacklevel=2)
        return written
    return [*written, save_figure(figure, folder / "attention.png")]


def _in_one_step(model: CameoModel, pipeline: MultiViewPipeline, inputs: TrainingInputs) -> torch.Tensor:
    """Images of all views: the references as they are, the targets as predicted from the noisy input."""
    with evaluation_mode(model), native_precision(model):
        return pipeline.predict_clean(model.base_model(*inputs.args, **inputs.kwargs), inputs)


def _sampled(
    model: CameoModel, pipeline: MultiViewPipeline, batch: Mapping[str, Any], config: TrainingConfig
) -> torch.Tensor:
    """Images of all views: the references as they are, the targets sampled."""
    return generate_views(
        model,
        pipeline,
        batch,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        generator=torch.Generator().manual_seed(config.data_seed),
    )


def card_metrics(validation: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what a model card shows of a validation result: its figures and settings, without notes and pictures."""
    return {name: value for name, value in validation.items() if name not in ("notes", "pictures", "step")}


def metrics_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Format validation results side by side as a Markdown table."""
    covisible = "PSNR of predicted clean image at high noise, pixels the reference sees (dB)"
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "denoising loss, fixed noise": lambda m: f"{m['loss']:.4f}",
        covisible: lambda m: _figure(m["psnr_covisible"], ".2f"),
        "the same, all target pixels (dB)": lambda m: f"{m['psnr_all']:.2f}",
        "attention precision, mean of heads, exact token": lambda m: _share(m, "mean@0"),
        "attention precision, mean of heads, within 1 token": lambda m: _share(m, "mean@1"),
        "attention precision, best head, within 1 token": lambda m: _share(m, "best_head@1"),
        "attention precision, through the alignment head, within 1 token": lambda m: _share(m, "through_head@1"),
        "share of queries whose most-attended view shows the same point": lambda m: _view_share(m, "mean"),
        "the same by chance": lambda m: _view_share(m, "chance"),
    }
    shown = {title: [show(metrics) for metrics in columns.values()] for title, show in rows.items()}
    measured = {title: cells for title, cells in shown.items() if any(cell != NOT_MEASURED for cell in cells)}
    return markdown_table(["", *columns], [[title, *cells] for title, cells in measured.items()])


def _share(metrics: Mapping[str, Any], name: str) -> str:
    return _figure((metrics["precision"] or {}).get(name), ".1%")


def _view_share(metrics: Mapping[str, Any], name: str) -> str:
    return _figure((metrics.get("precision_view") or {}).get(name), ".1%")


def _figure(value: float | None, format_spec: str) -> str:
    return NOT_MEASURED if value is None else format(value, format_spec)
