"""The sweep over several groups side by side: which keys are kept for the next portion, and how groups are padded."""

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
    """A sample with all matches has more groups than fit side by side into a portion, each with another view's keys."""
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
    assert len(portions[0]) == groups, "the groups are not side by side"
    assert len(set(portions)) > 1, "no portion can reuse the keys of another"


@every_normalization
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_query_that_nobody_supervises_may_be_anything(normalize: str, poison: float) -> None:
    """Shorter groups are padded with token 0 of view 0, which has no match here and is not finite."""
    query, key, match = make_inputs(batch=2, token_grids=EIGHT_VIEWS)
    match.index[:, 0, :, 0] = -1
    expected = losses(query, key, match, normalize)[1]
    with torch.no_grad():
        query[:, :, 0, 0] = poison
    got = losses(query, key, match, normalize)
    assert_equal(got[1], expected)
    assert_equal(got[0], expected)


@pytest.mark.parametrize("side", [32, 64])
def test_sums_in_float32_are_part_of_what_may_be_held(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-precision gradients are summed in float32, twice their own size: the portions become smaller by that."""
    bound = 192 << 20
    monkeypatch.setattr(sweep, "workspace_bytes", lambda device: bound)
    query = torch.empty(3, 10, 4, side**2, 64, dtype=torch.bfloat16, device="meta")
    sums, gradients = 2 * 4 * query.numel(), 2 * 2 * query.numel()
    workspace = sweep._workspace_beside_sums(query, torch.float32)
    assert workspace + sums <= bound + 1.25 * gradients < 1.01 * (workspace + sums)
    assert sweep._workspace_beside_sums(query.float(), torch.float32) == bound
    long = torch.empty(4, 10, 8, 64**2, 64, dtype=torch.bfloat16, device="meta")
    assert sweep._workspace_beside_sums(long, torch.float32) == bound // 4
