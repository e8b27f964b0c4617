"""A forward of a wrapped model with its supervised layers observed, in compiled code where that is possible.

Where the model, or a part that holds a supervised layer, is compiled by `torch.compile`, the first forward with a
correspondence runs that part eagerly, so that all checks see it. If all of its attention is SDPA, the queries and keys
of later forwards are outputs of the compiled graph (`cameo.attention.compiled.traced_layers`). Else that part runs
eagerly each time, and one warning says so. The loss is computed outside of the graph: it reads the matches on the host
to cut its work into portions, and in a graph it would be one opaque operator, which nothing can be fused with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from cameo.attention.capture import AttentionCapture, AttentionLayer
from cameo.attention.compiled.regions import EagerRegions, compiled_around, modules_around
from cameo.attention.compiled.traced_layers import explain_no_tracing
from cameo.checks.unseen_kernels import UnseenKernels
from cameo.correspondence import Correspondence

__all__ = ["ObservedForward", "Observer"]


class Observer:
    """Decides for each forward of one model with a correspondence how its supervised layers are observed.

    Example:
        >>> from cameo import TokenLayout
        >>> class Attention(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.scaled_dot_product_attention(x, x, x)
        >>> model, observer = nn.Sequential(Attention()), Observer()
        >>> model.compile(backend="eager")
        >>> layer = AttentionLayer(0, "0", heads=1, layout=TokenLayout("b (v h w)"))
        >>> for _ in range(2):
        ...     with observer.observe(model, model, [layer], [], None, False) as forward:
        ...         _ = forward.run(torch.randn(1, 1, 8, 4))
        ...     print(forward.traced, forward.captured["0"].query.shape)
        False torch.Size([1, 1, 8, 4])
        True torch.Size([1, 1, 8, 4])
    """

    def __init__(self) -> None:
        # By the state of the model: for each layer why it cannot be seen in compiled code, "" if it can.
        self._reasons: dict[tuple[bool, ...], dict[str, str]] = {}
        self._warned = False

    def observe(
        self,
        model: nn.Module,
        core: nn.Module,
        layers: Sequence[AttentionLayer],
        matches: Sequence[Correspondence],
        unseen: UnseenKernels | None,
        surrounded: bool,
    ) -> ObservedForward:
        """Return the block in which the next forward of `model` is to run.

        Args:
            model: the wrapped module.
            core: the module within it in which the layers' paths are looked up; `model` itself, or what PEFT holds.
            layers: supervised layers.
            matches: of each layer; for `unseen`.
            unseen: its check is part of the block, None for no check.
            surrounded: whether the block stands in a function that `torch.compile` compiles, see `is_being_compiled`.
        """
        prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is core)
        paths = {layer.path: prefix + layer.path for layer in layers}
        compiled = surrounded or any(compiled_around(model, path) for path in paths.values())
        state = _state(model, paths.values())
        due = unseen is not None and unseen.is_due(layers)
        traced = compiled and not due and not any(self._reasons.get(state, {"": "not known yet"}).values())

        def learn(captured: AttentionCapture) -> None:
            if traced:
                return
            self._reasons[state] = {
                path: captured.untraced[path] or explain_no_tracing(core.get_submodule(path)) for path in paths
            }
            if compiled:
                self._warn(
                    self._reasons[state],
                    "the whole model" if surrounded else "the compiled part of the model that holds it",
                )

        observed = ObservedForward(model, AttentionCapture(core, layers, traced=traced), traced, learn)
        if surrounded and not traced:
            observed.run = _Eager(model)
        if not traced and core is not model:
            observed.around.append(EagerRegions(model, paths.values()))
        if unseen is not None:
            observed.around.append(unseen.look(core, layers, matches))
        return observed

    def _warn(self, reasons: Mapping[str, str], what: str) -> None:
        found = next(((path, reason) for path, reason in reasons.items() if reason), None)
        if found is None or self._warned:
            return
        self._warned = True
        path, reason = found
        warnings.warn(
            f"layer {path!r} cannot be observed in compiled code: {reason}. So in each forward with a correspondence "
            f"{what} runs eagerly, with the same results, and gains nothing by torch.compile; the rest, and forwards "
            "without a correspondence, run compiled",
            stacklevel=2,
        )


class ObservedForward:
    """A block in which one forward of a model runs, by `run`; then `captured` holds what the layers attended with.

    Attributes:
        run: calls the model.
        captured: the capture of the supervised layers.
        traced: whether they are seen in compiled code.
        around: blocks that are open around the capture.
    """

    def __init__(
        self, model: nn.Module, captured: AttentionCapture, traced: bool, done: Callable[[AttentionCapture], None]
    ) -> None:
        self.run: Callable[..., Any] = model
        self.captured, self.traced = captured, traced
        self.around: list[Any] = []
        self._done = done
        self._open = ExitStack()

    @torch.compiler.disable
    def __enter__(self) -> ObservedForward:
        with ExitStack() as stack:
            for block in (*self.around, self.captured):
                stack.enter_context(block)
            self._open = stack.pop_all()
        return self

    @torch.compiler.disable
    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._open.__exit__(kind, *rest)
        if kind is None:
            self._done(self.captured)


class _Eager:
    """Calls a model eagerly where the caller is compiled; parts that are compiled in place stay so."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)


def _state(model: nn.Module, paths: Any) -> tuple[bool, ...]:
    """What decides, beside the kernels, whether a part may be run as another graph: gradients and checkpointing."""
    checkpointed = [
        bool(getattr(module, "gradient_checkpointing", False))
        for path in paths
        for module in modules_around(model, path)
    ]
    return (torch.is_grad_enabled(), *checkpointed)
