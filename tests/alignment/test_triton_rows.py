"""Gradients of rows added to those of their queries, in Triton's interpreter, against a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from tests.helpers.triton_interpreter import Interpreter

BATCH, HEADS, TOKENS, DIMENSION, COMPARISONS = 2, 3, 7, 4, 3


def added(rows: Tensor, slots: Tensor, first: int, factor: Tensor, sums: Tensor) -> Tensor:
    """Runs in the other process."""
    from cameo.alignment.triton_rows import add_to_queries

    add_to_queries(rows, slots, first, factor, sums)
    return sums


@pytest.mark.parametrize("joined", [False, True], ids=["a row of each head", "all heads in a row"])
@pytest.mark.parametrize("per_entry", [False, True], ids=["one factor", "a factor per entry"])
def test_every_row_reaches_its_query(interpreted: Interpreter, joined: bool, per_entry: bool) -> None:
    torch.manual_seed(0)
    many = BATCH * COMPARISONS * TOKENS
    slots = torch.randperm(many).view(BATCH, COMPARISONS, TOKENS)
    slots[torch.rand(slots.shape) < 0.3] = -1
    slots[:, :, 2] = -1  # this query has no row at all
    first, count = 5, 20  # rows of other portions come before and after
    rows = torch.randn(HEADS, count, DIMENSION)
    factor = torch.randn(HEADS * DIMENSION) if per_entry else torch.tensor(0.5)
    sums = torch.randn(BATCH, HEADS, TOKENS, DIMENSION)
    sums[:, :, 2] = torch.nan  # and is left alone
    scale = factor.view(HEADS, DIMENSION) if per_entry else factor
    expected = sums.clone()
    for sample, comparison, token in torch.cartesian_prod(*map(torch.arange, slots.shape)).tolist():
        slot = int(slots[sample, comparison, token]) - first
        if 0 <= slot < count:
            expected[sample, :, token] += scale * rows[:, slot]
    flat = rows.transpose(0, 1).reshape(1, count, -1) if joined else rows
    got = interpreted(added, flat, slots, first, factor, sums)
    torch.testing.assert_close(got, expected, equal_nan=True)
