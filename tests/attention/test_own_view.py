"""Layouts in which the tokens of a view stand for those of another one, against loops written out by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from cameo import Correspondence, TokenLayout
from cameo.errors import ShapeError

B, K, D = 2, 3, 4
H, W = 2, 3
N = H * W
VIEWS = 4
GRIDS = ((H, W),) * VIEWS

# Layout, and the place (row of the attention batch, first token, step between tokens) of the tokens of a view.
LAYOUTS = {
    "reference first": (TokenLayout("(b v) (h w)", own_view_shows=0), lambda b, v: (4 * b + v, 0)),
    "reference last": (
        TokenLayout("(b v) (h w)", own_view_shows=0, references_last=1),
        lambda b, v: (4 * b + [3, 0, 1, 2][v], 0),
    ),
    "reference absent": (
        TokenLayout("(b v) (h w)", own_view_shows=0, references_absent=1),
        lambda b, v: (3 * b + v - 1, 0),
    ),
    "two references last": (
        TokenLayout("(b v) (h w)", own_view_shows=0, references_last=2),
        lambda b, v: (4 * b + [2, 3, 0, 1][v], 0),
    ),
    "shows the last": (TokenLayout("(b v) (h w)", own_view_shows=3), lambda b, v: (4 * b + v, 0)),
    "text before each view": (TokenLayout("(b v) (t + h w)", own_view_shows=0, t=5), lambda b, v: (4 * b + v, 5)),
    "joined": (
        TokenLayout("b (v h w)", own_view_shows=0, references_last=1),
        lambda b, v: (b, [3, 0, 1, 2][v] * N),
    ),
}
every_layout = pytest.mark.parametrize("name", LAYOUTS)


def random_match(seed: int = 0) -> Correspondence:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, N, (B, VIEWS, VIEWS, N), generator=generator)
    index[:, range(VIEWS), range(VIEWS)] = -1
    values = torch.rand(2, *index.shape, generator=generator)
    return Correspondence(index, GRIDS, match_weight=values[0], distance=values[1])


def random_call(layout: TokenLayout) -> tuple[Tensor, Tensor]:
    shape = layout.shape("query", batch=B, token_grids=GRIDS)
    assert layout.shape("key", batch=B, token_grids=GRIDS) == shape
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, shape[0], K, shape[1], D, generator=generator)
    return query, key


@every_layout
@pytest.mark.parametrize("of", ["query", "key"])
def test_places_are_those_of_the_views_themselves(name: str, of: str) -> None:
    layout, place = LAYOUTS[name]
    expected = torch.full((*layout.shape(of, batch=B, token_grids=GRIDS), 4), -1)
    cells = torch.cartesian_prod(torch.arange(H), torch.arange(W))
    for sample in range(B):
        for view in range(layout.view_order.references_absent, VIEWS):
            row, first = place(sample, view)
            expected[row, first : first + N, :2] = torch.tensor([sample, view])
            expected[row, first : first + N, 2:] = cells
    assert torch.equal(layout.places(of, batch=B, token_grids=GRIDS), expected)


@every_layout
def test_each_view_is_a_sample_with_its_own_tokens_as_keys(name: str) -> None:
    layout, place = LAYOUTS[name]
    query, key = random_call(layout)
    match = random_match()
    queries = layout.split_query(query, batch=B, token_grids=GRIDS)
    keys = layout.split_key(key, batch=B, token_grids=GRIDS)
    local = layout.localize(match)
    shown = layout.own_view_shows
    showing = [view for view in range(VIEWS) if view != shown]
    assert local.token_grids == ((H, W),) * 2
    assert queries.shape == keys.shape == (B * len(showing), K, 2, N, D)
    for sample in range(B):
        for number, view in enumerate(showing):
            folded = sample * len(showing) + number
            row, first = place(sample, view)
            assert torch.equal(queries[folded, :, 1], query[row, :, first : first + N])
            assert torch.equal(keys[folded, :, 0], key[row, :, first : first + N])
            assert torch.equal(local.index[folded, 1, 0], match.index[sample, view, shown])
            assert torch.equal(local.match_weight[folded, 1, 0], match.match_weight[sample, view, shown])
            assert torch.equal(local.distance[folded, 1, 0], match.distance[sample, view, shown])
            assert layout.view_order.origin(folded, 0, VIEWS) == (sample, shown)
            assert layout.view_order.origin(folded, 1, VIEWS) == (sample, view)
            for of in ("query", "key"):
                at = layout.locate(view, 1, 2, batch_index=sample, batch=B, token_grids=GRIDS, of=of)
                assert at == (row, first + 5)
    assert not local.matched[:, 0].any()
    assert not local.matched[:, 1, 1].any()


def test_the_values_of_tokens_and_pairs_follow() -> None:
    layout = TokenLayout("(b v) (h w)", own_view_shows=0, references_last=1)
    values, groups = torch.randn(B, VIEWS, N, 5), torch.randint(9, (B, VIEWS, VIEWS))
    tokens, pairs = layout.localize_tokens(values, GRIDS), layout.view_order.take_pairs(groups)
    for sample in range(B):
        for view in (1, 2, 3):
            folded = 3 * sample + view - 1
            assert torch.equal(tokens[folded], values[sample, [0, view]])
            assert pairs[folded, 1, 0] == groups[sample, view, 0]
    assert layout.view_order.num_references(1) == 1
    assert layout.view_order.num_references(0) == 0


def test_rows_within_a_view() -> None:
    """A layer that attends by row within each view: each row of each view is a sample."""
    layout = TokenLayout("(b v h) w", own_view_shows=0)
    match = random_match()
    query = torch.randn(B * VIEWS * H, K, W, D)
    queries, local = layout.split_query(query, batch=B, token_grids=GRIDS), layout.localize(match)
    assert queries.shape[0] == local.batch_size == B * 3 * H
    for sample in range(B):
        for view in (1, 2, 3):
            for row in range(H):
                folded = (sample * 3 + view - 1) * H + row
                assert torch.equal(queries[folded, :, 1], query[(sample * VIEWS + view) * H + row])
                found = match.index[sample, view, 0].view(H, W)[row]
                expected = torch.where(found // W == row, found % W, -1).where(found >= 0, -1)
                assert torch.equal(local.index[folded, 1, 0], expected)


@every_layout
def test_settings_come_back(name: str) -> None:
    layout = LAYOUTS[name][0]
    assert TokenLayout(**layout.to_dict()) == layout
    assert eval(repr(layout)) == layout
    for again in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert again == layout
        assert hash(again) == hash(layout)
    plain = {name: value for name, value in layout.to_dict().items() if name != "own_view_shows"}
    assert layout.to_dict() != {**plain, "own_view_shows": 1}


def test_layouts_without_it_are_saved_as_before() -> None:
    assert TokenLayout("b (v h w)", references_last=1).to_dict() == {
        "query": "b (v h w)",
        "key": "b (v h w)",
        "unsupervised_views": 0,
        "references_last": 1,
    }


def test_only_keys_in_the_batch_part_stay_within_their_view() -> None:
    assert LAYOUTS["reference last"][0].within_views
    assert not LAYOUTS["joined"][0].within_views
    assert not TokenLayout("(b v) (h w)", key="(b u) (v h w)").within_views


@pytest.mark.parametrize(
    ("query", "settings", "message"),
    [
        ("(b v) (h w)", {}, "its own tokens show that too: own_view_shows=0"),
        ("(b v) (h w)", {"own_view_shows": -1}, "own_view_shows: expected an integer of at least 0, got -1"),
        ("b (v h w)", {"references_absent": 1}, "references_absent=1: needs own_view_shows="),
        (
            "(b v) (h w)",
            {"own_view_shows": 0, "references_absent": 1, "references_last": 1},
            "references_absent cannot go with references_last",
        ),
        ("(b v) (h w)", {"own_view_shows": 0, "unsupervised_views": 1}, "unsupervised_views cannot go with own_view_s"),
        ("b (v h w + h' w')", {"own_view_shows": 0}, "own_view_shows cannot go with views that have their own grid"),
    ],
)
def test_contradictory_settings(query: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout(query, **settings)


@pytest.mark.parametrize(
    ("settings", "grids", "message"),
    [
        ({"own_view_shows": 0}, 1, "needs more than 1 views, got 1"),
        ({"own_view_shows": 0, "references_absent": 1}, 1, "needs more than 1 views, got 1"),
        ({"own_view_shows": 1, "references_absent": 1}, 2, "needs more than 2 views, got 2"),
        ({"own_view_shows": 3}, 3, "needs more than 3 views, got 3"),
    ],
)
def test_too_few_views(settings: dict[str, int], grids: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout("(b v) (h w)", **settings).shape("query", batch=1, token_grids=((H, W),) * grids)


def test_a_view_that_is_shown_has_the_token_grid_of_the_others() -> None:
    layout = TokenLayout("(b v) (h w)", own_view_shows=0, references_absent=1)
    with pytest.raises(ValueError, match=r"stand for those of view 0 too, so all views have one token grid"):
        layout.shape("query", batch=1, token_grids=((4, 4), (2, 3)))


def test_an_absent_view_has_no_place() -> None:
    layout = TokenLayout("(b v) (h w)", own_view_shows=0, references_absent=1)
    with pytest.raises(ValueError, match="view 0 is not in the attention"):
        layout.locate(0, 0, 0, batch_index=0, batch=1, token_grids=((H, W),) * 2)


def test_a_joined_layer_is_told_from_one_of_single_views() -> None:
    layout = TokenLayout("(b v) (h w)", own_view_shows=0)
    with pytest.raises(ShapeError, match=r"The 4 views were joined in this layer"):
        layout.split_query(torch.zeros(B, K, VIEWS * N, D), batch=B, token_grids=GRIDS)


def test_one_token_of_the_own_view_is_refused() -> None:
    layout = TokenLayout("(b h w) v", own_view_shows=0)
    for normalize in ("per_view", "all_views"):
        assert layout.refusal(normalize) == "a query reaches one token of its own view, so the softmax is constant"
    assert TokenLayout("(b v) (h w)", own_view_shows=0).refusal("per_view") is None
