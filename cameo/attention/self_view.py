"""Restrict each query of one attention layer to the keys of its own view, at the kernel, without changing the model.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension, V views.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import BoundArguments
from typing import Any

import torch
from torch import Tensor, nn

from cameo.attention.capture import AttentionLayer, captured_call
from cameo.attention.kernel_calls import CallWatcher
from cameo.attention.kernels.known import Kernel
from cameo.attention.layout import TokenLayout
from cameo.attention.pattern import Pattern
from cameo.attention.watched_layers import WatchedLayers
from cameo.errors import CaptureError
from cameo.geometry.grids import TokenGrids

__all__ = ["cut_other_views"]

SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
MASKS = ("attn_mask", "attn_bias", "is_causal", "causal", "block_mask")


@contextmanager
def cut_other_views(module: nn.Module, layer: AttentionLayer, token_grids: TokenGrids) -> Iterator[None]:
    """Restrict one layer to self-views: inside the block each query sees the keys of its own view only.

    This is `cameo.probing.ablation.self_view_only` for the plain module in which the layer's path is looked up.

    Example:
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
    cut = _Cut(layer, token_grids)
    layers = WatchedLayers(module, [layer.path], lambda _: _Cutter(layer, cut.parts), cut.done)
    with layers:
        yield
    if not cut.was_called:
        raise CaptureError(layers.explain_no_call(layer.path))
    if not cut.has_parts:
        raise CaptureError(
            f"layer {layer.path!r} ran, but in none of its calls did one view look at another, so there was nothing to "
            "cut"
        )


@dataclass(frozen=True)
class _Part:
    """Queries that see the same keys: their rows of the attention batch (None = all), token positions of both."""

    rows: Tensor | None
    queries: Tensor
    keys: Tensor

    def take(self, tensor: Tensor, tokens: Tensor, axis: int) -> Tensor:
        """Return these rows and tokens; `axis` is the token axis."""
        return tensor.movedim(axis, 1)[self._place(tokens)].movedim(1, axis)

    def put(self, whole: Tensor, output: Tensor, axis: int) -> None:
        """Write the output of these queries into the output of all, in place."""
        whole.movedim(axis, 1)[self._place(self.queries)] = output.movedim(axis, 1)

    def _place(self, tokens: Tensor) -> tuple[slice | Tensor, Tensor]:
        return (slice(None) if self.rows is None else self.rows[:, None]), tokens


class _Cut:
    """Which queries see which keys in the calls of a layer."""

    def __init__(self, layer: AttentionLayer, token_grids: TokenGrids) -> None:
        self._layer, self._token_grids = layer, tuple(token_grids)
        if layer.layout.within_views:
            raise CaptureError(f"layer {layer.path!r} attends within each view, so there is nothing to cut")
        self._layout, self._ordered_grids = _in_attention_order(layer.layout, self._token_grids)
        self._parts: dict[tuple[int, int, torch.device], list[_Part]] = {}
        self._lengths = tuple(
            self._layout.shape(of, batch=1, token_grids=self._ordered_grids)[1] for of in ("query", "key")
        )
        with_own_grid = layer.layout.views_with_own_grid(len(self._token_grids))
        self._lengths_of_one_view = {math.prod(self._token_grids[view]) for view in with_own_grid}
        self.was_called = self.has_parts = False

    def done(self, path: str, watcher: CallWatcher) -> None:
        """Check the calls of a run as a capture does: of several it must be known which one mixes the views."""
        self.was_called |= captured_call(self._layer, watcher.calls) is not None

    def parts(self, like: Tensor, length: int, key_length: int) -> list[_Part] | None:
        """Return which queries see which keys in a call with queries or logits `like`; None if it holds one view only.

        Raises:
            CaptureError: the call has another shape than the layout says.
        """
        if (length, key_length) != self._lengths:
            if length == key_length and length in self._lengths_of_one_view:
                return None
            raise CaptureError(
                f"layer {self._layer.path!r} with {self._layer.layout!r}: expected {self._lengths[0]} queries and "
                f"{self._lengths[1]} keys for token grids {self._token_grids}, got {length} and {key_length}. Pass the "
                "token grids of this batch, layer.token_grids(height, width, num_views); a kernel that takes the "
                "tokens in slices cannot be cut"
            )
        heads = self._layer.heads if like.ndim == 3 else 1
        call = like.shape[0], heads, like.device
        if call not in self._parts:
            try:
                self._parts[call] = _who_sees_whom(self._layout, self._ordered_grids, *call)
            except ValueError as error:
                raise CaptureError(f"layer {self._layer.path!r}: {error}") from error
        self.has_parts = True
        return self._parts[call]


