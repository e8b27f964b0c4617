from __future__ import annotations

import gc
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from einops import rearrange
from torch import Tensor, nn

from cameo.attention.capture import AttentionCapture, AttentionLayer
from cameo.attention.kernel_calls import KernelCall, join_slices
from cameo.attention.layout import TokenLayout
from cameo.errors import CaptureError

HEADS, DIMENSION, TOKENS, SAMPLES = 4, 6, 10, 3
WIDTH = HEADS * DIMENSION
SCALE = DIMENSION**-0.5
LAYOUT = TokenLayout("b (v h w)")


def heads_apart(x: Tensor) -> Tensor:
    return rearrange(x, "b n (k d) -> b k n d", k=HEADS)


def rows(x: Tensor) -> Tensor:
    return rearrange(x, "b n (k d) -> (b k) n d", k=HEADS)


def from_rows(x: Tensor) -> Tensor:
    return rearrange(x, "(b k) n d -> b n (k d)", k=HEADS)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return rearrange(F.scaled_dot_product_attention(*map(heads_apart, (q, k, v))), "b k n d -> b n (k d)")


def sdpa_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return from_rows(F.scaled_dot_product_attention(*map(rows, (q, k, v)), scale=SCALE))


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(rows, (q, k, v))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1])
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return from_rows(torch.bmm(scores.softmax(dim=-1), v))


def bmm_then_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(rows, (q, k, v))
    return from_rows(torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * SCALE, -1), v))


def operator_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads_apart, (q, k, v))
    logits = q @ k.mT
    logits *= SCALE
    return rearrange(F.softmax(logits, dim=-1, dtype=torch.float32) @ v, "b k n d -> b n (k d)")


def einsum_ldm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(rows, (q, k, v))
    sim = torch.einsum("b i d, b j d -> b i j", q, k) * SCALE
    return from_rows(torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v))


def einsum_heads_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (rearrange(x, "b n (k d) -> b n k d", k=HEADS) for x in (q, k, v))
    sim = torch.einsum("bihd,bjhd->bhij", [q, k]) * SCALE
    return rearrange(torch.einsum("bhij,bjhd->bihd", sim.softmax(-1), v), "b n k d -> b n (k d)")


def matmul_by_keyword(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads_apart, (q, k, v))
    logits = torch.matmul(input=q, other=k.mT) / DIMENSION**0.5
    return rearrange(torch.softmax(input=logits, dim=-1) @ v, "b k n d -> b n (k d)")


def xformers_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import xformers.ops

    return from_rows(xformers.ops.memory_efficient_attention(*map(rows, (q, k, v)), attn_bias=None, op=None))


def xformers_bmhk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import xformers.ops

    q, k, v = (rearrange(x, "b n (k d) -> b n k d", k=HEADS) for x in (q, k, v))
    return rearrange(xformers.ops.memory_efficient_attention(q, k, v, scale=SCALE), "b n k d -> b n (k d)")


def in_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SGM feeds the kernel in portions of rows; 5 rows are not whole samples."""
    import xformers.ops

    q, k, v = map(rows, (q, k, v))
    call = xformers.ops.memory_efficient_attention
    parts = [call(q[i : i + 5], k[i : i + 5], v[i : i + 5]) for i in range(0, len(q), 5)]
    return from_rows(torch.cat(parts))


PLAIN = [
    sdpa_rows,
    baddbmm,
    bmm_then_scale,
    operator_in_place,
    einsum_ldm,
    einsum_heads_inside,
    matmul_by_keyword,
]
WITH_XFORMERS = [xformers_rows, xformers_bmhk, in_slices]


class Attention(nn.Module):
    def __init__(self, kernel: Callable[..., Any] = sdpa) -> None:
        super().__init__()
        self.kernel = kernel
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(self.to_q(x), self.to_k(x), self.to_v(x))


class Model(nn.Module):
    """Two attentions of the same shape, one after the other."""

    def __init__(self, kernel: Callable[..., Any] = sdpa) -> None:
        super().__init__()
        self.first, self.second = Attention(kernel), Attention(kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def layer(path: str = "second", heads: int = HEADS) -> AttentionLayer:
    return AttentionLayer(0, path, heads, LAYOUT)


def make(kernel: Callable[..., Any] = sdpa) -> Model:
    torch.manual_seed(0)
    return Model(kernel)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def xformers_ops(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for xformers whose kernel is PyTorch's."""

    def memory_efficient_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: Any = None,
        *,
        op: Any = None,
    ) -> Tensor:
        if query.ndim == 3:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias, scale=scale)
        parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*parts, attn_mask=attn_bias, scale=scale).transpose(1, 2)

    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops = ops  # type: ignore[attr-defined]
    ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return ops


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert torch.overrides._get_current_function_mode_stack() == []


