"""Validation and pictures of models whose layers see their views in other ways."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence
from cameo.data import collate
from cameo.evaluation.match_errors import find_matches
from cameo.evaluation.pictures import comparison_figure, match_error_figure
from cameo.evaluation.validation import validate
from cameo.model import wrapper_of
from tests.helpers.batches import make_batch
from tests.helpers.evaluations import VALIDATION, rig_data
from tests.helpers.planted_attention import (
    ZERO123,
    PlantedAttention,
    joined,
    per_cell,
    prompt_last,
    tiled,
    within_views,
)


def true_match(data: Any, token_grids: Any) -> Correspondence:
    batch = collate([data[0], data[1]])
    return Correspondence.from_depth(batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grid=token_grids)


def test_validation_without_references(tmp_path: Path) -> None:
    data, pipeline = rig_data("mvdream", 0, tmp_path), PlantedAttention(TokenLayout("b (v h w)"), joined)
    found = validate(pipeline.wrapped(), pipeline, data, VALIDATION)
    assert found["psnr_covisible"] is None
    assert "num_reference_views=0" in found["notes"]["psnr_covisible"]
    assert found["pixels"] == 0
    assert found["loss"] == 0.25
    # All four views are targets, the first of them at 6 dB, the others at 20 dB.
    assert found["psnr_all"] == pytest.approx(-10 * math.log10((0.25 + 3 * 0.01) / 4), abs=1e-4)
    assert found["precision"]["mean@0"] == found["precision"]["best_head@1"] == 1.0
    assert found["precision_view"] is None
    assert found["pairs"] == 2 * int(true_match(data, 4).matched.sum())

    figures = pictures_of(pipeline, data)
    assert [axis.get_title() for axis in figures[0].axes[:4]] == [
        "truth, view 0",
        "one, view 0",
        "truth, view 1",
        "one, view 1",
    ]
    assert titles_of(figures[1]) == ["target view 1\n(keys)", "target view 0\n(queries)", "one\n100% within 1 token"]


def titles_of(figure: Any) -> list[str]:
    """Titles of the panels of the first sample in a map of the errors of one model."""
    return [axis.get_title() for axis in figure.axes[:3]]


def pictures_of(pipeline: PlantedAttention, data: Any) -> list[Any]:
    """The comparison, and the map of the errors, which has none: what is looked at is the true match."""
    batch = collate([data[0], data[1]])
    inputs = pipeline.training_inputs(batch, timesteps=torch.tensor([999, 999]))
    model = wrapper_of(pipeline) or pipeline.wrapped()
    found = find_matches(model, batch, inputs, through_head=False)
    match = true_match(data, model.supervised_layers[0].token_grids(48, 48, batch["images"].shape[1]))
    truth = match.index[:, found.query_view, found.key_view, : found.target.shape[1]]
    assert torch.equal(found.target, truth)
    assert torch.equal(found.found[truth >= 0], truth[truth >= 0])
    assert found.shares_within(0) == pytest.approx([1.0, 1.0])
    attention = match_error_figure(batch, {"one": found})
    for axis in attention.axes[:2]:  # what is drawn is the view that the title names
        drawn = torch.from_numpy(axis.images[0].get_array()).movedim(-1, 0)
        view = int(axis.get_title().split()[2])
        assert any(torch.equal(drawn, one[view]) for one in batch["images"])  # type: ignore[attr-defined]
    comparison = comparison_figure(batch, {"one": pipeline.predict_clean(None, inputs)})
    return [comparison, attention]


def test_validation_of_tiles_with_a_reference_on_a_grid_of_its_own(tmp_path: Path) -> None:
    """Zero123++: the reference has no queries, and tokens half as large as those of the tiles."""
    data = rig_data("zero123plus-v1.2", 1, tmp_path)
    token_grids = ((8, 8), *[(4, 4)] * 6)
    index = true_match(data, token_grids).index[:, 1:]
    pairs = int((index >= 0).sum())
    # The next token is in the next column of the key view, or at the end of a row in the next row.
    beside = int((index[:, :, 0] % 8 < 7).where(index[:, :, 0] >= 0, False).sum())
    beside += int((index[:, :, 1:] % 4 < 3).where(index[:, :, 1:] >= 0, False).sum())
    for shift, exact, near in ((0, pairs, pairs), (1, 0, beside)):
        pipeline = PlantedAttention(ZERO123, tiled, shift=shift)
        model = pipeline.wrapped()
        pipeline.layer = replace(pipeline.layer, reference_size=(96, 96))
        model._supervised = [pipeline.layer]
        found = validate(model, pipeline, data, VALIDATION)
        assert found["pairs"] == 2 * pairs > 0
        assert found["precision"]["mean@0"] == pytest.approx(exact / pairs)
        assert found["precision"]["mean@1"] == pytest.approx(near / pairs)
        # PSNR is over the target views only, whichever views have a denoising loss.
        assert found["psnr_all"] == pytest.approx(20, abs=1e-4)
        assert found["psnr_covisible"] == pytest.approx(20, abs=1e-4)
        if not shift:
            _, attention = pictures_of(pipeline, data)
            assert titles_of(attention)[:2] == ["reference view 0\n(keys)", "target view 1\n(queries)"]
            assert attention.axes[2].images[1].get_array().shape == (4, 4, 4)  # tokens of the queries, colors


def test_validation_without_the_reference(tmp_path: Path) -> None:
    """The reference view is part of the attention, but is not supervised."""
    data = rig_data("imagedream", 1, tmp_path)
    pipeline = PlantedAttention(TokenLayout("b (v h w)", unsupervised_views=1, references_last=1), prompt_last)
    found = validate(pipeline.wrapped(), pipeline, data, VALIDATION)
    assert found["pairs"] == 2 * int(true_match(data, 4).matched[:, 1:, 1:].sum()) > 0
    assert found["precision"]["mean@0"] == 1.0
    assert found["psnr_covisible"] == pytest.approx(20, abs=1e-4)
    assert found["pixels"] > 0
    _, attention = pictures_of(pipeline, data)
    assert titles_of(attention)[:2] == ["target view 2\n(keys)", "target view 1\n(queries)"]


@pytest.mark.parametrize("shift", [0, 1])
def test_validation_within_each_view(tmp_path: Path, shift: int) -> None:
    """Each view shows the reference too: its own token in the place of the match is what is to be looked at."""
    data, layout = rig_data("sv3d-orbit", 1, tmp_path), TokenLayout("(b v) (h w)", own_view_shows=0, references_last=1)
    pipeline = PlantedAttention(layout, within_views, shift=shift)
    found = validate(pipeline.wrapped(), pipeline, data, VALIDATION)
    assert found["pairs"] == 2 * int(true_match(data, 4).matched[:, 1:, 0].sum()) > 0
    assert found["precision"]["mean@0"] == found["precision"]["best_head@0"] == 1 - shift
    if not shift:
        _, attention = pictures_of(pipeline, data)
        assert titles_of(attention)[:2] == ["reference view 0\n(keys)", "target view 1\n(queries)"]


class PairedCameras:
    """Two cameras at each of two positions before a wall; both cameras of a position show the same in each cell."""

    def __getitem__(self, index: int) -> Any:
        batch = make_batch(samples=1, views=4, size=48, seed=index)
        batch["extrinsics"][0, :, 0, 3] = torch.tensor([0.0, 0.0, -0.5, -0.5])
        return {name: value[0] if isinstance(value, (Tensor, list)) else value for name, value in batch.items()}


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, 0.0)])
def test_validation_of_a_layer_that_sees_one_token_per_view(sign: float, expected: float) -> None:
    pipeline = PlantedAttention(TokenLayout("(b h w) v", references_last=1), per_cell, sign=sign)
    model = pipeline.wrapped(normalize="all_views")
    found = validate(model, pipeline, PairedCameras(), VALIDATION)  # type: ignore[arg-type]
    assert found["precision"] is None
    assert "one token of each view" in found["notes"]["precision"]
    # Each query has a match in one of three other views.
    assert found["precision_view"]["mean"] == found["precision_view"]["best_head"] == expected
    assert found["precision_view"]["chance"] == pytest.approx(1 / 3)
    assert found["pairs"] == 2 * 2 * 4 * 16
    assert found["psnr_all"] == pytest.approx(20, abs=1e-4)
    batch = collate([PairedCameras()[0]])
    inputs = pipeline.training_inputs(batch, timesteps=torch.tensor([999]))
    with pytest.raises(ValueError, match="layer 'attn' attends to a part of the other view"):
        find_matches(model, batch, inputs, through_head=False)
