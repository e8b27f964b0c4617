"""Models that mask their attention: text, causal views, windows; their loss is compared with arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import Correspondence, TokenLayout
from cameo.errors import CaptureError, ShapeError

BATCH, VIEWS, GRID, WIDTH, TEXT = 2, 3, (2, 3), 8, 5
TOKENS = GRID[0] * GRID[1]
IMAGE = VIEWS * TOKENS
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """One attention over a sequence that `attend` receives by head."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.attend = attend

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (rearrange(p(x), "b n (k d) -> b k n d", k=2) for p in (self.to_q, self.to_k, self.to_v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.attend(*self.project(x)), "b k n d -> b n (k d)")


def make(attend: Attend) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"attention": Attention(attend)})


def wrap(model: nn.Module, layout: str | TokenLayout, **options: object) -> cameo.CameoModel:
    model.forward = lambda x: model["attention"](x)  # type: ignore[method-assign,index,operator,assignment]
    return cameo.wrap(model, layer="attention", layout=layout, heads=2, head="mean", **options)  # type: ignore[arg-type]


def images(seed: int = 1) -> Tensor:
    return torch.randn(BATCH, IMAGE, WIDTH, generator=torch.Generator().manual_seed(seed))


def text(length: int, seed: int = 2) -> Tensor:
    return torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def matches() -> Correspondence:
    """Each token matches the next one of the next view, and of the one before."""
    index = torch.full((BATCH, VIEWS, VIEWS, TOKENS), -1)
    for view in range(VIEWS):
        for other in ((view + 1) % VIEWS, (view - 1) % VIEWS):
            index[:, view, other] = (torch.arange(TOKENS) + 1) % TOKENS
    return Correspondence(index, token_grids=(GRID,) * VIEWS)


def expected_loss(model: nn.Module, x: Tensor, match: Correspondence, visible: Tensor | None = None) -> Tensor:
    """Mean of the cross-entropies over the visible tokens of each other view, written out."""
    q, k, _ = model["attention"].project(x)  # type: ignore[index,operator]
    logits = (q @ k.mT / (WIDTH // 2) ** 0.5).mean(dim=1).unflatten(1, (VIEWS, TOKENS)).unflatten(3, (VIEWS, TOKENS))
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    losses = [
        -logits[b, i, n, j].log_softmax(dim=-1)[int(match.index[b, i, j, n])]
        for b, i, j, n in (match.index >= 0).nonzero().tolist()
        if visible is None or visible[b, i, n, j, int(match.index[b, i, j, n])]
    ]
    return torch.stack(losses).mean()


def check(model: cameo.CameoModel, x: Tensor, image: Tensor, visible: Tensor | None = None) -> None:
    match = matches()
    before = model.base_model(x)
    output = model(x, correspondence=match)
    assert torch.equal(output, before)
    expected = expected_loss(model.base_model, image, match, visible)
    torch.testing.assert_close(model.alignment_loss, expected)
    found = torch.autograd.grad(model.alignment_loss, model.base_model.attention.to_q.weight)[0]  # type: ignore[union-attr]
    torch.testing.assert_close(found, torch.autograd.grad(expected, model.base_model.attention.to_q.weight)[0])  # type: ignore[union-attr]


def text_mask(kind: str, before: bool) -> Tensor:
    """Hide two of the text's tokens in the first sample."""
    kept = torch.ones(BATCH, 1, 1, TEXT + IMAGE, dtype=torch.bool)
    kept[0, ..., TEXT - 2 : TEXT] = False
    kept = kept if before else kept.roll(-TEXT, dims=-1)
    if kind == "bool":
        return kept
    if kind == "of each query":
        return kept & kept.mT
    return torch.zeros(kept.shape).masked_fill(~kept, {"-inf": -torch.inf, "-10000": -10000.0}[kind])


@pytest.mark.parametrize("kind", ["bool", "-inf", "-10000", "of each query"])
@pytest.mark.parametrize("before", [True, False], ids=["text first", "text last"])
@pytest.mark.parametrize("length", [TEXT, None])
def test_a_mask_over_text_changes_nothing(kind: str, before: bool, length: int | None) -> None:
    mask = text_mask(kind, before)
    model = make(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask))
    layout = TokenLayout("b (t + v h w)" if before else "b (v h w + t)", t=length)
    parts = [text(TEXT), images()]
    check(wrap(model, layout), torch.cat(parts if before else parts[::-1], dim=1), images())


@pytest.mark.parametrize("layout", ["b (t + v h w)", "b (v h w + t)", "b (s + t + v h w)", "b (s + v h w + t)"])
def test_text_of_open_length_may_differ_between_calls(layout: str) -> None:
    model = make(F.scaled_dot_product_attention)
    lengths = {"t": None} | ({"s": 2} if "s" in layout else {})
    wrapped = wrap(model, TokenLayout(layout, **lengths))
    for length in (1, 4):
        segments = {"s": text(2, seed=5), "t": text(length), "v": images()}
        parts = [segments[part.strip()[0]] for part in layout[3:-1].split("+")]
        check(wrapped, torch.cat(parts, dim=1), images())
    assert TokenLayout(**wrapped.cameo_config.layout) == TokenLayout(layout, **lengths)
    with pytest.raises(ShapeError, match="L = "):
        wrapped(images()[:, 1:], correspondence=matches())


def test_images_follow_directly_on_texts_of_unequal_length() -> None:
    lengths, image = [2, 4], images()
    rows = [torch.cat([text(4)[i, :n], image[i]]) for i, n in enumerate(lengths)]
    x = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    kept = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None] + IMAGE
    model = make(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, kept[:, None, None]))
    check(wrap(model, TokenLayout("b (t + v h w)", t=None)), x, image)


