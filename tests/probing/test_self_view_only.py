"""One layer cut to self-view attention: every layout, every kernel, and what cannot be cut."""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from cameo import TokenLayout
from cameo.attention.capture import AttentionCapture, AttentionLayer
from cameo.errors import CaptureError
from cameo.probing.ablation import (
    self_view_only,
)
from tests.helpers import backbone_checks as checks
from tests.helpers.attention_kernels import (
    DIMENSION,
    HEADS,
    PLAIN,
    WITH_XFORMERS,
    bmm_then_scale,
    in_slices,
    install_xformers,
    sdpa,
)

KERNELS = [sdpa, *PLAIN, *WITH_XFORMERS]
NO_VIEW, REFERENCE = -1, 99
GRID, OWN_GRID, VIEWS, SAMPLES = (2, 3), (3, 2), 3, 2
SIZES = {"b": SAMPLES, "v": VIEWS, "h": GRID[0], "w": GRID[1]}


def by(pattern: str, **lengths: int) -> Tensor:
    """View of every token `[A, L]` of an attention whose axes `pattern` names, independently of `TokenLayout`."""
    return repeat(torch.arange(lengths.get("v", VIEWS)), f"v -> {pattern}", **{**SIZES, **lengths})


def canvas() -> Tensor:
    """Six views on 3 x 2 tiles."""
    return repeat(rearrange(torch.arange(6), "(r c) -> r c", r=3), "r c -> b (r h c w)", b=SAMPLES, h=2, w=3)


def some(view: int, tokens: int) -> Tensor:
    return torch.full((SAMPLES, tokens), view)


# Layout, token grids in correspondence order, views of the queries and of the keys [A, L].
CASES: dict[str, tuple[TokenLayout, tuple[tuple[int, int], ...], Tensor, Tensor]] = {
    "joint": (TokenLayout("b (v h w)"), (GRID,) * 3, by("b (v h w)"), by("b (v h w)")),
    "image prompt without a loss": (
        TokenLayout("b (v h w)", unsupervised_views=1, references_last=1),
        (GRID,) * 3,
        by("b (v h w)"),
        by("b (v h w)"),
    ),
    "view that no correspondence has": (
        TokenLayout("b (v h w)", unsupervised_views=1),
        (GRID,) * 2,
        by("b (v h w)"),
        by("b (v h w)"),
    ),
    "canvas and reference": (
        TokenLayout("b (r h c w)", key="b (r h c w + h' w')", references_last=1, r=3, c=2),
        (OWN_GRID, *(GRID,) * 6),
        canvas(),
        torch.cat([canvas(), some(REFERENCE, 6)], 1),
    ),
    "rows": (TokenLayout("(b h) (v w)"), (GRID,) * 3, by("(b h) (v w)"), by("(b h) (v w)")),
    "columns": (TokenLayout("(b w) (v h)"), (GRID,) * 3, by("(b w) (v h)"), by("(b w) (v h)")),
    "temporal": (TokenLayout("(b h w) v"), (GRID,) * 3, by("(b h w) v"), by("(b h w) v")),
    "views in the rows": (
        TokenLayout("(b v h) w", key="(b u h) (v w)"),
        (GRID,) * 3,
        by("(b v h) w"),
        by("(b u h) (v w)", u=3),
    ),
    "views before samples": (
        TokenLayout("(v b) (h w)", key="(u b) (v h w)"),
        (GRID,) * 3,
        by("(v b) (h w)"),
        by("(u b) (v h w)", u=3),
    ),
    "text": (
        TokenLayout("b (t + v h w)", t=4),
        (GRID,) * 3,
        torch.cat([some(NO_VIEW, 4), by("b (v h w)")], 1),
        torch.cat([some(NO_VIEW, 4), by("b (v h w)")], 1),
    ),
    "text among the keys": (
        TokenLayout("b (v h w)", key="b (v h w + t)", t=4),
        (GRID,) * 3,
        by("b (v h w)"),
        torch.cat([by("b (v h w)"), some(NO_VIEW, 4)], 1),
    ),
}
# With these layouts, five rows of a sliced kernel are not whole samples.
ROWWISE = [name for name, (layout, *_) in CASES.items() if layout.query.startswith(("(b v", "(v b"))]
# Every layout with one kernel of each way to cut, every kernel with layouts of each kind.
PAIRS = sorted(
    {(case, kernel) for case in CASES for kernel in (sdpa, bmm_then_scale)}
    | {(case, kernel) for case in ("canvas and reference", "temporal", "views in the rows") for kernel in KERNELS}
    - {(case, in_slices) for case in ROWWISE},
    key=lambda pair: (pair[0], pair[1].__name__),
)


