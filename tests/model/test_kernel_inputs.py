"""Attention by a kernel that nothing sees, whose queries and keys the caller names."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cameo
from cameo import CameoModel, Correspondence
from cameo.attention import KernelInputs
from cameo.config import CameoConfig
from cameo.errors import CaptureError
from tests.helpers.attention_kernels import opaque_attention

BATCH, VIEWS, GRID, WIDTH, HEADS = 2, 3, (2, 3), 16, 2
TOKENS = VIEWS * GRID[0] * GRID[1]
SCALE = 0.3  # not the usual one


class Core(nn.Module):
    """The kernel, in sight or out of it, of tokens in some order of axes."""

    def __init__(self, axes: str, hidden: bool) -> None:
        super().__init__()
        self.axes, self.hidden = axes, hidden

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = {"k": HEADS} if "(" in self.axes else {}
        given = [rearrange(tensor, f"{self.axes} -> a k l d", **heads) for tensor in (q, k, v)]
        attend = opaque_attention if self.hidden else F.scaled_dot_product_attention
        return rearrange(attend(*given, scale=SCALE), "a k l d -> a l (k d)")


class Attention(nn.Module):
    heads = HEADS

    def __init__(self, axes: str, hidden: bool) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_q, self.norm_k = nn.Identity(), nn.Identity()
        self.core, self.axes = Core(axes, hidden), axes

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(p(x), f"a l (k d) -> {self.axes}", k=HEADS) for p in (self.to_q, self.to_k, self.to_v))
        return self.core(self.norm_q(q), k=self.norm_k(k), v=v)


class Model(nn.Module):
    def __init__(self, axes: str = "a k l d", hidden: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention, self.checkpointing = nn.Linear(WIDTH, WIDTH), Attention(axes, hidden), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + (checkpoint(self.attention, x, use_reentrant=False) if self.checkpointing else self.attention(x))


def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))


def matches() -> Correspondence:
    count = GRID[0] * GRID[1]
    index = torch.full((BATCH, VIEWS, VIEWS, count), -1)
    for view in range(VIEWS):
        index[:, view, (view + 1) % VIEWS] = (torch.arange(count) + 2) % count
    return Correspondence(index, (GRID,) * VIEWS)


def wrap(model: nn.Module, **options: Any) -> CameoModel:
    return cameo.wrap(model, layer="attention", layout="b (v h w)", head="mean", **options)


def loss_and_gradients(model: CameoModel) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    output = model(tokens(), correspondence=matches())
    parameters = [parameter for name, parameter in model.base_model.named_parameters() if "to_v" not in name]
    gradients = torch.autograd.grad(model.alignment_loss, parameters, allow_unused=True)
    return output.detach(), model.alignment_loss.detach(), list(gradients)


def check_same(found: CameoModel, expected: CameoModel) -> None:
    (output, loss, gradients), (_, expected_loss, expected_gradients) = map(loss_and_gradients, (found, expected))
    assert torch.equal(output, found.base_model(tokens()))
    torch.testing.assert_close(loss, expected_loss)
    assert all(gradient is not None and gradient.any() for gradient in gradients[:4])
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("axes", ["a k l d", "a l k d", "a l (k d)", "(a k) l d", "l a (k d)"])
@pytest.mark.parametrize("places", [("core:q", "core:k"), ("core:0", "core:1"), ("norm_q", "norm_k")], ids=str)
def test_the_loss_is_that_of_a_kernel_in_sight(axes: str, places: tuple[str, str]) -> None:
    named = KernelInputs(*places, axes=axes, scale=SCALE)
    check_same(wrap(Model(axes), kernel_inputs=named), wrap(Model(axes, hidden=False)))


def test_arguments_of_the_layer_itself() -> None:
    named = {"query": ":q", "key": ":k", "scale": SCALE}
    options = {"layer": "attention.core", "layout": "b (v h w)", "head": "mean", "heads": HEADS}
    check_same(cameo.wrap(Model(), kernel_inputs=named, **options), cameo.wrap(Model(hidden=False), **options))


def test_without_a_name_the_error_says_how_to_give_one() -> None:
    with pytest.raises(CaptureError, match=r"no attention kernel was seen in it.*kernel_inputs= of cameo\.wrap"):
        wrap(Model())(tokens(), correspondence=matches())


def test_fewer_key_heads_and_the_usual_scale() -> None:
    class Grouped(nn.Module):
        heads = 4

        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return q

    torch.manual_seed(0)
    query, key = torch.randn(1, 12, 4 * 8), torch.randn(1, 12, 2 * 8)
    model = nn.ModuleDict({"attention": Grouped()})
    model.forward = lambda: model["attention"](query, key)
    inputs = {"query": ":q", "key": ":k", "axes": "a l (k d)"}
    wrapped = cameo.wrap(model, layer="attention", layout="b (v h w)", kernel_inputs=inputs)
    with wrapped.capture() as captured:
        model()
    seen = captured["attention"]
    assert torch.equal(seen.query, query.unflatten(2, (4, 8)).transpose(1, 2))
    assert torch.equal(seen.key, key.unflatten(2, (2, 8)).transpose(1, 2).repeat_interleave(2, dim=1))
    assert seen.scale == 8**-0.5


def test_checkpointing_copies_and_pickles() -> None:
    named = {"query": "norm_q", "key": "norm_k", "scale": SCALE}
    model = wrap(Model(), kernel_inputs=named)
    _, loss, gradients = loss_and_gradients(model)
    model.base_model.checkpointing = True
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _, again, found = loss_and_gradients(twin)
        assert torch.equal(again, loss)
        torch.testing.assert_close(found, gradients)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.base_model.modules())


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = wrap(Model(), kernel_inputs=KernelInputs("norm_q", "core:k", scale=SCALE))
    again = cameo.from_pretrained(model.save_pretrained(tmp_path), base_model=Model())
    config = CameoConfig.load(tmp_path)
    assert config.kernel_inputs == {"query": "norm_q", "key": "core:k", "axes": "a k l d", "scale": SCALE}
    check_same(again, model)


def test_the_layout_is_checked_through_the_names() -> None:
    model = wrap(Model(), kernel_inputs={"query": "norm_q", "key": "norm_k", "scale": SCALE})
    images = torch.randn(1, VIEWS, WIDTH, *GRID)
    for order, fits in (("b (v h w) c", True), ("b (v w h) c", False)):
        check = model.check_layout(lambda x, order=order: ((rearrange(x, f"b v c h w -> {order}"),), {}), images)
        assert check.fits is fits


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"query": "norm_q"}, "kernel_inputs: key is missing"),
        ({"query": "norm_q", "key": "norm_k", "scales": 1.0}, "unknown name in kernel_inputs 'scales'.*'scale'"),
        (
            {"query": "norm_p", "key": "norm_k"},
            r"query: submodule of layer 'attention' 'norm_p': did you mean 'norm_q'",
        ),
        ({"query": "core:p", "key": "core:k"}, r"query: argument of 'core' 'p': .*Known: k, q, v"),
        ({"query": "core:q", "key": "core:3"}, "key: argument of 'core': expected a number below 3, got 3"),
        ({"query": "core:", "key": "core:k"}, 'query: expected a submodule of the layer, as "norm_q"'),
        ({"query": "norm_q", "key": "norm_k", "axes": "a l c"}, "axes: expected an order of a k l d"),
        ({"query": "norm_q", "key": "norm_k", "scale": float("nan")}, "scale: expected a finite factor"),
        ({"query": "norm_q", "key": "norm_k", "scale": True}, "scale: expected a finite factor"),
    ],
)
def test_names_that_do_not_exist_are_refused_at_once(named: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrap(Model(), kernel_inputs=named)


def test_another_type_is_refused_and_a_backbone_knows_its_kernels() -> None:
    with pytest.raises(TypeError, match="kernel_inputs: expected a KernelInputs or its keyword arguments"):
        wrap(Model(), kernel_inputs="norm_q")
    with pytest.raises(ValueError, match=r"kernel_inputs= and kernel_call= describe a model without an adapter"):
        cameo.wrap(Model(), "cat3d", kernel_inputs={"query": "norm_q", "key": "norm_k"})


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {"query": "norm_q", "key": "norm_k", "axes": "a l (k d)"},
            r'with the axes "a l \(k d\)" and k = 2, got \[2, 2',
        ),
        ({"query": "norm_q", "key": "unused"}, "gave 1 queries and 0 keys; name modules that run once for each call"),
        ({"query": "twice", "key": "norm_k"}, "expected a tensor as query='twice' of kernel_inputs, got tuple"),
    ],
)
def test_what_is_found_has_to_be_queries_and_keys(named: dict[str, Any], message: str) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    model = Model()
    model.attention.unused, model.attention.twice = nn.Identity(), Twice()
    forward = model.attention.core.forward
    model.attention.core.forward = lambda q, k, v: forward(model.attention.twice(q)[0], k, v)
    with pytest.raises(CaptureError, match=message):
        wrap(model, kernel_inputs=named)(tokens(), correspondence=matches())