class _Cutter(CallWatcher):
    """Runs the kernel view by view, or masks the logits before the softmax; records the calls as its base does."""

    def __init__(self, layer: AttentionLayer, parts: Callable[..., list[_Part] | None]) -> None:
        super().__init__(layer.path)
        self._layer, self._parts = layer, parts

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        if not self._muted and self._mixes_views():
            if name == "scaled_dot_product_attention":
                func = functools.wraps(func)(functools.partial(self._by_view, func, SDPA_ARGUMENTS, -2))
            elif name == "softmax" and self._ends_product(args[0] if args else kwargs["input"], *args[1:], **kwargs):
                func = functools.wraps(func)(functools.partial(self._masked, func))
        return super().__torch_function__(func, types, args, kwargs)

    def kernel_call(self, kernel: Kernel, run: Callable[[BoundArguments], Any], given: BoundArguments) -> Any:
        """Run a kernel of another package view by view."""
        if self._muted or not self._mixes_views():
            return super().kernel_call(kernel, run, given)
        if not kernel.tensors:
            raise CaptureError(
                f"layer {self.layer!r} attends by {kernel.title}, which does not take queries, keys and values apart "
                "and cannot be cut; switch the model to F.scaled_dot_product_attention"
            )

        def pieces(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Any:
            part = BoundArguments(given.signature, given.arguments.copy())
            part.arguments |= dict(zip(kernel.tensors, (query, key, value), strict=True)) | rest
            return run(part)

        tensors = [given.arguments[name] for name in kernel.tensors]
        rest = {name: value for name, value in given.arguments.items() if name not in kernel.tensors}

        def by_view(_: BoundArguments) -> Tensor:
            return self._by_view(pieces, ("query", "key", "value"), kernel.token_axis, *tensors, **rest)

        return super().kernel_call(kernel, by_view, given)

    def _mixes_views(self) -> bool:
        """Whether the next call is the one that mixes the views."""
        return self._layer.kernel_call in (None, len(self.calls))

    def _by_view(
        self, kernel: Callable[..., Tensor], names: tuple[str, ...], axis: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        given = dict(zip(names, args, strict=False)) | kwargs
        if any(given.get(mask) is not None and given[mask] is not False for mask in MASKS):
            raise CaptureError(
                f"layer {self.layer!r} masks its attention, which cannot be cut view by view as well; measure it "
                "without padding"
            )
        query, key, value = (given.pop(name) for name in ("query", "key", "value"))
        if query.ndim not in (3, 4):
            raise CaptureError(f"layer {self.layer!r}: expected queries of 3 or 4 axes, got {list(query.shape)}")
        parts = self._parts(query, query.shape[axis], key.shape[axis])
        if parts is None:
            return kernel(query, key, value, **given)
        axis %= query.ndim
        whole = query.new_empty(*query.shape[:-1], value.shape[-1])
        for part in parts:
            keys, values = (part.take(tensor, part.keys, axis) for tensor in (key, value))
            part.put(whole, kernel(part.take(query, part.queries, axis), keys, values, **given), axis)
        return whole

    def _masked(self, softmax: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        logits = args[0] if args else kwargs.pop("input")
        parts = self._parts(logits, *logits.shape[-2:])
        if parts is not None:
            rows = 1 if parts[0].rows is None else logits.shape[0]
            hidden = torch.ones(rows, *logits.shape[-2:], dtype=torch.bool, device=logits.device)
            for part in parts:
                these = torch.zeros(1, dtype=torch.long) if part.rows is None else part.rows
                hidden[these[:, None, None], part.queries[:, None], part.keys] = False
            logits = logits.masked_fill(hidden if logits.ndim == 3 else hidden[:, None], -torch.inf)
        return softmax(logits, *args[1:], **kwargs)


def _in_attention_order(layout: TokenLayout, token_grids: TokenGrids) -> tuple[TokenLayout, TokenGrids]:
    """Return the layout with all views in the order of the attention, also those that no correspondence has."""
    grids = (*token_grids[layout.references_last :], *token_grids[: layout.references_last])
    if not layout.references_last:
        grids += grids[-1:] * layout.unsupervised_views
    return TokenLayout(layout.query, layout.key, **layout.lengths), grids  # type: ignore[arg-type]


def _who_sees_whom(
    layout: TokenLayout, token_grids: TokenGrids, rows: int, heads: int, device: torch.device
) -> list[_Part]:
    """Return one part for each view that has queries, and one for the queries of no view, if there are any.

    Args:
        layout, token_grids: as `_in_attention_order` returns them.
        rows: length of the first axis of the call, `A * heads`.
        heads: number of heads in that axis.
        device: device of the result.

    Raises:
        ValueError: the queries' views are in the batch part of the pattern, and the rows are not whole samples.
    """
    pattern = Pattern(layout.query, layout.lengths)
    by_row = any(name in pattern.batch for name in pattern.views)
    single, length = layout.shape("query", batch=1, token_grids=token_grids)
    if by_row and rows % (single * heads):
        raise ValueError(
            f'the queries "{layout.query}" of one sample are {single * heads} rows of the kernel, and a call has '
            f"{rows}; a kernel that takes part of a sample cannot be cut"
        )
    samples = rows // (single * heads) if by_row else 1
    of_query = _positions(layout.split_query, samples, single, length, token_grids)
    single, key_length = layout.shape("key", batch=1, token_grids=token_grids)
    of_key = _positions(layout.split_key, samples, single, key_length, token_grids)
    of_key = [positions % key_length for positions in of_key]
    of_no_view = _others(key_length, of_key)
    head = torch.arange(heads)
    parts = []
    for positions, keys in zip(of_query, of_key, strict=True):
        if positions.numel():
            rows_of_view = ((positions // length).unique()[:, None] * heads + head).flatten() if by_row else None
            parts.append((rows_of_view, (positions % length).unique(), torch.cat([keys, of_no_view]).unique()))
    rest = _others(length, [positions % length for positions in of_query])
    if rest.numel():
        parts.append((torch.arange(rows) if by_row else None, rest, torch.arange(key_length)))
    return [_Part(*(None if tensor is None else tensor.to(device) for tensor in part)) for part in parts]  # type: ignore[arg-type]


def _positions(
    split: Callable[..., Tensor], samples: int, single: int, length: int, token_grids: TokenGrids
) -> list[Tensor]:
    """For each view its positions, row * length + token, among `samples * single` rows."""
    position = torch.arange(1, samples * single * length + 1).reshape(-1, 1, length, 1)  # 0 is padding
    views = split(position, batch=samples, token_grids=token_grids).movedim(2, 0).flatten(1)
    return [view[view > 0] - 1 for view in views]


def _others(count: int, positions: list[Tensor]) -> Tensor:
    """Those of `count` positions that are in none of the tensors."""
    other = torch.ones(count, dtype=torch.bool)
    other[torch.cat(positions)] = False
    return other.nonzero()[:, 0]
