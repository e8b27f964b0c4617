"""A pretended accelerator in CPU memory, which counts what a step asks of its device and where the host waits for it.

Tensors of the device `pretend` hold a tensor of the CPU. Operators that mix both devices raise as on a GPU, and those
that mix types as on CUDA (`benchmarks.step.pretend_dtypes`, which has the casts of autocast too). Every operator that
would launch something is counted, and so is every place where the host would wait: a value that is read,
a shape that depends on values, a blocking copy. Nothing is timed, and all results are those of the CPU.

It needs torch 2.10 or later, and everything on the device must happen inside of the block.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.utils.backend_registration as registration
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.step.pretend_dtypes import mixed_types, register_autocast

__all__ = ["NAME", "PretendDevice", "available"]

NAME = "pretend"
ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / folder) for folder in ("cameo", "adapters", "recipes", "benchmarks", "tests"))
# The files that pretend, in which nothing waits.
PRETENDED = str(Path(__file__).parent / "pretend_")
aten = torch.ops.aten
# What reads values, or has a shape that depends on them.
READS = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.nonzero_numpy.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
# Neither launched nor views by their schema.
NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::lift", "aten::set_", "aten::resize_")


def available() -> bool:
    """Whether this torch can have a device that is made in Python."""
    return hasattr(registration, "_setup_privateuseone_for_python_backend")


class _Module(getattr(registration, "_DummyBackendModule", object)):  # type: ignore[misc]
    """What torch, accelerate and autocast ask of the module of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def get_rng_state_all(self) -> list[Tensor]:
        return []

    def __getattr__(self, name: str) -> Any:
        if name in (
            "synchronize",
            "empty_cache",
            "set_rng_state",
            "set_rng_state_all",
            "manual_seed",
            "manual_seed_all",
        ):
            return lambda *_: None
        raise AttributeError(name)


