"""Find attention that runs unseen beside the call that is supervised, in the same module.

A fused kernel that `cameo.attention.kernel_calls` does not know leaves no trace. If a module calls another kernel as
well, that one would be supervised without a word. So once for each layer, in its first supervised forward, its module
runs a few times more, with what all seen calls return held fixed: then no view may depend on the tokens of another.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

from cameo.attention.capture import AttentionLayer, captured_call
from cameo.attention.kernel_calls import EXPLICIT, CallWatcher, unwatched
from cameo.attention.kernels.call import KernelCall, join_slices
from cameo.attention.kernels.known import Kernel
from cameo.checks.rerun import CannotTell, left_as_it_was, run_again
from cameo.errors import CaptureError
from cameo.geometry.grids import TokenGrids

if TYPE_CHECKING:
    from cameo.correspondence import Correspondence

__all__ = ["UnseenKernels"]

# Without an answer the check is repeated in forwards 2, 4, 8, ..., since what hides the answer may pass: an output
# projection of zeros shows nothing until it has learned.
LAST_FORWARD = 512
# What a held call still contributes to other views must stay below this share of what the call contributes itself.
# Without another path it is exactly 0, or a rounding error where the module quantizes all tokens by a common scale.
SHARE = 0.01
# Elements of an output that differ by less than this share of the largest difference are taken as unchanged.
NOISE = 1e-3


class UnseenKernels:
    """Looks at each supervised layer until it is known whether another attention runs unseen beside the seen one.

    The layer's module runs six times more, on copies of its inputs, before it hands on what it returned. Random
    state, buffers and attributes are as before, the hooks of its submodules do not see these runs, and no tensor of
    them is in a graph of the model.

    It cannot tell, and the forward goes on, where

    - the inputs that hold the tokens are no arguments of the module's forward, or each influences all views (a
      normalization over all views, a convolution over frames before the attention);
    - the output mixes the views once more after the seen call, or does not depend on it (its projection is zero);
    - the layer attends within each view and its grid has fewer than 4 rows;
    - the module cannot run a second time, or its random state cannot be held on its device.

    Attributes:
        answers: for each layer that was looked at its path and `""`, or why it could not be told.

    Example:
        >>> from cameo import Correspondence, TokenLayout
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.scaled_dot_product_attention(x, x, x)
        >>> model = nn.Sequential(Attention())
        >>> layer = AttentionLayer(0, "0", heads=1, layout=TokenLayout("b (v h w)"))
        >>> match = Correspondence(torch.full((1, 2, 2, 4), -1), ((2, 2), (2, 2)))
        >>> check = UnseenKernels()
        >>> with check.look(model, [layer], [match]):
        ...     _ = model(torch.randn(1, 1, 8, 4))
        >>> check.answers
        {'0': ''}
    """

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self._forwards = 0

    def is_due(self, layers: Sequence[AttentionLayer]) -> bool:
        """Whether the next `look` would make one of these layers run again."""
        number = self._forwards + 1
        is_one = number <= LAST_FORWARD and not number & (number - 1)
        return is_one and any(self.answers.get(layer.path) != "" for layer in layers)

    @contextmanager
    def look(
        self, model: nn.Module, layers: Sequence[AttentionLayer], matches: Sequence[Correspondence]
    ) -> Iterator[None]:
        """Check those layers without an answer that run inside the block; to be entered before their capture.

        Args:
            model: the module in which the layers' paths are looked up.
            layers: supervised layers; those whose kernel is named by `kernel_inputs` are left out.
            matches: of each layer; their batch size and token grids are read.

        Raises:
            CaptureError: inside the block, by the module that calls an unseen attention.
        """
        due = self.is_due(layers)
        self._forwards += 1
        with ExitStack() as stack:
            for layer, match in zip(layers, matches, strict=True):
                if due and layer.kernel_inputs is None and self.answers.get(layer.path) != "":
                    module = model.get_submodule(layer.path)
                    for hook in self._hooks(module, layer, match.batch_size, match.token_grids):
                        stack.callback(hook.remove)
            yield

    def _hooks(
        self, module: nn.Module, layer: AttentionLayer, batch: int, token_grids: TokenGrids
    ) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
        thread, waiting = threading.get_ident(), []

        def keep_inputs(module: nn.Module, *inputs: Any) -> None:
            if threading.get_ident() == thread:
                # A copy of the containers, since the module may take something out of them.
                waiting.append(tree_map(lambda leaf: leaf, inputs))

        def check(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() != thread or not waiting:
                return
            subject = _Subject(module, layer, waiting.pop(), batch, tuple(token_grids))
            if self.answers.get(layer.path) == "":
                return
            try:
                found = subject.check()
            except CannotTell as reason:
                self.answers[layer.path] = str(reason)
            except Exception as error:  # of the module, which may not be made to run twice
                self.answers[layer.path] = f"it did not run again: {type(error).__name__}: {error}"
            else:
                if found:
                    self._forwards = 0  # to look again in the next forward
                    raise CaptureError(found)
                self.answers[layer.path] = ""

        return (
            module.register_forward_pre_hook(keep_inputs, with_kwargs=True),
            # Prepended, so that it runs before a hook of FSDP that frees the parameters.
            module.register_forward_hook(check, with_kwargs=True, prepend=True),
        )


class _HeldCalls(CallWatcher):
    """Multiplies what each seen call returns by a number per query, so that it depends on nothing where that is 0.

    Explicit attention is multiplied at its softmax.
    """

    def __init__(self, layer: str, kept: Sequence[Tensor | None]) -> None:
        super().__init__(layer)
        self._kept = kept  # per call, for all queries as the kernel orders them; None and calls beyond: 0 for all

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        count = len(self.calls)
        output = super().__torch_function__(func, types, args, kwargs)
        return output if len(self.calls) == count else self._hold(output, count)

    def kernel_call(self, kernel: Kernel, run: Callable[[BoundArguments], Any], given: BoundArguments) -> Any:
        """Run a kernel of another package, which returns its tokens where it takes them."""
        count = len(self.calls)
        output = super().kernel_call(kernel, run, given)
        if len(self.calls) == count:
            return output
        if not kernel.tensors or not isinstance(output, Tensor):
            raise CannotTell(f"it attends by {kernel.title}, whose output cannot be held")
        axes = (1, 2) if output.ndim == 4 and kernel.token_axis == 1 else (1, 1)
        return self._hold(output.transpose(*axes), count).transpose(*axes)

    def _explicit(self, logits: Tensor, *arguments: Any, **options: Any) -> None:
        """Record the call without measuring its scale, which was done in the forward itself."""
        if self._ends_product(logits, *arguments, **options):
            product, self._product = self._product, None
            assert product is not None
            self._keep(EXPLICIT, KernelCall(product.query, product.key, 1.0))

    def _hold(self, output: Any, call: int) -> Any:
        if not isinstance(output, Tensor):
            raise CannotTell("it attends by torch.nn.MultiheadAttention, which projects its output out of sight")
        kept = self._kept[call] if call < len(self._kept) else None
        return output * (0 if kept is None else kept.to(output).reshape(*output.shape[:-1], 1))


@dataclass(frozen=True)
class _Group:
    """Some tokens of the call: whole views, or where a layer attends within each view the rows at one edge of all.

    Queries `[A, L]` and keys `[A', M]`, both bool.
    """

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class _Subject:
    """A module that has just run, with the arguments it was given."""

    module: nn.Module
    layer: AttentionLayer
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    batch: int
    token_grids: TokenGrids

    def check(self) -> str:
        """Return what to say if another attention runs, "" if none does; an error if that is not known."""
        leaves, form = tree_flatten(self.inputs)
        with left_as_it_was(self.module), unwatched():
            traced = self._trace(leaves, form)
            held = self._outputs(leaves, form, [])
            contributed = [_changes(self._outputs(leaves, form, kept), held) for kept in traced.kept]
            noise = [NOISE * _largest(changes) for changes in contributed]
            if not all(0 < level < torch.inf for level in noise):
                raise CannotTell("its output does not depend on what the seen call returns")
            places = _apart(
                *([change > level for change in changes] for changes, level in zip(contributed, noise, strict=True))
            )
            if not all(any(where.any() for where in group) for group in places):
                raise CannotTell("its output mixes the tokens once more after the seen call")
            for group, others in ((0, 1), (1, 0)):
                moved = self._outputs(_moved(leaves, traced.exclusive[group]), form, [])
                reached = _largest(_at(places[others], _changes(moved, held)))
                own = _largest(_at(places[others], contributed[others]))
                if not math.isfinite(reached):
                    raise CannotTell("its output is not finite for other inputs")
                if reached > SHARE * own:
                    return _explain(self.layer, reached / own)
        return ""

    def _outputs(self, leaves: Sequence[Any], form: TreeSpec, kept: Sequence[Tensor | None]) -> list[Tensor]:
        with _HeldCalls(self.layer.path, kept):
            return run_again(self.module, leaves, form)

    def _trace(self, leaves: list[Any], form: TreeSpec) -> _Traced:
        """Run once with a small graph, to see which inputs the queries and keys of each group depend on."""
        inputs = [
            leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for leaf in leaves
        ]
        floating = [leaf for leaf in inputs if isinstance(leaf, Tensor) and leaf.requires_grad]
        watcher = _HeldCalls(self.layer.path, [])
        # Hooks of their own, since gradient checkpointing counts what is saved while the module runs.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            with watcher:
                run_again(self.module, inputs, form)
            call = captured_call(self.layer, watcher.calls)
        if call is None:
            raise CannotTell("no attention kernel was seen when the module ran again")
        if call.samples is not None or call.key_lengths is not None:
            raise CannotTell("the number of tokens differs between samples")
        groups = self._groups(call.query, call.key)
        by_key = [_dependence([(call.key, group.key)], floating) for group in groups]
        by_both = [_dependence([(call.query, group.query), (call.key, group.key)], floating) for group in groups]
        exclusive = _apart(*by_both)
        if not any(places.any() for group in exclusive for places in group):
            exclusive = _apart(*by_key)
        if not any(places.any() for group in exclusive for places in group):
            raise CannotTell("no argument of the module's forward influences the tokens of some views alone")
        where = {id(leaf): number for number, leaf in enumerate(inputs)}
        return _Traced(
            [self._kept(watcher, group.query) for group in groups],
            [{where[id(leaf)]: places for leaf, places in zip(floating, group, strict=True)} for group in exclusive],
        )

    def _groups(self, query: Tensor, key: Tensor) -> tuple[_Group, _Group]:
        layout, grids = self.layer.layout, self.token_grids
        try:
            places = [
                layout.places(of, batch=self.batch, token_grids=grids, tokens=tensor.shape[2]).to(query.device)
                for of, tensor in (("query", query), ("key", key))
            ]
        except ValueError as error:
            raise CannotTell("the attention call has another shape than the layout says") from error
        if [place.shape[:2] for place in places] != [(tensor.shape[0], tensor.shape[2]) for tensor in (query, key)]:
            raise CannotTell("the attention call has another shape than the layout says")
        if layout.within_views:
            rows = self.token_grids[0][0]
            if rows < 4:
                raise CannotTell("it attends within each view, and the token grid has fewer than 4 rows")
            chosen = [torch.arange(rows // 3), torch.arange(rows - rows // 3, rows)]
        else:
            views = places[1][..., 1].unique()
            views = views[views >= 0]
            chosen = [views[: len(views) // 2], views[len(views) // 2 :]]
        axis = 2 if layout.within_views else 1
        first, second = (_Group(*(torch.isin(place[..., axis], some.to(place)) for place in places)) for some in chosen)
        return first, second

    def _kept(self, watcher: CallWatcher, queries: Tensor) -> Sequence[Tensor | None]:
        """For each call of the kernel the queries whose output it keeps, in the kernel's order; others become 0."""
        rows = queries[:, None].expand(-1, self.layer.heads, -1).flatten(0, 1)
        joined = join_slices(watcher.calls)
        if len(joined) == len(watcher.calls):
            chosen = self.layer.kernel_call or 0
            return [rows if number == chosen else None for number in range(len(joined))]
        counts = [call.query[..., 0].numel() // rows.shape[1] for call in watcher.calls]
        return rows.split(counts)


@dataclass(frozen=True)
class _Traced:
    """For each group what `_HeldCalls` keeps, and by the number of an input the elements that belong to it alone."""

    kept: list[Sequence[Tensor | None]]
    exclusive: list[dict[int, Tensor]]


def _dependence(of: Sequence[tuple[Tensor, Tensor]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """For each input which of its elements these tokens `[A, L]` of tensors `[A, K, L, D]` depend on."""
    of = [(tensor, tokens) for tensor, tokens in of if tensor.requires_grad]
    if not (of and inputs):
        return [torch.zeros_like(leaf, dtype=torch.bool) for leaf in inputs]
    # Numbers that differ from channel to channel, since the sum over a normalized token is constant.
    cotangents = [
        (tokens[:, None, :, None] * torch.arange(1, tensor.shape[-1] + 1, device=tensor.device).sin()).to(tensor)
        for tensor, tokens in of
    ]
    tensors = [tensor for tensor, _ in of]
    gradients = torch.autograd.grad(
        tensors,
        inputs,
        [cotangent.expand_as(tensor) for cotangent, tensor in zip(cotangents, tensors, strict=True)],
        retain_graph=True,
        allow_unused=True,
    )
    return [
        torch.zeros_like(leaf, dtype=torch.bool) if gradient is None else gradient != 0
        for leaf, gradient in zip(inputs, gradients, strict=True)
    ]


def _apart(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Drop from both what is in the other."""
    pairs = list(zip(first, second, strict=True))
    return [one & ~other for one, other in pairs], [other & ~one for one, other in pairs]


def _moved(leaves: Sequence[Any], places: dict[int, Tensor]) -> list[Any]:
    """Add noise of the tensors' own size at some places of them, part of it common to all tokens.

    What is common does not average out in attention over many tokens. Which axis holds the channels is not known, so
    there is a part for every axis.
    """
    moved = list(leaves)
    for number, chosen in places.items():
        leaf = leaves[number]
        if chosen.any():
            generator = torch.Generator(leaf.device).manual_seed(number)
            exact = {"device": leaf.device, "dtype": torch.float32, "generator": generator}
            noise = torch.randn(leaf.shape, **exact)
            for axis, length in enumerate(leaf.shape):
                noise += torch.randn(length, **exact).reshape(-1, *[1] * (leaf.ndim - axis - 1))
            size = leaf[chosen].float().square().mean().sqrt()
            moved[number] = torch.where(chosen, leaf + (size * noise).to(leaf), leaf)
    return moved


def _changes(outputs: Sequence[Tensor], held: Sequence[Tensor]) -> list[Tensor]:
    return [(output.float() - before.float()).abs() for output, before in zip(outputs, held, strict=True)]


def _at(places: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    return [value[where] for value, where in zip(values, places, strict=True)]


def _largest(values: Sequence[Tensor]) -> float:
    return max((float(value.max()) for value in values if value.numel()), default=0.0)


def _explain(layer: AttentionLayer, share: float) -> str:
    whom = "places of the same view" if layer.layout.within_views else "views"
    return (
        f"layer {layer.path!r}: another attention runs unseen in this module, beside the kernel call that would be "
        f"supervised. With what the seen call returns held fixed, its output still changes with the tokens of other "
        f"{whom}, by {share:.0%} of what that call contributes. Likely cause: a fused kernel such as flash-attn, "
        "SageAttention or flex_attention does part of the work. Cure: let all of it run by "
        'F.scaled_dot_product_attention (models of diffusers: model.set_attention_backend("native")), or point layer= '
        "at the submodule that makes the supervised call alone. If what mixes the tokens is known and is no attention, "
        "set model.check_unseen = False"
    )
