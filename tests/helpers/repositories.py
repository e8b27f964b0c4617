"""Published repositories whose narrow models are attached by the lines of docs/models.md, and where their tokens lie.

Axes: B samples, V views, h w token grid, C channels, L tokens. A place is (view, row, column).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cameo import Correspondence
from tests.helpers import attached_models as checks
from tests.helpers.attached_models import Arguments, Attached, hidden_states
from tests.helpers.catalogue import Row, noise
from tests.helpers.models import GRID, SAMPLES, VIEWS, Place, next_view

__all__ = [
    "LATENTS",
    "PATCH",
    "Builder",
    "Entry",
    "attach",
    "check_footprint",
    "seeded",
    "switch_checkpointing_on",
    "views_first",
]

Builder = Callable[[], nn.Module]
PATCH = 2
LATENTS = (4, GRID[0] * PATCH, GRID[1] * PATCH)  # channels, height and width, of models that pack 2 x 2 cells


def views_first(views: int, grid: tuple[int, int], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Take tokens `[B, (V h w + p), C]` or `[(B V), h w, C]` apart into images `[B, V, h, w, C]` and what is left."""
    tokens = tokens.reshape(SAMPLES, -1, tokens.shape[-1])
    length = views * grid[0] * grid[1]
    return tokens[:, :length].reshape(SAMPLES, views, *grid, -1), tokens[:, length:]


def switch_checkpointing_on(model: nn.Module) -> dict[str, Any]:
    """Let every module with a switch for checkpointing compute again; for models whose own switch fails today."""
    model.train()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    return {}


@dataclass(frozen=True)
class Entry:
    """One model of a repository, and a layer of it.

    Attributes:
        checkout: the name of the repository's folder.
        open: with its folder, gives what makes the model.
        inputs: makes the arguments of a forward from latents `[B, V, C, H, W]`.
        latents: C, H and W of them.
        views, grid: of the layer.
        enters: picks what enters the layer out of its arguments.
        to_images: takes what enters the layer apart into images `[B, V, h, w, C]` and all other tokens `[..., C]`.
        reach: which tokens of another view a query attends to: "all", its "row", or its "cell" in all other views.
        checkpoint: turns the model's own gradient checkpointing on, and returns more options of its forward; None
            where it has none.
    """

    checkout: str
    open: Callable[[Path], AbstractContextManager[Builder]]
    inputs: Callable[[Tensor], Arguments]
    latents: tuple[int, int, int] = LATENTS
    views: int = VIEWS
    grid: tuple[int, int] = GRID
    enters: Callable[..., tuple[Tensor, ...]] = hidden_states
    to_images: Callable[..., tuple[Tensor, Tensor]] = views_first
    reach: str = "all"
    checkpoint: Callable[[nn.Module], dict[str, Any]] | None = None

    @property
    def one_match(self) -> tuple[Place, Place]:
        """Query and key of a match that the layer can see."""
        query = (self.views - 1, 1, self.grid[1] - 1)
        return query, {"all": (0, 2, 1), "row": (0, 1, 1), "cell": (0, *query[1:])}[self.reach]

    def reached(self) -> Tensor:
        """The places that `one_match` may pull, bool `[V, h, w]`."""
        query, key = self.one_match
        places = torch.zeros(self.views, *self.grid, dtype=torch.bool)
        places[query] = True
        if self.reach == "all":
            places[key[0]] = True
        elif self.reach == "row":
            places[key[0], key[1]] = True
        else:
            places[:, key[1], key[2]] = True
        return places

    def many_matches(self) -> Correspondence:
        """Every token matches one of the next view, which the layer can see."""
        return next_view(views=self.views, grid=self.grid, shift=0 if self.reach == "cell" else 1)


def seeded(make: Builder) -> nn.Module:
    torch.manual_seed(0)
    return checks.randomize(make().eval())


def attach(model: nn.Module, entry: Entry, row: Row) -> Attached:
    """Attach by the line of the page, and run with one match."""
    assert type(model).__name__ == row.kind
    match = checks.one_match(*entry.one_match, entry.views, entry.grid)
    arguments = entry.inputs(noise(SAMPLES, entry.views, *entry.latents))
    return checks.attach(model, row.line, arguments, match, entry.enters)


def check_footprint(attached: Attached, entry: Entry) -> None:
    checks.check_footprint(*entry.to_images(entry.views, entry.grid, *attached.hidden), entry.reached())