def test_samples_that_attend_one_by_one() -> None:
    lengths, image = [2, 4], images()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        whole = torch.zeros_like(q)
        for i, n in enumerate(lengths):
            part = [torch.cat([t[i : i + 1, :, :n], t[i : i + 1, :, 4:]], dim=2) for t in (q, k, v)]
            whole[i, :, : n + IMAGE] = F.scaled_dot_product_attention(*part)[0]
        return whole

    x = torch.cat([text(4), image], dim=1)
    model = wrap(make(attend), TokenLayout("b (t + v h w)", t=None))
    check(model, x, image)
    one = Correspondence(matches().index[:1], token_grids=(GRID,) * VIEWS)
    with pytest.raises(CaptureError, match="called the attention kernel 2 times"):
        model(x, correspondence=one)


def test_causal_views_lose_the_matches_that_they_do_not_see() -> None:
    view = torch.arange(IMAGE) // TOKENS
    mask = view[:, None] >= view
    model = wrap(make(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)), "b (v h w)")
    visible = mask.unflatten(0, (VIEWS, TOKENS)).unflatten(2, (VIEWS, TOKENS)).expand(BATCH, -1, -1, -1, -1)
    check(model, images(), images(), visible)
    assert model.num_supervised == BATCH * 3 * TOKENS  # of six directions three look back
    model.implementation = "chunked"  # whole views are seen or not, so the fast path can serve
    check(model, images(), images(), visible)


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
def test_the_softmax_runs_over_what_a_query_sees(normalize: str) -> None:
    row = torch.arange(IMAGE) % TOKENS // GRID[1]
    mask = row[:, None] == row  # a window: the same row of every view
    model = wrap(make(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)), "b (v h w)", normalize=normalize)
    visible = mask.unflatten(0, (VIEWS, TOKENS)).unflatten(2, (VIEWS, TOKENS)).expand(BATCH, -1, -1, -1, -1)
    if normalize == "per_view":
        check(model, images(), images(), visible)
        model.implementation = "chunked"
        with pytest.raises(ValueError, match="compares a query with whole views, and visible= hides tokens"):
            model(images(), correspondence=matches())
        return
    model(images(), correspondence=matches())
    q, k, _ = model.base_model.attention.project(images())  # type: ignore[union-attr,operator]
    logits = (q @ k.mT / (WIDTH // 2) ** 0.5).mean(dim=1)
    view = torch.arange(IMAGE) // TOKENS
    log_weights = logits.masked_fill(~mask | (view[:, None] == view), -torch.inf).log_softmax(dim=-1)
    match, losses = matches(), []
    for b, i, j, n in (match.index >= 0).nonzero().tolist():
        key = int(match.index[b, i, j, n])
        if visible[b, i, n, j, key]:
            losses.append(-log_weights[b, i * TOKENS + n, j * TOKENS + key])
    torch.testing.assert_close(model.alignment_loss, torch.stack(losses).mean())


def test_a_bias_that_is_the_same_for_all_views_changes_nothing() -> None:
    mask = text_mask(
        "bool", before=True
    ).float()  # numbers, as Chroma's pipeline has them: 1 is added to all but padding
    mask = mask * mask.mT
    layout = TokenLayout("b (t + v h w)", t=None)
    model = wrap(make(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)), layout)
    x = torch.cat([text(TEXT), images()], dim=1)
    check(model, x, images())
    mask[0, 0, TEXT, -1] = 0.5  # one token of the last view is another to the first query
    with pytest.raises(CaptureError, match="adds a bias to its attention that does not only hide tokens"):
        model(x, correspondence=matches())


def test_masks_that_differ_between_heads_are_refused() -> None:
    mask = torch.ones(2, IMAGE, IMAGE, dtype=torch.bool)
    mask[1, 0, 1] = False
    model = wrap(make(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)), "b (v h w)")
    with pytest.raises(CaptureError, match="hides other keys in each head"):
        model(images(), correspondence=matches())


@pytest.mark.parametrize("lengths", [{"t": None, "s": None}, {"t": 3, "r": None, "c": 2}])
def test_only_one_length_of_text_may_be_open(lengths: dict[str, int | None]) -> None:
    text = "b (t + s + v h w)" if "s" in lengths else "b (t + r h c w)"
    with pytest.raises(ValueError, match="only one length may be open"):
        TokenLayout(text, **lengths)


def test_a_token_behind_text_of_open_length_is_located_in_a_call_of_known_length() -> None:
    place = {"batch_index": 1, "batch": BATCH, "token_grids": (GRID,) * VIEWS}
    layout = TokenLayout("b (t + v h w)", t=None)
    known = TokenLayout("b (t + v h w)", t=TEXT).locate(2, 1, 0, **place)
    assert layout.locate(2, 1, 0, **place, tokens=TEXT + IMAGE) == known == (1, TEXT + 2 * TOKENS + 3)
    assert TokenLayout("b (v h w + t)", t=None).locate(2, 1, 0, **place) == (1, 2 * TOKENS + 3)
    with pytest.raises(ValueError, match=r"tokens: the number of tokens t is open.* at least 18, got None"):
        layout.locate(2, 1, 0, **place)
