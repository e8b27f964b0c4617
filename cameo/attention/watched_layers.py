"""Watch the kernel calls of chosen layers during a `with` block, after which no hook remains.

Hooks are registered on the layers for the duration of the block. While such a layer runs, a watcher of
`cameo.attention.kernel_calls` is open; it is passed on when the layer returns.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from cameo.attention.compiled.regions import EagerRegions
from cameo.attention.kernels.call import KernelCall
from cameo.attention.kernels.known import KNOWN

__all__ = ["LayerWatcher", "WatchedLayers"]


class LayerWatcher(Protocol):
    """A block that collects the kernel calls of one run of a layer."""

    @property
    def calls(self) -> list[KernelCall]:
        """The calls, in the order in which they were made."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: Any) -> Any: ...


Watcher = TypeVar("Watcher", bound=LayerWatcher)


class WatchedLayers(Generic[Watcher]):
    """Open a watcher whenever one of some layers runs, in the thread that entered the block.

    Example:
        >>> import torch
        >>> from cameo.attention.kernel_calls import CallWatcher
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.scaled_dot_product_attention(x, x, x)
        >>> model = nn.Sequential(Attention())
        >>> with WatchedLayers(model, ["0"], CallWatcher, lambda path, seen: print(path, len(seen.calls))):
        ...     _ = model(torch.zeros(1, 2, 12, 4))
        0 1

    What is compiled in place and holds a layer runs eagerly inside the block, since compiled code hides its kernel
    calls, see `EagerRegions`.

    Args:
        model: the module in which the paths are looked up.
        paths: dotted module paths of the layers.
        watch: makes the watcher of one run of a layer, `watch(path)`.
        done: receives the watcher when the layer has returned, `done(path, watcher)`; not called if the layer raised.
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Iterable[str],
        watch: Callable[[str], Watcher],
        done: Callable[[str, Watcher], None],
    ) -> None:
        self._model, self._paths = model, list(paths)
        self._watch, self._done = watch, done
        self._cleanup = ExitStack()
        self._thread = 0
        self._open: list[tuple[str, Watcher]] = []
        self._ran: set[str] = set()

    def __enter__(self) -> WatchedLayers[Watcher]:
        self._thread = threading.get_ident()
        self._ran.clear()
        with ExitStack() as stack:
            stack.enter_context(EagerRegions(self._model, self._paths))
            for path in self._paths:
                module = self._model.get_submodule(path)
                for hook in (
                    module.register_forward_pre_hook(self._opener(path)),
                    # prepended, so that of two nested blocks on one layer the inner one closes first
                    module.register_forward_hook(self._closer(path), always_call=True, prepend=True),
                ):
                    stack.callback(hook.remove)
            self._cleanup = stack.pop_all()  # without this line, an error above removes the hooks again
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._cleanup.close()
        while self._open:  # an exception that runs no hooks, such as KeyboardInterrupt
            self._open.pop()[1].__exit__(None, None, None)
        if kind is not None:
            self._ran.clear()

    def open_watcher(self, path: str) -> Watcher | None:
        """Return the watcher of a layer that is running in the thread of this block, if it is the innermost."""
        if threading.get_ident() != self._thread or not self._open or self._open[-1][0] != path:
            return None
        return self._open[-1][1]

    def explain_no_call(self, path: str) -> str:
        """Say why no kernel call of a layer was seen."""
        if path not in self._ran:
            return (
                f"layer {path!r} did not run in this forward. Likely causes: the model skips it for these "
                "arguments, calls its forward() directly, or the module was replaced after cameo.wrap (unwrap "
                "and wrap again)."
            )
        packages = ", ".join(sorted({kernel.module.partition(".")[0] for kernel in KNOWN} - {"torch"}))
        return (
            f"layer {path!r} ran, but no attention kernel was seen in it. The known kernels are "
            "F.scaled_dot_product_attention, flex_attention, torch.nn.MultiheadAttention, a query-key product followed "
            f"by a softmax, and those of {packages}. Likely causes: layer= names a module that is not the attention "
            "itself, or the model uses another fused kernel: switch its attention processor or backend to SDPA, in "
            'diffusers by model.set_attention_backend("native"). A kernel that has to stay can be supervised where '
            "you name its queries and keys: kernel_inputs= of cameo.wrap."
        )

    def _opener(self, path: str) -> Callable[[nn.Module, Any], None]:
        def open_watcher(module: nn.Module, _: Any) -> None:
            if threading.get_ident() != self._thread:
                return
            watcher = self._watch(path)
            watcher.__enter__()
            self._open.append((path, watcher))

        return open_watcher

    def _closer(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def close_watcher(module: nn.Module, _: Any, output: Any) -> None:
            if self.open_watcher(path) is None:
                return
            watcher = self._open.pop()[1]
            watcher.__exit__(None, None, None)
            if output is None and sys.exc_info()[0] is not None:
                return  # the module raised: its own error is the one to show
            self._ran.add(path)
            self._done(path, watcher)

        return close_watcher
