"""Models without an adapter: `cameo.wrap(model, layer=..., layout=...)`, proven on small models of four kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cameo
from cameo import CameoModel, TokenLayout
from cameo.errors import CaptureError, ShapeError
from tests.helpers.models import (
    GRID,
    SAMPLES,
    VIEWS,
    JointModel,
    RowModel,
    add_lora,
    check_bit_identical,
    check_layout,
    check_overfits,
    frames,
    next_view,
)

HEIGHT, WIDTH = GRID
ROW_KEYS = TokenLayout("(b v h) w", key="(b u h) (v w)")


def view(number: int) -> list[tuple[int, int, int]]:
    return [(number, row, column) for row in range(HEIGHT) for column in range(WIDTH)]


# What enters each kind of layer, brought to images [B, V, h, w, C] without the library


def from_joint(x: Tensor) -> Tensor:
    return x.reshape(SAMPLES, VIEWS, HEIGHT, WIDTH, -1)


def from_cells(x: Tensor) -> Tensor:
    return x.reshape(SAMPLES, HEIGHT, WIDTH, VIEWS, -1).permute(0, 3, 1, 2, 4)


def from_rows(x: Tensor) -> Tensor:
    return x.reshape(SAMPLES, HEIGHT, VIEWS, WIDTH, -1).permute(0, 2, 1, 3, 4)


@dataclass
class Case:
    """A layer of a model, how it is described to `wrap`, and which tokens one match (2, 1, 3) -> `key` pulls."""

    make: Callable[[], nn.Module]
    layer: str
    options: dict[str, Any]
    to_images: Callable[[Tensor], Tensor]
    key: tuple[int, int, int]
    reached: list[tuple[int, int, int]]
    projections: tuple[str, str]
    shift: int = 1
    query: tuple[int, int, int] = (2, 1, 3)
    targets: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.targets = tuple(name.rpartition(".")[2] for name in self.projections)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def wrap(self, model: nn.Module) -> CameoModel:
        return cameo.wrap(model, layer=self.layer, head="mean", **self.options)


CASES = {
    "joint": Case(
        JointModel,
        "joint",
        {"layout": "b (v h w)"},
        from_joint,
        key=(0, 2, 1),
        reached=view(0),
        projections=("to_q", "to_k"),
    ),
    # Among all views but the query's own: normalize=None finds that this layer needs one softmax over the views.
    "temporal": Case(
        JointModel,
        "temporal",
        {"layout": "(b h w) v"},
        from_cells,
        key=(0, 1, 3),
        reached=[(0, 1, 3), (1, 1, 3)],
        projections=("to_q", "to_k"),
        shift=0,
    ),
    "mv_adapter": Case(
        RowModel,
        "rows",
        {"layout": ROW_KEYS, "kernel_call": 1},
        from_joint,
        key=(0, 1, 2),
        reached=[(0, 1, column) for column in range(WIDTH)],
        projections=("projections.to_q_mv", "projections.to_k_mv"),
    ),
    "era3d": Case(
        RowModel,
        "whole_rows",
        {"layout": "(b h) (v w)"},
        from_rows,
        key=(0, 1, 2),
        reached=[(0, 1, column) for column in range(WIDTH)],
        projections=("to_q", "to_k"),
    ),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(model: nn.Module, **options: Any) -> Tensor:
    return model(frames(), VIEWS, **options)


@EVERY_CASE
def test_wrapped_is_bit_identical(case: Case) -> None:
    check_bit_identical(case.model, case.wrap, run, next_view(shift=case.shift))


@EVERY_CASE
def test_one_match_pulls_its_tokens_and_no_others(case: Case) -> None:
    model = case.wrap(case.model())
    layer = model.base_model.get_submodule(case.layer)

    def project(images: Tensor) -> tuple[Tensor, Tensor]:
        projections = [layer.get_submodule(name) for name in case.projections]
        query, key = (projection(images).unflatten(-1, (layer.heads, -1)) for projection in projections)
        return query, key

    check_layout(model, run, case.to_images, query=case.query, key=case.key, reached=case.reached, project=project)


@EVERY_CASE
def test_lora_overfits_one_batch(case: Case) -> None:
    model = case.wrap(add_lora(case.model(), *case.targets))
    check_overfits(model, run, next_view(shift=case.shift))


def test_lora_is_saved_and_loaded_with_the_description(tmp_path: Path) -> None:
    case = CASES["mv_adapter"]
    model = case.wrap(add_lora(case.model(), *case.targets))
    for name, parameter in model.base_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    again = cameo.from_pretrained(model.save_pretrained(tmp_path), base_model=case.model())
    losses = []
    for wrapped in (model, again):
        output = run(wrapped, correspondence=next_view())
        losses.append(wrapped.alignment_loss)
        assert torch.equal(output, run(model))
    assert torch.equal(*losses)
    assert not torch.equal(run(case.model()), run(model))


def test_a_match_in_another_row_is_out_of_reach() -> None:
    model = CASES["era3d"].wrap(CASES["era3d"].model())
    match = next_view(shift=0)
    other_row = torch.where(match.matched, (match.index + WIDTH) % (HEIGHT * WIDTH), -1)
    run(model, correspondence=cameo.Correspondence(other_row, match.token_grids))
    assert model.num_supervised == 0
    assert model.alignment_loss.item() == 0


def test_normalize_follows_from_the_layout_unless_it_is_given() -> None:
    assert CASES["temporal"].wrap(CASES["temporal"].model()).cameo_config.normalize == "all_views"
    assert CASES["joint"].wrap(CASES["joint"].model()).cameo_config.normalize == "per_view"
    with pytest.raises(ValueError, match="softmax per view is constant"):
        cameo.wrap(JointModel(), layer="temporal", layout="(b h w) v", normalize="per_view")


def test_three_kernel_calls_need_to_be_told_apart() -> None:
    model = cameo.wrap(RowModel(), layer="rows", layout=ROW_KEYS)
    with pytest.raises(CaptureError, match=r"3 times.*kernel_call="):
        run(model, correspondence=next_view())
    model.unwrap()
    for wrong in (0, 2):  # attention within a view: the shapes give it away
        model = cameo.wrap(RowModel(), layer="rows", layout=ROW_KEYS, kernel_call=wrong)
        with pytest.raises(ShapeError):
            run(model, correspondence=next_view())
