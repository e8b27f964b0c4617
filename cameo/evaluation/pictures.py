"""Pictures of what a model does: predictions beside the truth, and where its attention looks."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cameo.config import write_atomically
from cameo.correspondence import Correspondence
from cameo.evaluation.attention import attention_maps
from cameo.evaluation.mode import evaluation_mode, native_precision
from cameo.pipeline import MultiViewPipeline, TrainingInputs
from cameo.training.correspondences import layer_grids, match_batch
from cameo.wrap import CameoModel

__all__ = ["attention_figure", "comparison_figure", "save_figure"]

PANEL = 1.6  # inches


def comparison_figure(batch: Mapping[str, Any], predictions: Mapping[str, Tensor], *, samples: int = 3) -> Figure:
    """Draw one row per sample: its references, then the first target view as it is and as each model predicts it.

    Args:
        batch: collated samples.
        predictions: name of a model to its images of all views, `[B, V, 3, H, W]`.
        samples: rows.
    """
    references = int(batch["num_reference_views"])
    images: Tensor = batch["images"]
    samples = min(samples, images.shape[0])
    titles = [f"reference {view}" for view in range(references)] + ["truth", *predictions]
    figure, axes = _grid(samples, len(titles))
    for row in range(samples):
        panels = [images[row, view] for view in range(references)] + [images[row, references]]
        panels += [prediction[row, references] for prediction in predictions.values()]
        for axis, panel, title in zip(axes[row], panels, titles, strict=True):
            _show(axis, panel)
            if row == 0:
                axis.set_title(title, fontsize=8)
    return figure


def attention_figure(
    models: Mapping[str, CameoModel],
    pipeline: MultiViewPipeline,
    batch: Mapping[str, Any],
    inputs: TrainingInputs,
    *,
    queries: int = 4,
) -> Figure:
    """Draw where a few query tokens of the first target view look in the first reference view.

    One row per query: the target view with the query token (square), then per model the reference view under the
    attention of its supervised layer (mean over heads), the true match as a circle and the most-attended token as a
    cross. The sample is the one with most matches; the queries are spread evenly over the tokens that have one.

    Raises:
        ValueError: if no token of a target view is visible in the reference view, or the layer does not attend
            across whole views.
    """
    references = int(batch["num_reference_views"])
    size = layer_grids(next(iter(models.values())).supervised_sites[0], batch)[0]
    match = match_batch(batch, size)
    visible = match.visible[:, references, 0]
    sample = int(visible.sum(1).argmax())
    images, target = batch["images"][sample], match.index[sample, references, 0]
    candidates = visible[sample].nonzero().flatten()
    if not len(candidates):
        raise ValueError(
            f"batch {batch['key']}: no token of a first target view is visible in its first reference view"
        )
    chosen = candidates[torch.linspace(0, len(candidates) - 1, min(queries, len(candidates))).round().long()]
    figure, axes = _grid(len(chosen), 1 + len(models))
    for column, (name, model) in enumerate(models.items(), start=1):
        heat = _attention_to_reference(model, inputs, match, references)[sample]
        for row, token in enumerate(chosen.tolist()):
            _show(axes[row, 0], images[references])
            _mark(axes[row, 0], token, size, images.shape[-2:], "s", "white")
            _show(axes[row, column], images[0])
            axes[row, column].imshow(
                heat[token].view(size).numpy(),
                extent=(0, images.shape[-1], images.shape[-2], 0),
                cmap="magma",
                alpha=0.6,
            )
            _mark(axes[row, column], int(target[token]), size, images.shape[-2:], "o", "lime")
            _mark(axes[row, column], int(heat[token].argmax()), size, images.shape[-2:], "x", "cyan")
        axes[0, column].set_title(name, fontsize=8)
    axes[0, 0].set_title("query in target", fontsize=8)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
    return Path(path)


def _attention_to_reference(
    model: CameoModel, inputs: TrainingInputs, match: Correspondence, references: int
) -> Tensor:
    """Attention `[B, N, N]` of the first target view's tokens over those of the first reference view."""
    site = model.supervised_sites[0]
    with evaluation_mode(model):
        with native_precision(model), model.capture([site]) as captured:
            model.base_model(*inputs.args, **inputs.kwargs)
        query, key, local = model.split(site, captured[site.path], match)
        if local.batch_size != match.batch_size:
            raise ValueError(f"layer {site.path!r} attends to a part of the other view; its attention is not drawn")
        maps = attention_maps(query, key, local, None, captured[site.path].scale)
    return maps["mean"][:, 0, references, :, 0].cpu()


def _grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(PANEL * columns, PANEL * rows + 0.25), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _show(axis: Axes, image: Tensor) -> None:
    height, width = image.shape[-2:]
    pixels = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    axis.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")


def _mark(axis: Axes, token: int, size: tuple[int, int], image_size: tuple[int, ...], marker: str, colour: str) -> None:
    row, column = divmod(token, size[1])
    x, y = (column + 0.5) * image_size[1] / size[1], (row + 0.5) * image_size[0] / size[0]
    face = colour if marker == "x" else "none"
    axis.plot(x, y, marker=marker, markersize=7, markeredgewidth=1.5, markeredgecolor=colour, markerfacecolor=face)