class _Pretended(Tensor):
    """A tensor of the device; `held` is the one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _Pretended:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=f"{NAME}:0",
            requires_grad=False,
        )
        tensor.held = held
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}({self.held!r})"

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: _Pretended) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.held = other.held

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _index_on_device(args[1]), *args[2:])
        elif func in (Tensor.__float__, Tensor.__index__) and PretendDevice.current is not None:
            PretendDevice.current.sync("_local_scalar_dense")
            args = (args[0].held,)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if PretendDevice.current is None:
            raise RuntimeError(f"{func}: a tensor of the pretended device is used outside of its block")
        return PretendDevice.current.run(func, args, kwargs or {})


class PretendDevice(TorchDispatchMode):
    """A block in which the device `pretend` exists, and what was asked of it so far.

    Example:
        >>> with PretendDevice() as device:
        ...     x = torch.ones(2, device=device.name)
        ...     with device.part("mine"):
        ...         known = bool((x + x).any())
        >>> known, device.launches["mine"].total(), device.syncs["mine"].total()
        (True, 3, 1)

    Args:
        parts: name of a part of the step by the beginning of a path within the repository, as "cameo/correspondence" or
            "cameo/alignment/rows.py"; an operator belongs to the part of the innermost file that has one.

    Attributes:
        launches: by part, how often each operator was called that is no view and only allocates nothing.
        syncs: by part, how often the host waited, by reason and line.
        name: of the device.
    """

    current: PretendDevice | None = None
    casts: torch.library.Library
    name = NAME

    def __init__(self, parts: Mapping[str, str] | None = None) -> None:
        super().__init__()
        if not available():
            raise RuntimeError("PretendDevice: needs torch 2.10 or later, whose devices can be made in Python")
        if torch._C._get_privateuse1_backend_name() != NAME:
            registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
            PretendDevice.casts = register_autocast(NAME)
        self.parts = {str(ROOT / path): part for path, part in (parts or {}).items()}
        self.launches: dict[str, Counter[str]] = {}
        self.syncs: dict[str, Counter[str]] = {}
        self._named: list[str] = []
        self._silent = 0
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> PretendDevice:
        if PretendDevice.current is None:
            PretendDevice.current = self
            self._patches.enter_context(_patched(self))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if PretendDevice.current is self and not self._inside:
            PretendDevice.current = None
            self._patches.close()

    _inside = 0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count everything in this block as this part of the step."""
        self._named.append(name)
        try:
            yield
        finally:
            self._named.pop()

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count nothing in this block."""
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count everything in this block, also within a block that is uncounted."""
        silent, self._silent = self._silent, 0
        try:
            yield
        finally:
            self._silent = silent

    def clear(self) -> None:
        """Forget what was counted."""
        self.launches, self.syncs = {}, {}

    def launch(self, name: str, count: int = 1) -> None:
        """Count launches of a kernel that is no operator."""
        if not self._silent:
            self.launches.setdefault(self._place()[0], Counter())[name] += count

    def sync(self, reason: str) -> None:
        """Count that the host waits here."""
        if not self._silent:
            part, line = self._place()
            self.syncs.setdefault(part, Counter())[f"{reason} at {line}"] += 1

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Compute an operator on what its tensors hold."""
        own = torch._library.custom_ops.OPDEFS.get(func._schema.name) if func.namespace == "cameo" else None
        if own is not None or func._can_decompose():  # what such an operator computes is counted inside of it
            self._inside += 1
            try:
                with self:
                    return own._init_fn(*args, **kwargs) if own is not None else func.decompose(*args, **kwargs)
            finally:
                self._inside -= 1
        if func is aten._foreach_copy_.default and not all(isinstance(one, _Pretended) for one in [*args[0], *args[1]]):
            for target, source in zip(*args[:2], strict=True):  # as CUDA does between devices
                self.run(aten.copy_.default, (target, source, *args[2:]), {})
            return None
        self._count(func, args, kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Pretended)]
        held_args, held_kwargs = tree_map(_held, (args, kwargs))
        if held_kwargs.get("device") is not None:
            held_kwargs["device"] = torch.device("cpu")
        held_kwargs.pop("pin_memory", None)
        if func is aten.bmm.dtype:  # which a CPU does not have
            result = torch.bmm(held_args[0].to(held_args[2]), held_args[1].to(held_args[2]))
        else:
            result = func(*held_args, **held_kwargs)
        if func in READS and not isinstance(result, Tensor | tuple | list):
            return result
        if func is aten._to_copy.default and _goes_to_cpu(kwargs):
            return result
        given = {id(leaf.held): leaf for leaf in leaves}

        def pretended(value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, _Pretended):
                return value
            return given[id(value)] if func._schema.is_mutable and id(value) in given else _Pretended(value)

        if func is aten.copy_.default and not isinstance(args[0], _Pretended):
            return args[0]
        return tree_map(pretended, result)

    def _count(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [isinstance(tensor, _Pretended) for tensor in tensors]
        if func is aten._to_copy.default or func is aten.copy_.default:
            source = args[1] if func is aten.copy_.default else args[0]
            to_cpu = _goes_to_cpu(kwargs) if func is aten._to_copy.default else not isinstance(args[0], _Pretended)
            waits = not (kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
            from_cpu = not isinstance(source, _Pretended)
            if isinstance(source, _Pretended) and to_cpu:
                self.sync("device to host" if waits else "device to host, awaited later")
            elif from_cpu and not to_cpu and waits and source.numel():
                self.sync("host to device, blocking")
        elif any(ours) and not all(ours):
            strangers = [tensor for tensor, own in zip(tensors, ours, strict=True) if not own and tensor.ndim]
            if strangers and func in INDEXING:
                self.sync("index on the host")
            elif strangers:
                shapes = [tuple(tensor.shape) for tensor in strangers]
                raise RuntimeError(f"{func}: mixes {NAME} and cpu {shapes} at {self._place()[1]}")
        if mixed := mixed_types(func, args, kwargs):
            raise RuntimeError(f"{func}: mixes {sorted(map(str, mixed))}, which CUDA refuses, at {self._place()[1]}")
        if func in READS:
            self.sync(func._schema.name.removeprefix("aten::"))
        if func in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.sync("mask as an index")
        if not _is_view(func) and not func._schema.name.startswith(NO_LAUNCH):
            self.launch(func._schema.name)

    def _place(self) -> tuple[str, str]:
        """Return the part and the line of the repository that the operator belongs to."""
        part = self._named[-1] if self._named else ""
        line = ""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            path = frame.f_code.co_filename
            if path.startswith(OURS) and not path.startswith(PRETENDED):
                line = line or f"{Path(path).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
                part = part or next((name for start, name in self.parts.items() if path.startswith(start)), "")
                if part:
                    break
            frame = frame.f_back
        return part or "other", line or "outside of the repository"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        on_device = device is not None and torch.device(device).type == NAME
        if on_device or any(isinstance(leaf, _Pretended) for leaf in tree_leaves((args, kwargs))):
            return self.run(func, args, kwargs)
        return func(*args, **kwargs)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, _Pretended) else value


def _index_on_device(index: Any) -> Any:
    """Turn lists in an index into tensors of the device, which torch would do in C++."""
    if isinstance(index, tuple):
        return tuple(map(_index_on_device, index))
    if not isinstance(index, list):
        return index
    return torch.tensor(index, device=NAME, dtype=None if index else torch.long)


def _goes_to_cpu(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _is_view(func: Any) -> bool:
    results = func._schema.returns
    return bool(results) and all(one.alias_info is not None and not one.alias_info.is_write for one in results)


@contextlib.contextmanager
def _patched(device: PretendDevice) -> Iterator[None]:
    """Let functions know the device that torch computes in C++, where no operator is dispatched."""
    before = torch.tensor, torch.as_tensor, Tensor.new_tensor, Tensor.tolist, Tensor.numpy, Tensor.pin_memory
    make, take, _, to_list, to_numpy, _ = before

    def wanted(target: Any) -> bool:
        return target is not None and torch.device(target).type == NAME

    def tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> Tensor:
        if not wanted(device):
            return make(data, device=device, requires_grad=requires_grad, **options)
        return make(data, **options).to(device).requires_grad_(requires_grad)

    def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
        if isinstance(data, Tensor):
            return data.to(device=device or data.device, dtype=dtype or data.dtype)
        return take(data, dtype=dtype).to(device) if wanted(device) else take(data, dtype=dtype, device=device)

    def new_tensor(self: Tensor, data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        return tensor(data, dtype=dtype or self.dtype, device=device or self.device, **options)

    def tolist(self: Tensor) -> Any:
        if isinstance(self, _Pretended):
            device.sync("tolist")
            return to_list(self.held)
        return to_list(self)

    def numpy(self: Tensor, *args: Any, **options: Any) -> Any:
        if isinstance(self, _Pretended):
            raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy. Use Tensor.cpu()")
        return to_numpy(self, *args, **options)

    torch.tensor, torch.as_tensor = tensor, as_tensor  # type: ignore[assignment]
    Tensor.new_tensor, Tensor.tolist, Tensor.numpy = new_tensor, tolist, numpy  # type: ignore[assignment,method-assign]
    Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.tensor, torch.as_tensor = make, take
        _, _, Tensor.new_tensor, Tensor.tolist, Tensor.numpy, Tensor.pin_memory = before  # type: ignore[method-assign]
