"""Which parts of a model around a layer are compiled in place, and how to run these alone eagerly for a while."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from cameo.errors import CaptureError

__all__ = ["EagerRegions", "compiled_around", "is_being_compiled", "modules_around", "skipped_by_compiler"]

Function = TypeVar("Function", bound=Callable[..., Any])


def modules_around(model: nn.Module, path: str) -> list[nn.Module]:
    """List the modules from `model` down to the one at a path, the outermost first.

    Example:
        >>> [type(module).__name__ for module in modules_around(nn.Sequential(nn.Sequential(nn.Identity())), "0.0")]
        ['Sequential', 'Sequential', 'Identity']
    """
    modules = [model]
    for name in path.split(".") if path else ():
        modules.append(modules[-1].get_submodule(name))
    return modules


def compiled_around(model: nn.Module, path: str) -> list[nn.Module]:
    """List what `module.compile()` was called on: the layer at a path, modules around it, and parts of it.

    Raises:
        CaptureError: `torch.compile(module)` was put in the place of such a module.
    """
    around = modules_around(model, path)
    if any(hasattr(module, "_orig_mod") for module in around):
        raise CaptureError(
            f"layer {path!r} is in a module that was replaced by torch.compile(module), which hides its attention; "
            "compile it in place, module.compile()"
        )
    return [module for module in (*around, *around[-1].modules()) if _is_compiled(module)]


def skipped_by_compiler(function: Function) -> Function:
    """Let `torch.compile` of this function compile what it calls, each call as a graph of its own, and not itself.

    It is no break of a graph. Where a larger function that calls it is compiled, it is part of that one's graph.
    """
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)
    return function


@skipped_by_compiler
def is_being_compiled() -> bool:
    """Whether what is called from here is compiled: the caller runs inside of `torch.compile(function)`."""
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    return callable(get_eval_frame_callback())


class EagerRegions:
    """A block in which the parts of a model that are compiled in place and hold a layer run eagerly.

    The other compiled parts stay compiled. A part that runs inside of a gradient checkpoint stays eager after the
    block, with a warning: the backward pass runs it once more, which has to be the code of its forward pass.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> for part in model:
        ...     part.compile()
        >>> with EagerRegions(model, ["1"]):
        ...     [part._compiled_call_impl is None for part in model]
        [False, True]

    Args:
        model: the module in which the paths are looked up.
        paths: dotted module paths of the layers.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._model, self._paths = model, list(paths)
        self._taken: list[tuple[nn.Module, Any]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._kept_eager: dict[nn.Module, str] = {}

    def __enter__(self) -> EagerRegions:
        by_path = {path: compiled_around(self._model, path) for path in self._paths}  # before anything is changed
        for path, parts in by_path.items():
            for part in parts:
                if part._compiled_call_impl is not None:
                    self._taken.append((part, part._compiled_call_impl))
                    part._compiled_call_impl = None
            if parts:
                self._handles.append(parts[0].register_forward_pre_hook(self._recomputes(path, parts)))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        for part, compiled in self._taken:
            if part not in self._kept_eager:
                part._compiled_call_impl = compiled
        for path in dict.fromkeys(self._kept_eager.values()):
            warnings.warn(
                f"layer {path!r} is supervised in a part of the model that is compiled in place and checkpointed. The "
                "backward pass recomputes that part, and compiled without what the alignment loss reads it would be "
                "another graph, so this part (one block of regional compilation) runs eagerly from now on and gains "
                "nothing by compilation; the other parts stay compiled. Cure, if it matters: compile the whole model, "
                "which holds the checkpoints in its graph, or train without gradient checkpointing",
                stacklevel=2,
            )
        self._taken, self._handles, self._kept_eager = [], [], {}

    def _recomputes(self, path: str, parts: list[nn.Module]) -> Any:
        def note(module: nn.Module, _: Any) -> None:
            # The hooks with which a checkpoint drops what is saved for the backward pass.
            if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
                self._kept_eager.update(dict.fromkeys(parts, path))

        return note


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None
