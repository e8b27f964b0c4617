"""The loss of uniform attention and the number of matches there could be, against the loss itself and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cameo.alarms import alignment_chance, matchable_tokens
from cameo.alignment import AlignmentHead, alignment_loss
from cameo.attention.capture import AttentionLayer
from cameo.attention.layout import TokenLayout
from cameo.config import CameoConfig
from cameo.correspondence import Correspondence
from cameo.geometry.grids import TokenGrids

SQUARE: TokenGrids = ((4, 4),) * 3
ZERO123PLUS: TokenGrids = ((6, 6), *((4, 4),) * 6)
JOINT = TokenLayout("b (v h w)")
ROWS = TokenLayout("(b h) (v w)")
CELLS = TokenLayout("(b h w) v")
TILES = TokenLayout("b (r h c w)", key="b (r h c w + h' w')", r=3, c=2, references_last=1)
OWN_VIEW = TokenLayout("(b v) (h w)", own_view_shows=0, references_absent=1)
REFERENCE_KEYS = TokenLayout("(b v) (h w)", key="(b u) (v h w)", reference_keys=1)
FRAMES = TokenLayout("(b f) (v h w)", f=2)
LAST_LEFT_OUT = TokenLayout("b (v h w)", unsupervised_views=1)


def layer_of(layout: TokenLayout) -> AttentionLayer:
    return AttentionLayer(0, "attn", heads=2, layout=layout)


def config_of(layout: TokenLayout, **options: Any) -> CameoConfig:
    return CameoConfig(None, ["attn"], layouts=[layout.to_dict()], **options)


def random_match(token_grids: TokenGrids, *, share: float = 0.6, batch: int = 2) -> Correspondence:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([height * width for height, width in token_grids])
    views, most = len(tokens), int(tokens.max())
    shape = (batch, views, views, most)
    index = (torch.rand(shape, generator=generator) * tokens[None, None, :, None]).long()
    matched = torch.rand(shape, generator=generator) < share
    matched &= ~torch.eye(views, dtype=torch.bool)[None, :, :, None]
    matched &= (torch.arange(most) < tokens[:, None])[None, :, None]
    distance = torch.rand(shape, generator=generator)
    return Correspondence(index.where(matched, -1), token_grids, distance=distance)


@pytest.mark.parametrize(
    ("layout", "token_grids", "options"),
    [
        (JOINT, SQUARE, {}),
        (JOINT, SQUARE, {"normalize": "all_views"}),
        (JOINT, SQUARE, {"reduction": "sum"}),
        (JOINT, SQUARE, {"reduction": "released", "num_reference_views": 1}),
        (ROWS, SQUARE, {}),
        (CELLS, SQUARE, {"normalize": "all_views"}),
        (TILES, ZERO123PLUS, {}),
        (TILES, ZERO123PLUS, {"normalize": "all_views"}),
        (TILES, ZERO123PLUS, {"reduction": "released", "num_reference_views": 1}),
        (OWN_VIEW, SQUARE, {}),
        (REFERENCE_KEYS, SQUARE, {}),
        (FRAMES, ((4, 4),) * 4, {}),
    ],
    ids=str,
)
def test_it_is_the_loss_of_uniform_attention(
    layout: TokenLayout, token_grids: TokenGrids, options: dict[str, Any]
) -> None:
    match, config = random_match(token_grids), config_of(layout, **options)
    local = layout.localize(match)
    tokens = local.index.shape[-1]
    query = torch.zeros(local.batch_size, 2, local.num_views, tokens, 3)
    references = config.num_reference_views
    uniform = alignment_loss(
        query,
        query,
        local,
        AlignmentHead(2, kind="mean"),
        normalize=config.normalize_of_layers()[0],
        reduction=config.reduction,
        num_reference_views=None if references is None else layout.view_order.num_references(references),
        implementation="reference",
    )
    assert uniform > 0.5
    torch.testing.assert_close(alignment_chance([layer_of(layout)], [match], config), uniform)


def test_it_is_the_mean_of_the_layers_and_zero_without_matches() -> None:
    match, coarse = random_match(SQUARE), random_match(((2, 2),) * 3)
    layers = [layer_of(JOINT), layer_of(JOINT)]
    config = CameoConfig(None, ["one", "two"], layouts=[JOINT.to_dict()] * 2)
    mean = (torch.tensor(16.0).log() + torch.tensor(4.0).log()) / 2
    torch.testing.assert_close(alignment_chance(layers, [match, coarse], config), mean)
    assert alignment_chance([layer_of(JOINT)], [random_match(SQUARE, share=0)], config_of(JOINT)) == 0


@pytest.mark.parametrize(
    ("layout", "token_grids", "number"),
    [
        (JOINT, SQUARE, 3 * 16 * 2),
        (ROWS, SQUARE, 3 * 16 * 2),
        (CELLS, SQUARE, 3 * 16 * 2),
        (TILES, ZERO123PLUS, 6 * 16 * (5 + 1)),  # the reference has no queries
        (OWN_VIEW, SQUARE, 2 * 16),  # to view 0 alone
        (REFERENCE_KEYS, SQUARE, 2 * 16),
        (FRAMES, ((4, 4),) * 4, 4 * 16),  # to the one other view of the frame
        (LAST_LEFT_OUT, SQUARE, 3 * 16 * 2),
    ],
    ids=str,
)
def test_matches_that_there_could_be(layout: TokenLayout, token_grids: TokenGrids, number: int) -> None:
    assert matchable_tokens(layer_of(layout), token_grids) == number
    # No sample has more.
    full = layout.localize(random_match(token_grids, share=1.0, batch=1))
    assert int(full.matched.sum()) <= number
    if layout.reach == "all":
        assert int(full.matched.sum()) == number
