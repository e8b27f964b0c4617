"""Pictures of a model: its predictions beside the true views, and where its attention looks."""

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

PANEL_SIZE = 1.6  # inches
TITLE_WIDTH = 20  # characters above a panel


def comparison_figure(batch: Mapping[str, Any], predictions: Mapping[str, Tensor], *, samples: int = 3) -> Figure:
    """Draw one row per sample: its reference views, the true first target view, and the prediction of each model.

    Without reference views the first two views are drawn, which a model must generate consistently.

    Args:
        batch: collated samples.
        predictions: name of a model to its images of all views, `[B, V, 3, H, W]`.
        samples: number of rows.
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
    figure, axes = _panels(samples, len(titles))
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

    Each row shows a query: the query view with the query token as a square, then for each model the key view under the
    attention of its supervised layer (mean over heads), with the true match as a circle and the most-attended token as
    a cross. The query view is the first target view, and the key view the first reference view. If the layer has no
    match between these two, the next two views with a match are drawn; if the layer has no reference views, two target
    views. The sample is the one with most matches, and the queries are spread evenly over the tokens with a match.

    Where the tokens of a view stand for those of the reference view (`TokenLayout(own_view_shows=)`), the attention
    within the query view is drawn over the reference view.

    Raises:
        ValueError: if no token has a match in the other view, or the layer does not attend across whole views.
    """
    first = next(iter(models.values()))
    layer = first.supervised_layers[0]
    match = match_batch(batch, layer_grids(layer, batch))
    local, order = layer.layout.localize(match), layer.layout.view_order
    if layer.layout.reach != "all":
        raise ValueError(f"layer {layer.path!r} attends to a part of the other view; its attention is not drawn")
    references = order.num_references(int(batch["num_reference_views"]))
    query_view, key_view = _views_to_draw(local, references, batch)
    matched = local.matched[:, query_view, key_view]
    sample = int(matched.sum(1).argmax())
    target, candidates = local.index[sample, query_view, key_view], matched[sample].nonzero().flatten()
    chosen = candidates[torch.linspace(0, len(candidates) - 1, min(queries, len(candidates))).round().long()]
    shown = [order.origin(sample, view, match.num_views) for view in (query_view, key_view)]
    query_image, key_image = (batch["images"][place] for place in shown)
    query_grid, key_grid = local.token_grids[query_view], local.token_grids[key_view]
    figure, axes = _panels(len(chosen), 1 + len(models))
    for column, (name, model) in enumerate(models.items(), start=1):
        heat = _attention_between(model, inputs, match, sample, query_view, key_view)
        for row, token in enumerate(chosen.tolist()):
            _show(axes[row, 0], query_image)
            _mark(axes[row, 0], token, query_grid, query_image.shape[-2:], "s", "white")
            axis, (height, width) = axes[row, column], key_image.shape[-2:]
            _show(axis, key_image)
            axis.imshow(heat[token].view(key_grid).numpy(), extent=(0, width, height, 0), cmap="magma", alpha=0.6)
            _mark(axis, int(target[token]), key_grid, (height, width), "o", "lime")
            _mark(axis, int(heat[token].argmax()), key_grid, (height, width), "x", "cyan")
        title = f"{textwrap.fill(name, TITLE_WIDTH)}\nin view {shown[1][1]}".strip()
        axes[0, column].set_title(title, fontsize=8)
    axes[0, 0].set_title(f"query in view {shown[0][1]}", fontsize=8)
    return figure


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 120) -> Path:
    """Write a figure as PNG, whole or not at all; `dpi` are the pixels per inch of the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())
    return Path(path)


def _views_to_draw(local: Correspondence, references: int, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Choose the query view and the key view, by their index in the layer's localized correspondence."""
    has_match = local.matched.any(-1).any(0)
    for query_view in range(references, local.num_views):
        for key_view in range(references or local.num_views):
            if has_match[query_view, key_view]:
                return query_view, key_view
    raise ValueError(
        f"batch {batch['key']}: no token of a target view has a match in "
        f"{'a reference' if references else 'another target'} view"
    )


def _attention_between(
    model: CameoModel, inputs: TrainingInputs, match: Correspondence, sample: int, query_view: int, key_view: int
) -> Tensor:
    """Attention `[N, N']` of one view's tokens over the N' tokens of another view, mean over heads."""
    layer = model.supervised_layers[0]
    with evaluation_mode(model):
        with native_precision(model), model.capture([layer]) as captured:
            model.base_model(*inputs.args, **inputs.kwargs)
        query, key, local = model.split(layer, captured[layer.path], match)
        queries = query[sample : sample + 1, :, query_view : query_view + 1]
        height, width = grid = local.token_grids[key_view]
        keys = key[sample : sample + 1, :, key_view : key_view + 1, : height * width]
        maps = attention_maps(queries, keys, (grid,), None, captured[layer.path].scale)
    return maps["mean"][0, 0, 0, :, 0].cpu()


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(PANEL_SIZE * columns, PANEL_SIZE * rows + 0.45), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _show(axis: Axes, image: Tensor) -> None:
    height, width = image.shape[-2:]
    pixels = image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    axis.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")


def _mark(
    axis: Axes, token: int, token_grid: tuple[int, int], image_size: tuple[int, ...], marker: str, color: str
) -> None:
    row, column = divmod(token, token_grid[1])
    x, y = (column + 0.5) * image_size[1] / token_grid[1], (row + 0.5) * image_size[0] / token_grid[0]
    face = color if marker == "x" else "none"
    axis.plot(x, y, marker=marker, markersize=7, markeredgewidth=1.5, markeredgecolor=color, markerfacecolor=face)
