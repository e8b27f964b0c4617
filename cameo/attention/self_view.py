"""Restrict each query of one attention layer to the keys of its own view, at the kernel, without changing the model.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension, V views.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import BoundArguments
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cameo.attention.capture import AttentionLayer, captured_call, per_head
from cameo.attention.kernel_calls import MULTIHEAD, CallWatcher
from cameo.attention.kernels.call import KernelCall, kept_tokens
from cameo.attention.kernels.known import Kernel, UnreadableCallError, causal_mask
from cameo.attention.kernels.multihead import read_multihead
from cameo.attention.view_parts import ViewPart, ViewParts
from cameo.attention.visibility import lengths_of_call
from cameo.attention.watched_layers import WatchedLayers
from cameo.errors import CaptureError
from cameo.geometry.grids import TokenGrids

__all__ = ["cut_other_views"]

SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
CURE = 'switch the model to F.scaled_dot_product_attention, in diffusers by model.set_attention_backend("native")'


@contextmanager
def cut_other_views(module: nn.Module, layer: AttentionLayer, token_grids: TokenGrids) -> Iterator[None]:
    """Restrict one layer to self-views: inside the block each query sees the keys of its own view only.

    This is `cameo.probing.ablation.self_view_only` for the plain module in which the layer's path is looked up.

    Example:
        >>> from cameo.attention.layout import TokenLayout
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.scaled_dot_product_attention(x, x, x)
        >>> model = nn.Sequential(Attention())
        >>> layer = AttentionLayer(0, "0", heads=1, layout=TokenLayout("b (v h w)"))
        >>> x = torch.randn(1, 1, 8, 4)  # two views of 2 x 2 tokens
        >>> with cut_other_views(model, layer, token_grids=((2, 2), (2, 2))):
        ...     cut = model(x)
        >>> torch.equal(cut, torch.cat([model(x[:, :, :4]), model(x[:, :, 4:])], dim=2))
        True
    """
    if layer.kernel_inputs is not None:
        raise CaptureError(
            f"layer {layer.path!r} attends by a kernel that is known by its kernel_inputs= only, which cannot be cut; "
            + CURE
        )
    parts, ran = ViewParts(layer, token_grids), []

    def done(_: str, watcher: CallWatcher) -> None:
        """Check the calls of a run as a capture does: of several it must be known which one mixes the views."""
        if captured_call(layer, watcher.calls) is not None:
            ran.append(True)

    layers = WatchedLayers(module, [layer.path], lambda _: _Cutter(layer, parts), done)
    with layers:
        yield
    if not ran:
        raise CaptureError(layers.explain_no_call(layer.path))
    if not parts.found:
        raise CaptureError(
            f"layer {layer.path!r} ran, but in none of its calls did one view look at another, so there was nothing to "
            "cut"
        )


class _Cutter(CallWatcher):
    """Runs the kernel view by view, or masks the logits before the softmax; records the calls as its base does."""

    def __init__(self, layer: AttentionLayer, parts: ViewParts) -> None:
        super().__init__(layer.path)
        self._layer, self._parts = layer, parts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        if not self._muted and self._mixes_views():
            if name == "scaled_dot_product_attention":
                func = functools.wraps(func)(functools.partial(self._sdpa, func))
            elif name == "softmax" and self._ends_product(args[0] if args else kwargs["input"], *args[1:], **kwargs):
                func = functools.wraps(func)(functools.partial(self._masked, func))
            elif name == "multi_head_attention_forward":
                func = functools.wraps(func)(functools.partial(self._multihead, func))
        return super().__torch_function__(func, types, args, kwargs)

    def kernel_call(self, kernel: Kernel, run: Callable[[BoundArguments], Any], given: BoundArguments) -> Any:
        """Run a kernel of another package view by view; SDPA in its place, where it hides keys."""
        if self._muted or not self._mixes_views():
            return super().kernel_call(kernel, run, given)
        if not kernel.tensors:
            raise CaptureError(
                f"layer {self.layer!r} attends by {kernel.title}, which does not take queries, keys and values apart "
                f"and cannot be cut; {CURE}"
            )
        complete = BoundArguments(given.signature, given.arguments.copy())
        complete.apply_defaults()
        try:
            call = kernel.read(complete.arguments)
        except UnreadableCallError:
            return super().kernel_call(kernel, run, given)  # which refuses it
        tensors = [given.arguments[name] for name in kernel.tensors]

        def pieces(query: Tensor, key: Tensor, value: Tensor) -> Any:
            part = BoundArguments(given.signature, given.arguments.copy())
            part.arguments |= dict(zip(kernel.tensors, (query, key, value), strict=True))
            return run(part)

        def by_view(_: BoundArguments) -> Tensor:
            if call.mask is None:
                return self._by_view(pieces, call, kernel.token_axis, *tensors)
            axes = (1, 2) if tensors[2].ndim == 4 and kernel.token_axis == 1 else (1, 1)
            attend = functools.partial(
                F.scaled_dot_product_attention,
                scale=call.scale,
                enable_gqa=call.key.shape[:-2] != call.query.shape[:-2],
            )
            whole = call.query, call.key, tensors[2].transpose(*axes)
            return self._by_view(attend, call, -2, *whole).transpose(*axes)

        return super().kernel_call(kernel, by_view, given)

    def _mixes_views(self) -> bool:
        """Whether the next call is the one that mixes the views."""
        return self._layer.kernel_call in (None, len(self.calls))

    def _sdpa(self, kernel: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(SDPA_ARGUMENTS, args, strict=False)) | kwargs
        query, key, value = (given.pop(name) for name in ("query", "key", "value"))
        mask, is_causal = given.pop("attn_mask", None), given.pop("is_causal", False)
        if is_causal:
            mask = causal_mask(query.shape[-2], key.shape[-2], query.device)
        call = KernelCall(query, key, 1.0, mask)
        return self._by_view(functools.partial(kernel, **given), call, -2, query, key, value)

    def _by_view(
        self, kernel: Callable[..., Tensor], call: KernelCall, axis: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Run a kernel for each part; it takes `attn_mask` if the call has a mask. `axis` is that of the tokens."""
        if query.ndim not in (3, 4):
            raise CaptureError(f"layer {self.layer!r}: expected queries of 3 or 4 axes, got {list(query.shape)}")
        parts = self._parts.of_call(query, query.shape[axis], key.shape[axis], self._ends(call))
        if parts is None:
            return kernel(query, key, value) if call.mask is None else kernel(query, key, value, attn_mask=call.mask)
        axis %= query.ndim
        whole = query.new_empty(*query.shape[:-1], value.shape[-1])
        for part in parts:
            keys, values = (part.take(tensor, part.keys, axis) for tensor in (key, value))
            masked = {} if call.mask is None else {"attn_mask": part.take_mask(call.mask, query.ndim)}
            part.put(whole, kernel(part.take(query, part.queries, axis), keys, values, **masked), axis)
        return whole

    def _masked(self, softmax: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        logits = args[0] if args else kwargs.pop("input")
        call = KernelCall(logits, logits.mT, 1.0, kept_tokens(logits) if self._layer.layout.text_before_views else None)
        parts = self._parts.of_call(logits, logits.shape[-2], logits.shape[-1], self._ends(call))
        if parts is not None:
            hidden = _hidden(parts, logits.shape[0], logits.shape[-2], logits.shape[-1], logits.device)
            logits = logits.masked_fill(hidden if logits.ndim == 3 else hidden[:, None], -torch.inf)
        return softmax(logits, *args[1:], **kwargs)

    def _multihead(self, attend: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Hide the keys of other views by the mask of `torch.nn.MultiheadAttention`."""
        given = MULTIHEAD.bind(*args, **kwargs)
        given.apply_defaults()
        call = read_multihead(given.arguments)
        rows, heads, queries, _ = call.query.shape
        keys = call.key.shape[2]
        like = call.query.flatten(0, 1)
        parts = self._parts.of_call(like, queries, keys, self._ends(call))
        if parts is not None:
            mask = _hidden(parts, rows * heads, queries, keys, like.device).expand(rows * heads, -1, -1)
            before = given.arguments["attn_mask"]
            if before is not None:
                mask = mask | before if before.dtype == torch.bool else before.masked_fill(mask, -torch.inf)
            given.arguments |= {"attn_mask": mask, "is_causal": False}
        return attend(*given.args, **given.kwargs)

    def _ends(self, call: KernelCall) -> list[int] | None:
        """How many tokens of each row of the attention batch are no padding, where views follow on open text."""
        if call.mask is None or not self._layer.layout.text_before_views:
            return None
        lengths, _ = lengths_of_call(self._layer, per_head(self._layer, call))
        return None if lengths is None else lengths.tolist()


def _hidden(parts: list[ViewPart], rows: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Mask `[rows or 1, L, M]`, True where a query does not see a key."""
    by_row = any(part.rows is not None for part in parts)
    hidden = torch.ones(rows if by_row else 1, queries, keys, dtype=torch.bool, device=device)
    for part in parts:
        of_part = torch.arange(len(hidden), device=device) if part.rows is None else part.rows
        hidden[of_part[:, None, None], part.queries[:, None], part.keys] = False
    return hidden
