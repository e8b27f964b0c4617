"""The answer to whether a layout describes the tokens of a model, as text and as a picture.

Axes: V views, h w token grid of a view.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.attention.layout import TokenLayout
from cameo.files import write_atomically
from cameo.geometry.grids import TokenGrids

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CheckedCell", "CheckedLayer", "LayoutCheck"]

ANSWERS = {True: "fits", False: "does not fit", None: "cannot tell"}
MOST_PANELS = 6


@dataclass(frozen=True)
class CheckedCell:
    """One cell of one view that was changed, and which query or key moved farthest.

    Attributes:
        of: "query" or "key".
        place: sample, view, row and column of the cell.
        expected: row of the attention batch and token where the layout says that the cell is.
        found: the same, where the farthest movement was.
        found_place: sample, view, row and column that the layout gives to `found`; None for a token of no view.
        share: how far the expected token moved; 1 is as far as any, 0 not farther than most.
        fits: whether that is far enough.
        movement: how far the tokens of each view moved, `[V, h, w]` padded with NaN; not compared or shown.
    """

    of: str
    place: tuple[int, int, int, int]
    expected: tuple[int, int] | None
    found: tuple[int, int]
    found_place: tuple[int, int, int, int] | None
    share: float
    fits: bool
    movement: Tensor = field(repr=False, compare=False)

    def __str__(self) -> str:
        """Return one line: what was changed, what was expected and what was found."""
        expected = "in any view" if self.expected is None else f"at {list(self.expected)}"
        found = "of no view" if self.found_place is None else f"of {_place(self.found_place)}"
        return (
            f"{self.of} of {_place(self.place)}: expected {expected}, where the movement is {self.share:.0%}; "
            f"the farthest is at {list(self.found)}, by the layout {found}"
        )


@dataclass(frozen=True)
class CheckedLayer:
    """Whether a layout describes the tokens of one layer.

    Attributes:
        path: dotted module path of the layer.
        layout: the layout that was checked.
        token_grids: token grid of each view.
        cells: what was found for each cell that was changed, for queries and keys.
        mistake: "packed cells", "text at the other end", "order of segments", "order of views", "transposed grid",
            "order of axes", "other", or None.
        words: what the mistake looks like and the cure, or why it could not be told; empty where the layout fits.
    """

    path: str
    layout: TokenLayout
    token_grids: TokenGrids = ()
    cells: tuple[CheckedCell, ...] = ()
    mistake: str | None = None
    words: str = ""

    @property
    def fits(self) -> bool | None:
        """True or False, or None where it could not be told."""
        if self.mistake is not None:
            return False
        return None if self.words else True

    def __str__(self) -> str:
        """Return the answer, and a line for each cell that is not where the layout says; places are `[AB, L]`."""
        what = f" ({self.mistake})" if self.mistake else ""
        lines = [f"layer {self.path}, {self.layout!r}: {ANSWERS[self.fits]}{what}"]
        lines += [f"  {self.words}"] if self.words else []
        wrong = [cell for cell in self.cells if not cell.fits]
        if self.cells:
            lines.append(f"  {len(self.cells) - len(wrong)} of {len(self.cells)} changed cells are where it says")
        return "\n".join([*lines, *(f"  {cell}" for cell in wrong)])


@dataclass(frozen=True)
class LayoutCheck:
    """What `CameoModel.check_layout` found out: whether the layouts describe the tokens of the supervised layers.

    Example:
        >>> layer = CheckedLayer("attn", TokenLayout("b (v h w)"), words="inputs= was not given")
        >>> print(LayoutCheck((layer,)))
        layer attn, TokenLayout("b (v h w)"): cannot tell
          inputs= was not given
        >>> LayoutCheck((layer,)).fits is None
        True

    Attributes:
        layers: one answer per supervised layer.
    """

    layers: tuple[CheckedLayer, ...]

    @property
    def fits(self) -> bool | None:
        """True if every layout fits, False if one does not, None if that could not be told; None is not True."""
        answers = [layer.fits for layer in self.layers]
        return False if False in answers else None if None in answers else True

    def __str__(self) -> str:
        """Return the answers of all layers."""
        return "\n".join(map(str, self.layers))

    def figure(self) -> Figure:
        """Draw for each layer how far the tokens of all views moved, as the layout orders them, for a few cells.

        A square marks the cell that was changed. Where the layout fits, the movement is in it; elsewhere it lies where
        the layout puts the tokens of that cell.

        Raises:
            ValueError: nothing was measured in any layer.
        """
        from matplotlib.figure import Figure

        shown = [(layer, _telling(layer.cells)) for layer in self.layers if layer.cells]
        if not shown:
            raise ValueError("layers: expected one in which cells were changed; print the check for the reason")
        rows, columns = len(shown), max(len(cells) for _, cells in shown)
        figure = Figure(figsize=(1 + 3 * columns, 0.4 + 1.3 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for line, (layer, cells) in zip(panels, shown, strict=True):
            for panel in line[len(cells) :]:
                panel.axis("off")
            for panel, cell in zip(line, cells, strict=False):
                _draw_cell(panel, cell)
            what = f"\n{layer.mistake}" if layer.mistake else ""
            line[0].set_ylabel(f"{layer.path.split('.')[-1]}: {ANSWERS[layer.fits]}{what}", fontsize=8)
        figure.suptitle("movement of the tokens of each view after one cell (red) was changed", fontsize=9)
        return figure

    def draw(self, path: str | Path) -> Path:
        """Write the picture of `figure` to a file, whose ending says its format; returns the path.

        Raises:
            ValueError: nothing was measured in any layer.
        """
        path, buffer = Path(path), io.BytesIO()
        self.figure().savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=120)
        write_atomically(path, buffer.getvalue())
        return path


def _telling(cells: tuple[CheckedCell, ...]) -> list[CheckedCell]:
    """Those to be drawn: where some do not fit, these, of queries if there are any, from all over."""
    wrong = [cell for cell in cells if not cell.fits] or list(cells)
    side = [cell for cell in wrong if cell.of == wrong[0].of]
    return side[:: math.ceil(len(side) / MOST_PANELS)]


def _draw_cell(panel: Axes, cell: CheckedCell) -> None:
    from matplotlib.patches import Rectangle

    views, height, width = cell.movement.shape
    apart = F.pad(cell.movement, (0, 1), value=torch.nan).movedim(0, 1).reshape(height, -1)[:, :-1]
    panel.imshow(apart.numpy(), cmap="viridis", interpolation="nearest")
    panel.set_facecolor("0.85")
    _, view, row, column = cell.place
    corner = (view * (width + 1) + column - 0.5, row - 0.5)
    panel.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=1.5))
    panel.set_xticks(
        [number * (width + 1) + (width - 1) / 2 for number in range(views)], [*map(str, range(views))], fontsize=7
    )
    panel.set_yticks([])
    panel.set_xlabel("view", fontsize=7)
    where = "no view" if cell.found_place is None else _place(cell.found_place)
    panel.set_title(f"{cell.of}, farthest: {where}", fontsize=7)


def _place(place: tuple[int, int, int, int]) -> str:
    sample, view, row, column = place
    return f"{f'sample {sample}, ' if sample else ''}view {view}, row {row}, column {column}"
