"""Observe the calls of the attention kernel that a module makes, without replacing the kernel.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cameo.attention.xformers_tap import xformers_tap
from cameo.errors import CaptureError

__all__ = ["CallWatcher", "KernelCall", "join_slices"]

PRODUCTS = {
    "bmm": ("input", "mat2"),
    "matmul": ("input", "other"),
    "baddbmm": ("input", "batch1", "batch2"),
    "einsum": ("equation", "operands"),
}
XFORMERS_ARGUMENTS = ("query", "key", "value", "attn_bias", "p", "scale")
# Most rows, and about how many values, that are read to measure the scale of explicit attention.
SAMPLED_ROWS, SAMPLED_VALUES = 64, 2**22


@dataclass(frozen=True)
class KernelCall:
    """Queries `[A, K, L, D]` or `[A * K, L, D]`, keys likewise, and the kernel's factor of q.k."""

    query: Tensor
    key: Tensor
    scale: float


@dataclass(frozen=True)
class _Product:
    """Operands of a product `query @ key^T`, and shape and dtype of the result, which itself may be large."""

    query: Tensor
    key: Tensor
    shape: torch.Size
    dtype: torch.dtype


class CallWatcher(TorchFunctionMode):
    """Collects the attention calls made in the current thread while the watcher is open.

    Example:
        >>> query = torch.zeros(1, 2, 12, 4)
        >>> with CallWatcher("attn") as watcher:
        ...     _ = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        >>> watcher.calls[0].scale
        0.5

    Sees `F.scaled_dot_product_attention`, `xformers.ops.memory_efficient_attention`, and a product of queries
    and keys (`baddbmm`, `bmm`, `matmul`, `einsum`) whose multiple goes into a softmax.

    Raises:
        CaptureError: inside the block, for attention with a mask or bias.
    """

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer
        self.calls: list[KernelCall] = []
        self.hidden_kernel = ""  # a function that ran and hides its kernel
        self._muted = False
        self._product: _Product | None = None

    def __enter__(self) -> CallWatcher:
        super().__enter__()
        xformers_tap.push(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._product = None
        xformers_tap.pop(self)
        super().__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._muted:
            return output
        name = getattr(func, "__name__", "").partition(".")[0]
        if name == "scaled_dot_product_attention":
            self._fused(*args, **kwargs)
        elif name in PRODUCTS:
            operands = _operands(name, args, kwargs)
            if operands is not None:
                self._product = _Product(*operands, output.shape, output.dtype)
        elif name == "softmax" and self._product is not None:
            self._explicit(args[0] if args else kwargs["input"], *args[1:], **kwargs)
        elif name == "multi_head_attention_forward":
            self.hidden_kernel = "torch.nn.MultiheadAttention"
        return output

    def xformers_call(self, original: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run `memory_efficient_attention` and record it once, even if it falls back to SDPA."""
        muted, self._muted = self._muted, True
        try:
            output = original(*args, **kwargs)
        finally:
            self._muted = muted
        given = dict(zip(XFORMERS_ARGUMENTS, args, strict=False)) | kwargs
        if given.get("attn_bias") is not None:
            raise CaptureError(
                f"layer {self.layer!r} adds a bias to its attention; only unmasked layers can be supervised"
            )
        query, key = given["query"], given["key"]
        if query.ndim == 4:  # [A, L, K, D]
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        self._keep(query, key, given.get("scale"))
        return output

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> None:
        if attn_mask is not None or is_causal:
            raise CaptureError(f"layer {self.layer!r} masks its attention; only unmasked layers can be supervised")
        self._keep(query, key, scale)

    def _ends_product(self, logits: Tensor, dim: int | None = None, *_: Any, **options: Any) -> bool:
        """Whether the softmax with these arguments is taken of the latest product."""
        product, dim = self._product, options.get("dim", dim)
        if product is None or logits.shape[-1] != product.shape[-1] or logits.numel() != product.shape.numel():
            return False
        return dim in (-1, logits.ndim - 1)

    def _explicit(self, logits: Tensor, *arguments: Any, **options: Any) -> None:
        if not self._ends_product(logits, *arguments, **options):
            return
        product, self._product = self._product, None
        assert product is not None
        # In-place operators may have changed the product, so the logits are compared with q.k, computed again.
        scale = _measure_scale(self.layer, product, logits)
        self._keep(product.query, product.key, scale)

    def _keep(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        self.calls.append(KernelCall(query, key, query.shape[-1] ** -0.5 if scale is None else float(scale)))


def join_slices(calls: list[KernelCall]) -> list[KernelCall]:
    """Join calls whose queries and keys are consecutive slices of one tensor along the batch.

    Some models call the kernel with portions of the batch (SGM: 32768 rows per call; diffusers' attention slicing).

    Example:
        >>> query = torch.zeros(6, 4, 8)
        >>> parts = [KernelCall(query[:4], query[:4], 1.0), KernelCall(query[4:], query[4:], 1.0)]
        >>> [call.query.shape[0] for call in join_slices(parts)]
        [6]
    """
    if len(calls) < 2:
        return calls
    for last, following in itertools.pairwise(calls):
        together = _continues(last.query, following.query) and _continues(last.key, following.key)
        if not together or last.scale != following.scale:
            return calls
    query, key = (torch.cat([getattr(call, name) for call in calls]) for name in ("query", "key"))
    return [KernelCall(query, key, calls[0].scale)]


def _continues(last: Tensor, following: Tensor) -> bool:
    return (
        last.shape[1:] == following.shape[1:]
        and last.stride() == following.stride()
        and last.untyped_storage().data_ptr() == following.untyped_storage().data_ptr()
        and int(following.storage_offset()) == last.storage_offset() + last.shape[0] * last.stride(0)
    )


@torch.no_grad()
def _measure_scale(layer: str, product: _Product, logits: Tensor) -> float:
    """Return the factor between q.k and the logits that entered the softmax; refuse any other difference."""
    exact = torch.promote_types(product.query.dtype, torch.float32)
    query, key = (t.detach().reshape(-1, *t.shape[-2:]) for t in (product.query, product.key))
    length, dimension = key.shape[-2:]
    rows = query.shape[0] * query.shape[1]
    count = max(2, min(SAMPLED_ROWS, rows, SAMPLED_VALUES // (length * dimension)))
    picked = torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long().to(query.device)
    queries = query.reshape(rows, dimension)[picked].to(exact)
    keys = key[picked // query.shape[1]].to(exact)
    products = (queries[:, None] * keys).sum(-1)
    given = logits.detach().reshape(rows, length)[picked].to(exact)
    squared_norm = products.square().sum()
    if not squared_norm:
        raise CaptureError(
            f"layer {layer!r}: all its logits are zero, so its scale cannot be measured; use the SDPA or "
            "xformers attention processor of the model, or initialize the query projection"
        )
    scale = float((given * products).sum() / squared_norm)
    # Every rounding error is relative to |q| |k|, even where the product nearly cancels.
    epsilon = max(torch.finfo(kind).eps for kind in (product.dtype, logits.dtype, query.dtype))
    if query.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        epsilon = max(epsilon, 2**-10)
    magnitude = queries.norm(dim=-1)[:, None] * keys.norm(dim=-1) * abs(scale)
    if not bool(((given - scale * products).abs() <= 8 * epsilon * magnitude).all()):
        raise CaptureError(
            f"layer {layer!r} changes its logits between product and softmax (mask, bias or another "
            "function); only a constant factor can be supervised"
        )
    # Rounded logits give the factor to their precision only, so a common factor within it is taken as exact.
    common = (dimension**-0.5, 1.0)
    return next((factor for factor in common if abs(scale / factor - 1) < 4 * epsilon), scale)


def _operands(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return `(query [..., L, D], key [..., M, D])` of a batched product `query @ key^T`, if it is one."""
    if name == "einsum":
        return _einsum_operands(*args)
    names = PRODUCTS[name]
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key = (given.get(operand) for operand in names[-2:])
    if not isinstance(query, Tensor) or not isinstance(key, Tensor):
        return None
    if query.ndim not in (3, 4) or query.shape[:-2] != key.shape[:-2]:
        return None
    return query, key.transpose(-1, -2)


def _einsum_operands(equation: Any, *operands: Any) -> tuple[Tensor, Tensor] | None:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    summed = [axis for axis in left if axis in right and axis not in output]
    batch, tokens = output[:-2], output[-2:]
    if len(summed) != 1 or not all(axis in left and axis in right for axis in batch) or len(tokens) != 2:
        return None
    if tokens[0] not in left or tokens[0] in right or tokens[1] not in right or tokens[1] in left:
        return None
    if len(left) != len(batch) + 2 or len(right) != len(batch) + 2 or len(batch) not in (1, 2):
        return None
    query = operands[0].permute([left.index(axis) for axis in [*batch, tokens[0], summed[0]]])
    key = operands[1].permute([right.index(axis) for axis in [*batch, tokens[1], summed[0]]])
    return query, key
