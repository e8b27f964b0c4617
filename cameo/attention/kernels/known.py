"""The attention kernels of other packages, and how a call of each is read. None of the packages is imported.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension, T tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cameo.attention.kernels.call import KernelCall, pad

__all__ = ["KNOWN", "Kernel", "UnreadableCallError", "causal_mask", "fused_call"]


class UnreadableCallError(ValueError):
    """A call does more to its logits than to scale them and to hide keys; the message says what."""


@dataclass(frozen=True)
class Kernel:
    """One function that attends.

    Attributes:
        module: where it is defined.
        name: its name there, dotted for a method.
        read: makes a `KernelCall` of its arguments by name; raises `UnreadableCallError`.
        tensors: names of its arguments for queries, keys and values, where it takes these apart; else empty.
        token_axis: axis of the tokens in queries of four axes.
        parameters: names of the arguments that callers may give by position, in order.
    """

    module: str
    name: str
    read: Callable[[Mapping[str, Any]], KernelCall]
    tensors: tuple[str, ...] = ("q", "k", "v")
    token_axis: int = 1
    parameters: tuple[str, ...] = ("q", "k", "v")

    @property
    def title(self) -> str:
        """Name it as its users do."""
        return f"{self.module.partition('.')[0]}'s {self.name}"


def causal_mask(queries: int, keys: int, device: torch.device, *, from_the_end: bool = False) -> Tensor:
    """Mask `[L, M]` of causal attention: query i sees the keys up to i, or the last query those up to the last key.

    Example:
        >>> causal_mask(2, 3, torch.device("cpu"), from_the_end=True).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries if from_the_end else 0)


