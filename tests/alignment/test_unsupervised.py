"""Tokens that are not supervised change nothing, whatever they hold; where nothing is supervised, the loss is 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cameo.alignment import alignment_loss
from cameo.correspondence import Correspondence
from tests.helpers.alignment_inputs import PADDED, gradients, make_head, make_inputs


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
def test_what_is_not_supervised_cannot_matter(normalize: str) -> None:
    query, key, match = make_inputs(batch=1, token_grids=PADDED)
    match.index[0, 3] = -1
    head = make_head()
    expected = alignment_loss(query, key, match, head, normalize=normalize)
    expected_gradients = gradients(expected, query, key, head)
    with torch.no_grad():
        for v, (height, width) in enumerate(PADDED):
            query[:, :, v, height * width :] = torch.nan
            key[:, :, v, height * width :] = torch.inf
        query[:, :, 3] = -torch.inf
    got = alignment_loss(query, key, match, head, normalize=normalize)
    assert torch.equal(got, expected)
    for one, other in zip(gradients(got, query, key, head), expected_gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
@pytest.mark.parametrize("poison", [0.0, torch.inf, torch.nan])
@pytest.mark.parametrize("kind", ["mlp", "mean"])
def test_nothing_visible_is_zero_with_a_graph(normalize: str, poison: float, kind: str) -> None:
    query, key, match = make_inputs(visible=0.0)
    with torch.no_grad():
        query[0, 0, 0, 0, 0] = poison
        key[0, 0, 0, 0, 0] = poison
    head = make_head(kind=kind)
    loss = alignment_loss(query, key, match, head, normalize=normalize)
    assert loss.item() == 0
    assert loss.dtype == torch.float64
    for gradient in gradients(loss, query, key, head):
        assert (gradient == 0).all()


@pytest.mark.parametrize("why", ["pairs", "weight", "nearest view", "one view"])
def test_nothing_supervised_is_zero_with_a_graph(why: str) -> None:
    query, key, match = make_inputs(token_grids=((2, 3),) if why == "one view" else ((2, 3),) * 3)
    options: dict[str, Any] = {}
    if why == "pairs":
        options = {"pairs": torch.zeros(3, 3, dtype=torch.bool)}
    if why == "weight":
        match = Correspondence(match.index, match.token_grids, torch.zeros(match.index.shape))
    if why == "nearest view":  # view 0 has matches in view 1, but view 2 is nearer
        index, distance = torch.full((2, 3, 3, 6), -1), torch.ones(2, 3, 3, 6)
        index[:, 0, 1], distance[:, 0, 2] = 4, 0.5
        match = Correspondence(index, match.token_grids, distance=distance)
        options = {"reduction": "released", "num_reference_views": 1}
    head = make_head()
    loss = alignment_loss(query, key, match, head, **options)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, query, key, head))


def test_non_finite_logits_of_supervised_queries_show() -> None:
    query, key, match = make_inputs(visible=1.0)
    with torch.no_grad():
        query[0, 0, 0, 0, 0] = torch.nan
    assert alignment_loss(query, key, match, make_head()).isnan()
