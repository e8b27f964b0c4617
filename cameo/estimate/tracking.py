"""What the operators of a computation take: the memory of their tensors, counted as these come and go, and FLOPs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["INSIDE", "Tracker"]

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
INSIDE = "inside of the alignment loss"
DEVICE = torch.ops.prim.device.default
ALL = (torch.ops.aten.all.default, torch.ops.aten.all.dim)


class Tracker(TorchDispatchMode):
    """Counts the bytes of all tensors that operators return, while they live, and the FLOPs of products.

    Example:
        >>> with Tracker() as tracker:
        ...     kept = torch.ones(1 << 20) + 1      # 4 MB, and 4 MB of the ones
        ...     del kept
        >>> tracker.peak, tracker.held
        (8388608, 0)

    A tensor that shares the memory of another one is not counted again. What an operator allocates inside and releases
    before it returns is not seen, except where `inside` says it.

    Where the computation reads a value of a tensor without contents, it gets some value: True of an `all`, False of
    another bool, 1 of a number.

    Args:
        inside: for operators that allocate much inside: how many bytes, a function of their arguments.
        products: for operators that `torch.utils.flop_counter` does not know: their FLOPs, a function of their
            arguments.

    Attributes:
        held: bytes that are held now.
        peak: largest number of bytes that were held at a time since `reset`.
        at_peak: bytes by kind when the peak was reached.
        by_kind: bytes by kind that are held now.
        kind: kind of what is allocated from now on.
        flops: floating-point operations so far.
    """

    def __init__(
        self,
        inside: Mapping[Any, Callable[..., int]] | None = None,
        products: Mapping[Any, Callable[..., int]] | None = None,
    ) -> None:
        super().__init__()
        self.inside, self.products = dict(inside or {}), dict(products or {})
        self.held = self.peak = self.flops = 0
        self.kind = "activations"
        self.by_kind: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # asked for at every turn, and allocates nothing
            return func(*args)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _some_value(args[0])
        kwargs = kwargs or {}
        if func in self.inside:
            size = self.inside[func](*args, **kwargs)
            self._add(INSIDE, size)
            self._add(INSIDE, -size)
        result = func(*args, **kwargs)
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.see(value)
        if func in ALL and isinstance(result, FakeTensor):
            result._answers_all = True  # type: ignore[attr-defined]
        self._count(func, args, kwargs, result)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if func in self.products:
            self.flops += self.products[func](*args, **kwargs)
        elif func._overloadpacket == ATTENTION:
            self.flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif func._overloadpacket == ATTENTION_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
        elif count := flop_registry.get(func._overloadpacket):
            self.flops += int(count(*args, **kwargs, out_val=result))

    def see(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count the memory of a tensor, if it is not counted already; with `kind` it is of that kind from now on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known[0]() is not None:
            if kind is not None and known[2] != kind:
                self._known[key] = (known[0], known[1], kind)
                self._add(known[2], -known[1])
                self._add(kind, known[1])
            return
        size, kind = storage.nbytes(), kind or self.kind
        self._known[key] = (weakref.ref(storage, lambda _: self._forget(key)), size, kind)
        self._add(kind, size)

    def see_all(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self.see(tensor, kind)

    def reset(self) -> None:
        """Begin a new peak with what is held now."""
        self.peak, self.at_peak = self.held, dict(self.by_kind)

    @contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """Let what is allocated inside of the block be of a kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def _add(self, kind: str, size: int) -> None:
        self.by_kind[kind] = self.by_kind.get(kind, 0) + size
        self.held += size
        if self.held > self.peak:
            self.peak, self.at_peak = self.held, dict(self.by_kind)

    def _forget(self, key: int) -> None:
        _, size, kind = self._known.pop(key)
        self._add(kind, -size)


def _some_value(tensor: Tensor) -> bool | int | float:
    """Return a value in place of one that is not computed: a step count, a norm, or the answer of a check."""
    if tensor.dtype == torch.bool:
        return hasattr(tensor, "_answers_all")
    return 1.0 if tensor.is_floating_point() else 1
