"""Layouts whose calls hold some of the views only, or keep views apart: which query is supervised with which key."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cameo import alignment_loss
from cameo.alignment import AlignmentHead
from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence
from cameo.errors import ShapeError

B, H, W = 2, 2, 3
N = H * W
Place = Callable[[int, int, int, int], tuple[int, int] | None]


@dataclass
class Case:
    """A layout, and by hand: shapes (AB, L), where each (sample, view, row, column) stands, and what sees what."""

    layout: TokenLayout
    views: int
    query_shape: tuple[int, int]
    key_shape: tuple[int, int]
    query: Place
    key: Place
    sees: Callable[[int, int], bool]
    grids: tuple[tuple[int, int], ...] = ()
    same_row: bool = False
    same_cell: bool = False

    def __post_init__(self) -> None:
        self.grids = self.grids or ((H, W),) * self.views


CASES = {
    # Hunyuan3D-2 paint: 3 targets, each alone in the batch, against the joined tokens of 2 references, copied for each.
    "reference attention": Case(
        TokenLayout("(b v) (h w)", key="(b u) (v h w)", reference_keys=2),
        5,
        (B * 3, N),
        (B * 3, 2 * N),
        lambda b, v, y, x: None if v < 2 else (b * 3 + v - 2, y * W + x),
        lambda b, v, y, x: (b * 3, v * N + y * W + x) if v < 2 else None,
        lambda i, j: i >= 2 and j < 2,
    ),
    # TrajectoryCrafter: all frames against reference frames of another size.
    "joint targets, references of another grid": Case(
        TokenLayout("b (v h w)", reference_keys=1),
        4,
        (B, 3 * N),
        (B, 4 * 2),
        lambda b, v, y, x: None if v < 1 else (b, (v - 1) * N + y * W + x),
        lambda b, v, y, x: (b, y * 2 + x) if v < 1 else None,
        lambda i, j: i >= 1 and j < 1,
        grids=((4, 2), (H, W), (H, W), (H, W)),
    ),
    # Consistent123: every view, the first one too, sees the keys of the first view.
    "all views see the first": Case(
        TokenLayout("(b v) (h w)", key="(b u) (v h w)", reference_keys=1, reference_queries=1),
        3,
        (B * 3, N),
        (B * 3, N),
        lambda b, v, y, x: (b * 3 + v, y * W + x),
        lambda b, v, y, x: (b * 3, y * W + x) if v < 1 else None,
        lambda i, j: j < 1,
    ),
    "references row by row": Case(
        TokenLayout("(b h) (v w)", reference_keys=1),
        3,
        (B * H, 2 * W),
        (B * H, W),
        lambda b, v, y, x: None if v < 1 else (b * H + y, (v - 1) * W + x),
        lambda b, v, y, x: (b * H + y, x) if v < 1 else None,
        lambda i, j: i >= 1 and j < 1,
        same_row=True,
    ),
    "tiles see the references": Case(
        TokenLayout("b (h c w)", key="b (v h w)", reference_keys=2, c=2),
        4,
        (B, 2 * N),
        (B, 2 * N),
        lambda b, v, y, x: None if v < 2 else (b, (y * 2 + v - 2) * W + x),
        lambda b, v, y, x: (b, v * N + y * W + x) if v < 2 else None,
        lambda i, j: i >= 2 and j < 2,
    ),
    # 2 frames of 3 cameras: view = 3 * frame + camera.
    "cameras of each frame": Case(
        TokenLayout("(b f) (v h w)", f=2),
        6,
        (B * 2, 3 * N),
        (B * 2, 3 * N),
        lambda b, v, y, x: (b * 2 + v // 3, v % 3 * N + y * W + x),
        lambda b, v, y, x: (b * 2 + v // 3, v % 3 * N + y * W + x),
        lambda i, j: i // 3 == j // 3,
    ),
    "frames in front of the samples": Case(
        TokenLayout("(f b) (v h w)", f=2),
        6,
        (B * 2, 3 * N),
        (B * 2, 3 * N),
        lambda b, v, y, x: (v // 3 * B + b, v % 3 * N + y * W + x),
        lambda b, v, y, x: (v // 3 * B + b, v % 3 * N + y * W + x),
        lambda i, j: i // 3 == j // 3,
    ),
    "frames of each camera": Case(
        TokenLayout("(b v) (f h w)", f=2),
        6,
        (B * 3, 2 * N),
        (B * 3, 2 * N),
        lambda b, v, y, x: (b * 3 + v % 3, v // 3 * N + y * W + x),
        lambda b, v, y, x: (b * 3 + v % 3, v // 3 * N + y * W + x),
        lambda i, j: i % 3 == j % 3,
    ),
    "frames of each cell of a camera": Case(
        TokenLayout("(b v h w) f", f=3),
        6,
        (B * 2 * N, 3),
        (B * 2 * N, 3),
        lambda b, v, y, x: ((b * 2 + v % 2) * N + y * W + x, v // 2),
        lambda b, v, y, x: ((b * 2 + v % 2) * N + y * W + x, v // 2),
        lambda i, j: i % 2 == j % 2,
        same_cell=True,
    ),
    "views in the batch, frame by frame": Case(
        TokenLayout("(b f v) (h w)", key="(b f u) (v h w)", f=2),
        6,
        (B * 6, N),
        (B * 6, 3 * N),
        lambda b, v, y, x: (b * 6 + v, y * W + x),
        lambda b, v, y, x: ((b * 2 + v // 3) * 3, v % 3 * N + y * W + x),
        lambda i, j: i // 3 == j // 3,
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
Token = tuple[int, int, int]  # sample, view, token


def tokens(case: Case) -> list[Token]:
    return [(b, v, x) for b in range(B) for v in range(case.views) for x in range(case.grids[v][0] * case.grids[v][1])]


def tagged(case: Case, of: str) -> tuple[Tensor, dict[int, Token]]:
    """A call whose every token holds a number of its own, and which token each number is."""
    (rows, length), place = (case.query_shape, case.query) if of == "query" else (case.key_shape, case.key)
    tensor, names = torch.zeros(rows, 1, length, 1), {}
    for number, (b, v, x) in enumerate(tokens(case), start=1):
        position = place(b, v, *divmod(x, case.grids[v][1]))
        if position is not None:
            assert tensor[position[0], 0, position[1], 0] == 0
            tensor[position[0], 0, position[1], 0] = number
            names[number] = (b, v, x)
    return tensor, names


def every_match(case: Case, seed: int) -> Correspondence:
    """Each token of each view matches some token of each other view."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(h * w for h, w in case.grids)
    index = torch.full((B, case.views, case.views, longest), -1)
    for i, j in itertools.permutations(range(case.views), 2):
        count, other = (case.grids[v][0] * case.grids[v][1] for v in (i, j))
        index[:, i, j, :count] = torch.randint(other, (B, count), generator=generator)
    return Correspondence(index, case.grids)


