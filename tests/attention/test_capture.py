"""Queries, keys and scale as the kernel receives them, whatever form the attention has."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from einops import rearrange
from torch import Tensor, nn

from cameo.attention.capture import AttentionCapture
from tests.helpers.attention_kernels import (
    DIMENSION,
    HEADS,
    PLAIN,
    SCALE,
    WITH_XFORMERS,
    from_rows,
    heads_apart,
    rows,
    sdpa,
    xformers_rows,
)
from tests.helpers.captured_models import (
    SAMPLES,
    TOKENS,
    WIDTH,
    Attention,
    capture,
    expected_query_and_key,
    layer,
    make_model,
)


@pytest.mark.parametrize("kernel", [sdpa, *PLAIN], ids=lambda kernel: kernel.__name__)
def test_every_form_of_attention_gives_the_same_queries_keys_and_scale(kernel: Any, x: Tensor) -> None:
    model = make_model(kernel)
    output, seen = capture(model, x)
    query, key = expected_query_and_key(model, x)
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

    model = make_model(kernel)
    _, seen = capture(model, x)
    query, key = expected_query_and_key(model, x)
    assert seen.scale == 1
    torch.testing.assert_close(seen.query @ seen.key.mT, SCALE * query @ key.mT)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float64, 1e-12)]
)
def test_an_unusual_scale_is_measured(dtype: torch.dtype, tolerance: float, x: Tensor) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return from_rows((rows(q) @ rows(k).mT * 0.137).softmax(-1) @ rows(v))

    _, seen = capture(make_model(kernel).to(dtype), x.to(dtype))
    assert seen.scale == pytest.approx(0.137, rel=tolerance)


def test_the_scale_given_to_the_kernel_is_taken(x: Tensor) -> None:
    _, seen = capture(
        make_model(lambda q, k, v: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=0.3)[:, 0]),
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

    model = make_model(
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
    model = make_model()
    with AttentionCapture(model, [layer("first"), layer("second")]) as captured:
        model(x)
        first, second = captured["first"], captured["second"]
    assert torch.equal(first.query, heads_apart(model.first.to_q(x)))
    assert torch.equal(second.query, expected_query_and_key(model, x)[0])


def test_of_a_layer_that_runs_twice_the_last_call_counts(x: Tensor) -> None:
    model = make_model()
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


def test_a_mask_given_to_diffusers_explicit_attention_is_read(x: Tensor) -> None:

    processor = attention_processor.AttnProcessor()
    attention = attention_processor.Attention(WIDTH, heads=HEADS, dim_head=DIMENSION, processor=processor)
    mask = torch.zeros(SAMPLES, 1, TOKENS)
    mask[1, :, -3:] = -10000.0
    model = nn.ModuleDict({"second": attention})
    with AttentionCapture(model, [layer()]) as captured:
        model["second"](x, attention_mask=mask)
    found = captured["second"].mask
    assert found is not None
    assert torch.equal(found, (mask[:, None] == 0).expand(-1, HEADS, TOKENS, -1))
