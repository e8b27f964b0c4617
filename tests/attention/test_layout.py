"""Token layouts against explicit loops: every index formula below is written out by hand, per model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence

B, K, D = 2, 3, 4
H, W = 3, 5
Place = Callable[[int, int, int, int], tuple[int, int] | None]


@dataclass
class Case:
    """A layout in use, with the position of each (sample, view, row, column) written out."""

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
    """Position (B', N') of a token after folding, derived from the reach only."""
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
@pytest.mark.parametrize("of", ["query", "key"])
def test_places_are_those_of_the_loops(case: Case, of: str) -> None:
    batch, tokens = getattr(case, f"{of}_shape")
    expected = torch.full((batch, tokens, 4), -1)
    for b in range(B):
        for v, (height, width) in enumerate(case.token_grids):
            for y in range(height):
                for x in range(width):
                    position = getattr(case, of)(b, v, y, x)
                    if position is not None:
                        for number in case.copies if of == "key" else [0]:
                            expected[position[0] + number * case.copy_stride, position[1]] = torch.tensor([b, v, y, x])
    assert torch.equal(case.layout.places(of, batch=B, token_grids=case.token_grids), expected)


@every_case
def test_localize_equals_the_loops(case: Case) -> None:
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
