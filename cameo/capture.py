"""Take queries and keys where the attention kernel receives them, and leave the kernel running.

Hooks stand on the supervised attention modules for the length of one forward; while such a module runs, its
calls of the attention kernel are observed (see `cameo.attention_calls`). Nothing is replaced, so the output
stays bit-identical, and nothing is left behind: a recomputation under gradient checkpointing or a deepcopy
meets no hook.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cameo.attention_calls import CallWatcher, KernelCall, join_slices
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
        reference_size: height and width in pixels at which a view with a token grid of its own is encoded.
        kernel_call: which of the attention kernel calls of the module mixes the views, counted from 0; None
            where there is one.
    """

    index: int
    path: str
    heads: int
    layout: TokenLayout
    stride: int | None = None
    unsupported: str | None = None
    reference_size: tuple[int, int] | None = None
    kernel_call: int | None = None

    def sizes(self, height: int, width: int, num_views: int) -> tuple[tuple[int, int], ...]:
        """Token grid `(h, w)` of each view for images of `height` x `width` pixels, in correspondence order.

        Example:
            >>> layout = TokenLayout("b (r h c w)", key="b (r h c w + h' w')", references_last=1, r=3, c=2)
            >>> AttentionSite(0, "attn", 8, layout, stride=16, reference_size=(512, 512)).sizes(320, 320, 7)[:2]
            ((32, 32), (20, 20))

        Raises:
            ValueError: if the image pixels per token are not known.
        """
        if self.stride is None:
            raise ValueError(
                f"layer {self.path!r}: the image pixels per token are not known. With backbone= give the image "
                "pixels per latent cell where the views are joined, as in inflate(unet, latent_stride=8); with "
                "layout= pass stride= to cameo.wrap"
            )
        images = [(height, width)] * num_views
        if self.reference_size is not None:
            for view in self.layout.views_with_own_grid(num_views):
                images[view] = self.reference_size
        return tuple((-(-rows // self.stride), -(-columns // self.stride)) for rows, columns in images)


@dataclass(frozen=True)
class CapturedAttention:
    """Queries and keys `[AB, K, L, D]` as one kernel call received them, and its logit scale."""

    query: Tensor
    key: Tensor
    scale: float


class AttentionCapture:
    """Observe the kernel calls of `sites` during one forward of `model`.

    Example:
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.scaled_dot_product_attention(x, x, x)
        >>> model = nn.Sequential(Attention())
        >>> site = AttentionSite(0, "0", heads=2, layout=TokenLayout("b (v h w)"))
        >>> with AttentionCapture(model, [site]) as captured:
        ...     _ = model(torch.zeros(1, 2, 12, 4))
        >>> captured["0"].query.shape
        torch.Size([1, 2, 12, 4])

    `captured[path]` holds the latest call of each layer; a layer that runs twice in a forward (a write and a
    read pass) is replaced, never appended. Only the thread that entered the block is observed. Compiled parts
    of the model that hold a site run eagerly inside the block, since a compiled graph hides its queries and
    keys.

    Raises:
        CaptureError: in the forward, if a layer masks its attention or calls the kernel several times; on reading
            a layer and on leaving the block, if it did not run or called no kernel that is known here.
    """

    def __init__(self, model: nn.Module, sites: Iterable[AttentionSite]) -> None:
        self._model = model
        self._sites = list(sites)
        self._cleanup = ExitStack()
        self._thread = 0
        self._open: list[tuple[str, CallWatcher]] = []
        self._ran: dict[str, str] = {}  # to the function that hid the kernel, or nothing
        self._captured: dict[str, CapturedAttention] = {}
        self._taken: set[str] = set()

    def __enter__(self) -> AttentionCapture:
        self._thread = threading.get_ident()
        self._captured.clear()
        self._ran.clear()
        self._taken.clear()
        with ExitStack() as stack:
            for site in self._sites:
                module = self._model.get_submodule(site.path)
                for hook in (
                    module.register_forward_pre_hook(self._opener(site)),
                    # prepended, so that of two blocks on one layer the inner one closes first
                    module.register_forward_hook(self._closer(site), always_call=True, prepend=True),
                ):
                    stack.callback(hook.remove)
            if any(_compiled(self._model, site.path) for site in self._sites):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._cleanup = stack.pop_all()  # without this line, an error above removes the hooks again
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        self._cleanup.close()
        while self._open:  # an exception that runs no hooks, such as KeyboardInterrupt
            self._open.pop()[1].__exit__(None, None, None)
        if kind is not None:
            self._captured.clear()
            self._ran.clear()
            return
        for site in self._sites:
            if site.path not in self._taken:
                self._require(site.path)

    def __getitem__(self, path: str) -> CapturedAttention:
        return self._require(path)

    def take(self, path: str) -> CapturedAttention:
        """Hand a layer's call over and keep no hold of it, so that its memory is free once the caller is done."""
        call = self._require(path)
        del self._captured[path]
        self._taken.add(path)
        return call

    def _require(self, path: str) -> CapturedAttention:
        if path not in self._captured:
            if path in self._taken:
                raise CaptureError(f"layer {path!r}: take() handed its call over already; keep what it returned")
            site = {site.path: site for site in self._sites}[path]
            raise CaptureError(_missing(site, self._ran.get(path)))
        return self._captured[path]

    def _watcher(self, site: AttentionSite) -> CallWatcher:
        return CallWatcher(site.path)

    def _opener(self, site: AttentionSite) -> Callable[[nn.Module, Any], None]:
        def open_watcher(module: nn.Module, _: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            watcher = self._watcher(site)
            watcher.__enter__()
            self._open.append((site.path, watcher))

        return open_watcher

    def _closer(self, site: AttentionSite) -> Callable[[nn.Module, Any, Any], None]:
        def close_watcher(module: nn.Module, _: Any, output: Any) -> None:
            if threading.get_ident() != self._thread or not self._open or self._open[-1][0] != site.path:
                return
            watcher = self._open.pop()[1]
            watcher.__exit__(None, None, None)
            if output is None and sys.exc_info()[0] is not None:
                return  # the module raised: its own error is the one to show
            calls = join_slices(watcher.calls)
            self._ran[site.path] = watcher.hidden_kernel
            if calls:
                self._captured[site.path] = _per_head(site, _choose(site, calls))

        return close_watcher


def _choose(site: AttentionSite, calls: list[KernelCall]) -> KernelCall:
    if site.kernel_call is not None:
        if not 0 <= site.kernel_call < len(calls):
            raise CaptureError(
                f"layer {site.path!r} called the attention kernel {len(calls)} times in one forward of the module, "
                f"so there is no kernel_call={site.kernel_call}; it counts from 0"
            )
        return calls[site.kernel_call]
    if len(calls) > 1:
        shapes = ", ".join(f"{list(call.query.shape)} x {list(call.key.shape)}" for call in calls)
        raise CaptureError(
            f"layer {site.path!r} called the attention kernel {len(calls)} times in one forward of the module, with "
            f"queries x keys {shapes}; which to supervise is not defined. Pass kernel_call= to cameo.wrap, counted "
            "from 0, or point layer= at the submodule that makes the cross-view call."
        )
    return calls[0]


def _per_head(site: AttentionSite, call: KernelCall) -> CapturedAttention:
    query, key = call.query, call.key
    if query.ndim == 3:
        if query.shape[0] % site.heads:
            raise CaptureError(
                f"layer {site.path!r}: {query.shape[0]} attention rows do not divide into {site.heads} heads"
            )
        query, key = (rearrange(tensor, "(a k) l d -> a k l d", k=site.heads) for tensor in (query, key))
    if query.ndim != 4 or query.shape[1] != site.heads or key.shape[1] != site.heads:
        raise CaptureError(
            f"layer {site.path!r}: expected queries and keys with {site.heads} heads, got "
            f"{list(query.shape)} and {list(key.shape)} for [AB, K, L, D]"
        )
    return CapturedAttention(query, key, call.scale)


def _compiled(model: nn.Module, path: str) -> bool:
    """Whether the layer, a module around it or a part of it was compiled in place."""
    names = path.split(".") if path else []
    chain = [model.get_submodule(".".join(names[:count])) for count in range(len(names) + 1)]
    chain += chain[-1].modules()
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in chain)


def _missing(site: AttentionSite, hidden_kernel: str | None) -> str:
    if hidden_kernel is None:
        return (
            f"layer {site.path!r} did not run in this forward. Likely causes: the model skips it for these "
            "arguments, calls its forward() directly, or the module was replaced after cameo.wrap (unwrap "
            "and wrap again)."
        )
    if hidden_kernel:
        return (
            f"layer {site.path!r} runs {hidden_kernel}, which keeps its queries and keys to itself. Replace "
            "it by a module with projections of its own that calls F.scaled_dot_product_attention."
        )
    return (
        f"layer {site.path!r} ran, but no attention kernel was seen in it. Known are "
        "F.scaled_dot_product_attention, xformers.ops.memory_efficient_attention (looked up in xformers.ops "
        "at the call, not imported by name) and a query-key product followed by a softmax. Likely causes: "
        "layer= names a module that is not the attention itself, or the model uses another fused kernel "
        "(switch its attention processor or backend to SDPA)."
    )
