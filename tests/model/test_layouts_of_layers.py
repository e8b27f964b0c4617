"""Several layers with a layout of their own, and layouts whose calls hold some of the views, through `cameo.wrap`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import CameoModel, Correspondence, TokenLayout
from cameo.config import CameoConfig
from cameo.errors import CaptureError, ShapeError
from tests.helpers.models import GRID, SAMPLES, VIEWS, Attention, JointModel, frames, next_view, split_heads

H, W = GRID
LAYOUTS = ["b (v h w)", "(b h w) v"]


def seva(**options: object) -> CameoModel:
    torch.manual_seed(0)
    return cameo.wrap(JointModel(), layer=["joint", "temporal"], layout=LAYOUTS, head="mean", **options)  # type: ignore[arg-type]


def loss_of(model: CameoModel) -> Tensor:
    model(frames(), VIEWS, correspondence=next_view(shift=0))
    return model.alignment_loss


def test_each_layer_has_its_layout_and_normalization() -> None:
    model, alone = seva(), []
    assert [str(layer.layout.query) for layer in model.supervised_layers] == LAYOUTS
    assert model.cameo_config.normalize == ["per_view", "all_views"]
    for layer, layout in zip(("joint", "temporal"), LAYOUTS, strict=True):
        torch.manual_seed(0)
        alone.append(loss_of(cameo.wrap(JointModel(), layer=layer, layout=layout, head="mean")))
    assert alone[0] != alone[1]
    torch.testing.assert_close(loss_of(model), (alone[0] + alone[1]) / 2)


def test_they_are_saved_and_loaded(tmp_path: Path) -> None:
    model = seva()
    again = cameo.from_pretrained(model.save_pretrained(tmp_path), base_model=seva().unwrap())
    assert [layer.layout for layer in again.supervised_layers] == [TokenLayout(layout) for layout in LAYOUTS]
    assert torch.equal(loss_of(again), loss_of(model))
    assert CameoConfig.load(tmp_path).layout is None


def test_one_layout_for_all_is_kept_once() -> None:
    config = cameo.wrap(JointModel(), layer=["joint", "temporal"], layout=["b (v h w)"] * 2).cameo_config
    assert config.layouts is None
    assert config.normalize == "per_view"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": LAYOUTS[:1]}, "layout: expected one for all layers or one for each of 2, got 1"),
        ({"normalize": ["per_view"]}, r"normalize: expected one for each of the layers \['joint', 'temporal'\], got"),
        ({"normalize": ["per_view", "per_view"]}, "'temporal' cannot be supervised with normalize='per_view'"),
        ({"normalize": ["per_view", "each"]}, "unknown normalize 'each'"),
    ],
)
def test_lists_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cameo.wrap(JointModel(), layer=["joint", "temporal"], **{"layout": LAYOUTS} | options)  # type: ignore[arg-type]


def test_a_layout_in_a_list_has_to_be_one() -> None:
    with pytest.raises(TypeError, match=r"layout: expected a cameo\.TokenLayout or a pattern such as .*, got 3"):
        cameo.wrap(JointModel(), layer=["joint", "temporal"], layout=["b (v h w)", 3])  # type: ignore[list-item]


# Keys of reference views, frames in the batch, samples one by one


class Projected(Attention):
    """Attention of tokens to other tokens; `attend` gets queries, keys and values by head."""

    def __init__(self, attend: Callable[..., Tensor] = F.scaled_dot_product_attention) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: Tensor, others: Tensor | None = None) -> Tensor:  # type: ignore[override]
        others = x if others is None else others
        query, key, value = (
            split_heads(linear(source), self.heads)
            for linear, source in ((self.to_q, x), (self.to_k, others), (self.to_v, others))
        )
        return rearrange(self.attend(query, key, value), "a k l d -> a l (k d)")


class Viewed(nn.Module):
    """Brings tokens `[B, V, N, C]` into the form of a call, and the result is returned as it is."""

    def __init__(
        self, arrange: Callable[[Tensor], tuple[Tensor, ...]], attend: Callable[..., Tensor] | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.arrange = Projected(*filter(None, [attend])), arrange

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(*self.arrange(x))


def tokens(views: int) -> Tensor:
    return torch.randn(SAMPLES, views, H * W, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()


def expected_loss(model: nn.Module, x: Tensor, match: Correspondence, sees: Callable[[int, int], bool]) -> Tensor:
    """Mean cross-entropy over the tokens of the matched view, of the pairs of views that meet."""
    query, key = (linear(x).unflatten(-1, (2, -1)) for linear in (model.attention.to_q, model.attention.to_k))  # type: ignore[union-attr,operator]
    losses = []
    for b, i, j, n in match.matched.nonzero().tolist():
        if sees(i, j):
            logits = torch.einsum("kd,mkd->m", query[b, i, n], key[b, j]) / 2 * query.shape[-1] ** -0.5
            losses.append(-logits.log_softmax(0)[int(match.index[b, i, j, n])])
    return torch.stack(losses).mean()


def every_pair(views: int) -> Correspondence:
    index = torch.randint(H * W, (SAMPLES, views, views, H * W), generator=torch.Generator().manual_seed(5))
    index[:, range(views), range(views)] = -1
    return Correspondence(index, (GRID,) * views)


ARRANGED = {
    "reference attention": (
        4,
        TokenLayout("(b v) (h w)", key="(b u) (v h w)", reference_keys=1),
        lambda x: (x[:, 1:].flatten(0, 1), x[:, :1].expand(-1, 3, -1, -1).flatten(0, 1)),
        lambda i, j: i > 0 and j == 0,
    ),
    "cross attention to two references": (
        4,
        TokenLayout("b (v h w)", reference_keys=2),
        lambda x: (x[:, 2:].flatten(1, 2), x[:, :2].flatten(1, 2)),
        lambda i, j: i > 1 and j < 2,
    ),
    "cameras of each frame": (
        6,
        TokenLayout("(b f) (v h w)", f=2),
        lambda x: (x.unflatten(1, (2, 3)).flatten(0, 1).flatten(1, 2),),
        lambda i, j: i // 3 == j // 3,
    ),
    "frames of each camera": (
        6,
        TokenLayout("(b v) (f h w)", f=2),
        lambda x: (x.unflatten(1, (2, 3)).transpose(1, 2).flatten(0, 1).flatten(1, 2),),
        lambda i, j: i % 3 == j % 3,
    ),
}


@pytest.mark.parametrize("name", ARRANGED)
def test_the_loss_and_whom_it_pulls(name: str) -> None:
    views, layout, arrange, sees = ARRANGED[name]
    x, match, base = tokens(views), every_pair(views), Viewed(arrange)
    model = cameo.wrap(base, layer="attention", layout=layout, head="mean")
    before = base(x)
    assert torch.equal(model(x, correspondence=match), before)
    assert (
        model.num_supervised == sum(sees(i, j) for i in range(views) for j in range(views) if i != j) * SAMPLES * H * W
    )
    expected = expected_loss(base, x, match, lambda i, j: i != j and sees(i, j))
    torch.testing.assert_close(model.alignment_loss, expected)
    parameters = [x, base.attention.to_q.weight, base.attention.to_k.weight]
    found = torch.autograd.grad(model.alignment_loss, parameters)
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters))


@pytest.mark.parametrize("name", ARRANGED)
def test_the_layout_is_found_to_fit(name: str) -> None:
    views, layout, arrange, _ = ARRANGED[name]
    model = cameo.wrap(Viewed(arrange), layer="attention", layout=layout)
    images = torch.randn(1, views, 16, *GRID)
    assert model.check_layout(lambda x: ((x.flatten(3).transpose(2, 3),), {}), images).fits is True
    turned = model.check_layout(lambda x: ((x.flip(1).flatten(3).transpose(2, 3),), {}), images)
    assert turned.layers[0].mistake == "order of views"


def test_reference_keys_that_leave_nothing_are_refused() -> None:
    for options in ({"layout": TokenLayout("(b h w) v", reference_keys=2)}, {"normalize": "all_views"}):
        given = {"layout": TokenLayout("b (v h w)", reference_keys=2)} | options
        with pytest.raises(ValueError, match="cannot be supervised with normalize='all_views'"):
            cameo.wrap(Viewed(lambda x: (x,)), layer="attention", **given)  # type: ignore[arg-type]


def one_by_one(masked: bool = False, heads_in_batch: bool = False) -> Callable[..., Tensor]:
    """A kernel that is called once for each sample."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril() if masked else None
        picked = [slice(i, i + 1) if not heads_in_batch else i for i in range(len(query))]
        # Each call is a copy, so that it is no slice of one tensor.
        parts = [F.scaled_dot_product_attention(*(t[i].clone() for t in (query, key, value)), mask) for i in picked]
        return torch.stack(parts) if heads_in_batch else torch.cat(parts)

    return attend


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads_in_batch", [False, True])
def test_samples_one_by_one_are_joined(masked: bool, heads_in_batch: bool) -> None:
    def at_once(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=masked)

    losses = []
    for attend in (one_by_one(masked, heads_in_batch), at_once):
        base = Viewed(lambda x: (x.flatten(1, 2),), attend)
        model = cameo.wrap(base, layer="attention", layout="b (v h w)", head="mean")
        model(tokens(VIEWS), correspondence=every_pair(VIEWS))
        losses.append(model.alignment_loss)
    assert losses[0] > 0
    torch.testing.assert_close(*losses)


def test_one_call_of_several_samples_names_the_way_out() -> None:
    x, match = tokens(VIEWS), every_pair(VIEWS)
    base = Viewed(lambda x: (x.flatten(1, 2),), one_by_one())
    model = cameo.wrap(base, layer="attention", layout="b (v h w)", kernel_call=0)
    with pytest.raises(ShapeError, match="once for each sample, leave kernel_call= out: they are joined"):
        model(x, correspondence=match)
    other = Viewed(lambda x: (x.flatten(1, 2),), lambda q, k, v: one_by_one()(q, k.flip(2), v) + one_by_one()(q, k, v))
    model = cameo.wrap(other, layer="attention", layout="b (v h w)")
    with pytest.raises(CaptureError, match=r"4 times.*joined where there is one for each sample of the correspondence"):
        model(x, correspondence=match)
