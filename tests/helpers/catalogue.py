"""Narrow random models of diffusers' transformer classes, and where their tokens lie: the rows of docs/models.md.

Axes: B samples, V views, h w token grid, C channels, L tokens. Each model gets three views, or four where it groups
them, in the way of its pipeline: as frames of a video, as images one below the other, or as a sequence of image tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.models import GRID, SAMPLES, VIEWS

__all__ = [
    "CLASSES",
    "PAGE",
    "REPOSITORIES",
    "SIZE",
    "TEXT",
    "Entry",
    "Row",
    "frames",
    "noise",
    "positions",
    "rows",
    "stacked",
    "text",
    "text_mask",
]

CLASSES, REPOSITORIES = "Transformers of diffusers", "Published repositories"  # headings of the page
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PATCH = 2
SIZE = (GRID[0] * PATCH, GRID[1] * PATCH)  # of the latents of a view
TEXT = (5, 3)  # text tokens of the two samples, where the class takes texts of unequal length


@dataclass(frozen=True)
class Entry:
    """One class of diffusers, and a layer of it.

    Attributes:
        build: makes the model.
        inputs: makes the keyword arguments of its forward.
        starts: where the tokens of the views begin in the hidden states that enter the layer, for each sample.
        views: how many there are.
        checkpoints: whether the class computes the same again under gradient checkpointing.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    starts: tuple[int, int] = (0, 0)
    views: int = VIEWS
    checkpoints: bool = True

    def to_images(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Take `[B, L, C]` apart into the views `[B, V, h, w, C]` and all other tokens `[..., C]`."""
        length = self.views * GRID[0] * GRID[1]
        images = torch.stack([row[start : start + length] for row, start in zip(tokens, self.starts, strict=True)])
        others = [
            torch.cat([row[:start], row[start + length :]]) for row, start in zip(tokens, self.starts, strict=True)
        ]
        return images.reshape(SAMPLES, self.views, *GRID, -1), torch.cat(others)


@dataclass(frozen=True)
class Row:
    """A row of a table of the page: model, class, the line that attaches CAMEO, projections for a LoRA, and notes."""

    name: str
    kind: str
    line: str
    targets: tuple[str, ...]
    notes: str


def rows(heading: str) -> dict[str, Row]:
    """Read the table under this heading of docs/models.md."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[2].startswith("`cameo.wrap("):
            targets = tuple(re.findall(r"`([\w.]+)`", cells[3]))
            found[cells[0]] = Row(cells[0], cells[1].strip("`"), cells[2].strip("`"), targets, cells[4])
    return found


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def frames(channels: int = 4, *, views: int = VIEWS) -> Tensor:
    """Latents of a video, `[B, C, V, H, W]`."""
    return noise(SAMPLES, channels, views, *SIZE)


def stacked(channels: int = 4) -> Tensor:
    """Latents of images one below the other, `[B, C, V H, W]`."""
    return noise(SAMPLES, channels, VIEWS * SIZE[0], SIZE[1])


def text(width: int = 8, *, length: int = max(TEXT), seed: int = 1) -> Tensor:
    return noise(SAMPLES, length, width, seed=seed)


def text_mask(lengths: tuple[int, int] = TEXT) -> Tensor:
    """Which of the text tokens are no padding, bool `[B, T]`."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def positions(axes: int = 3) -> Tensor:
    """View, row and column of each token, `[V h w, axes]`; a fourth axis is that of the text."""
    places = torch.cartesian_prod(*(torch.arange(float(count)) for count in (VIEWS, *GRID)))
    return torch.nn.functional.pad(places, (0, axes - 3))
