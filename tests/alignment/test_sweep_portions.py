"""The sweep over groups of queries that stand side by side: whose keys are held, and what fills up short groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cameo import Correspondence, alignment_loss
from cameo.alignment import sweep
from tests.helpers.alignment_inputs import gradients, make_head, make_inputs

EIGHT_VIEWS = ((8, 8),) * 8
every_normalization = pytest.mark.parametrize("normalize", ["per_view", "all_views"])


def losses(query: Tensor, key: Tensor, match: Correspondence, normalize: str) -> list[tuple[Tensor, ...]]:
    """Loss and gradients by the sweep, and by the reference."""
    head, found = make_head(), []
    for implementation in ("chunked", "reference"):
        loss = alignment_loss(query, key, match, head, normalize=normalize, implementation=implementation)
        found.append((loss, *gradients(loss, query, key, head)))
    return found


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@every_normalization
def test_eight_views_in_several_portions_equal_the_reference(normalize: str) -> None:
    """All matches of one sample: more groups than stand side by side in one portion, each with keys of its own view."""
    query, key, match = make_inputs(batch=1, token_grids=EIGHT_VIEWS, visible=1.0)
    assert_equal(*losses(query, key, match, normalize))


@pytest.mark.parametrize("groups", [4, 5])
def test_portions_of_any_number_of_groups_equal_the_reference(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, match = make_inputs(batch=1, token_grids=((2, 3),) * 10, visible=1.0)
    monkeypatch.setattr(sweep, "CPU_PRODUCTS", groups * (9 * 6) * 6)  # a group: 9 views of 6 queries, 6 keys
    portions: list[tuple[object, ...]] = []
    losses_of = sweep._Products.losses

    def counting(self: sweep._Products, rows: sweep.Rows) -> Tensor:
        portions.append(rows.ranges)
        return losses_of(self, rows)

    monkeypatch.setattr(sweep._Products, "losses", counting)
    assert_equal(*losses(query, key, match, "per_view"))
    assert len(portions[0]) == groups, "they do not stand side by side"
    assert len(set(portions)) > 1, "one portion has nothing to hold from another"


@every_normalization
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_query_that_nobody_supervises_may_be_anything(normalize: str, poison: float) -> None:
    """Short groups are filled up with token 0 of view 0, which has no match here and is no number."""
    query, key, match = make_inputs(batch=2, token_grids=EIGHT_VIEWS)
    match.index[:, 0, :, 0] = -1
    expected = losses(query, key, match, normalize)[1]
    with torch.no_grad():
        query[:, :, 0, 0] = poison
    got = losses(query, key, match, normalize)
    assert_equal(got[1], expected)
    assert_equal(got[0], expected)
