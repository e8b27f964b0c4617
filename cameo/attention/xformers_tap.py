"""Observe calls of `xformers.ops.memory_efficient_attention` without importing xformers."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor

__all__ = ["XformersWatcher", "xformers_tap"]


class XformersWatcher(Protocol):
    """Receives the calls."""

    def xformers_call(self, original: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run the operator `original` with these arguments and return its result."""


class XformersTap:
    """Passes calls of `xformers.ops.memory_efficient_attention` to the watchers of the calling thread.

    xformers' operator is a Python function that is looked up at the call, and a TorchFunctionMode does not see it.
    The tap replaces it only while a watcher is open in some thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._local = threading.local()
        self._installed: tuple[ModuleType, Callable[..., Tensor], Callable[..., Tensor]] | None = None

    def push(self, watcher: XformersWatcher) -> None:
        """Pass the calls of this thread to `watcher`."""
        self._watchers().append(watcher)
        with self._lock:
            self._open += 1
            ops = sys.modules.get("xformers.ops")
            if self._installed is None and ops is not None:
                original = ops.memory_efficient_attention
                tap = self._make(original)
                ops.memory_efficient_attention = tap  # type: ignore[attr-defined]
                self._installed = (ops, tap, original)

    def pop(self, watcher: XformersWatcher) -> None:
        """Stop passing calls to `watcher`."""
        self._watchers().remove(watcher)
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._installed is not None:
                ops, tap, original = self._installed
                self._installed = None
                if ops.memory_efficient_attention is tap:  # otherwise other code has replaced it since
                    ops.memory_efficient_attention = original  # type: ignore[attr-defined]

    def _watchers(self) -> list[XformersWatcher]:
        if not hasattr(self._local, "watchers"):
            self._local.watchers = []
        return self._local.watchers

    def _make(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        # The original is bound here, not read at the call: another thread may have fetched the tap just
        # before the last watcher removed it.
        @functools.wraps(original)
        def memory_efficient_attention(*args: Any, **kwargs: Any) -> Tensor:
            call = original
            for watcher in self._watchers():
                call = _watched(watcher, call)
            return call(*args, **kwargs)

        return memory_efficient_attention


def _watched(watcher: XformersWatcher, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: watcher.xformers_call(call, args, kwargs)


xformers_tap = XformersTap()
