"""Take queries and keys where the attention kernel receives them, and leave the kernel running.

Hooks stand on the supervised attention modules for the length of one forward; while such a module runs, its
calls of `F.scaled_dot_product_attention`, `xformers.ops.memory_efficient_attention` or of an explicit
query-key product followed by a softmax are observed. Nothing is replaced, so the output stays bit-identical, and
nothing is left behind: a recomputation under gradient checkpointing or a deepcopy meets no hook.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cameo.errors import CaptureError
from cameo.layout import TokenLayout

__all__ = ["AttentionCapture", "AttentionSite", "CapturedAttention"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention layer in which tokens of different views meet.

    Attributes:
        index: position among the model's cross-view attention layers in execution order.
        path: dotted module path of the attention module.
        heads: number of attention heads `K`.
        layout: what the layer's batch and token axes are made of.
        stride: image pixels per token side, where it is known.
        unsupported: why the layer cannot be supervised, or None.
    """

    index: int
    path: str
    heads: int
    layout: TokenLayout
    stride: int | None = None
    unsupported: str | None = None


@dataclass(frozen=True)
class CapturedAttention:
    """Queries and keys `[AB, K, L, D]` as one kernel call received them, and its logit scale."""

    query: Tensor
    key: Tensor
    scale: float


class AttentionCapture:
    """Observe the kernel calls of `sites` during one forward of `model`.

    Example:
        >>> attention = nn.Module()
        >>> attention.forward = lambda x: F.scaled_dot_product_attention(x, x, x)  # a stand-in for a model
        >>> site = AttentionSite(0, "", heads=2, layout=TokenLayout("b (v h w)"))
        >>> with AttentionCapture(attention, [site]) as captured:
        ...     _ = attention(torch.zeros(1, 2, 12, 4))
        >>> captured[""].query.shape
        torch.Size([1, 2, 12, 4])

    Inside the block `captured[path]` holds the latest call of each layer; a layer that runs twice in a forward
    (a write and a read pass) is replaced, never appended.

    Raises:
        CaptureError: on leaving the block, if a layer did not run or called no kernel that is known here.
    """

    def __init__(self, model: nn.Module, sites: Iterable[AttentionSite]) -> None:
        self._model = model
        self._sites = list(sites)
        self._handles: list[Any] = []
        self._open: list[tuple[str, _KernelWatcher]] = []
        self._ran: set[str] = set()
        self._captured: dict[str, CapturedAttention] = {}

    def __enter__(self) -> AttentionCapture:
        for site in self._sites:
            module = self._model.get_submodule(site.path)
            self._handles.append(module.register_forward_pre_hook(self._opener(site)))
            self._handles.append(module.register_forward_hook(self._closer(site), always_call=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._open:
            self._open.pop()[1].__exit__(None, None, None)
        if kind is not None:
            self._captured.clear()
            return
        for site in self._sites:
            if site.path not in self._captured:
                self._captured.clear()
                raise CaptureError(_missing(site, site.path in self._ran))

    def __getitem__(self, path: str) -> CapturedAttention:
        return self._captured[path]

    def _opener(self, site: AttentionSite) -> Callable[[nn.Module, Any], None]:
        def open_watcher(module: nn.Module, _: Any) -> None:
            watcher = _KernelWatcher(site)
            watcher.__enter__()
            self._open.append((site.path, watcher))

        return open_watcher

    def _closer(self, site: AttentionSite) -> Callable[[nn.Module, Any, Any], None]:
        def close_watcher(module: nn.Module, _: Any, output: Any) -> None:
            if not self._open or self._open[-1][0] != site.path:
                return  # an exception inside the layer: __exit__ of the capture cleans up
            watcher = self._open.pop()[1]
            watcher.__exit__(None, None, None)
            self._ran.add(site.path)
            if len(watcher.calls) > 1:
                raise CaptureError(
                    f"layer {site.path!r} called the attention kernel {len(watcher.calls)} times in one forward of "
                    "the module, so which queries and keys to supervise is not defined. Point layer= at the "
                    "submodule that makes the cross-view call."
                )
            if watcher.calls:
                self._captured[site.path] = watcher.calls[0]

        return close_watcher


def _missing(site: AttentionSite, ran: bool) -> str:
    if ran:
        return (
            f"layer {site.path!r} ran, but no attention kernel was seen in it. Known are "
            "F.scaled_dot_product_attention, xformers.ops.memory_efficient_attention and a query-key product "
            "followed by a softmax. Likely causes: layer= names a module that is not the attention itself, "
            "another fused kernel, or a compiled module (compile after the training, or another part of the model)."
        )
    return (
        f"layer {site.path!r} did not run in this forward. Likely causes: the model skips it for these arguments, "
        "or the module was replaced after cameo.wrap (unwrap and wrap again)."
    )


class _KernelWatcher(TorchFunctionMode):
    """Sees the torch functions called while one attention module runs."""

    PRODUCTS = frozenset({"baddbmm", "bmm", "matmul", "__matmul__", "einsum"})

    def __init__(self, site: AttentionSite) -> None:
        super().__init__()
        self.site = site
        self.calls: list[CapturedAttention] = []
        self.muted = False  # inside xformers' operator, whose fallback may call SDPA itself
        self._product: tuple[Tensor, Tensor, Tensor] | None = None

    def __enter__(self) -> _KernelWatcher:
        super().__enter__()
        _xformers_tap.push(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        _xformers_tap.pop()
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.muted:
            return output
        if func is F.scaled_dot_product_attention:
            self._fused(*args, **kwargs)
        elif (name := getattr(func, "__name__", "")) in self.PRODUCTS:
            operands = _product_operands(name, args)
            if operands is not None:
                self._product = (*operands, output)
        elif name == "softmax" and self._product is not None:
            self._explicit(args[0] if args else kwargs["input"])
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
        enable_gqa: bool = False,
    ) -> None:
        if attn_mask is not None or is_causal:
            raise CaptureError(f"layer {self.site.path!r} masks its attention; only unmasked layers can be supervised")
        self._keep(query, key, scale)

    def from_xformers(self, query: Tensor, key: Tensor, attn_bias: Any, scale: float | None) -> None:
        """Record one `memory_efficient_attention` call: `[A K, L, D]` or `[A, L, K, D]`."""
        if attn_bias is not None:
            raise CaptureError(f"layer {self.site.path!r} adds a bias to its attention; it cannot be supervised")
        if query.ndim == 4:
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        self._keep(query, key, scale)

    def _explicit(self, logits: Tensor) -> None:
        assert self._product is not None
        query, key, product = self._product
        self._product = None
        with torch.no_grad():  # the factor between the product and the softmax is the layer's own scale
            given, plain = logits.detach().flatten()[:4096].double(), product.detach().flatten()[:4096].double()
            if given.shape != plain.shape:
                return  # another softmax of the module
            if not plain.any():
                raise CaptureError(
                    f"layer {self.site.path!r}: all its logits are zero, so its scale cannot be measured; use the "
                    "SDPA or xformers attention processor of the model, or initialise the query projection"
                )
            scale = float((given @ plain) / (plain @ plain).clamp_min(1e-30))
            rounding = 4 * max(torch.finfo(t.dtype).eps for t in (logits, product)) * float(given.abs().max())
            if not torch.allclose(given, scale * plain, rtol=1e-3, atol=rounding):
                raise CaptureError(
                    f"layer {self.site.path!r} changes its logits between product and softmax (mask, bias or another "
                    "function); only a constant factor can be supervised"
                )
            # A product may carry a factor of its own (baddbmm's alpha): measure it on one row.
            row = (query.reshape(-1, *query.shape[-2:])[0, :1].double() @ _first(key).double().mT).flatten()
            first = product.detach().reshape(-1, *product.shape[-2:])[0, 0].double()
            scale *= float((first @ row) / (row @ row).clamp_min(1e-30))
        self._keep(query, key, scale)

    def _keep(self, query: Tensor, key: Tensor, scale: float | None) -> None:
        heads = self.site.heads
        if query.ndim == 3:
            if query.shape[0] % heads:
                raise CaptureError(
                    f"layer {self.site.path!r}: {query.shape[0]} attention rows do not divide into {heads} heads"
                )
            query, key = (rearrange(t, "(a k) l d -> a k l d", k=heads) for t in (query, key))
        if query.ndim != 4 or query.shape[1] != heads or key.shape[1] != heads:
            raise CaptureError(
                f"layer {self.site.path!r}: expected queries and keys with {heads} heads, got "
                f"{list(query.shape)} and {list(key.shape)}"
            )
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        self.calls.append(CapturedAttention(query, key, scale))


def _first(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, *tensor.shape[-2:])[0]


def _product_operands(name: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Return `(query [..., L, D], key [..., M, D])` of a batched product `query @ key^T`, if it is one."""
    if name == "einsum":
        if len(args) != 3 or not isinstance(args[0], str):
            return None
        left, right = args[0].replace(" ", "").split("->")[0].split(",")
        if left[-1] == right[-1]:
            return args[1], args[2]
        return (args[1], args[2].transpose(-1, -2)) if left[-1] == right[-2:-1] else None
    query, key = args[-2:]
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and query.ndim == key.ndim and query.ndim in (3, 4)):
        return None
    return query, key.transpose(-1, -2)


class _XformersTap:
    """Forwards `xformers.ops.memory_efficient_attention` and tells the watcher of the calling thread.

    xformers' operator is a Python function looked up at call time, which a TorchFunctionMode does not see. The tap
    stands in its place only while some watcher is open in any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._local = threading.local()
        self._ops: ModuleType | None = None
        self._original: Callable[..., Tensor] | None = None

    def push(self, watcher: _KernelWatcher) -> None:
        self._stack().append(watcher)
        with self._lock:
            self._users += 1
            ops = sys.modules.get("xformers.ops")
            if self._ops is None and ops is not None:
                self._ops, self._original = ops, ops.memory_efficient_attention
                ops.memory_efficient_attention = self._forward  # type: ignore[attr-defined]

    def pop(self) -> None:
        self._stack().pop()
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._ops is not None:
                self._ops.memory_efficient_attention = self._original  # type: ignore[attr-defined]
                self._ops = self._original = None

    def _stack(self) -> list[_KernelWatcher]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def _forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any = None,
        p: float = 0.0,
        scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        assert self._original is not None
        watcher = self._stack()[-1] if self._stack() else None
        if watcher is None:  # another thread's watcher put the tap in place
            return self._original(query, key, value, attn_bias=attn_bias, p=p, scale=scale, **options)
        watcher.muted = True
        try:
            output = self._original(query, key, value, attn_bias=attn_bias, p=p, scale=scale, **options)
        finally:
            watcher.muted = False
        watcher.from_xformers(query, key, attn_bias, scale)
        return output


_xformers_tap = _XformersTap()
