"""Record the queries and keys that the attention kernel receives, while the kernel itself runs as before.

The supervised attention modules are watched during one forward (see `cameo.attention.watched_layers`). Nothing is
replaced, so the output stays bit-identical, and nothing remains afterwards: neither a recomputation under gradient
checkpointing nor a deepcopy finds a hook.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from cameo.attention.compiled.traced_layers import TracedLayers
from cameo.attention.kernel_calls import FUSED, CallWatcher
from cameo.attention.kernel_inputs import InputsWatcher, KernelInputs
from cameo.attention.kernels.call import KernelCall, join_samples, join_slices
from cameo.attention.kernels.known import fused_call
from cameo.attention.layout import TokenLayout
from cameo.attention.watched_layers import WatchedLayers
from cameo.errors import CaptureError, as_integer
from cameo.geometry.grids import TokenGrids
from cameo.renamed import old_attributes

__all__ = ["AttentionCapture", "AttentionLayer", "CapturedAttention", "shared_grids"]


@old_attributes
@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer in which tokens of different views meet.

    Attributes:
        index: position among the model's cross-view attention layers in execution order.
        path: dotted module path of the attention module.
        heads: number of attention heads `K`.
        layout: what the layer's batch and token axes are made of.
        stride: image pixels per token side, where it is known.
        unsupported: why the layer cannot be supervised, or None.
        reference_size: height and width in pixels at which a view with a token grid of its own is encoded.
        kernel_call: which of the module's attention kernel calls mixes the views, counted from 0; None where there is
            only one.
        kernel_inputs: where the queries and keys of a kernel that is not known are found; None: the kernel is known.
        stride_cure: what the error recommends where `stride` is not known.
    """

    index: int
    path: str
    heads: int
    layout: TokenLayout
    stride: int | None = None
    unsupported: str | None = None
    reference_size: tuple[int, int] | None = None
    kernel_call: int | None = None
    kernel_inputs: KernelInputs | None = None
    stride_cure: str = field(default="pass stride= to cameo.wrap", compare=False, repr=False)

    def token_grids(self, height: int, width: int, num_views: int) -> TokenGrids:
        """Return the token grid `(h, w)` of each view for images of `height` x `width` pixels, in correspondence order.

        Example:
            >>> layout = TokenLayout("b (r h c w)", key="b (r h c w + h' w')", references_last=1, r=3, c=2)
            >>> AttentionLayer(0, "attn", 8, layout, stride=16, reference_size=(512, 512)).token_grids(320, 320, 7)[:2]
            ((32, 32), (20, 20))

        Raises:
            ValueError: the image pixels per token are not known, or a size is no integer of at least 1.
        """
        if self.stride is None:
            raise ValueError(f"layer {self.path!r}: the image pixels per token are not known; {self.stride_cure}")
        height, width = as_integer("height", height, least=1), as_integer("width", width, least=1)
        num_views = as_integer("num_views", num_views, least=1)
        images = [(height, width)] * num_views
        if self.reference_size is not None:
            for view in self.layout.views_with_own_grid(num_views):
                images[view] = self.reference_size
        return tuple((-(-rows // self.stride), -(-columns // self.stride)) for rows, columns in images)


def shared_grids(layers: Sequence[AttentionLayer], height: int, width: int, num_views: int) -> TokenGrids:
    """Return the token grids that all layers have, see `AttentionLayer.token_grids`; differing ones are refused."""
    grids = {layer.token_grids(height, width, num_views) for layer in layers}
    if len(grids) > 1:
        raise ValueError(
            "token_grid: the supervised layers have different grids, with "
            + ", ".join(f"{layer.path}: {layer.stride}" for layer in layers)
            + " pixels per token; build one Correspondence per layer"
        )
    return grids.pop()


@dataclass(frozen=True)
class CapturedAttention:
    """Queries and keys `[AB, K, L, D]` as one kernel call received them, and the scale of its logits.

    Attributes:
        query, key, scale, mask, query_lengths, key_lengths, trains: as in `cameo.attention.kernels.call.KernelCall`,
            the keys with as many heads as the queries.
        samples: of how many calls of one sample each it is made; None for one call.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    trains: bool = True
    samples: int | None = None

    def check_graph(self, path: str) -> None:
        """Raise a CaptureError, with the likely causes, if no gradient of a loss could reach the layer at `path`."""
        if not self.trains:
            raise CaptureError(
                f"layer {path!r} attends by a kernel without a backward, which is for inference: nothing before it "
                'would be trained. Switch to another, in diffusers by model.set_attention_backend("native")'
            )
        if self.query.requires_grad or self.key.requires_grad:
            return
        raise CaptureError(
            f"queries and keys of layer {path!r} carry no gradient, so the alignment loss could train nothing but its "
            "head. Likely causes: reentrant gradient checkpointing (use use_reentrant=False), or every parameter "
            "before this layer is frozen (add LoRA or unfreeze before the forward). To measure without training call "
            "model.eval() or use torch.no_grad()."
        )


class AttentionCapture:
    """Observe the kernel calls of `layers` during one forward of `model`.

    Example:
        >>> import torch
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.scaled_dot_product_attention(x, x, x)
        >>> model = nn.Sequential(Attention())
        >>> layer = AttentionLayer(0, "0", heads=2, layout=TokenLayout("b (v h w)"))
        >>> with AttentionCapture(model, [layer]) as captured:
        ...     _ = model(torch.zeros(1, 2, 12, 4))
        >>> captured["0"].query.shape
        torch.Size([1, 2, 12, 4])

    `captured[path]` holds the latest call of each layer: if a layer runs twice in a forward (a write and a read
    pass), the second call replaces the first. Only the thread that entered the block is observed. What is compiled in
    place and holds a layer runs eagerly inside the block, since compiled code hides its queries and keys, unless
    `traced`.

    Args:
        model: the module in which the layers' paths are looked up.
        layers: what to observe.
        traced: observe the layers in compiled code too, by SDPA alone and at the end of the block, see
            `cameo.attention.compiled.traced_layers`.

    Attributes:
        untraced: for each observed layer why it would not be seen if `traced`, "" if it would be.

    Raises:
        CaptureError: in the forward, if a layer does more to its logits than to scale them and to hide keys, or calls
            the kernel several times; when a layer
            is read and at the end of the block, if the layer did not run or called no known kernel.
    """

    def __init__(self, model: nn.Module, layers: Iterable[AttentionLayer], *, traced: bool = False) -> None:
        self._model, self._hooks = model, ExitStack()
        self._attention_layers = by_path = {layer.path: layer for layer in layers}
        self._captured: dict[str, CapturedAttention] = {}
        self._taken: set[str] = set()
        self.untraced: dict[str, str] = {}
        captured, untraced = self._captured, self.untraced

        # No methods: a reference cycle would keep the calls alive.
        def keep(path: str, calls: list[KernelCall]) -> None:
            call = captured_call(by_path[path], calls)
            if call is not None:
                captured[path] = call

        def keep_watched(path: str, watcher: CallWatcher | InputsWatcher) -> None:
            keep(path, watcher.calls)
            untraced[path] = _explain_untraced(watcher)

        self._layers: WatchedLayers[CallWatcher | InputsWatcher] | TracedLayers
        if traced:
            self._layers = TracedLayers(
                model, by_path, lambda path, calls: keep(path, [fused_call(*call) for call in calls])
            )
        else:
            self._layers = WatchedLayers(model, by_path, lambda path: _watcher(by_path[path]), keep_watched)

    def __enter__(self) -> AttentionCapture:
        self._captured.clear()
        self._taken.clear()
        with ExitStack() as stack:
            stack.push(self._layers.__exit__)
            self._layers.__enter__()
            for path, layer in self._attention_layers.items():
                if layer.kernel_inputs is not None and isinstance(self._layers, WatchedLayers):
                    module = self._model.get_submodule(path)  # after the hooks that open a watcher when the layer runs
                    stack.enter_context(layer.kernel_inputs.watched(module, partial(_hand_on, self._layers, path)))
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._hooks.__exit__(kind, *rest)
        if kind is not None:
            self._captured.clear()
            return
        for path in self._attention_layers:
            if path not in self._taken:
                self._require(path)

    def __getitem__(self, path: str) -> CapturedAttention:
        return self._require(path)

    def take(self, path: str) -> CapturedAttention:
        """Return a layer's call and release it, so that its memory is free once the caller is done."""
        call = self._require(path)
        del self._captured[path]
        self._taken.add(path)
        return call

    def _require(self, path: str) -> CapturedAttention:
        if path not in self._captured:
            if path not in self._attention_layers:
                raise KeyError(path)
            if path in self._taken:
                raise CaptureError(f"layer {path!r}: take() handed its call over already; keep what it returned")
            raise CaptureError(self._layers.explain_no_call(path))
        return self._captured[path]


def _watcher(layer: AttentionLayer) -> CallWatcher | InputsWatcher:
    if layer.kernel_inputs is None:
        return CallWatcher(layer.path)
    return InputsWatcher(layer.path, layer.kernel_inputs, layer.heads)


def _hand_on(layers: WatchedLayers[CallWatcher | InputsWatcher], path: str, side: str, value: object) -> None:
    """Give queries or keys to the watcher of the layer, if that runs."""
    watcher = layers.open_watcher(path)
    if isinstance(watcher, InputsWatcher):
        watcher.keep(side, value)


def captured_call(layer: AttentionLayer, calls: list[KernelCall]) -> CapturedAttention | None:
    """Return that call of a layer which mixes the views, among those that were seen; None if there are none.

    Raises:
        CaptureError: there are several calls and the layer does not say which, or the number of heads is another.
    """
    calls = join_slices(calls)
    if not calls:
        return None
    if len(calls) > 1 and layer.kernel_call is None:
        joined = join_samples(calls, layer.heads)
        if joined is None:
            raise several_calls(layer.path, len(calls), calls)
        return per_head(layer, joined, samples=len(calls))
    if layer.kernel_call is not None and not 0 <= layer.kernel_call < len(calls):
        raise CaptureError(
            f"layer {layer.path!r} called the attention kernel {len(calls)} times in one forward of the module, "
            f"so there is no kernel_call={layer.kernel_call}; it counts from 0"
        )
    return per_head(layer, calls[layer.kernel_call or 0])


def _explain_untraced(watcher: CallWatcher | InputsWatcher) -> str:
    if isinstance(watcher, InputsWatcher):
        return "its queries and keys are named by kernel_inputs, which compiled code does not hand out"
    others = sorted(set(watcher.kernels) - {FUSED})
    if others:
        return f"it attends by {' and '.join(others)}, and compiled code shows F.{FUSED} alone"
    if len(join_slices(watcher.calls)) < len(watcher.calls):
        return "its kernel takes the batch in slices, which compiled code does not show as such"
    return ""


def several_calls(path: str, count: int, calls: Iterable[KernelCall] = ()) -> CaptureError:
    """Build the error for a layer that attends several times in one forward."""
    shapes = ", ".join(f"{list(call.query.shape)} x {list(call.key.shape)}" for call in calls)
    return CaptureError(
        f"layer {path!r} called the attention kernel {count} times in one forward of the module"
        + (f", with queries x keys {shapes}" if shapes else "")
        + "; which to supervise is not defined. Pass kernel_call= to cameo.wrap, counted from 0, or point layer= at "
        "the submodule that makes the cross-view call. If each call is for one sample, they are joined where there is "
        "one for each sample of the correspondence, and all have the same heads and scale."
    )


def per_head(layer: AttentionLayer, call: KernelCall, samples: int | None = None) -> CapturedAttention:
    """Bring queries, keys and mask of a call to `[A, K, ...]`, keys repeated where heads share them.

    Raises:
        CaptureError: the number of heads is another than the layer's.
    """
    query, key = (_heads_apart(layer, tensor) for tensor in (call.query, call.key))
    if query.ndim == 4 == key.ndim and 0 < key.shape[1] < layer.heads and layer.heads % key.shape[1] == 0:
        key = key.repeat_interleave(layer.heads // key.shape[1], dim=1)  # grouped queries share keys
    if query.ndim != 4 or query.shape[1] != layer.heads or key.shape[1] != layer.heads:
        raise CaptureError(
            f"layer {layer.path!r}: expected queries and keys with {layer.heads} heads, got "
            f"{list(query.shape)} and {list(key.shape)} for [AB, K, L, D]; pass heads= to cameo.wrap"
        )
    mask = call.mask
    if mask is not None and mask.ndim > 2 and mask.shape[:-2] == call.query.shape[:-2]:
        mask = _heads_apart(layer, mask)
    elif mask is not None and call.query.ndim == 3 and mask.ndim == 3:
        mask = mask[:, None]
    lengths = call.query_lengths, call.key_lengths
    return CapturedAttention(query, key, call.scale, mask, *lengths, call.trains, samples)


def _heads_apart(layer: AttentionLayer, tensor: Tensor) -> Tensor:
    """Bring `[A * K, L, D]`, or five axes with the heads among the first three, to `[A, K, L, D]`."""
    if tensor.ndim == 3:
        if tensor.shape[0] % layer.heads:
            raise CaptureError(
                f"layer {layer.path!r}: {tensor.shape[0]} attention rows do not divide into {layer.heads} heads; pass "
                "heads= to cameo.wrap"
            )
        return rearrange(tensor, "(a k) l d -> a k l d", k=layer.heads)
    if tensor.ndim == 5:
        axis = next((axis for axis in (2, 1, 0) if tensor.shape[axis] == layer.heads), 2)
        return tensor.movedim(axis, 2).flatten(0, 1)
    return tensor