class Layer(nn.Module):
    """Attention with the given queries, keys and values."""

    def __init__(self, kernel: Callable[..., Tensor] = sdpa) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.kernel(query, key, value)


class Model(nn.Module):
    def __init__(self, kernel: Callable[..., Tensor] = sdpa) -> None:
        super().__init__()
        self.layer, self.other = Layer(kernel), Layer(kernel)

    def forward(self, *call: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(*call), self.other(*call)


@pytest.fixture
def xformers_ops(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    return install_xformers(monkeypatch)


def make_site(case: str, **options: Any) -> AttentionLayer:
    return AttentionLayer(0, "layer", HEADS, CASES[case][0], **options)


def random_call(case: str) -> tuple[Tensor, ...]:
    *_, of_query, of_key = CASES[case]
    generator = torch.Generator().manual_seed(2)
    views = of_query, of_key, of_key
    return tuple(torch.randn(*view.shape, HEADS * DIMENSION, generator=generator) for view in views)


def token_by_token(case: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in float64, computed for each query over the keys that it may see."""
    *_, of_query, of_key = CASES[case]
    output = torch.empty(*query.shape, dtype=torch.float64)
    for row, token in torch.cartesian_prod(torch.arange(query.shape[0]), torch.arange(query.shape[1])).tolist():
        view = of_query[row, token]
        seen = (of_key[row] == view) | (of_key[row] == NO_VIEW) | (view == NO_VIEW)
        q, k, v = (
            rearrange(x.double(), "... (k d) -> k ... d", k=HEADS)
            for x in (query[row, token], key[row, seen], value[row, seen])
        )
        weights = (torch.einsum("kd,kmd->km", q, k) * DIMENSION**-0.5).softmax(-1)
        output[row, token] = torch.einsum("km,kmd->kd", weights, v).flatten()
    return output


@pytest.mark.parametrize(("case", "kernel"), PAIRS, ids=lambda value: getattr(value, "__name__", value))
def test_each_query_sees_its_own_view_only(case: str, kernel: Any, xformers_ops: types.ModuleType) -> None:
    model, call = Model(kernel), random_call(case)
    whole = model(*call)
    with self_view_only(model, make_site(case), CASES[case][1]), torch.no_grad():
        cut, other = model(*call)
    torch.testing.assert_close(cut.double(), token_by_token(case, *call), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(cut, whole[0], atol=1e-3)
    assert torch.equal(other, whole[1])
    assert all(map(torch.equal, model(*call), whole))


def test_part_of_a_sample_is_refused(xformers_ops: types.ModuleType) -> None:
    for case in ROWWISE:
        model = Model(in_slices)
        with (
            pytest.raises(CaptureError, match=r"of one sample are \d+ rows of the kernel, and a call has 5"),
            self_view_only(model, make_site(case), CASES[case][1]),
        ):
            model(*random_call(case))


def test_queries_of_other_views_do_not_change_a_bit() -> None:
    """In a cut layer, no value of one view can change another view."""
    model, (query, key, value) = Model(), random_call("joint")
    far = [torch.where(CASES["joint"][2][..., None] == 1, 1e4 * x, x) for x in (query, key, value)]
    with self_view_only(model, make_site("joint"), (GRID,) * 3):
        near, changed = model(query, key, value)[0], model(*far)[0]
    others = CASES["joint"][2] != 1
    assert torch.equal(near[others], changed[others])
    assert not torch.equal(near[~others], changed[~others])


def test_gradients_are_those_of_the_attention_that_ran() -> None:
    call = [x.requires_grad_() for x in random_call("joint")]
    with self_view_only(model := Model(), make_site("joint"), (GRID,) * 3):
        model(*call)[0].square().sum().backward()
    truth = [x.detach().double().requires_grad_() for x in call]
    token_by_token("joint", *truth).square().sum().backward()
    for one, true in zip(call, truth, strict=True):
        torch.testing.assert_close(one.grad.double(), true.grad, rtol=1e-4, atol=1e-5)


def test_a_capture_inside_sees_all_keys() -> None:
    model, call, layer = Model(), random_call("joint"), make_site("joint")
    with self_view_only(model, layer, (GRID,) * 3):
        cut = model(*call)[0]
        with AttentionCapture(model, [layer]) as captured:
            assert torch.equal(model(*call)[0], cut)
        assert torch.equal(model(*call)[0], cut)
    assert captured["layer"].key.shape == (SAMPLES, HEADS, 18, DIMENSION)


def test_only_this_model_and_this_thread_are_affected() -> None:
    model, call = Model(), random_call("joint")
    twin, whole, found = copy.deepcopy(model), model(*call)[0], []
    with self_view_only(model, make_site("joint"), (GRID,) * 3):
        assert not torch.equal(model(*call)[0], whole)
        assert torch.equal(twin(*call)[0], whole)
        thread = threading.Thread(target=lambda: found.append(model(*call)[0]))
        thread.start()
        thread.join()
    assert torch.equal(found[0], whole)
    assert checks.hooks(model) == 0


def test_an_exception_restores_the_model() -> None:
    def out_of_memory(*_: Tensor) -> Tensor:
        raise MemoryError("mine")

    model, call = Model(), random_call("joint")
    whole = model(*call)[0]
    model.layer.kernel = out_of_memory
    with pytest.raises(MemoryError, match="mine"), self_view_only(model, make_site("joint"), (GRID,) * 3):
        model(*call)
    model.layer.kernel = sdpa
    assert torch.equal(model(*call)[0], whole)
    assert checks.hooks(model) == 0


def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(sdpa(q, k, v), k, v)


def half_the_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([sdpa(part, k, v) for part in q.chunk(2, dim=1)], dim=1)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (twice, "called the attention kernel 2 times"),
        (half_the_tokens, "expected 18 queries and 18 keys .* got 9 and 18"),
        (lambda q, k, v: q, "no attention kernel was seen"),
    ],
)
def test_what_cannot_be_cut_says_why(kernel: Any, message: str) -> None:
    model = Model(kernel)
    with pytest.raises(CaptureError, match=message), self_view_only(model, make_site("joint"), (GRID,) * 3):
        model(*random_call("joint"))
    assert checks.hooks(model) == 0


def test_a_block_in_which_nothing_was_cut_is_an_error() -> None:
    with pytest.raises(CaptureError, match="did not run"), self_view_only(Model(), make_site("joint"), (GRID,) * 3):
        pass
    case = "canvas and reference"
    reference = torch.zeros(SAMPLES, 6, HEADS * DIMENSION)  # the write pass alone
    with (
        pytest.raises(CaptureError, match="nothing to cut"),
        self_view_only(model := Model(), make_site(case), CASES[case][1]),
    ):
        model(reference, reference, reference)


def test_sizes_of_another_batch_are_refused() -> None:
    with (
        pytest.raises(CaptureError, match=r"expected 12 queries .* got 18 and 18"),
        self_view_only(model := Model(), make_site("joint"), (GRID,) * 2),
    ):
        model(*random_call("joint"))
    with (
        pytest.raises(ValueError, match="needs 7 views, got 3"),
        self_view_only(Model(), make_site("canvas and reference"), (GRID,) * 3),
    ):
        pass


def test_a_compiled_layer_is_cut_too() -> None:
    model, call = Model(), random_call("joint")
    model.layer.compile(backend="eager")
    with self_view_only(model, make_site("joint"), (GRID,) * 3), torch.no_grad():
        cut = model(*call)[0]
    torch.testing.assert_close(cut.double(), token_by_token("joint", *call), rtol=1e-5, atol=1e-6)
