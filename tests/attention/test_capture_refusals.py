"""What a capture refuses, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cameo.attention.capture import AttentionCapture
from cameo.attention.kernels.call import KernelCall, join_slices, kept_tokens
from cameo.attention.visibility import visible_tokens
from cameo.errors import CaptureError
from tests.helpers.attention_kernels import HEADS, SCALE, baddbmm, from_rows, heads_apart, rows, sdpa, sdpa_rows
from tests.helpers.captured_models import (
    SAMPLES,
    TOKENS,
    capture,
    expected_query_and_key,
    hooks,
    layer,
    make_model,
)

PADDED = torch.ones(SAMPLES, 1, 1, TOKENS, dtype=torch.bool)
PADDED[1, ..., -3:] = False


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
    elif kind == "finfo.min":
        bias[-HEADS:, :, -2:] = torch.finfo(torch.float32).min
    else:
        bias += -0.1 * (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()
    return bias


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        ({"attn_mask": torch.zeros(TOKENS, TOKENS)}, torch.ones(TOKENS, TOKENS)),
        ({"is_causal": True}, torch.ones(TOKENS, TOKENS).tril()),
        ({"attn_mask": PADDED}, PADDED[:, 0, 0].float()),
    ],
    ids=["zeros", "causal", "padding"],
)
def test_a_mask_of_the_kernel_is_kept(mask: dict[str, Any], seen: Tensor, x: Tensor) -> None:
    model = make_model(masked(**mask))
    _, found = capture(model, x)
    assert found.mask is not None
    assert torch.equal(kept_tokens(found.mask).squeeze().float(), seen)
    query, key = expected_query_and_key(model, x)
    assert torch.equal(found.query, query)
    assert torch.equal(found.key, key)
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", ["causal", "last sample", "finfo.min"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_mask_in_explicit_attention_is_kept(kind: str, fused: bool, x: Tensor) -> None:
    bias = some_bias(kind)
    _, found = capture(make_model(additive(bias, fused=fused)), x)
    assert found.mask is not None
    assert torch.equal(found.mask.flatten(0, 1), bias == 0)
    assert found.scale == SCALE


@pytest.mark.parametrize("fused", [True, False])
def test_a_bias_in_explicit_attention_is_refused(fused: bool, x: Tensor) -> None:
    with pytest.raises(CaptureError, match="changes its logits between product and softmax by more than a mask"):
        capture(make_model(additive(some_bias("distance"), fused=fused)), x)


def test_a_bias_of_xformers_is_refused(x: Tensor, xformers_ops: Any) -> None:
    original, code = xformers_ops.memory_efficient_attention, xformers_ops.memory_efficient_attention.__code__
    bias = some_bias("distance")
    model = make_model(lambda q, k, v: from_rows(original(rows(q), rows(k), rows(v), bias)))
    _, found = capture(model, x)
    with pytest.raises(CaptureError, match="adds a bias to its attention that does not only hide tokens"):
        visible_tokens(layer(), found, batch=SAMPLES, token_grids=((1, TOKENS // 2),) * 2)
    assert xformers_ops.memory_efficient_attention is original
    assert original.__code__ is code


def test_two_different_calls_in_one_module_are_refused(x: Tensor) -> None:
    model = make_model(lambda q, k, v: sdpa(q, k, v) + sdpa(q, k.flip(1), v))
    with pytest.raises(CaptureError, match="called the attention kernel 2 times"):
        capture(model, x)


def test_only_neighboring_slices_of_one_tensor_are_joined() -> None:
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
    model = make_model()
    with pytest.raises(CaptureError, match="layer 'second' did not run"), AttentionCapture(model, [layer()]):
        model.first(x)
    with pytest.raises(CaptureError, match="did not run"), AttentionCapture(model, [layer()]):
        model.second.forward(x)  # hooks are not called


def test_a_path_that_is_not_captured_is_no_layer_that_did_not_run(x: Tensor) -> None:
    with AttentionCapture(model := make_model(), [layer()]) as captured:
        model(x)
    with pytest.raises(KeyError, match="first"):
        captured["first"]
    with pytest.raises(KeyError, match="first"):
        captured.take("first")


def test_a_layer_without_a_known_kernel_is_an_error(x: Tensor) -> None:
    with pytest.raises(CaptureError, match="ran, but no attention kernel was seen"):
        capture(make_model(lambda q, k, v: v), x)


def test_a_wrong_number_of_heads_is_an_error(x: Tensor) -> None:
    with pytest.raises(CaptureError, match=r"expected queries and keys with 3 heads, got \[3, 4, 10, 6\]"):
        capture(make_model(), x, layer(heads=3))
    with pytest.raises(CaptureError, match="12 attention rows do not divide into 5 heads"):
        capture(make_model(sdpa_rows), x, layer(heads=5))


def test_zero_logits_have_no_scale(x: Tensor) -> None:
    model = make_model(baddbmm)
    nn.init.zeros_(model.second.to_q.weight)
    with pytest.raises(CaptureError, match="all its logits are zero"):
        capture(model, x)


def test_a_softmax_that_is_not_the_attention_is_left_alone(x: Tensor) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = rows(q) @ rows(k).mT
        gate = v.softmax(-1)  # between the product and the softmax of the attention
        mixed = logits.flatten().softmax(0).sum() + logits.softmax(0).sum()  # of the logits, but along another axis
        return from_rows((logits * SCALE).softmax(-1) @ rows(v)) * gate + mixed

    model = make_model(kernel)
    _, seen = capture(model, x)
    assert seen.scale == SCALE
    assert torch.equal(seen.query, expected_query_and_key(model, x)[0])