def fused_call(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> KernelCall:
    """Build the call of `F.scaled_dot_product_attention` with these arguments.

    Example:
        >>> fused_call(torch.zeros(1, 2, 12, 4), torch.zeros(1, 2, 12, 4), None, False, None).scale
        0.5
    """
    if is_causal:
        mask = causal_mask(query.shape[-2], key.shape[-2], query.device)
    return KernelCall(query, key, query.shape[-1] ** -0.5 if scale is None else float(scale), mask)


def _refuse(given: Mapping[str, Any], **plain: Any) -> None:
    """Refuse arguments that are there and not as in plain attention."""
    for name, values in plain.items():
        value = given.get(name)
        if isinstance(value, list):
            value = tuple(value)
        if value is not None and value not in values:
            raise UnreadableCallError(f"{name}={value!r}")


def _call(
    query: Tensor, key: Tensor, given: Mapping[str, Any], *, scale: str, causal: str, mask: Tensor | None = None,
    from_the_end: bool = True, trains: bool = True,
) -> KernelCall:  # fmt: skip
    """Build the call of queries and keys `[A, K, L, D]` (or without K)."""
    if given.get(causal):
        if mask is not None:
            raise UnreadableCallError(f"{causal}=True beside a mask")
        mask = causal_mask(query.shape[-2], key.shape[-2], query.device, from_the_end=from_the_end)
    factor = given.get(scale)
    return KernelCall(query, key, query.shape[-1] ** -0.5 if factor is None else float(factor), mask, trains=trains)


def _heads_first(tensor: Tensor) -> Tensor:
    """`[A, L, K, D]` to `[A, K, L, D]`."""
    return tensor.transpose(1, 2)


def _xformers(given: Mapping[str, Any]) -> KernelCall:
    query, key, bias = given["query"], given["key"], given.get("attn_bias")
    if bias is not None and not isinstance(bias, Tensor):
        raise UnreadableCallError(f"attn_bias of type {type(bias).__name__}")
    if query.ndim == 4:
        query, key = _heads_first(query), _heads_first(key)
    elif query.ndim != 3:
        raise UnreadableCallError(f"queries of {query.ndim} axes")
    return _call(query, key, given, scale="scale", causal="", mask=bias)


XFORMERS = ("query", "key", "value", "attn_bias", "p", "scale")
# What flash-attn can do to the logits beside scaling and causality, and the values with which it does nothing.
FLASH_PLAIN: dict[str, tuple[Any, ...]] = {
    "window_size": ((-1, -1), (None, None)),
    "softcap": (0, 0.0),
    "alibi_slopes": (),
    "block_table": (),
    "qv": (),
    "attention_chunk": (0,),
    "learnable_sink": (),
    "mask_mod": (),
    "score_mod": (),
}


def _flash(given: Mapping[str, Any]) -> KernelCall:
    _refuse(given, **FLASH_PLAIN)
    query, key = (_heads_first(given[name]) for name in "qk")
    return _call(query, key, given, scale="softmax_scale", causal="causal")


def _flash_packed(given: Mapping[str, Any]) -> KernelCall:
    _refuse(given, **FLASH_PLAIN)
    if "qkv" in given:
        query, key = given["qkv"].unbind(2)[:2]
    else:
        query, key = given["q"], given["kv"].unbind(2)[0]
    return _call(_heads_first(query), _heads_first(key), given, scale="softmax_scale", causal="causal")


def _rows(tokens: Tensor, ends: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens of all rows one after the other, `[T, K, D]`, as `[A, K, L, D]` with their numbers `[A]`."""
    bounds = ends.tolist()
    if bounds[-1] != tokens.shape[0]:
        raise UnreadableCallError(f"{bounds[-1]} tokens in cu_seqlens, and {tokens.shape[0]} in the tensor")
    return pad([row.transpose(0, 1) for row in tokens.tensor_split(bounds[1:-1])])


def _flash_varlen(given: Mapping[str, Any]) -> KernelCall:
    _refuse(given, seqused_q=(), seqused_k=(), causal=(False,), **FLASH_PLAIN)
    if "qkv" in given:
        query, key = given["qkv"].unbind(1)[:2]
        query_ends = key_ends = given["cu_seqlens"]
    else:
        query, key = given["q"], given["k"] if "k" in given else given["kv"].unbind(1)[0]
        query_ends, key_ends = given["cu_seqlens_q"], given["cu_seqlens_k"]
    (query, query_lengths), (key, key_lengths) = _rows(query, query_ends), _rows(key, key_ends)
    call = _call(query, key, given, scale="softmax_scale", causal="")
    return KernelCall(call.query, call.key, call.scale, None, query_lengths, key_lengths)


def _sage(given: Mapping[str, Any]) -> KernelCall:
    query, key = given["q"], given["k"]
    if given.get("tensor_layout", "HND") == "NHD":
        query, key = _heads_first(query), _heads_first(key)
    return _call(query, key, given, scale="sm_scale", causal="is_causal", from_the_end=False, trains=False)


def _sage_varlen(given: Mapping[str, Any]) -> KernelCall:
    _refuse(given, is_causal=(False,))
    query, query_lengths = _rows(given["q"], given["cu_seqlens_q"])
    key, key_lengths = _rows(given["k"], given["cu_seqlens_k"])
    call = _call(query, key, given, scale="sm_scale", causal="")
    return KernelCall(call.query, call.key, call.scale, None, query_lengths, key_lengths, trains=False)


def _flex(given: Mapping[str, Any]) -> KernelCall:
    _refuse(given, score_mod=())
    query, key, blocks, mask = given["query"], given["key"], given.get("block_mask"), None
    if blocks is not None:
        from torch.nn.attention.flex_attention import create_mask

        rows, heads = blocks.shape[:2]
        mask = create_mask(blocks.mask_mod, rows, heads, query.shape[-2], key.shape[-2], device=query.device)
    return _call(query, key, given, scale="scale", causal="", mask=mask)


def _dispatched(given: Mapping[str, Any]) -> KernelCall:
    """diffusers' one entrance to all its backends."""
    _refuse(given, parallel_config=())
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    if mask is not None and mask.ndim == 2 and tuple(mask.shape) == (key.shape[0], key.shape[1]):
        mask = mask[:, None, None]  # keys of each row, as its backends of unequal lengths take them
    backend = given.get("backend")
    if backend is None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend = _AttentionBackendRegistry.get_active_backend()[0]
    name = str(getattr(backend, "value", backend))
    return _call(
        _heads_first(query), _heads_first(key), given, scale="scale", causal="is_causal", mask=mask,
        from_the_end="flash" in name, trains="sage" not in name,
    )  # fmt: skip


TE_FORMATS = {"sbhd": (1, 2, 0, 3), "bshd": (0, 2, 1, 3)}


def _transformer_engine(given: Mapping[str, Any]) -> KernelCall:
    module, kind = given["self"], given.get("attn_mask_type") or getattr(given["self"], "attn_mask_type", "no_mask")
    _refuse(given, window_size=((-1, -1), (-1, 0)), core_attention_bias_type=("no_bias",), alibi_slopes=())
    form = given.get("qkv_format") or getattr(module, "qkv_format", "sbhd")
    if form not in TE_FORMATS:
        raise UnreadableCallError(f"qkv_format={form!r}")
    if kind not in ("no_mask", "padding", "causal", "arbitrary"):
        raise UnreadableCallError(f"attn_mask_type={kind!r}")
    query, key = (given[name].permute(TE_FORMATS[form]) for name in ("query_layer", "key_layer"))
    hidden = given.get("attention_mask") if kind in ("padding", "arbitrary") else None
    if hidden is not None and not isinstance(hidden, Tensor):
        raise UnreadableCallError(f"attention_mask of type {type(hidden).__name__}")
    options = {**given, "scale": getattr(module, "softmax_scale", None), "causal": kind == "causal"}
    mask = None if hidden is None else ~hidden.bool()
    return _call(query, key, options, scale="scale", causal="causal", mask=mask, from_the_end=False)


def _listed() -> tuple[Kernel, ...]:
    kernels = [
        Kernel("xformers.ops", "memory_efficient_attention", _xformers, XFORMERS[:3], parameters=XFORMERS),
        Kernel("diffusers.models.attention_dispatch", "dispatch_attention_fn", _dispatched, ("query", "key", "value")),
        Kernel("torch.nn.attention.flex_attention", "flex_attention", _flex, ("query", "key", "value"), 2),
        Kernel("transformer_engine.pytorch", "DotProductAttention.forward", _transformer_engine, ()),
        Kernel("sageattention.core", "sageattn_varlen", _sage_varlen, ()),
    ]
    # flash-attn 2 and 3 have the same names in modules of their own.
    for module in ("flash_attn.flash_attn_interface", "flash_attn_interface"):
        kernels += [
            Kernel(module, "flash_attn_func", _flash),
            Kernel(module, "flash_attn_qkvpacked_func", _flash_packed, ()),
            Kernel(module, "flash_attn_kvpacked_func", _flash_packed, ()),
            Kernel(module, "flash_attn_varlen_func", _flash_varlen, ()),
            Kernel(module, "flash_attn_varlen_qkvpacked_func", _flash_varlen, ()),
            Kernel(module, "flash_attn_varlen_kvpacked_func", _flash_varlen, ()),
        ]
    for name in (
        "",
        "_qk_int8_pv_fp16_triton",
        "_qk_int8_pv_fp16_cuda",
        "_qk_int8_pv_fp8_cuda",
        "_qk_int8_pv_fp8_cuda_sm90",
    ):
        kernels.append(Kernel("sageattention.core", f"sageattn{name}", _sage, ()))
    return tuple(kernels)


KNOWN = _listed()
