"""Pictures of what a model does: predictions beside the truth, and where its attention looks."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cameo.correspondence import Correspondence
from cameo.data.batches import layer_grids, match_batch
from cameo.files import write_atomically
from cameo.model import CameoModel
from cameo.pipeline import TrainingInputs
from cameo.probing.hits import attention_maps
from cameo.probing.mode import evaluation_mode, native_precision

__all__ = ["attention_figure", "comparison_figure", "save_figure"]

PANEL = 1.6  # inches
TITLE_WIDTH = 20  # characters above a panel


def comparison_figure(batch: Mapping[str, Any], predictions: Mapping[str, Tensor], *, samples: int = 3) -> Figure:
    """Draw one row per sample: its references, then the first target view as it is and as each model predicts it.

    Without references the first two views are drawn, which a model must make fit each other.

    Args:
        batch: collated samples.
        predictions: name of a model to its images of all views, `[B, V, 3, H, W]`.
        samples: rows.
    """
    references = int(batch["num_reference_views"])
    images: Tensor = batch["images"]
    samples = min(samples, images.shape[0])
    titles = [f"reference {view}" for view in range(references)]
    shown = [(images, view) for view in range(references)]
    targets = [references] if references else list(range(min(2, images.shape[1])))
    for view in targets:
        suffix = "" if references else f", view {view}"
        titles += [f"{name}{suffix}" for name in ("truth", *predictions)]
        shown += [(pictures, view) for pictures in (images, *predictions.values())]
    figure, axes = _grid(samples, len(titles))
    for row in range(samples):
        for axis, (pictures, view), title in zip(axes[row], shown, titles, strict=True):
            _show(axis, pictures[row, view])
            if row == 0:
                axis.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=8)
    return figure


def attention_figure(
    models: Mapping[str, CameoModel],
    batch: Mapping[str, Any],
    inputs: TrainingInputs,
    *,
    queries: int = 4,
) -> Figure:
    """Draw where a few query tokens of a target view look in another view.

    One row per query: the first view with the query token (square), then per model the other view under the
    attention of its supervised layer (mean over heads), the true match as a circle and the most-attended token as a
    cross. Drawn is the first target view looking at the first reference; where the layer has no match for these two,
    the next two views that have one, and where the layer knows no reference view, two target views. The sample is the
    one with most matches; the queries are spread evenly over the tokens that have one.

    Raises:
        ValueError: if no token is visible in another view, or the layer does not attend across whole views.
    """
    first = next(iter(models.values()))
    layer = first.supervised_layers[0]
    match = match_batch(batch, layer_grids(layer, batch))
    local = layer.layout.localize(match)
    if local.batch_size != match.batch_size:
        raise ValueError(f"layer {layer.path!r} attends to a part of the other view; its attention is not drawn")
    references, dropped = int(batch["num_reference_views"]), match.num_views - local.num_views
    query_view, key_view = _views_to_draw(local, max(0, references - dropped), batch)
    visible = local.matched[:, query_view, key_view]
    sample = int(visible.sum(1).argmax())
    target, candidates = local.index[sample, query_view, key_view], visible[sample].nonzero().flatten()
    chosen = candidates[torch.linspace(0, len(candidates) - 1, min(queries, len(candidates))).round().long()]
    shown, looked_at = (batch["images"][sample, dropped + view] for view in (query_view, key_view))
    query_size, key_size = local.token_grids[query_view], local.token_grids[key_view]
    figure, axes = _grid(len(chosen), 1 + len(models))
    for column, (name, model) in enumerate(models.items(), start=1):
        heat = _attention_between(model, inputs, match, sample, query_view, key_view)
        for row, token in enumerate(chosen.tolist()):
            _show(axes[row, 0], shown)
            _mark(axes[row, 0], token, query_size, shown.shape[-2:], "s", "white")
            _show(axes[row, column], looked_at)
            axes[row, column].imshow(
                heat[token].view(key_size).numpy(),
                extent=(0, looked_at.shape[-1], looked_at.shape[-2], 0),
                cmap="magma",
                alpha=0.6,
            )
            _mark(axes[row, column], int(target[token]), key_size, looked_at.shape[-2:], "o", "lime")
            _mark(axes[row, column], int(heat[token].argmax()), key_size, looked_at.shape[-2:], "x", "cyan")
        title = f"{textwrap.fill(name, TITLE_WIDTH)}\nin view {dropped + key_view}".strip()
        axes[0, column].set_title(title, fontsize=8)
    axes[0, 0].set_title(f"query in view {dropped + query_view}", fontsize=8)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
    return Path(path)


def _views_to_draw(local: Correspondence, references: int, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Choose the query view and the key view, counted as in the layer's own correspondence."""
    visible = local.matched.any(-1).any(0)
    for query_view in range(references, local.num_views):
        for key_view in range(references or local.num_views):
            if visible[query_view, key_view]:
                return query_view, key_view
    raise ValueError(
        f"batch {batch['key']}: no token of a target view is visible in "
        f"{'a reference' if references else 'another target'} view"
    )


def _attention_between(
    model: CameoModel, inputs: TrainingInputs, match: Correspondence, sample: int, query_view: int, key_view: int
) -> Tensor:
    """Attention `[N, N']` of one view's tokens over those of another, mean over heads; N' as the key view's grid."""
    layer = model.supervised_layers[0]
    with evaluation_mode(model):
        with native_precision(model), model.capture([layer]) as captured:
            model.base_model(*inputs.args, **inputs.kwargs)
        query, key, local = model.split(layer, captured[layer.path], match)
        queries = query[sample : sample + 1, :, query_view : query_view + 1]
        height, width = size = local.token_grids[key_view]
        keys = key[sample : sample + 1, :, key_view : key_view + 1, : height * width]
        maps = attention_maps(queries, keys, (size,), None, captured[layer.path].scale)
    return maps["mean"][0, 0, 0, :, 0].cpu()


def _grid(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(PANEL * columns, PANEL * rows + 0.45), layout="constrained")
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
