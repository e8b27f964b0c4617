"""Published repositories whose narrow models are attached by the lines of docs/models.md, and where their tokens lie.

Axes: B samples, V views, h w token grid, C channels, L tokens. A place is (view, row, column).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.models import GRID, SAMPLES, VIEWS

__all__ = ["Arguments", "Builder", "Entry", "Place", "first_tensor", "frames_first", "noise"]

Place = tuple[int, int, int]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Builder = Callable[[Path], AbstractContextManager[Callable[[], nn.Module]]]


def frames_first(tokens: Tensor, views: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Take tokens `[B, (V h w + p), C]` or `[(B V), h w, C]` apart into images `[B, V, h, w, C]` and what is left."""
    tokens = tokens.reshape(SAMPLES, -1, tokens.shape[-1])
    length = views * grid[0] * grid[1]
    return tokens[:, :length].reshape(SAMPLES, views, *grid, -1), tokens[:, length:]


@dataclass(frozen=True)
class Entry:
    """One model of a repository, and a layer of it.

    Attributes:
        checkout: the name of the repository's folder.
        build: opens the checkout and gives what makes the model.
        inputs: makes the arguments of a forward from latents `[B, V, C, H, W]`.
        latents: C, H and W of them.
        views, grid: of the layer.
        to_images: takes what enters the layer apart into images `[B, V, h, w, C]` and all other tokens `[..., C]`.
        reach: which tokens of another view a query attends to: "all", its "row", or its "cell" in all other views.
        targets: projections for a LoRA.
        checkpoint: turns on the model's own gradient checkpointing; None where it has none.
    """

    checkout: str
    build: Builder
    inputs: Callable[[Tensor], Arguments]
    latents: tuple[int, int, int]
    views: int = VIEWS
    grid: tuple[int, int] = GRID
    to_images: Callable[[Tensor, int, tuple[int, int]], tuple[Tensor, Tensor]] = frames_first
    reach: str = "all"
    targets: tuple[str, ...] = ("to_q", "to_k")
    checkpoint: Callable[[nn.Module], None] | None = None

    @property
    def match(self) -> tuple[Place, Place]:
        """The places of a match that the layer can see."""
        query = (self.views - 1, 1, self.grid[1] - 1)
        return query, {"all": (0, 2, 1), "row": (0, 1, 1), "cell": (0, *query[1:])}[self.reach]

    def reached(self) -> Tensor:
        """The places that the match of `match` may pull, bool `[V, h, w]`."""
        (view, row, column), key = self.match
        places = torch.zeros(self.views, *self.grid, dtype=torch.bool)
        places[view, row, column] = True
        if self.reach == "all":
            places[key[0]] = True
        elif self.reach == "row":
            places[key[0], row] = True
        else:
            places[:, row, column] = True
        return places


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def first_tensor(output: Any) -> Tensor:
    """The prediction in whatever a forward returns."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    found = [first_tensor(part) for part in output]
    return torch.stack(found) if isinstance(output, list) else found[0]
