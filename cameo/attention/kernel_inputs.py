"""Queries and keys of a kernel that nothing sees, where the caller names them.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import EinopsError, rearrange
from torch import Tensor, nn

from cameo.attention.kernels.call import KernelCall
from cameo.errors import CaptureError, unknown_name

__all__ = ["InputsWatcher", "KernelInputs"]

SIDES = ("query", "key")
Keep = Callable[[str, object], None]


@dataclass(frozen=True)
class KernelInputs:
    """Where the queries and keys that the kernel receives are found in an attention module, for kernels of your own.

    Example:
        >>> KernelInputs("core:q", "core:k", axes="a l k d")  # arguments of the submodule `core`
        KernelInputs(query='core:q', key='core:k', axes='a l k d', scale=None)
        >>> KernelInputs("norm_q", "norm_k", axes="a l (k d)").query  # what two submodules return
        'norm_q'

    They have to be what the kernel multiplies: after normalization and rotary embedding. What the kernel does beyond
    scaling, such as masking keys, is not seen.

    Args:
        query, key: a submodule of the layer, whose output it is (`"norm_q"`), or an argument of its forward, by name or
            number (`"core:q"`, `"core:0"`); `":q"` is an argument of the layer itself.
        axes: how they lie in memory, in the notation of einops: a rows of the attention batch, k heads, l tokens,
            d channels of a head.
        scale: the kernel's factor of q.k; None is D ** -0.5.

    Raises:
        ValueError: one of them cannot be read.
    """

    query: str
    key: str
    axes: str = "a k l d"
    scale: float | None = None

    def __post_init__(self) -> None:
        for side in SIDES:
            place = getattr(self, side)
            if not isinstance(place, str) or not place or place.count(":") > 1 or place.endswith(":"):
                raise ValueError(
                    f'kernel_inputs: {side}: expected a submodule of the layer, as "norm_q", or an argument of its '
                    f'forward, as "core:q" or "core:0", got {place!r}'
                )
        groups = re.findall(r"\([^()]*\)|[^\s()]+", self.axes) if isinstance(self.axes, str) else []
        try:
            rearrange(torch.zeros([1] * len(groups)), f"{self.axes} -> a k l d", a=1, k=1, l=1, d=1)
        except EinopsError:
            raise ValueError(
                'kernel_inputs: axes: expected an order of a k l d, as "a l k d", "a l (k d)" or "(a k) l d", got '
                f"{self.axes!r}"
            ) from None
        number = isinstance(self.scale, int | float) and not isinstance(self.scale, bool)
        if self.scale is not None and not (number and math.isfinite(self.scale)):
            raise ValueError(f"kernel_inputs: scale: expected a finite factor of q.k or None, got {self.scale!r}")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> KernelInputs:
        """Build from keyword arguments, such as `cameo_config.json` holds them.

        Example:
            >>> KernelInputs.from_mapping({"query": "norm_q", "key": "norm_k"}).axes
            'a k l d'

        Raises:
            ValueError: a name is unknown or missing, or a value cannot be read.
        """
        names = list(inspect.signature(cls).parameters)
        for name in given:
            if name not in names:
                raise unknown_name("name in kernel_inputs", name, names)
        if missing := [side for side in SIDES if side not in given]:
            raise ValueError(f"kernel_inputs: {missing[0]} is missing, got {dict(given)!r}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)

    def check(self, layer: str, module: nn.Module) -> None:
        """Raise a ValueError unless the module at path `layer` has the submodules and arguments."""
        for side in SIDES:
            path, _, argument = getattr(self, side).partition(":")
            parts = dict(module.named_modules())
            if path not in parts:
                raise unknown_name(f"kernel_inputs: {side}: submodule of layer {layer!r}", path, list(parts)[1:])
            if argument:
                _find_argument(parts[path], argument, f"kernel_inputs: {side}: argument of {path or layer!r}")

    @contextmanager
    def watched(self, module: nn.Module, keep: Keep) -> Iterator[None]:
        """Hand the queries and keys of each run of the module on, `keep("query", tensor)`, until the block ends."""
        handles = []
        for side in SIDES:
            path, _, argument = getattr(self, side).partition(":")
            part = module.get_submodule(path)
            if argument:
                handles.append(part.register_forward_pre_hook(_taker(argument, side, keep), with_kwargs=True))
            else:
                handles.append(part.register_forward_hook(lambda _, __, output, side=side: keep(side, output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _find_argument(module: nn.Module, argument: str, what: str) -> None:
    parameters = inspect.signature(module.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if argument.isdecimal():
        if int(argument) >= len(positional) and inspect.Parameter.VAR_POSITIONAL not in kinds:
            raise ValueError(f"{what}: expected a number below {len(positional)}, got {argument}")
    elif argument not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise unknown_name(what, argument, list(parameters))


def _taker(argument: str, side: str, keep: Keep) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        if argument.isdecimal():
            found = given.args[int(argument)] if int(argument) < len(given.args) else None
        else:
            found = {**given.arguments, **given.kwargs}.get(argument)
        keep(side, found)

    return take


class InputsWatcher:
    """Collects the named queries and keys of one run of a layer, as `CallWatcher` collects the calls that it sees.

    Example:
        >>> watcher = InputsWatcher("attn", KernelInputs("norm_q", "norm_k", axes="a l (k d)"), heads=2)
        >>> watcher.keep("query", torch.zeros(1, 12, 8))
        >>> watcher.keep("key", torch.zeros(1, 12, 8))
        >>> watcher.calls[0].query.shape
        torch.Size([1, 2, 12, 4])
    """

    def __init__(self, layer: str, inputs: KernelInputs, heads: int) -> None:
        self.layer, self._inputs, self._heads = layer, inputs, heads
        self._kept: dict[str, list[object]] = {side: [] for side in SIDES}

    def __enter__(self) -> InputsWatcher:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def keep(self, side: str, value: object) -> None:
        """Record what was found for "query" or "key"."""
        self._kept[side].append(value)

    @property
    def calls(self) -> list[KernelCall]:
        """The calls, in the order in which they were made.

        Raises:
            CaptureError: queries or keys were not found, or have another shape than `axes` says.
        """
        queries, keys = (self._kept[side] for side in SIDES)
        if not queries or len(queries) != len(keys):
            raise CaptureError(
                f"layer {self.layer!r} ran, and {self._inputs!r} gave {len(queries)} queries and {len(keys)} keys; "
                "name modules that run once for each call of the kernel"
            )
        return [self._call(query, key) for query, key in zip(queries, keys, strict=True)]

    def _call(self, query: object, key: object) -> KernelCall:
        query = self._ordered("query", query, k=self._heads)
        key = self._ordered("key", key, a=query.shape[0], d=query.shape[3])
        scale = query.shape[3] ** -0.5 if self._inputs.scale is None else float(self._inputs.scale)
        return KernelCall(query, key, scale)

    def _ordered(self, side: str, value: object, **lengths: int) -> Tensor:
        place, axes = getattr(self._inputs, side), self._inputs.axes
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"layer {self.layer!r}: expected a tensor as {side}={place!r} of kernel_inputs, got "
                f"{type(value).__name__}"
            )
        try:
            return rearrange(value, f"{axes} -> a k l d", **lengths)
        except EinopsError:
            known = " and ".join(f"{name} = {length}" for name, length in lengths.items())
            raise CaptureError(
                f'layer {self.layer!r}: expected {side}={place!r} of kernel_inputs with the axes "{axes}" and {known}, '
                f"got {list(value.shape)}; correct axes="
            ) from None
