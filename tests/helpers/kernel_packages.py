"""Stand-ins for packages of attention kernels that cannot be installed here, with the signatures that they publish.

As in the real ones, functions call `torch.autograd.Function`s whose insides no torch function mode sees, and are
defined in another module than the one that users import from. No real kernel has confirmed how they are read.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["install_flash", "install_sage", "install_transformer_engine"]


class _Hidden(torch.autograd.Function):
    """Attention of `[A, L, K, D]`, out of sight."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = scale, causal
        with torch._C.DisableTorchFunction():
            return _attend(q, k, v, scale, causal)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        with torch.enable_grad(), torch._C.DisableTorchFunction():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            found = torch.autograd.grad(_attend(*inputs, *ctx.options), inputs, gradients[0])
        return (*found, None, None)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]) if causal else None
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(1, 2)


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def _flash_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    return _Hidden.apply(q, k, v, softmax_scale, causal)


def _flash_qkvpacked(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    return _Hidden.apply(*qkv.unbind(2), softmax_scale, causal)


def _flash_kvpacked(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    return _Hidden.apply(q, *kv.unbind(2), softmax_scale, causal)


def _flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Tensor:  # fmt: skip
    queries = q.tensor_split(cu_seqlens_q.tolist()[1:-1])
    keys, values = (tensor.tensor_split(cu_seqlens_k.tolist()[1:-1]) for tensor in (k, v))
    rows = zip(queries, keys, values, strict=True)
    return torch.cat([_Hidden.apply(*(t[None] for t in row), softmax_scale, causal)[0] for row in rows])


def _flash3_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, qv: Any = None,
    q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
    deterministic: bool = False, sm_margin: int = 0,
) -> Any:  # fmt: skip
    return _Hidden.apply(q, k, v, softmax_scale, causal)


def install_flash(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """flash-attn 2 as `flash_attn`, and version 3 as `flash_attn_interface`."""
    functions = {
        "flash_attn_func": _flash_func,
        "flash_attn_qkvpacked_func": _flash_qkvpacked,
        "flash_attn_kvpacked_func": _flash_kvpacked,
        "flash_attn_varlen_func": _flash_varlen,
    }
    _module(monkeypatch, "flash_attn.flash_attn_interface", **functions)
    _module(monkeypatch, "flash_attn_interface", flash_attn_func=_flash3_func)
    return _module(monkeypatch, "flash_attn", **functions)


def _sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, sm_scale: float | None = None,
    return_lse: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    with torch.no_grad(), torch._C.DisableTorchFunction():
        if tensor_layout == "HND":
            return _attend(*(t.transpose(1, 2) for t in (q, k, v)), sm_scale, is_causal).transpose(1, 2)
        return _attend(q, k, v, sm_scale, is_causal)


def install_sage(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """SageAttention, which has no backward."""
    _module(monkeypatch, "sageattention.core", sageattn=_sageattn)
    return _module(monkeypatch, "sageattention", sageattn=_sageattn)


class _DotProductAttention(nn.Module):
    def __init__(
        self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "no_mask",
        sequence_parallel: bool = False, tp_size: int = 1, tp_group: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.qkv_format, self.attn_mask_type, self.softmax_scale = qkv_format, attn_mask_type, kv_channels**-0.5

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: Tensor | None = None,
        qkv_format: str | None = None, attn_mask_type: str | None = None, window_size: Any = None,
        core_attention_bias_type: str = "no_bias", core_attention_bias: Tensor | None = None, alibi_slopes: Any = None,
    ) -> Tensor:  # fmt: skip
        tensors = query_layer, key_layer, value_layer
        if (qkv_format or self.qkv_format) == "bshd":
            return _Hidden.apply(*tensors, self.softmax_scale, False).flatten(2)
        return (
            _Hidden.apply(*(t.transpose(0, 1) for t in tensors), self.softmax_scale, False).transpose(0, 1).flatten(2)
        )


def _apply_rotary_pos_emb(t: Tensor, freqs: Tensor, tensor_format: str = "sbhd", fused: bool = False) -> Tensor:
    assert tensor_format == "sbhd"
    first, second = t.chunk(2, dim=-1)
    return t * freqs.cos() + torch.cat([-second, first], dim=-1) * freqs.sin()


def install_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Transformer Engine's attention module, and what models take from the package beside it."""
    functions = {"DotProductAttention": _DotProductAttention, "apply_rotary_pos_emb": _apply_rotary_pos_emb}
    _module(monkeypatch, "transformer_engine.pytorch.attention", **functions)
    package = _module(monkeypatch, "transformer_engine.pytorch", RMSNorm=nn.RMSNorm, **functions)
    _module(monkeypatch, "transformer_engine", pytorch=package)
    return package