def supervised(case: Case, match: Correspondence) -> set[tuple[Token, Token]]:
    """Which queries are compared with which keys, read from the folded form."""
    (query, queries), (key, keys) = (tagged(case, of) for of in ("query", "key"))
    query = case.layout.split_query(query, batch=B, token_grids=case.grids)[:, 0, :, :, 0].long()
    key = case.layout.split_key(key, batch=B, token_grids=case.grids)[:, 0, :, :, 0].long()
    local = case.layout.localize(match)
    assert query.shape == key.shape == (local.batch_size, local.num_views, local.index.shape[-1])
    found = [
        (queries[int(query[b, i, x])], keys[int(key[b, j, local.index[b, i, j, x]])])
        for b, i, j, x in local.matched.nonzero().tolist()
    ]
    assert len(set(found)) == len(found)
    return set(found)


@every_case
@pytest.mark.parametrize("seed", [0, 1])
def test_the_supervised_pairs_are_those_that_meet(case: Case, seed: int) -> None:
    match = every_match(case, seed)
    expected = set()
    for b, i, j, x in match.matched.nonzero().tolist():
        y = int(match.index[b, i, j, x])
        reached = (not case.same_row or x // W == y // W) and (not case.same_cell or x == y)
        if case.sees(i, j) and reached:
            expected.add(((b, i, x), (b, j, y)))
    assert supervised(case, match) == expected
    assert expected


@every_case
def test_shapes_and_places_are_those_of_the_loops(case: Case) -> None:
    for of, shape, place in (("query", case.query_shape, case.query), ("key", case.key_shape, case.key)):
        assert case.layout.shape(of, batch=B, token_grids=case.grids) == shape
        places = case.layout.places(of, batch=B, token_grids=case.grids)
        for b, v, x in tokens(case):
            row, column = divmod(x, case.grids[v][1])
            position = place(b, v, row, column)
            at = {"batch_index": b, "batch": B, "token_grids": case.grids, "of": of}
            if position is None:
                assert not (places[..., 1] == v).any()
                with pytest.raises(ValueError, match=f"view {v} has no {'queries' if of == 'query' else 'keys'} in"):
                    case.layout.locate(v, row, column, **at)
            else:
                assert case.layout.locate(v, row, column, **at) == position
                assert places[position].tolist() == [b, v, row, column]


@every_case
def test_a_layout_is_built_again_from_what_it_shows(case: Case) -> None:
    assert eval(repr(case.layout), {"TokenLayout": TokenLayout}) == case.layout
    assert TokenLayout(**case.layout.to_dict()) == case.layout


def test_the_loss_is_that_of_the_reference_alone() -> None:
    """One target token, `log sum exp` over the reference's tokens, by hand."""
    case = CASES["joint targets, references of another grid"]
    torch.manual_seed(0)
    query, key = torch.randn(B, 2, 3 * N, 4), torch.randn(B, 2, 8, 4)
    index = torch.full((B, 4, 4, 8), -1)
    index[1, 2, 0, 4], index[1, 2, 3, 4], index[1, 0, 2, 1] = 5, 1, 3  # only the first is target to reference
    of = {"batch": B, "token_grids": case.grids}
    split = case.layout.split_query(query, **of), case.layout.split_key(key, **of)
    loss = alignment_loss(
        *split, case.layout.localize(Correspondence(index, case.grids)), AlignmentHead(2, kind="mean")
    )
    logits = (query[1, :, N + 4] @ key[1].mT)[torch.arange(2), torch.arange(2)].mean(0) / 2
    torch.testing.assert_close(loss, logits.logsumexp(0) - logits[5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"query": "b (v h w)", "reference_queries": 1}, "reference_queries: expected 0 or reference_keys=0, got 1"),
        (
            {"query": "b (v h w)", "reference_keys": 1, "references_last": 1},
            "reference_keys cannot go with references_last",
        ),
        (
            {"query": "b (v h w)", "key": "b (r h w)", "reference_keys": 2, "r": 2},
            "reference_keys=2 needs v, the reference views, as its only view axis",
        ),
        ({"query": "(b f) (v h w)"}, "axis f is not known; it keeps views apart, so give f=<their number>"),
        ({"query": "(b f) (v h w)", "f": None}, "f=None: only one length may be open"),
        ({"query": "(b f) (v h w)", "f": 2, "references_last": 1}, "references_last=1 cannot go with f, which keeps"),
        ({"query": "(b v f h w) r", "f": 2, "r": 3}, "v f cannot all keep views apart"),
        ({"query": "(b f) (v h w + h' w')", "f": 2}, "v, h and w must stand in the token part"),
    ],
)
def test_layouts_that_contradict_themselves(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenLayout(**settings)  # type: ignore[arg-type]


def test_numbers_of_views_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="needs more than 0 and a multiple of 2 views, got 5"):
        TokenLayout("(b f) (v h w)", f=2).shape("key", batch=1, token_grids=((H, W),) * 5)
    with pytest.raises(ValueError, match="needs more than 2 views, got 2"):
        TokenLayout("b (v h w)", reference_keys=2).shape("key", batch=1, token_grids=((H, W),) * 2)
    with pytest.raises(ValueError, match=r"one h of the reference views, so all views have one token grid"):
        TokenLayout("(b h) (v w)", reference_keys=1).shape("key", batch=1, token_grids=((3, W), (H, W)))
    layout = TokenLayout("b (v h w)", reference_keys=1)
    with pytest.raises(ShapeError, match=r'AB = 1 and L = 6 .* "b \(v h w\)"'):
        layout.split_key(torch.zeros(1, 1, 2 * N, 1), batch=1, token_grids=((H, W),) * 2)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (TokenLayout("b (v h w)", reference_keys=2), {"normalize": "all_views"}, 'use normalize="per_view"'),
        (TokenLayout("(b h w) v", reference_keys=2), {"normalize": "all_views"}, "one token of each reference view"),
        (TokenLayout("(b h w) v", reference_keys=2), {"normalize": "per_view"}, "one token of each reference view"),
        (TokenLayout("(b f h w) v", f=3), {"normalize": "all_views", "num_views": 6}, "with 2 views a query reaches"),
        (TokenLayout("(b v h w) f", f=2), {"normalize": "all_views"}, "with 2 views a query reaches"),
        (TokenLayout("(b f) (v h w)", f=3), {"normalize": "per_view", "reduction": "released"}, 'use "mean"'),
    ],
)
def test_where_nothing_is_left_to_supervise(layout: TokenLayout, options: dict[str, object], message: str) -> None:
    assert message in str(layout.refusal(**options))  # type: ignore[arg-type]
