"""Patterns, sizes, calls and places that a token layout refuses, and what it says."""

from __future__ import annotations

import re

import pytest
import torch

from cameo.attention.layout import TokenLayout
from cameo.errors import ShapeError

K, D = 3, 4
H, W = 3, 5


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        ("b (v h w)", {"references_last": -1}, "references_last: expected an integer of at least 0, got -1"),
        ("b (v h w)", {"references_last": 2, "unsupervised_views": 1}, "expected 0 or references_last=2, got 1"),
        ("b (v h w + h' w')", {"references_last": 2}, "expected 0 or the 1 views that have their own grid"),
    ],
)
def test_wrong_numbers_of_references(pattern: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout(pattern, **settings)


def test_references_last_needs_another_view() -> None:
    with pytest.raises(ValueError, match="needs more than 1 views, got 1"):
        TokenLayout("b (v h w)", references_last=1).shape("query", batch=1, token_grids=((H, W),))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": "b"}, r'pattern "b": write "<batch part> <token part>"'),
        ({"query": "b (v h w) w"}, r'pattern "b \(v h w\) w": write'),
        ({"query": "b (v (h w))"}, "write"),
        ({"query": "b ()"}, "empty part or segment"),
        ({"query": "b (v h w + )"}, "empty part or segment"),
        ({"query": "b (v H w)"}, r"'H' is no axis name"),
        ({"query": "(b + t) (v h w)", "t": 3}, r"sums \(\+\) and primed axes belong in the token part"),
        ({"query": "(b h') (v h w)"}, "sums"),
        ({"query": "b (v h h)"}, "axis h stands twice"),
        ({"query": "(b h) (v h w)"}, "axis h stands twice"),
        ({"query": "n (v h w)"}, "needs the axis b"),
        ({"query": "b (v h)"}, "the token grid needs the axis w"),
        ({"query": "b (h w)"}, "no view axis: write v"),
        ({"query": "b (r h c w)", "r": 3}, r"axis c is not known; .* c=<tiles>"),
        ({"query": "b (v r h w)", "r": 3}, "v and r cannot both be the views"),
        ({"query": "b (t + v h w)"}, "tokens t belong to no view, so give their number: t=<tokens>"),
        ({"query": "b t", "t": 3}, "no segment holds the token grid"),
        ({"query": "b (v h w + h w)"}, "axis h stands twice"),
        ({"query": "b (v h + w)"}, "more than one segment holds the token grid"),
        ({"query": "b (v h w + h' w'')"}, "segment h' w'' must be one primed height and width"),
        ({"query": "b (v h w + h')"}, "must be one primed height and width"),
        ({"query": "(b u) (v h w)"}, "u, the copies of the keys, belongs in the key pattern"),
        (
            {"query": "b (v h w)", "key": "b (u v h w)"},
            "u, the copies of the keys, belongs in the batch part",
        ),
        ({"query": "(b v) (h w)"}, r'sees its own view only .* key="\(b u\) \(v h w\)"'),
        ({"query": "(b v) (h w)", "key": "b (v h w)"}, r"its batch part must be \(b u\) to go with"),
        ({"query": "b (v h w)", "key": "(b h) (v w)"}, r"its batch part must be \(b\) to go with"),
        (
            {"query": "b (v h w)", "key": "b (r h c w)", "r": 3, "c": 2},
            "its view axes are r c, those of the queries v",
        ),
        ({"query": "b (v h w + h' w')", "key": "b (v h w)"}, "segment h' w' of the queries .* is missing"),
        ({"query": "(b h) (v w + h' w')"}, "v, h and w must stand in the token part"),
        ({"query": "b (v h w + h' w')", "unsupervised_views": 1}, "unsupervised_views cannot go with"),
        (
            {"query": "b (v h w)", "unsupervised_views": -1},
            "unsupervised_views: expected an integer of at least 0, got -1",
        ),
        ({"query": "b (v h w)", "v": 4}, "batch and token_grids tell how long axis v is"),
        ({"query": "b (v h w)", "t": 4}, r'TokenLayout\("b \(v h w\)", t=4\): no axis is called t'),
        ({"query": "b (t + v h w)", "t": 0}, "t: expected an integer of at least 1, got 0"),
        ({"query": None}, "write"),
    ],
)
def test_patterns_that_cannot_be_read(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "token_grids", "message"),
    [
        (TokenLayout("b (v h w)"), (), "needs more than 0 views, got 0"),
        (TokenLayout("b (v h w + h' w')"), ((2, 2),), "needs more than 1 views, got 1"),
        (TokenLayout("b (r h c w)", r=3, c=2), ((2, 2),) * 5, r"needs 6 views, got 5: \(\(2, 2\)"),
        (TokenLayout("b (v h w)"), ((2, 2), (3, 3)), "share one token grid"),
    ],
)
def test_sizes_that_do_not_fit(layout: TokenLayout, token_grids: tuple[tuple[int, int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.shape("key", batch=1, token_grids=token_grids)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, K, 4 * 16, D), r"L = 60 .* use token_grid=model\.token_grid\(height, width\)"),
        ((4, K, 4 * 15, D), "AB = 2 .* 2 times the batch of the correspondence. Classifier-free guidance"),
        ((3, K, 4 * 15, D), "The correspondence has 2 samples; give the model the same number"),
        ((2, 4 * 15, D), r"query: expected \[AB, K, L, D\] for \"b \(v h w\)\", got \[2, 60, 4\]"),
    ],
)
def test_calls_of_another_shape(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        TokenLayout("b (v h w)").split_query(torch.zeros(shape), batch=2, token_grids=((3, 5),) * 4)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"batch_index": 2}, "batch_index: expected 0 to 1, got 2"),
        ({"view": 7}, "view: expected 0 to 6, got 7"),
        ({"row": 3}, "row: expected 0 to 2, got 3"),
        ({"col": -1}, "col: expected 0 to 4, got -1"),
        ({"view": 6}, 'view 6 has no queries in "b'),
        ({"of": "value"}, "unknown of 'value'"),
    ],
)
def test_places_that_do_not_exist(place: dict[str, object], message: str) -> None:
    layout = TokenLayout("b (r h c w)", key="b (r h c w + h' w')", r=3, c=2)
    arguments = {"view": 0, "row": 0, "col": 0, "batch_index": 0, **place}
    with pytest.raises(ValueError, match=message):
        layout.locate(**arguments, batch=2, token_grids=((3, 5),) * 6 + ((4, 6),))  # type: ignore[arg-type]
