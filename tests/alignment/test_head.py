"""The alignment head: its formula, its parameters, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cameo.alignment import AlignmentHead
from cameo.errors import ShapeError
from tests.helpers.alignment_inputs import explicit_head, make_head


@pytest.mark.parametrize(
    ("settings", "count"),
    [({}, 12 * 3 + 12 + 12), ({"depth": 0}, 3), ({"depth": 2, "expansion": 2}, 18 + 6 + 36 + 6 + 6)],
    ids=str,
)
def test_heads_have_the_parameters_of_their_formula(settings: dict[str, Any], count: int) -> None:
    head = make_head(**settings)
    assert sum(parameter.numel() for parameter in head.parameters()) == count
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(head(logits), explicit_head(head, logits), rtol=1e-12, atol=1e-14)


def test_heads_without_parameters() -> None:
    logits = torch.randn(3, 5, 7)
    assert torch.equal(AlignmentHead(3, "none")(logits), logits)
    torch.testing.assert_close(AlignmentHead(3, "mean")(logits)[0], (logits[0] + logits[1] + logits[2]) / 3)
    assert not list(AlignmentHead(3, "mean").parameters())
    assert "num_heads=3, kind='mean'" in repr(AlignmentHead(3, "mean"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, "mpl"), "unknown head kind 'mpl': did you mean 'mlp'"),
        ((0,), "num_heads: expected an integer of at least 1, got 0"),
        ((3, "mlp", -1), "depth: expected an integer of at least 0"),
        ((3, "mlp", 1, 0), "expansion: expected an integer of at least 1"),
    ],
)
def test_head_errors(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignmentHead(*arguments)


def test_head_refuses_another_head_count() -> None:
    with pytest.raises(ShapeError, match=r"logits: expected \[3, \.\.\.\] .* got \[4, 2\]"):
        AlignmentHead(3)(torch.zeros(4, 2))
