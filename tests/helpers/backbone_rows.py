"""One table of all registered backbones and presets, with the batch that each of them takes."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from cameo.pipeline import TrainingInputs
from tests.helpers import backbone_checks as checks
from tests.helpers.batches import make_batch

__all__ = ["ROWS", "TINY", "Row", "every_row", "every_tiny"]


@dataclass(frozen=True)
class Row:
    """One preset, with the batch that its backbone takes.

    `grids` are the token grids of the supervised layer, written out by hand; `learning_rate` is that of the batch that
    is repeated for LoRA.
    """

    backbone: str
    preset: str
    views: int
    references: int
    size: int
    grids: checks.Grids
    wrap: dict[str, Any] = field(default_factory=dict, hash=False)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    learning_rate: float = 2e-2

    def __str__(self) -> str:
        way = "-inflated" if self.wrap.get("inflate") else "-own-view" if self.wrap.get("own_view") else ""
        return f"{self.backbone}-{self.preset}{way}"

    def batch(self, samples: int = 1) -> dict[str, Any]:
        found = make_batch(samples=samples, views=self.views, size=self.size)
        return {**found, "num_reference_views": self.references}

    def pipeline(self) -> Any:
        return copy.deepcopy(_built(self))

    def inputs(self, denoiser: nn.Module) -> TrainingInputs:
        pipeline = _built(self)
        return pipeline.training_inputs(
            self.batch(),
            generator=torch.Generator().manual_seed(5),
            timesteps=torch.tensor([pipeline.num_train_timesteps // 2]),
        )

    def subject(self) -> checks.Subject:
        return checks.Subject(
            self.backbone,
            build=lambda: self.pipeline().denoiser,
            inputs=lambda denoiser: ((found := self.inputs(denoiser)).args, found.kwargs),
            grids=self.grids,
            wrap=self.wrap,
        )


@functools.cache
def _built(row: Row) -> Any:
    return checks.build_pipeline(row.backbone, row.preset, **row.options)


TINY = [
    Row("cat3d", "tiny", views=3, references=1, size=64, grids=((8, 8),) * 3),
    Row("cat3d", "transformer-tiny", views=3, references=1, size=32, grids=((8, 8),) * 3, learning_rate=5e-3),
    Row("zero123plus", "tiny", views=7, references=1, size=32, grids=((6, 6), *((4, 4),) * 6)),
    Row("mvdream", "tiny", views=4, references=0, size=32, grids=((4, 4),) * 4),
    Row("mvdream", "imagedream-tiny", views=5, references=1, size=32, grids=((4, 4),) * 5),
    Row("sv3d", "tiny", views=5, references=1, size=32, grids=((4, 4),) * 5),
    Row("sv3d", "tiny", views=5, references=1, size=32, grids=((4, 4),) * 5, wrap={"own_view": True}),
    Row("sv3d", "tiny", views=5, references=1, size=32, grids=((4, 4),) * 5, wrap={"inflate": True}),
]
SMALL = [
    Row("cat3d", "small", views=2, references=1, size=32, grids=((4, 4),) * 2),
    Row("cat3d", "transformer-small", views=2, references=1, size=16, grids=((4, 4),) * 2),
    Row(
        "zero123plus",
        "small",
        views=7,
        references=1,
        size=32,
        grids=((6, 6), *((4, 4),) * 6),
        options={"reference_size": 48},
    ),
    Row("mvdream", "small", views=2, references=0, size=32, grids=((4, 4),) * 2),
    Row("mvdream", "imagedream-small", views=3, references=1, size=32, grids=((4, 4),) * 3),
    Row("sv3d", "small", views=3, references=1, size=32, grids=((4, 4),) * 3),
]
ROWS = [*TINY, *SMALL]
every_row = pytest.mark.parametrize("row", ROWS, ids=str)
every_tiny = pytest.mark.parametrize("row", TINY, ids=str)
