"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["markdown_row", "markdown_table"]


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    r"""Format a table in Markdown, one line per row and without a line break at the end.

    Example:
        >>> print(markdown_table(["layer", "note"], [[0, "rows | columns"], [1, ""]]))
        | layer | note |
        | --- | --- |
        | 0 | rows \| columns |
        | 1 | |

    Args:
        header: one title per column.
        rows: cells of each row, as many as the header has. A cell is shown as `str` gives it, with line breaks as
            spaces and `|` escaped, so that no content can end a cell.

    Raises:
        ValueError: if a row has another number of cells than the header.
    """
    lines = [markdown_row(header), markdown_row(["---"] * len(header))]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"rows: expected {len(header)} cells as in the header, got {len(row)} in row {number}")
        lines.append(markdown_row(row))
    return "\n".join(lines)


def markdown_row(cells: Iterable[object]) -> str:
    """Format one row of a table, for tables that are printed while they grow.

    Example:
        >>> markdown_row(["softmax", None, 0.5])
        '| softmax | None | 0.5 |'
    """
    shown = (" ".join(str(cell).split()).replace("|", r"\|") for cell in cells)
    return f"|{''.join(f' {cell} |' if cell else ' |' for cell in shown)}"