def capture(model: nn.Module, x: Tensor, where: AttentionLayer | None = None) -> tuple[Tensor, Any]:
    where = where or layer()
    with AttentionCapture(model, [where]) as captured:
        output = model(x)
        seen = captured[where.path]
    assert hooks(model) == 0
    return output, seen


def expected(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of the second attention, by the definition of the model."""
    inside = x + model.first(x)
    return heads_apart(model.second.to_q(inside)), heads_apart(model.second.to_k(inside))


@pytest.mark.parametrize("kernel", [sdpa, *PLAIN], ids=lambda kernel: kernel.__name__)
def test_every_form_of_attention_gives_the_same_queries_keys_and_scale(kernel: Any, x: Tensor) -> None:
    model = make(kernel)
    output, seen = capture(model, x)
    query, key = expected(model, x)
    assert torch.equal(output, model(x))
    assert seen.scale == SCALE
    assert torch.equal(seen.query, query)
    assert torch.equal(seen.key, key)
    assert seen.query.requires_grad


@pytest.mark.parametrize("kernel", WITH_XFORMERS, ids=lambda kernel: kernel.__name__)
def test_xformers_gives_the_same_queries_keys_and_scale(kernel: Any, x: Tensor, xformers_ops: Any) -> None:
    original = xformers_ops.memory_efficient_attention
    test_every_form_of_attention_gives_the_same_queries_keys_and_scale(kernel, x)
    assert xformers_ops.memory_efficient_attention is original


def test_queries_that_are_scaled_before_the_product_have_scale_one(x: Tensor) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bmm(q * SCALE, k, v)

    def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return from_rows((rows(q) @ rows(k).mT).softmax(-1) @ rows(v))

    model = make(kernel)
    _, seen = capture(model, x)
    query, key = expected(model, x)
    assert seen.scale == 1
    torch.testing.assert_close(seen.query @ seen.key.mT, SCALE * query @ key.mT)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float64, 1e-12)]
)
def test_an_unusual_scale_is_measured(dtype: torch.dtype, tolerance: float, x: Tensor) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return from_rows((rows(q) @ rows(k).mT * 0.137).softmax(-1) @ rows(v))

    _, seen = capture(make(kernel).to(dtype), x.to(dtype))
    assert seen.scale == pytest.approx(0.137, rel=tolerance)


def test_the_scale_given_to_the_kernel_is_taken(x: Tensor) -> None:
    _, seen = capture(
        make(lambda q, k, v: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=0.3)[:, 0]),
        x,
        layer(heads=1),
    )
    assert seen.scale == 0.3
    assert seen.query.shape == (SAMPLES, 1, TOKENS, WIDTH)


def test_norm_and_rotation_after_the_projection_are_captured(x: Tensor) -> None:
    def rotate(t: Tensor) -> Tensor:
        angle = torch.arange(TOKENS, dtype=t.dtype)[:, None]
        half = t.shape[-1] // 2
        a, b = t[..., :half], t[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def prepared(t: Tensor) -> Tensor:
        return rotate(F.normalize(heads_apart(t), dim=-1))

    model = make(
        lambda q, k, v: rearrange(
            F.scaled_dot_product_attention(prepared(q), prepared(k), heads_apart(v)), "b k n d -> b n (k d)"
        )
    )
    _, seen = capture(model, x)
    inside = x + model.first(x)
    assert torch.equal(seen.query, prepared(model.second.to_q(inside)))
    assert torch.equal(seen.key, prepared(model.second.to_k(inside)))
    assert not torch.allclose(seen.query, heads_apart(model.second.to_q(inside)))


def test_the_same_token_count_in_another_layer_is_not_mixed_up(x: Tensor) -> None:
    model = make()
    with AttentionCapture(model, [layer("first"), layer("second")]) as captured:
        model(x)
        first, second = captured["first"], captured["second"]
    assert torch.equal(first.query, heads_apart(model.first.to_q(x)))
    assert torch.equal(second.query, expected(model, x)[0])


def test_of_a_layer_that_runs_twice_the_last_call_counts(x: Tensor) -> None:
    model = make()
    with AttentionCapture(model, [layer("first")]) as captured:
        model.first(x)
        model.first(2 * x)
        assert torch.equal(captured["first"].query, heads_apart(model.first.to_q(2 * x)))


def test_a_layer_inside_a_captured_layer_is_captured_too(x: Tensor, xformers_ops: Any) -> None:
    for kernel in (sdpa, xformers_rows):
        outer = nn.ModuleDict({"block": nn.Sequential(Attention(kernel))})
        with AttentionCapture(outer, [layer("block"), layer("block.0")]) as captured:
            outer["block"](x)
            assert torch.equal(captured["block"].query, captured["block.0"].query)


# What is refused


def masked(**mask: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: (
        F.scaled_dot_product_attention(*map(heads_apart, (q, k, v)), **mask).transpose(1, 2).flatten(2)
    )


def additive(bias: Tensor, *, fused: bool) -> Callable[..., Tensor]:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = map(rows, (q, k, v))
        logits = torch.baddbmm(bias, q, k.mT, alpha=SCALE) if fused else q @ k.mT * SCALE + bias
        return from_rows(logits.softmax(-1) @ v)

    return kernel


def some_bias(kind: str) -> Tensor:
    bias = torch.zeros(SAMPLES * HEADS, TOKENS, TOKENS)
    if kind == "causal":
        bias.masked_fill_(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    elif kind == "last sample":  # padding of one sample of the batch
        bias[-HEADS:, :, -2:] = -10000.0
    else:
        bias += -0.1 * (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()
    return bias


@pytest.mark.parametrize("mask", [{"attn_mask": torch.zeros(TOKENS, TOKENS)}, {"is_causal": True}])
def test_a_masked_kernel_is_refused(mask: dict[str, Any], x: Tensor) -> None:
    model = make(masked(**mask))
    with pytest.raises(CaptureError, match="layer 'second' masks its attention"):
        capture(model, x)
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", ["causal", "last sample", "distance"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_mask_in_explicit_attention_is_refused(kind: str, fused: bool, x: Tensor) -> None:
    with pytest.raises(CaptureError, match="changes its logits between product and softmax"):
        capture(make(additive(some_bias(kind), fused=fused)), x)


def test_a_bias_of_xformers_is_refused(x: Tensor, xformers_ops: Any) -> None:
    original = xformers_ops.memory_efficient_attention
    bias = torch.zeros(1, TOKENS, TOKENS)
    model = make(lambda q, k, v: from_rows(xformers_ops.memory_efficient_attention(rows(q), rows(k), rows(v), bias)))
    with pytest.raises(CaptureError, match="adds a bias"):
        capture(model, x)
    assert xformers_ops.memory_efficient_attention is original


def test_two_different_calls_in_one_module_are_refused(x: Tensor) -> None:
    model = make(lambda q, k, v: sdpa(q, k, v) + sdpa(q, k.flip(1), v))
    with pytest.raises(CaptureError, match="called the attention kernel 2 times"):
        capture(model, x)


def test_only_neighbouring_slices_of_one_tensor_are_joined() -> None:
    query, key = torch.randn(6, 4, 8), torch.randn(6, 4, 8)
    calls = [KernelCall(query[i : i + 2], key[i : i + 2], 1.0) for i in (0, 2, 4)]
    (joined,) = join_slices(calls)
    assert torch.equal(joined.query, query)
    assert torch.equal(joined.key, key)
    for refused in (
        [calls[0], calls[2]],  # a gap
        [calls[0], calls[0]],  # the same rows again
        [calls[0], KernelCall(calls[1].query, key[2:4].clone(), 1.0)],  # keys of another tensor
        [calls[0], KernelCall(calls[1].query, calls[1].key, 2.0)],
    ):
        assert len(join_slices(refused)) == 2


def test_a_layer_that_did_not_run_is_an_error(x: Tensor) -> None:
    model = make()
    with pytest.raises(CaptureError, match="layer 'second' did not run"), AttentionCapture(model, [layer()]):
        model.first(x)
    with pytest.raises(CaptureError, match="did not run"), AttentionCapture(model, [layer()]):
        model.second.forward(x)  # hooks are not called


def test_a_layer_without_a_known_kernel_is_an_error(x: Tensor) -> None:
    with pytest.raises(CaptureError, match="ran, but no attention kernel was seen"):
        capture(make(lambda q, k, v: v), x)
    attention = nn.ModuleDict({"second": nn.MultiheadAttention(WIDTH, HEADS)})
    with pytest.raises(CaptureError, match="which keeps its queries and keys"), AttentionCapture(attention, [layer()]):
        attention["second"](x, x, x)


def test_a_wrong_number_of_heads_is_an_error(x: Tensor) -> None:
    with pytest.raises(CaptureError, match=r"expected queries and keys with 3 heads, got \[3, 4, 10, 6\]"):
        capture(make(), x, layer(heads=3))
    with pytest.raises(CaptureError, match="12 attention rows do not divide into 5 heads"):
        capture(make(sdpa_rows), x, layer(heads=5))


def test_zero_logits_have_no_scale(x: Tensor) -> None:
    model = make(baddbmm)
    nn.init.zeros_(model.second.to_q.weight)
    with pytest.raises(CaptureError, match="all its logits are zero"):
        capture(model, x)


def test_a_softmax_that_is_not_the_attention_is_left_alone(x: Tensor) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = rows(q) @ rows(k).mT
        gate = v.softmax(-1)  # between product and attention
        mixed = logits.flatten().softmax(0).sum() + logits.softmax(0).sum()  # of the logits, but another axis
        return from_rows((logits * SCALE).softmax(-1) @ rows(v)) * gate + mixed

    model = make(kernel)
    _, seen = capture(model, x)
    assert seen.scale == SCALE
    assert torch.equal(seen.query, expected(model, x)[0])


# Nothing is left behind


def test_the_calls_are_free_with_the_capture(x: Tensor) -> None:
    """Without a garbage collection, which may be long in coming."""
    with AttentionCapture(model := make(sdpa), [layer()]) as captured:
        model(x)
    query = weakref.ref(captured[layer().path].query)
    assert query() is not None
    gc.disable()
    try:
        del captured
        assert query() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [RuntimeError("inside"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_an_exception_inside_the_layer_leaves_nothing(error: BaseException, x: Tensor, xformers_ops: Any) -> None:
    original = xformers_ops.memory_efficient_attention

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sdpa(q, k, v), sdpa(q, k.flip(0), v)
        raise error

    model = make(kernel)
    model.first = Attention(sdpa)
    captured = AttentionCapture(model, [layer("first"), layer()])
    with pytest.raises(type(error)) as raised, captured:
        model(x)
    assert raised.value is error
    assert hooks(model) == 0
    assert torch.overrides._get_current_function_mode_stack() == []
    assert xformers_ops.memory_efficient_attention is original
    with pytest.raises(CaptureError, match="did not run"):
        captured["first"]  # half a forward is no result
    model.second.kernel = sdpa
    with captured:
        model(x)
        assert torch.equal(captured["second"].query, expected(model, x)[0])


def test_an_exception_that_the_model_catches_ends_the_observation(x: Tensor) -> None:
    class Retrying(Model):
        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(RuntimeError, match="shape"):
                self.second(x[..., 1:])
            assert torch.overrides._get_current_function_mode_stack() == []
            return super().forward(x)

    model = Retrying()
    _, seen = capture(model, x)
    assert torch.equal(seen.query, expected(model, x)[0])


def test_an_unknown_path_leaves_no_hook_on_the_others() -> None:
    model = make()
    with pytest.raises(AttributeError), AttentionCapture(model, [layer("first"), layer("third")]):
        pass
    assert hooks(model) == 0


def test_another_thread_is_neither_observed_nor_disturbed(x: Tensor, xformers_ops: Any) -> None:
    original = xformers_ops.memory_efficient_attention
    model, other = make(xformers_rows), make(xformers_rows)
    results: dict[str, Any] = {}

    def elsewhere() -> None:
        results["same model"] = model(2 * x)  # its modules carry our hooks
        results["other model"] = other(2 * x)
        results["fetched"] = xformers_ops.memory_efficient_attention

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if threading.current_thread() is threading.main_thread() and not results:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return xformers_rows(q, k, v)

    model.second.kernel = kernel
    _, seen = capture(model, x)
    assert torch.equal(seen.query, expected(model, x)[0])
    assert torch.equal(results["same model"], model(2 * x))
    assert torch.equal(results["other model"], other(2 * x))
    assert xformers_ops.memory_efficient_attention is original
    late = results["fetched"](*(x[..., :DIMENSION] for _ in range(3)))  # the call of a thread that was slow
    assert torch.equal(late, original(*(x[..., :DIMENSION] for _ in range(3))))


def test_of_two_threads_the_last_one_puts_the_kernel_back(x: Tensor, xformers_ops: Any) -> None:
    sdpa_inside = xformers_ops.memory_efficient_attention

    def original(*args: Any, **kwargs: Any) -> Tensor:
        with torch._C.DisableTorchFunction():  # as the real one, whose kernel is not PyTorch's
            return sdpa_inside(*args, **kwargs)

    xformers_ops.memory_efficient_attention = original
    inside, finished = threading.Event(), threading.Event()
    seen: list[Tensor] = []

    def slow_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inside.set()
        assert finished.wait(timeout=20)
        return xformers_rows(q, k, v)

    slow = make(xformers_rows)
    slow.second.kernel = slow_kernel
    thread = threading.Thread(target=lambda: seen.append(capture(slow, 2 * x)[1].query))
    thread.start()
    assert inside.wait(timeout=20)
    model = make(xformers_rows)
    _, mine = capture(model, x)
    finished.set()
    thread.join()
    assert torch.equal(mine.query, expected(model, x)[0])
    slow.second.kernel = xformers_rows
    assert torch.equal(seen[0], expected(slow, 2 * x)[0])
    assert xformers_ops.memory_efficient_attention is original


# diffusers' own processors


@pytest.mark.parametrize(
    "processor", ["AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"]
)
def test_processors_of_diffusers(processor: str, x: Tensor, xformers_ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_processor, "xformers", sys.modules["xformers"])
    torch.manual_seed(0)
    attention = attention_processor.Attention(WIDTH, heads=HEADS, dim_head=DIMENSION)
    options = (5,) if processor == "SlicedAttnProcessor" else ()
    attention.set_processor(getattr(attention_processor, processor)(*options))
    model = nn.ModuleDict({"second": attention})
    with AttentionCapture(model, [layer()]) as captured:
        output = model["second"](x)
        seen = captured["second"]
    assert torch.equal(output, attention(x))
    assert seen.scale == SCALE
    torch.testing.assert_close(seen.query, heads_apart(attention.to_q(x)), rtol=0, atol=0)
    torch.testing.assert_close(seen.key, heads_apart(attention.to_k(x)), rtol=0, atol=0)


def test_a_mask_given_to_diffusers_explicit_attention_is_refused(x: Tensor) -> None:

    processor = attention_processor.AttnProcessor()
    attention = attention_processor.Attention(WIDTH, heads=HEADS, dim_head=DIMENSION, processor=processor)
    mask = torch.zeros(SAMPLES, 1, TOKENS)
    mask[1, :, -3:] = -10000.0
    model = nn.ModuleDict({"second": attention})
    with pytest.raises(CaptureError, match="changes its logits"), AttentionCapture(model, [layer()]):
        model["second"](x, attention_mask=mask)
