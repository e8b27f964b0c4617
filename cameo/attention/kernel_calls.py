"""Observe the calls of the attention kernel that a module makes, without replacing the kernel.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import BoundArguments
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from cameo.attention.kernels.call import KernelCall
from cameo.attention.kernels.explicit import PRODUCTS, Product, measure_scale, operands_of
from cameo.attention.kernels.known import Kernel, UnreadableCallError, fused_call
from cameo.attention.kernels.multihead import read_multihead
from cameo.attention.kernels.taps import kernel_taps
from cameo.errors import CaptureError

__all__ = ["EXPLICIT", "FUSED", "CallWatcher", "unwatched"]

FUSED, EXPLICIT = "scaled_dot_product_attention", "an explicit softmax"

MULTIHEAD = inspect.signature(F.multi_head_attention_forward)


class CallWatcher(TorchFunctionMode):
    """Collects the attention calls made in the current thread while the watcher is open.

    Example:
        >>> import torch
        >>> query = torch.zeros(1, 2, 12, 4)
        >>> with CallWatcher("attn") as watcher:
        ...     _ = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        >>> watcher.calls[0].scale
        0.5

    Sees `F.scaled_dot_product_attention`, `torch.nn.MultiheadAttention`, the kernels that are listed in
    `cameo.attention.kernels.known`, and a product of queries and keys (`baddbmm`, `bmm`, `matmul`, `einsum`) whose
    multiple goes into a softmax. A kernel that calls another is recorded once. `torch.nn.MultiheadAttention` does not
    take its fast path inside the block, whose result differs in the last digits.

    Attributes:
        layer: name of what is watched, for messages.
        calls: the calls, in order.
        kernels: the name of the kernel of each call; that of SDPA where another one handed the call on to it.

    Raises:
        CaptureError: inside the block, for attention that does more to its logits than to scale them and to hide keys.
    """

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer
        self.calls: list[KernelCall] = []
        self.kernels: list[str] = []
        self._muted = self._reached_fused = False
        self._product: Product | None = None

    def __enter__(self) -> CallWatcher:
        super().__enter__()
        kernel_taps.push(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._product = None
        kernel_taps.pop(self)
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
        name = getattr(func, "__name__", "").partition(".")[0]
        self._reached_fused |= name == FUSED
        if self._muted:
            return output
        if name == FUSED:
            self._fused(*args, **kwargs)
        elif name in PRODUCTS:
            operands = operands_of(name, args, kwargs)
            if operands is not None:
                self._product = Product(*operands, output.shape, output.dtype)
        elif name == "softmax" and self._product is not None:
            self._explicit(args[0] if args else kwargs["input"], *args[1:], **kwargs)
        elif name == "multi_head_attention_forward":
            self._read("torch.nn.MultiheadAttention", read_multihead, MULTIHEAD.bind(*args, **kwargs))
        return output

    def kernel_call(self, kernel: Kernel, run: Callable[[BoundArguments], Any], given: BoundArguments) -> Any:
        """Run a kernel of another package and record it once, even if it falls back to SDPA."""
        muted, self._muted, self._reached_fused = self._muted, True, False
        try:
            output = run(given)
            if not muted:
                self._read(FUSED if self._reached_fused else kernel.title, kernel.read, given)
        finally:
            self._muted = muted
        return output

    def _read(self, kernel: str, read: Callable[[dict[str, Any]], KernelCall], given: BoundArguments) -> None:
        given.apply_defaults()
        try:
            self._keep(kernel, read(given.arguments))
        except UnreadableCallError as error:
            raise CaptureError(
                f"layer {self.layer!r} attends with {error}, so its logits are more than a multiple of q.k with some "
                "keys hidden, and cannot be supervised; switch that off in the model, or supervise a layer without it"
            ) from error

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
        self._keep(FUSED, fused_call(query, key, attn_mask, is_causal, scale))

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
        scale, mask = measure_scale(self.layer, product, logits)
        mask = None if mask is None else mask.reshape(product.shape)
        self._keep(EXPLICIT, KernelCall(product.query, product.key, scale, mask))

    def _keep(self, kernel: str, call: KernelCall) -> None:
        self.kernels.append(kernel)
        self.calls.append(call)


@contextmanager
def unwatched() -> Iterator[None]:
    """Hide what runs inside the block from the watchers that are open around it.

    Example:
        >>> import torch
        >>> query = torch.zeros(1, 2, 12, 4)
        >>> with CallWatcher("attn") as watcher, unwatched():
        ...     _ = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        >>> watcher.calls
        []
    """
    open_ones = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, CallWatcher)]
    before = [watcher._muted for watcher in open_ones]
    for watcher in open_ones:
        watcher._muted = True
    try:
        yield
    finally:
        for watcher, muted in zip(open_ones, before, strict=True):
            watcher._muted = muted
