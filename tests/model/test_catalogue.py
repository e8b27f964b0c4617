"""Every row of docs/models.md on a narrow random model of the installed diffusers, attached by the line of the page."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import cameo
from cameo.errors import CaptureError
from cameo.probing.ablation import self_view_only
from tests.helpers import attached_models as checks
from tests.helpers.attached_models import Attached
from tests.helpers.catalogue import CLASSES, Entry, Row, noise, rows
from tests.helpers.catalogue_images import IMAGES
from tests.helpers.catalogue_videos import VIDEOS
from tests.helpers.models import GRID, SAMPLES, next_view

ENTRIES = IMAGES | VIDEOS
ROWS = rows(CLASSES)
QUERY, KEY = (2, 1, 3), (0, 2, 1)  # view, row, column


@pytest.fixture(scope="module", params=ENTRIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def entry(name: str) -> Entry:
    return ENTRIES[name]


@pytest.fixture(scope="module")
def row(name: str) -> Row:
    return ROWS[name]


@pytest.fixture(scope="module")
def attached(entry: Entry, row: Row) -> Attached:
    torch.manual_seed(0)
    model = checks.randomize(entry.build().eval())
    assert type(model) is getattr(diffusers, row.kind)
    return checks.attach(model, row.line, ((), entry.inputs()), checks.one_match(QUERY, KEY, entry.views, GRID))


def test_the_page_lists_these_models() -> None:
    assert list(ROWS) == list(ENTRIES)


def test_the_output_is_untouched(attached: Attached) -> None:
    checks.check_untouched(attached)


def test_one_match_pulls_its_query_and_the_matched_view(attached: Attached, entry: Entry) -> None:
    expected = torch.zeros(entry.views, *GRID, dtype=torch.bool)
    expected[QUERY] = True
    expected[KEY[0]] = True
    checks.check_footprint(*entry.to_images(*attached.hidden), expected)


def test_the_layer_can_be_cut_to_its_own_views(attached: Attached, entry: Entry) -> None:
    """Text of open length, masks and calls sample by sample stay as they are."""
    (layer,), (args, options) = attached.model.supervised_layers, attached.arguments
    with torch.no_grad():
        with self_view_only(attached.model, layer, (GRID,) * entry.views):
            cut = checks.first_tensor(attached.model(*args, **options))
        after = checks.first_tensor(attached.model(*args, **options))
    assert cut.isfinite().all()
    assert not torch.allclose(cut, attached.before, atol=1e-4)
    assert torch.equal(after, attached.before)


def test_a_copy_has_the_same_loss(attached: Attached) -> None:
    checks.check_copy(attached)


def test_checkpointing_gives_the_same_gradients(
    attached: Attached, entry: Entry, request: pytest.FixtureRequest
) -> None:
    if not entry.checkpoints:
        request.applymarker(pytest.mark.xfail(strict=True, reason="the class drops its mask; docs/models.md says so"))
    model: Any = attached.model.base_model
    model.enable_gradient_checkpointing()
    try:
        checks.check_checkpointing(attached)
    finally:
        model.disable_gradient_checkpointing()


def test_a_lora_trains(attached: Attached, entry: Entry, row: Row) -> None:
    checks.check_lora(attached, row.targets, next_view(views=entry.views))


def test_linear_attention_has_nothing_to_supervise() -> None:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=12,
    )
    wrapped = cameo.wrap(model, layer="transformer_blocks.0.attn1", layout="b (v h w)")
    match = next_view()
    with pytest.raises(CaptureError, match=r"layer 'transformer_blocks\.0\.attn1'"):
        wrapped(noise(SAMPLES, 4, 9, 4), noise(SAMPLES, 5, 8), torch.full((SAMPLES,), 400), correspondence=match)
