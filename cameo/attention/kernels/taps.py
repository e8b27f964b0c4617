"""See the calls of functions that PyTorch's dispatcher does not see, under every name to which a caller bound them.

Fused attention kernels of other packages are functions that a model imports by name
(`from flash_attn import flash_attn_func`), so a replaced attribute of their module would miss them. All names share the
function's code, which is exchanged while a watcher is open. Nothing is imported: a kernel whose module is not loaded
cannot be called either.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from inspect import BoundArguments, Parameter, Signature
from types import FunctionType
from typing import Any, Protocol

from cameo.attention.kernels.known import KNOWN, Kernel

__all__ = ["KernelWatcher", "kernel_taps"]


class KernelWatcher(Protocol):
    """Receives the calls."""

    def kernel_call(self, kernel: Kernel, run: Callable[[BoundArguments], Any], given: BoundArguments) -> Any:
        """Run the kernel with its arguments, `run(given)`, and return its result."""


# The code that takes the place of a kernel's. It runs with the globals of the kernel, so it imports what it needs; it
# has as many free variables as the kernel, of which it makes no use, since Python asks for that.
STAND_IN = """
def around({free}):
    def {name}(*args, **kwargs):
        if False:
            return ({free})
        from cameo.attention.kernels.taps import kernel_taps
        return kernel_taps.passed({place}, args, kwargs)
    return {name}
"""


class _Tapped:
    """One function, whose code is exchanged for one that asks the taps."""

    def __init__(self, kernel: Kernel, function: FunctionType, place: int) -> None:
        self.kernel, self._function, self._code = kernel, function, function.__code__
        self._signature = _signature(kernel, function)
        self.original = FunctionType(
            self._code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        self.original.__kwdefaults__ = function.__kwdefaults__
        free = "".join(f"free_{number}, " for number in range(len(self._code.co_freevars)))
        made: dict[str, Any] = {}
        exec(STAND_IN.format(free=free, name=kernel.name.rpartition(".")[2], place=place), made)
        self._tap = function.__code__ = made["around"](*self._code.co_freevars).__code__

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BoundArguments:
        """Give the arguments of a call their names."""
        return self._signature.bind(*args, **kwargs)

    def run(self, given: BoundArguments) -> Any:
        """Call the function as it was."""
        return self.original(*given.args, **given.kwargs)

    def restore(self) -> None:
        """Give the function its code again, unless other code has exchanged it since."""
        if self._function.__code__ is self._tap:
            self._function.__code__ = self._code


def _signature(kernel: Kernel, function: FunctionType) -> Signature:
    """Return the parameters of a kernel; the published ones, where a wrapper takes any arguments and passes them on."""
    signature = inspect.signature(function, follow_wrapped=False)
    if not any(parameter.kind == Parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        return signature
    named = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in kernel.parameters]
    return Signature([*named, Parameter("others", Parameter.VAR_KEYWORD)])


class KernelTaps:
    """Passes calls of the known kernels to the watchers of the calling thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._local = threading.local()
        # By place in `KNOWN`. Kept when the last watcher is gone: another thread may be on its way through a stand-in.
        self._tapped: dict[int, _Tapped] = {}
        self._installed: set[int] = set()

    def push(self, watcher: KernelWatcher) -> None:
        """Pass the calls of this thread to `watcher`."""
        self._watchers().append(watcher)
        with self._lock:
            self._open += 1
            for place, kernel in enumerate(KNOWN):
                function = _function(kernel) if place not in self._installed else None
                if function is not None:
                    self._tapped[place] = _Tapped(kernel, function, place)
                    self._installed.add(place)

    def pop(self, watcher: KernelWatcher) -> None:
        """Stop passing calls to `watcher`."""
        self._watchers().remove(watcher)
        with self._lock:
            self._open -= 1
            if self._open == 0:
                for place in self._installed:
                    self._tapped[place].restore()
                self._installed.clear()

    def passed(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a kernel that was called, through the watchers of this thread."""
        tapped, watchers = self._tapped[place], self._watchers()
        if not watchers:
            return tapped.original(*args, **kwargs)
        run: Callable[[BoundArguments], Any] = tapped.run
        for watcher in watchers:
            run = _watched(watcher, tapped.kernel, run)
        return run(tapped.bind(args, kwargs))

    def _watchers(self) -> list[KernelWatcher]:
        if not hasattr(self._local, "watchers"):
            self._local.watchers = []
        return self._local.watchers


def _function(kernel: Kernel) -> FunctionType | None:
    """Return the function of a kernel, if its module is loaded and it is written in Python."""
    found: Any = sys.modules.get(kernel.module)
    for name in kernel.name.split("."):
        found = getattr(found, name, None)
    found = inspect.unwrap(found) if callable(found) else None
    return found if isinstance(found, FunctionType) else None


def _watched(
    watcher: KernelWatcher, kernel: Kernel, run: Callable[[BoundArguments], Any]
) -> Callable[[BoundArguments], Any]:
    return lambda given: watcher.kernel_call(kernel, run, given)


kernel_taps = KernelTaps()
