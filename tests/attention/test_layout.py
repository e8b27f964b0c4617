"""Token layouts against explicit loops: every index formula below is written out by hand, per model."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence
from cameo.errors import ShapeError

B, K, D = 2, 3, 4
H, W = 3, 5
Place = Callable[[int, int, int, int], tuple[int, int] | None]


@dataclass
class Case:
    """One row of attention layers in use, with the position of (sample, view, row, column) written out."""

    name: str
    layout: TokenLayout
    token_grids: tuple[tuple[int, int], ...]
    query_shape: tuple[int, int]
    key_shape: tuple[int, int]
    query: Place
    key: Place
    reach: str = "all"
    copies: list[int] = field(default_factory=lambda: [0])
    copy_stride: int = 0


def zero123_query(b: int, v: int, y: int, x: int) -> tuple[int, int] | None:
    if v == 6:
        return None
    return b, ((v // 2) * H + y) * (2 * W) + (v % 2) * W + x


def zero123_key(b: int, v: int, y: int, x: int) -> tuple[int, int]:
    return (b, 6 * H * W + y * 6 + x) if v == 6 else (b, ((v // 2) * H + y) * (2 * W) + (v % 2) * W + x)


def joint(b: int, v: int, y: int, x: int) -> tuple[int, int]:
    return b, v * H * W + y * W + x


CASES = [
    Case("mvdream", TokenLayout("b (v h w)"), ((H, W),) * 4, (B, 4 * H * W), (B, 4 * H * W), joint, joint),
    Case(
        "imagedream",
        TokenLayout("b (v h w)", unsupervised_views=1),
        ((H, W),) * 4,
        (B, 5 * H * W),
        (B, 5 * H * W),
        joint,
        joint,
    ),
    Case(
        "zero123plus",
        TokenLayout("b (r h c w)", key="b (r h c w + h' w')", r=3, c=2),
        ((H, W),) * 6 + ((4, 6),),
        (B, 6 * H * W),
        (B, 6 * H * W + 24),
        zero123_query,
        zero123_key,
    ),
    Case(
        "row-wise",
        TokenLayout("(b h) (v w)"),
        ((H, W),) * 4,
        (B * H, 4 * W),
        (B * H, 4 * W),
        lambda b, v, y, x: (b * H + y, v * W + x),
        lambda b, v, y, x: (b * H + y, v * W + x),
        reach="row",
    ),
    Case(
        "column-wise",
        TokenLayout("(b w) (v h)"),
        ((H, W),) * 4,
        (B * W, 4 * H),
        (B * W, 4 * H),
        lambda b, v, y, x: (b * W + x, v * H + y),
        lambda b, v, y, x: (b * W + x, v * H + y),
        reach="column",
    ),
    Case(
        "sv3d temporal",
        TokenLayout("(b h w) v"),
        ((H, W),) * 7,
        (B * H * W, 7),
        (B * H * W, 7),
        lambda b, v, y, x: (b * H * W + y * W + x, v),
        lambda b, v, y, x: (b * H * W + y * W + x, v),
        reach="cell",
    ),
    Case(
        "dit with text",
        TokenLayout("b (t + v h w)", t=7),
        ((H, W),) * 4,
        (B, 7 + 4 * H * W),
        (B, 7 + 4 * H * W),
        lambda b, v, y, x: (b, 7 + v * H * W + y * W + x),
        lambda b, v, y, x: (b, 7 + v * H * W + y * W + x),
    ),
    Case(
        "mv-adapter",
        TokenLayout("(b v h) w", key="(b u h) (v w)"),
        ((H, W),) * 6,
        (B * 6 * H, W),
        (B * 6 * H, 6 * W),
        lambda b, v, y, x: ((b * 6 + v) * H + y, x),
        lambda b, v, y, x: (b * 6 * H + y, v * W + x),
        reach="row",
        copies=list(range(6)),
        copy_stride=H,
    ),
    Case(
        "wonder3d",
        TokenLayout("(b v) (h w)", key="(b u) (v h w)"),
        ((H, W),) * 6,
        (B * 6, H * W),
        (B * 6, 6 * H * W),
        lambda b, v, y, x: (b * 6 + v, y * W + x),
        lambda b, v, y, x: (b * 6, v * H * W + y * W + x),
        copies=list(range(6)),
        copy_stride=1,
    ),
    Case(
        "zero123plus, reference first",
        TokenLayout("b (r h c w)", key="b (r h c w + h' w')", r=3, c=2, references_last=1),
        ((4, 6),) + ((H, W),) * 6,
        (B, 6 * H * W),
        (B, 6 * H * W + 24),
        lambda b, v, y, x: zero123_query(b, (v - 1) % 7, y, x),
        lambda b, v, y, x: zero123_key(b, (v - 1) % 7, y, x),
    ),
    Case(
        "sv3d temporal, conditioning frame last",
        TokenLayout("(b h w) v", references_last=1),
        ((H, W),) * 7,
        (B * H * W, 7),
        (B * H * W, 7),
        lambda b, v, y, x: (b * H * W + y * W + x, [6, 0, 1, 2, 3, 4, 5][v]),
        lambda b, v, y, x: (b * H * W + y * W + x, [6, 0, 1, 2, 3, 4, 5][v]),
        reach="cell",
    ),
    Case(
        "joint, two references last",
        TokenLayout("b (v h w)", references_last=2),
        ((H, W),) * 4,
        (B, 4 * H * W),
        (B, 4 * H * W),
        lambda b, v, y, x: joint(b, [2, 3, 0, 1][v], y, x),
        lambda b, v, y, x: joint(b, [2, 3, 0, 1][v], y, x),
    ),
    Case(
        "text last, view slowest in the batch",
        TokenLayout("b (h v w + t + h' w' + h'' w'')", t=2),
        ((H, W), (H, W), (1, 2), (2, 2)),
        (B, 2 * H * W + 2 + 2 + 4),
        (B, 2 * H * W + 2 + 2 + 4),
        lambda b, v, y, x: (
            b,
            [(y * 2 + v) * W + x, (y * 2 + v) * W + x, 2 * H * W + 2 + x, 2 * H * W + 4 + 2 * y + x][v],
        ),
        lambda b, v, y, x: (
            b,
            [(y * 2 + v) * W + x, (y * 2 + v) * W + x, 2 * H * W + 2 + x, 2 * H * W + 4 + 2 * y + x][v],
        ),
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def folded_place(case: Case, b: int, y: int, x: int, width: int) -> tuple[int, int]:
    """Position (B', N') of a token after folding, from the reach alone."""
    return {
        "all": (b, y * width + x),
        "row": (b * H + y, x),
        "column": (b * W + x, y),
        "cell": ((b * H + y) * W + x, 0),
    }[case.reach]


def random_call(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    (query_batch, query_tokens), (key_batch, key_tokens) = case.query_shape, case.key_shape
    query = torch.randn(query_batch, K, query_tokens, D)
    return query, torch.randn(key_batch, K, key_tokens, D)


@every_case
@pytest.mark.parametrize("of", ["query", "key"])
def test_split_and_locate_equal_the_loops(case: Case, of: str) -> None:
    tensor = random_call(case)[of == "key"]
    place, split = getattr(case, of), getattr(case.layout, f"split_{of}")
    got = split(tensor, batch=B, token_grids=case.token_grids)
    seen = torch.zeros_like(got, dtype=torch.bool)
    for b in range(B):
        for v, (height, width) in enumerate(case.token_grids):
            for y in range(height):
                for x in range(width):
                    folded, token = folded_place(case, b, y, x, width)
                    position = place(b, v, y, x)
                    if position is None:
                        continue
                    attention_batch, attention_token = position
                    expected = tensor[attention_batch, :, attention_token]
                    torch.testing.assert_close(got[folded, :, v, token], expected, rtol=0, atol=0)
                    seen[folded, :, v, token] = True
                    located = case.layout.locate(v, y, x, batch_index=b, batch=B, token_grids=case.token_grids, of=of)
                    assert located == position
    assert (got[~seen] == 0).all()  # padding and views without queries
    assert case.layout.shape(of, batch=B, token_grids=case.token_grids) == (tensor.shape[0], tensor.shape[2])
    assert case.layout.reach == case.reach


@every_case
def test_localise_equals_the_loops(case: Case) -> None:
    torch.manual_seed(1)
    views, tokens = len(case.token_grids), max(h * w for h, w in case.token_grids)
    index = torch.full((B, views, views, tokens), -1)
    for i, (query_height, query_width) in enumerate(case.token_grids):
        for j, (height, width) in enumerate(case.token_grids):
            if i != j:
                shape = (B, query_height * query_width)
                index[:, i, j, : shape[1]] = torch.randint(-1, height * width, shape)
    weight, distance = torch.rand(index.shape), torch.rand(index.shape)
    local = case.layout.localize(Correspondence(index, case.token_grids, weight, distance))
    assert local.match_weight is not None
    assert local.distance is not None
    kept = 0
    for b in range(B):
        for i, (query_height, query_width) in enumerate(case.token_grids):
            for y in range(query_height):
                for x in range(query_width):
                    source, token = folded_place(case, b, y, x, query_width)
                    for j, (_, width) in enumerate(case.token_grids):
                        match = int(index[b, i, j, y * query_width + x])
                        expected = -1
                        if match >= 0 and case.query(b, i, y, x) is not None:
                            target, match = folded_place(case, b, match // width, match % width, width)
                            expected = match if target == source else -1
                        assert local.index[source, i, j, token] == expected
                        kept += expected >= 0
                        original = (b, i, j, y * query_width + x)
                        assert local.match_weight[source, i, j, token] == weight[original]
                        assert local.distance[source, i, j, token] == distance[original]
    assert int(local.matched.sum()) == kept > 0
    key = case.layout.split_key(random_call(case)[1], batch=B, token_grids=case.token_grids)
    assert (key.shape[0], *key.shape[2:4]) == (local.batch_size, local.num_views, local.index.shape[3])
    assert key.shape[3] == max(h * w for h, w in local.token_grids)


def test_a_reference_without_loss_stands_first_in_the_correspondence_and_is_cut_away() -> None:
    """ImageDream: four generated views, then the image prompt."""
    layout = TokenLayout("b (v h w)", unsupervised_views=1, references_last=1)
    token_grids = ((H, W),) * 5
    query = torch.randn(B, K, 5 * H * W, D)
    got = layout.split_query(query, batch=B, token_grids=token_grids)
    torch.testing.assert_close(got, query[:, :, : 4 * H * W].unflatten(2, (4, H * W)), rtol=0, atol=0)
    index = torch.full((B, 5, 5, H * W), -1)
    index[:, 0, 1], index[:, 2, 0], index[:, 1, 4] = 1, 2, 3
    local = layout.localize(Correspondence(index, token_grids))
    assert local.index.shape == (B, 4, 4, H * W)
    assert int(local.matched.sum()) == B * H * W
    assert (local.index[:, 0, 3] == 3).all()
    assert layout.locate(0, 1, 2, batch_index=1, batch=B, token_grids=token_grids) == (1, 4 * H * W + W + 2)
    assert layout.locate(1, 0, 0, batch_index=1, batch=B, token_grids=token_grids) == (1, 0)


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


@every_case
def test_gradient_reaches_exactly_the_tokens_of_views(case: Case) -> None:
    query, key = (tensor.requires_grad_() for tensor in random_call(case))
    case.layout.split_query(query, batch=B, token_grids=case.token_grids).sum().backward()
    case.layout.split_key(key, batch=B, token_grids=case.token_grids).sum().backward()
    count = B * K * D * sum(h * w for h, w in case.token_grids)
    silent = B * K * D * sum(h * w for v, (h, w) in enumerate(case.token_grids) if case.query(0, v, 0, 0) is None)
    assert query.grad is not None
    assert key.grad is not None
    assert int(query.grad.sum()) == count - silent
    assert int(key.grad.sum()) == count


@pytest.mark.parametrize("name", ["mv-adapter", "wonder3d"])
def test_the_first_of_identical_copies_is_used(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    _, key = random_call(case)
    expected = case.layout.split_key(key, batch=B, token_grids=case.token_grids)
    for b in range(B):
        for copy_index in case.copies[1:]:
            for row in range(case.copy_stride):
                key[(b * 6 + copy_index) * case.copy_stride + row] = torch.nan
    torch.testing.assert_close(
        case.layout.split_key(key, batch=B, token_grids=case.token_grids), expected, rtol=0, atol=0
    )


def test_joint_layout_copies_no_memory() -> None:
    query = torch.randn(B, K, 4 * H * W, D)
    split = TokenLayout("b (v h w)").split_query(query, batch=B, token_grids=((H, W),) * 4)
    assert split.data_ptr() == query.data_ptr()


@every_case
def test_settings_round_trip(case: Case) -> None:
    rebuilt = TokenLayout(**case.layout.to_dict())  # type: ignore[arg-type]
    assert rebuilt == case.layout
    assert hash(rebuilt) == hash(case.layout)
    assert eval(repr(case.layout)) == case.layout
    assert copy.deepcopy(case.layout) == case.layout
    assert pickle.loads(pickle.dumps(case.layout)) == case.layout
    assert TokenLayout("b (v h w + t)", t=1) != case.layout


def test_layouts_without_limits_return_the_correspondence_itself() -> None:
    match = Correspondence(torch.full((1, 2, 2, 4), -1), ((2, 2),) * 2)
    assert TokenLayout("b (v h w)").localize(match) is match


def test_refusal_names_the_reason() -> None:
    cell, row = TokenLayout("(b h w) v"), TokenLayout("(b h) (v w)")
    assert 'use normalize="all_views"' in str(cell.refusal("per_view"))
    assert cell.refusal("all_views", num_views=3) is None
    assert "softmax is constant" in str(cell.refusal("all_views", num_views=2))
    assert row.refusal("per_view") is None
    with pytest.raises(ValueError, match="unknown normalize 'per_views': did you mean 'per_view'"):
        row.refusal("per_views")


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
        ((2, K, 4 * 16, D), r"L = 60 .* use size=model\.token_grid\(height, width\)"),
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
