"""Kernels of other packages and of PyTorch, bound early: each gives the queries, keys and scale of plain attention."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cameo.attention.capture import AttentionCapture
from cameo.attention.kernels.call import kept_tokens
from cameo.errors import CaptureError
from tests.helpers.attention_kernels import DIMENSION, HEADS, SCALE, heads_apart
from tests.helpers.captured_models import SAMPLES, TOKENS, WIDTH, capture, expected_query_and_key, layer, make_model
from tests.helpers.kernel_packages import install_flash, install_sage, install_transformer_engine

Kernel = Callable[..., Tensor]
ENDS = torch.arange(0, (SAMPLES + 1) * TOKENS, TOKENS, dtype=torch.int32)


def tokens_first(x: Tensor) -> Tensor:
    return rearrange(x, "b n (k d) -> b n k d", k=HEADS)


def flash(module: Any) -> dict[str, Kernel]:
    """Each function of flash-attn, bound now."""
    func, packed, kv_packed, varlen = (
        getattr(module, f"flash_attn_{name}func") for name in ("", "qkvpacked_", "kvpacked_", "varlen_")
    )

    def with_lengths(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tokens_first(x).flatten(0, 1) for x in (q, k, v))
        return varlen(q, k, v, ENDS, ENDS, TOKENS, TOKENS).reshape(SAMPLES, TOKENS, -1)

    return {
        "func": lambda q, k, v: func(*map(tokens_first, (q, k, v)), softmax_scale=SCALE).flatten(2),
        "packed": lambda q, k, v: packed(torch.stack([*map(tokens_first, (q, k, v))], dim=2)).flatten(2),
        "kv packed": lambda q, k, v: kv_packed(
            tokens_first(q), torch.stack([*map(tokens_first, (k, v))], dim=2)
        ).flatten(2),
        "varlen": with_lengths,
    }


def check(kernel: Kernel, x: Tensor) -> Any:
    model = make_model(kernel)
    before = model(x)
    output, seen = capture(model, x)
    assert torch.equal(output, before)
    query, key = expected_query_and_key(model, x)
    torch.testing.assert_close(seen.query, query, rtol=0, atol=0)
    torch.testing.assert_close(seen.key, key, rtol=0, atol=0)
    assert seen.scale == SCALE
    return seen


@pytest.mark.parametrize("name", ["func", "packed", "kv packed", "varlen"])
def test_flash_attention(name: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    module = install_flash(monkeypatch)
    code = module.flash_attn_func.__code__
    kernel = flash(module)[name]  # bound before the capture
    seen = check(kernel, x)
    assert seen.mask is None
    assert seen.trains
    assert module.flash_attn_func.__code__ is code
    assert len(inspect.signature(module.flash_attn_func).parameters) == 11


def test_flash_attention_3(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    install_flash(monkeypatch)
    import flash_attn_interface  # type: ignore[import-not-found]

    func = flash_attn_interface.flash_attn_func
    check(lambda q, k, v: func(*map(tokens_first, (q, k, v)), SCALE).flatten(2), x)


def test_rows_of_unequal_length(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    varlen = install_flash(monkeypatch).flash_attn_varlen_func
    lengths = [4, 10, 7]
    ends = torch.tensor([0, 4, 14, 21], dtype=torch.int32)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [torch.cat([t[i, :n] for i, n in enumerate(lengths)]) for t in map(tokens_first, (q, k, v))]
        varlen(*rows, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=10, max_seqlen_k=10)
        return q

    model = make_model(kernel)
    _, seen = capture(model, x)
    query, _ = expected_query_and_key(model, x)
    assert seen.key_lengths.tolist() == lengths
    for row, length in enumerate(lengths):
        assert torch.equal(seen.query[row, :, :length], query[row, :, :length])
        assert not seen.query[row, :, length:].any()


@pytest.mark.parametrize("option", [{"window_size": (4, 4)}, {"softcap": 30.0}, {"alibi_slopes": torch.ones(HEADS)}])
def test_what_flash_attention_does_beside_is_refused(
    option: dict[str, Any], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    func = install_flash(monkeypatch).flash_attn_func
    model = make_model(lambda q, k, v: func(*map(tokens_first, (q, k, v)), **option).flatten(2))
    with pytest.raises(CaptureError, match=f"layer 'second' attends with {next(iter(option))}="):
        capture(model, x)


def test_causal_flash_attention_aligns_the_last_tokens(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    func = install_flash(monkeypatch).flash_attn_func
    model = make_model(lambda q, k, v: func(*map(tokens_first, (q[:, 2:], k, v)), causal=True).flatten(2))
    with AttentionCapture(model, [layer("first")]) as captured:
        model.first(x)
    assert torch.equal(captured["first"].mask, torch.ones(TOKENS - 2, TOKENS).tril(2).bool())


@pytest.mark.parametrize("form", ["HND", "NHD"])
def test_sage_attention_is_seen_and_cannot_train(form: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sage = install_sage(monkeypatch).sageattn

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = map(heads_apart if form == "HND" else tokens_first, (q, k, v))
        output = sage(*tensors, tensor_layout=form)
        return (output.transpose(1, 2) if form == "HND" else output).flatten(2)

    assert not check(kernel, x).trains


@pytest.mark.parametrize("form", ["sbhd", "bshd"])
def test_transformer_engine(form: str, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = install_transformer_engine(monkeypatch).DotProductAttention(HEADS, DIMENSION, qkv_format=form)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = [tokens_first(t) if form == "bshd" else tokens_first(t).transpose(0, 1) for t in (q, k, v)]
        output = attention(*tensors)
        return output if form == "bshd" else output.transpose(0, 1)

    check(kernel, x)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_backends_of_diffusers(backend: str, x: Tensor) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dispatch_attention_fn(*map(tokens_first, (q, k, v)), backend=backend).flatten(2)

    assert check(kernel, x).mask is None
    with attention_backend(backend):
        check(lambda q, k, v: dispatch_attention_fn(*map(tokens_first, (q, k, v))).flatten(2), x)


def test_flex_attention(x: Tensor) -> None:
    blocks = create_block_mask(lambda b, h, q, k: k < 7, None, None, TOKENS, TOKENS, device="cpu", BLOCK_SIZE=16)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rearrange(flex_attention(*map(heads_apart, (q, k, v)), block_mask=blocks), "b k n d -> b n (k d)")

    with torch.no_grad():  # on a CPU it has no backward
        seen = check(kernel, x)
    assert torch.equal(kept_tokens(seen.mask).squeeze(), (torch.arange(TOKENS) < 7).expand(TOKENS, -1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_multihead_attention_of_torch(training: bool, padded: bool, x: Tensor) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).train(training)
    model = nn.ModuleDict({"second": attention})
    padding = torch.zeros(SAMPLES, TOKENS, dtype=torch.bool)
    padding[1, 6:] = True
    given = {"key_padding_mask": padding} if padded else {}
    before = attention(x, x, x, need_weights=False, **given)[0]
    with AttentionCapture(model, [layer()]) as captured:
        output = attention(x, x, x, need_weights=False, **given)[0]
        seen = captured["second"]
    assert torch.equal(output, before)
    weights = attention.in_proj_weight.chunk(3)
    torch.testing.assert_close(seen.query, heads_apart(F.linear(x, weights[0])))
    torch.testing.assert_close(seen.key, heads_apart(F.linear(x, weights[1])))
    assert (seen.mask is not None) == padded
    if padded:
        assert torch.equal(kept_tokens(seen.mask)[:, 0, 0], ~padding)
    seen.query.sum().backward()
    assert attention.in_proj_weight.grad[:WIDTH].any()


def test_the_fast_path_of_multihead_attention_is_not_taken(x: Tensor) -> None:
    model = nn.ModuleDict({"second": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()})
    with torch.no_grad(), AttentionCapture(model, [layer()]) as captured:
        output = model["second"](x, x, x, need_weights=False)[0]
    torch.testing.assert_close(output, model["second"](x, x, x, need_weights=False)[0])
    assert captured["second"].query.shape == (SAMPLES, HEADS, TOKENS, DIMENSION)


def test_keys_with_fewer_heads_are_shared_among_queries(x: Tensor) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = map(heads_apart, (q, k, v))
        return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True).transpose(1, 2).flatten(2)

    model = make_model(kernel)
    _, seen = capture(model, x)
    _, key = expected_query_and_key(model, x)
    assert torch.equal(seen.key, key[:, [0, 0, 1, 1]])


def explicit_five_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (rearrange(t, "b n (k d) -> b 1 k n d", k=HEADS) for t in (q, k, v))
    return rearrange((q @ k.mT * SCALE).softmax(-1) @ v, "b 1 k n d -> b n (k d)")


def explicit_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = map(heads_apart, (q, k, v))
    weights = torch.einsum("... i d, ... j d -> ... i j", q, k).mul(SCALE).softmax(-1)
    return rearrange(torch.einsum("... i j, ... j d -> ... i d", weights, v), "b k n d -> b n (k d)")


@pytest.mark.parametrize("kernel", [explicit_five_axes, explicit_dots])
def test_explicit_attention_in_other_forms(kernel: Kernel, x: Tensor) -> None:
    check(kernel, x)


def test_a_wrapper_around_a_kernel_is_seen_and_its_frames_can_be_looked_at(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install_flash(monkeypatch)
    inner = module.flash_attn_func

    def flash_attn_func(*args: Any, **kwargs: Any) -> Tensor:
        return inner(*args, **kwargs)

    import flash_attn.flash_attn_interface as defining  # type: ignore[import-not-found]

    monkeypatch.setattr(defining, "flash_attn_func", flash_attn_func)
    check(lambda q, k, v: flash_attn_func(*map(tokens_first, (q, k, v)), softmax_scale=SCALE).flatten(2), x)
    with (
        pytest.raises(TypeError) as caught,
        AttentionCapture(model := make_model(lambda q, k, v: flash_attn_func(q)), [layer("first")]),
    ):
        model.first(x)
    assert [frame.frame.f_locals for frame in caught.traceback]  # no frame whose variables were never made


def test_other_threads_run_the_kernel_as_it_is(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    func = install_flash(monkeypatch).flash_attn_func
    found: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = [*map(tokens_first, (q, k, v))]
        thread = threading.Thread(target=lambda: found.append(func(*tensors).flatten(2)))
        thread.start()
        thread.join()
        return func(*tensors).flatten(2)

    output, seen = capture(make_model(kernel), x)
    assert seen.query.shape[0] == SAMPLES
    assert torch.equal(found[-1], output)
