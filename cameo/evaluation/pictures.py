"""Pictures of models side by side: their predictions beside the true views, and where their attention errs."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.patches import Patch
from torch import Tensor

from cameo.evaluation.match_errors import FoundMatches
from cameo.files import write_atomically
from cameo.probing.denoising import psnr_of_error
from cameo.probing.hits import ERROR_CLASSES

__all__ = ["comparison_figure", "match_error_figure", "save_figure"]

PANEL_SIZE = 1.6  # inches
TITLE_WIDTH = 20  # characters above a panel
TITLE_SIZE, LABEL_SIZE = 9, 8  # points

READOUTS = {"mean": "mean over heads", "through_head": "through the alignment head"}

Predictions = Mapping[str, Tensor | Mapping[str, Tensor]]


def comparison_figure(
    batch: Mapping[str, Any], predictions: Predictions, *, samples: int = 3, pixels: Tensor | None = None
) -> Figure:
    """Draw one row per sample: its reference views, the true first target view, and the prediction of each model.

    Without reference views the first two views are drawn, which a model must generate consistently.

    Args:
        batch: collated samples.
        predictions: name of a model to its images of all views, `[B, V, 3, H, W]`; or to several such images by what
            they are ("one step", "sampled"), the same for all models, which are then drawn one below the other.
        samples: number of rows.
        pixels: bool `[B, V, 1, H, W]`; if given, the PSNR over these pixels of a view is written below each of its
            predictions.
    """
    by_model = {name: images if isinstance(images, Mapping) else {"": images} for name, images in predictions.items()}
    kinds = list(next(iter(by_model.values()), {"": None}))
    references, images = int(batch["num_reference_views"]), batch["images"]
    targets = [references] if references else list(range(min(2, images.shape[1])))
    shown = [(sample, kind) for sample in range(min(samples, images.shape[0])) for kind in kinds]
    columns = references + len(targets) * (1 + len(by_model))
    figure, grid = _grid(len(shown), columns, line=0.0 if pixels is None else 0.17, margin=0.3)
    titles = ["reference"] if references == 1 else [f"reference {view}" for view in range(references)]
    for row, (sample, kind) in enumerate(shown):
        axes = [_panel(figure, grid[row, view], images[sample, view], titles[view]) for view in range(references)]
        for view in targets:
            suffix = "" if references else f", view {view}"
            axes.append(_panel(figure, grid[row, len(axes)], images[sample, view], f"truth{suffix}"))
            for name, made in by_model.items():
                axes.append(_panel(figure, grid[row, len(axes)], made[kind][sample, view], f"{name}{suffix}"))
                if pixels is not None:
                    axes[-1].set_xlabel(_psnr(made[kind], images, pixels, sample, view), fontsize=LABEL_SIZE)
        axes[0].set_ylabel(kind, fontsize=LABEL_SIZE)
        for axis in axes if row else ():  # the titles of the first row are those of the columns
            axis.set_title("")
    return figure


def _psnr(predicted: Tensor, truth: Tensor, pixels: Tensor, sample: int, view: int) -> str:
    """PSNR of one view over some of its pixels, as text; empty where there are no such pixels."""
    squared = (predicted[sample, view] - truth[sample, view]).square()
    shown = squared[:, pixels[sample, view, 0]]
    return f"{float(psnr_of_error(shown.mean())):.1f} dB" if shown.numel() else ""


def match_error_figure(batch: Mapping[str, Any], found: Mapping[str, FoundMatches], *, samples: int = 3) -> Figure:
    """Draw how far from the true match the attention of each model finds every query token of a target view.

    Each row shows a sample: the key view, the query view, then for each model the query view with each of its tokens
    colored by the distance, in tokens of the key view, between the true match and the most-attended token. Tokens
    without a match stay gray. Above each map stands the share of the matches found within one token. Samples without a
    match between the two views are left out.

    Args:
        batch: collated samples.
        found: name of a model to what `find_matches` returned for the batch.
        samples: number of rows.
    """
    first = next(iter(found.values()))
    rows = (first.target >= 0).any(1).nonzero().flatten().tolist()[:samples]
    readouts = {name: READOUTS[matches.readout] for name, matches in found.items()}
    title = "distance from the most-attended token to the true match"
    if is_same := len(set(readouts.values())) == 1:
        title += f", {readouts[next(iter(readouts))]}"
    figure, grid = _grid(len(rows), 2 + len(found), line=0.15, margin=0.8)
    figure.suptitle(title, fontsize=TITLE_SIZE + 1)
    for place, row in enumerate(rows):
        for column, (view, role) in enumerate(((first.key_view, "keys"), (first.query_view, "queries"))):
            kind = "reference" if view < int(batch["num_reference_views"]) else "target"
            title = f"{kind} view {view}\n({role})" if place == 0 else ""
            _panel(figure, grid[place, column], batch["images"][row, view], title)
        for column, (name, matches) in enumerate(found.items(), start=2):
            lines = [] if place else [name] if is_same else [name, readouts[name]]
            lines.append(f"{matches.shares_within(1)[row]:.0%} within 1 token")
            image = batch["images"][row, matches.query_view]
            axis = _panel(figure, grid[place, column], image, "\n".join(lines), faded=True)
            _draw_errors(axis, matches, row)
    classes = [least for least in ERROR_CLASSES if least < max(*first.key_grid, 3)]
    patches = [Patch(color=ERROR_CLASSES[least], label=_class_name(least, classes)) for least in classes]
    patches.append(Patch(color="0.75", label="no match in the key view"))
    columns = len(patches) if len(found) > 2 else 3  # as many as the panels are wide
    figure.legend(handles=patches, loc="outside lower center", ncols=columns, fontsize=LABEL_SIZE, frameon=False)
    return figure


def _class_name(least: int, classes: Sequence[int]) -> str:
    """Name a class of distances for the legend."""
    if least == classes[-1]:
        return f"{least} tokens off or more"
    if least == 0:
        return "the match itself"
    most = classes[classes.index(least) + 1] - 1
    return "1 token off" if most == 1 else f"{least} to {most} tokens off"


def _draw_errors(axis: Axes, matches: FoundMatches, row: int) -> None:
    """Color the tokens of the query view that have a match."""
    errors = matches.errors[row].view(matches.query_grid).numpy()
    colors = to_rgba_array(list(ERROR_CLASSES.values()), alpha=0.85)
    tokens = colors[np.digitize(errors, list(ERROR_CLASSES)[1:])]
    tokens[errors < 0] = 0
    axis.imshow(tokens, extent=axis.images[0].get_extent(), interpolation="nearest")


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 120) -> Path:
    """Write a figure as PNG, whole or not at all; `dpi` are the pixels per inch of the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())
    return Path(path)


def _grid(rows: int, columns: int, *, line: float, margin: float) -> tuple[Figure, GridSpec]:
    """Make a figure with a grid of square panels, with a line of text at each and a margin, both in inches."""
    size = PANEL_SIZE * columns, (PANEL_SIZE + line) * rows + margin
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_gridspec(rows, columns)


def _panel(figure: Figure, cell: Any, image: Tensor, title: str, *, faded: bool = False) -> Axes:
    """Draw an image `[3, H, W]` without smoothing; faded is gray and pale, as the ground of a map."""
    axis = figure.add_subplot(cell)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    height, width = image.shape[-2:]
    pixels = image.detach().float().clamp(0, 1).cpu()
    if faded:
        pixels = 0.5 + 0.5 * pixels.mean(0, keepdim=True).expand(3, -1, -1)
    axis.imshow(pixels.permute(1, 2, 0).numpy(), extent=(0, width, height, 0), interpolation="nearest")
    if title:
        axis.set_title(title if "\n" in title else textwrap.fill(title, TITLE_WIDTH), fontsize=TITLE_SIZE)
    return axis
