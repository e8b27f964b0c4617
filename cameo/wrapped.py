"""Which modules are wrapped by which, and which modules can be wrapped."""

from __future__ import annotations

import weakref

from torch import nn

__all__ = ["check_plain", "find_wrapper", "forget", "register"]

# Base modules and what wraps each, both by weak references, so that a deleted wrapper frees its base.
_wrappers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def register(base: nn.Module, wrapper: nn.Module) -> None:
    """Note that `wrapper` wraps `base`."""
    _wrappers[base] = weakref.ref(wrapper)


def forget(base: nn.Module) -> None:
    """Note that nothing wraps `base` any longer."""
    _wrappers.pop(base, None)


def find_wrapper(module: nn.Module) -> nn.Module | None:
    """Return what wraps this base module, if something does."""
    reference = _wrappers.get(module)
    return None if reference is None else reference()


def check_plain(model: nn.Module, wrapper: type[nn.Module]) -> None:
    """Raise `ValueError` for a module that is wrapped already, compiled, or inside a DataParallel.

    Args:
        model: what is to be wrapped.
        wrapper: class of what wraps modules.
    """
    _check_not_wrapped(model, wrapper)
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model: is compiled by torch.compile. Wrap the plain module, cameo.wrap(model._orig_mod, ...), "
            "and compile the result, torch.compile(wrapped), or compile in place, model.compile()."
        )
    if type(model) in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"model: is in {type(model).__name__}, which would not train the alignment head. Wrap the plain "
            f"module, cameo.wrap(model.module, ...), and put the result in {type(model).__name__}."
        )


def _check_not_wrapped(model: nn.Module, wrapper: type[nn.Module]) -> None:
    cure = "Call .unwrap() on that CameoModel first, or pass a list as layer= to supervise several layers."
    for name, module in model.named_modules():
        if isinstance(module, wrapper) or find_wrapper(module) is not None:
            where = f"its submodule {name!r}" if name else "this model"
            raise ValueError(f"model: {where} is wrapped already. {cure}")
    for base in [base for base in list(_wrappers) if find_wrapper(base) is not None]:
        if any(module is model for module in base.modules()):
            raise ValueError(f"model: is part of a {type(base).__name__} that is wrapped already. {cure}")
