"""What the alignment loss refuses, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cameo.alignment import alignment_loss
from cameo.correspondence import Correspondence
from tests.helpers.alignment_inputs import make_head, make_inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "views"}, "unknown normalize 'views'"),
        ({"reduction": "none"}, "unknown reduction 'none'"),
        ({"pairs": "al"}, "unknown pairs 'al': did you mean 'all'"),
        (
            {"pairs": torch.ones(3, 3)},
            r'pairs: expected "all" or a bool tensor \[V, V\] = \[3, 3\], got torch.float',
        ),
        ({"pairs": torch.ones(2, 3).bool()}, r"got torch.bool \[2, 3\]"),
        ({"pairs": [[True]]}, "got list"),
        ({"reduction": "released"}, "num_reference_views: .* 0 to 3, got None"),
        ({"reduction": "released", "num_reference_views": 4}, "0 to 3, got 4"),
        (
            {"reduction": "released", "normalize": "all_views", "num_reference_views": 1},
            'for normalize="per_view"',
        ),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    query, key, match = make_inputs()
    with pytest.raises(ValueError, match=message):
        alignment_loss(query, key, match, make_head(), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k: (q[0], k[0]), r"query: expected \[B, K, V, N, D\].*TokenLayout"),
        (lambda q, k: (q, k[..., :2]), r"key: expected the query's \[2, 3, 3, 6, 4\]"),
        (lambda q, k: (q, k.float()), "key: expected the query's .* got .* of torch.float32"),
        (lambda q, k: (q.long(), k.long()), "query: expected a floating-point tensor, got torch.int64"),
        (lambda q, k: (q[:, :2], k[:, :2]), r"K = 3 heads.*Use AlignmentHead\(num_heads=2\)"),
        (lambda q, k: (q.repeat(2, 1, 1, 1, 1), k.repeat(2, 1, 1, 1, 1)), "B = 2 .*Classifier-free guidance"),
        (lambda q, k: (q[:, :, :2], k[:, :, :2]), r"V = 3 .*Correspondence\.take_views"),
        (lambda q, k: (q[..., :5, :], k[..., :5, :]), r"N = 6 .*token_grid=model\.token_grid"),
        (lambda q, k: (q.to("meta"), k.to("meta")), r"query is on meta .* use correspondence\.to\('meta'\)"),
    ],
)
def test_tensor_errors(change: Any, message: str) -> None:
    query, key, match = make_inputs()
    with pytest.raises(ValueError, match=message):
        alignment_loss(*change(query, key), match, make_head())


# Correspondence checks its values on the CPU only, so the loss must refuse them too.
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            (0, 0, 1, 2),
            6,
            r"index\[0, 0, 1, 2\]: expected -1, or a token of view 1 with grid \(2, 3\).* got 6",
        ),
        ((1, 2, 0, 0), -2, r"index\[1, 2, 0, 0\].* got -2"),
        ((0, 1, 1, 0), 3, r"index\[0, 1, 1, 0\].* another view 1"),
        ((0, 3, 0, 2), 0, r"index\[0, 3, 0, 2\].* view 3 with grid \(1, 2\)"),
    ],
)
def test_matches_that_are_no_tokens(place: tuple[int, ...], value: int, message: str) -> None:
    query, key, match = make_inputs(token_grids=((2, 3), (2, 3), (2, 3), (1, 2)))
    match.index[place] = value
    with pytest.raises(ValueError, match=message):
        alignment_loss(query, key, match, make_head())


@pytest.mark.parametrize("value", [-0.5, torch.nan, torch.inf])
def test_weights_that_are_no_weights(value: float) -> None:
    query, key, match = make_inputs(weighted=True)
    assert match.match_weight is not None
    match.match_weight[0, 0, 1, 0] = value
    with pytest.raises(ValueError, match=r"correspondence.match_weight: expected finite values of at least 0"):
        alignment_loss(query, key, match, make_head())


def test_released_needs_distances() -> None:
    query, key, match = make_inputs()
    without = Correspondence(match.index, match.token_grids)
    with pytest.raises(ValueError, match=r"correspondence.distance: .*from_point_maps"):
        alignment_loss(query, key, without, make_head(), reduction="released", num_reference_views=1)


def test_one_reachable_token_per_view_is_refused() -> None:
    query, key, match = make_inputs(token_grids=((1, 1),) * 3)
    with pytest.raises(ValueError, match=r'a softmax per view is constant .* use normalize="all_views"'):
        alignment_loss(query, key, match, make_head())
    assert alignment_loss(query, key, match, make_head(), normalize="all_views") > 0
