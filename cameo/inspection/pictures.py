"""Pictures of matched points, warped views and their differences, as given and as they look like.

Axes: H W pixels of a panel.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from cameo.files import write_atomically
from cameo.inspection.readings import AS_GIVEN, Reading
from cameo.inspection.registration import Registration, moved_edges
from cameo.inspection.scenes import InspectedScene, at_grid
from cameo.inspection.scores import match_pairs
from cameo.scenes.views import images_to_float

__all__ = ["check_figure", "write_figure"]

# Side of a panel in inches and, at most, in pixels; dots along each side of a view.
PANEL, PANEL_PIXELS = 1.7, 128
DOTS = 8
GRAY = 0.8
# Mean difference of two colors, in [0, 1], from which all are drawn alike.
LARGEST_DIFFERENCE = 0.5


def check_figure(
    title: str, scenes: Sequence[InspectedScene], reading: Reading, moved: Registration | None, pairs: int
) -> Figure:
    """Draw a row for each reading of each pair, the given one first, and edges of depth that is not registered.

    Args:
        title: the verdict in words.
        scenes: that were compared.
        reading: the one that explains the views best.
        moved: how depth is to be moved; None where it lies on its colors.
        pairs: how many pairs are drawn, at most.

    Raises:
        ValueError: there are no scenes, or `pairs` is below 1.
    """
    if pairs < 1 or not scenes:
        raise ValueError(f"pairs: expected at least 1 and a check of scenes, got {pairs} and {len(scenes)} scenes")
    readings = {"as given": AS_GIVEN}
    if reading != AS_GIVEN:
        readings["as it looks like"] = reading
    shown = _telling_pairs(scenes, reading, pairs)
    rows = len(shown) * len(readings) + int(moved is not None)
    title = textwrap.fill(title, 135)
    height = PANEL * rows + 0.2 * (title.count("\n") + 1) + 0.5
    figure = Figure(figsize=(5 * PANEL, height), layout="constrained")
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    grid = figure.add_gridspec(rows, 2, width_ratios=(2, 3))
    place = 0
    for scene, pair in shown:
        for name, one in readings.items():
            _draw_pair(figure, grid, place, scene, pair, one, name)
            place += 1
    if moved is not None:
        _draw_edges(figure, grid, place, shown[0][0], moved)
    handles: list[Any] = [
        Line2D([], [], marker="o", color="0.3", markersize=4, linewidth=0.8, label="one surface point in two views"),
        Patch(color=str(GRAY), label="no match"),
        Patch(color=colormaps["magma"](1.0), label=f"difference from 0 (black) to {LARGEST_DIFFERENCE:g} (this color)"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=7, frameon=False)
    return figure


def write_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())
    return Path(path)


def _telling_pairs(
    scenes: Sequence[InspectedScene], reading: Reading, most: int
) -> list[tuple[InspectedScene, Tensor]]:
    """The pairs with neither few matches nor almost the same view, by the reading that was found."""
    found = []
    for scene in scenes:
        pairs = scene.pairs[: len(scene.pairs) // 2]
        matched = match_pairs(at_grid(scene, (DOTS, DOTS)), reading, pairs)
        share = matched.visible.sum(-1) / matched.measured.sum(-1).clamp(min=1)
        found += [((value - 0.6).abs().item(), scene, pair) for value, pair in zip(share, pairs, strict=True)]
    found.sort(key=lambda one: one[0])
    return [(scene, pair) for _, scene, pair in found[:most]]


def _draw_pair(
    figure: Figure, grid: GridSpec, row: int, scene: InspectedScene, pair: Tensor, reading: Reading, name: str
) -> None:
    """Draw one pair by one reading: matched points, then the second view warped into the first, and the difference."""
    images = [_panel_image(scene, view, reading) for view in pair]
    height, width = images[0].shape[-2:]
    axis = figure.add_subplot(grid[row, 0])
    _show(axis, torch.cat([images[0], torch.ones(3, height, 2), images[1]], -1), "")
    axis.set_ylabel(name, fontsize=7)
    axis.set_title(f"{scene.views.key}, views {pair[0]} and {pair[1]}", fontsize=7)
    if not (scene.views.depth > 0).any():
        _draw_tracks(axis, scene, pair, (height, width))
        return
    _draw_matches(axis, scene, pair, reading, (height, width))
    inner = grid[row, 1].subgridspec(1, 3)
    warped, matched = _warped(scene, pair, reading, (height, width))
    difference = torch.where(matched, (images[0] - warped).abs().mean(0), torch.nan)
    share = f"{matched.float().mean():.0%} matched"
    _show(figure.add_subplot(inner[0]), images[0], f"view {pair[0]}")
    _show(figure.add_subplot(inner[1]), torch.where(matched, warped, GRAY), f"view {pair[1]} warped, {share}")
    axis = figure.add_subplot(inner[2])
    axis.set_facecolor(str(GRAY))
    axis.imshow(difference.numpy(), cmap="magma", vmin=0, vmax=LARGEST_DIFFERENCE, interpolation="nearest")
    error = f"{difference.nanmean():.3f}" if matched.any() else "none"
    _bare(axis, f"difference, mean {error}")


def _panel_image(scene: InspectedScene, view: Tensor, reading: Reading) -> Tensor:
    late = reading.shift if reading.late == "images" else 0
    image = images_to_float(scene.views.images[scene.at(view, late)])
    height, width = image.shape[-2:]
    factor = min(1.0, PANEL_PIXELS / max(height, width))
    size = round(height * factor), round(width * factor)
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def _draw_matches(axis: Axes, scene: InspectedScene, pair: Tensor, reading: Reading, size: tuple[int, int]) -> None:
    """Join the token centers of the first view that have a match with where they are in the second one."""
    coarse = at_grid(scene, (DOTS, DOTS))
    found = match_pairs(coarse, reading, pair[None])
    scale = torch.tensor([size[1] / scene.views.size[1], size[0] / scene.views.size[0]])
    start, end = coarse.centers * scale, found.xy[0] * scale + torch.tensor([size[1] + 2.0, 0.0])
    _join(axis, start[found.visible[0]], end[found.visible[0]], size)


def _draw_tracks(axis: Axes, scene: InspectedScene, pair: Tensor, size: tuple[int, int]) -> None:
    """Join points that both views show, spread over the first one, where there is no depth to project."""
    tracks = scene.views.tracks
    if tracks is None:
        return
    scale = torch.tensor([size[1] / scene.views.size[1], size[0] / scene.views.size[0]])
    seen = []
    for view in pair:
        here = tracks.view == scene.at(view, 0)
        seen.append(dict(zip(tracks.point[here].tolist(), tracks.xy[here] * scale, strict=True)))
    by_cell = {}
    for point in seen[0].keys() & seen[1].keys():
        cell = (seen[0][point] * DOTS / torch.tensor([size[1], size[0]])).long()
        by_cell[tuple(cell.tolist())] = point
    if by_cell:
        start, end = (torch.stack([of_view[point] for point in by_cell.values()]) for of_view in seen)
        _join(axis, start, end + torch.tensor([size[1] + 2.0, 0.0]), size)


def _join(axis: Axes, start: Tensor, end: Tensor, size: tuple[int, int]) -> None:
    """Draw lines between points of two images side by side, each in a color of its place in the first."""
    for (x, y), (u, v) in zip(start.tolist(), end.tolist(), strict=True):
        color = hsv_to_rgb((x / size[1], 0.5 + 0.5 * y / size[0], 1.0))
        axis.plot([x, u], [y, v], color=color, linewidth=0.5, marker="o", markersize=2.5, markeredgewidth=0)


def _warped(scene: InspectedScene, pair: Tensor, reading: Reading, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Colors `[3, H, W]` that the second view has for the pixels of the first, and which of them it shows `[H, W]`."""
    fine = at_grid(scene, size)
    found = match_pairs(fine, reading, pair[None])
    late = reading.shift if reading.late == "images" else 0
    colors = fine.color_at(scene.at(pair[1:], late), found.xy)[0]
    return colors.T.unflatten(-1, size), found.visible[0].unflatten(-1, size)


def _draw_edges(figure: Figure, grid: GridSpec, row: int, scene: InspectedScene, move: Registration) -> None:
    """Draw the edges of depth on the colors of a view, as given and moved."""
    inner = grid[row, :].subgridspec(1, 4)
    for place, view in enumerate((0, len(scene.views) // 2)):
        for moved in (False, True):
            image, edges = moved_edges(scene, view, move if moved else None)
            shown = torch.where(edges, torch.tensor([1.0, 0.1, 0.1])[:, None, None], image)
            title = f"edges of depth, {'moved' if moved else 'as given'}"
            _show(figure.add_subplot(inner[2 * place + int(moved)]), shown, title)


def _show(axis: Axes, image: Tensor, title: str) -> None:
    axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.autoscale(False)
    _bare(axis, title)


def _bare(axis: Axes, title: str) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
    axis.set_title(title, fontsize=7)
