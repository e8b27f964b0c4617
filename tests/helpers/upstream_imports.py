"""Imports from checkouts of the original repositories, and stand-ins for what they import and nobody has installed."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def imports_from(folder: Path) -> Iterator[Path]:
    """Put `folder` first on `sys.path`; afterwards take it away again, with every module that came from it."""
    folder = folder.resolve()
    entry = str(folder)
    sys.path.insert(0, entry)
    importlib.invalidate_caches()
    try:
        yield folder
    finally:
        sys.path.remove(entry)
        # All of them first: the path of a namespace package cannot be read once its parent is gone.
        came = [
            name
            for name, module in list(sys.modules.items())
            if any(Path(place).resolve().is_relative_to(folder) for place in _places(module))
        ]
        for name in came:
            del sys.modules[name]
        sys.path_importer_cache.pop(entry, None)


@contextmanager
def stand_in(name: str, **attributes: Any) -> Iterator[types.ModuleType]:
    """Let `import <name>` give an empty module with these attributes; parents that are missing are made up too.

    Parents that can be imported stay as they are and get the module as an attribute for the time being.
    """
    with pytest.MonkeyPatch.context() as patch:
        parent, _, last = name.rpartition(".")
        module = _empty(name, attributes)
        patch.setitem(sys.modules, name, module)
        if not parent:
            yield module
            return
        with ExitStack() as stack:
            try:
                package = importlib.import_module(parent)
            except ImportError:
                package = stack.enter_context(stand_in(parent))
            patch.setattr(package, last, module, raising=False)
            yield module


@contextmanager
def bare_packages(folder: Path, *names: str) -> Iterator[None]:
    """Import from these packages of `folder`, parents first, without their `__init__.py`, which may import too much."""
    with ExitStack() as stack:
        for name in names:
            package = stack.enter_context(stand_in(name))
            package.__path__ = [str(folder.resolve().joinpath(*name.split(".")))]
        yield


def import_without_assertions(name: str, folder: Path) -> types.ModuleType:
    """Import a module of `folder` as `python -O` does, which skips its assertions; inside of `imports_from`."""
    path = folder.resolve().joinpath(*name.split(".")).with_suffix(".py")
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec", optimize=1), vars(module))
    return module


@contextmanager
def lent_names(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Lend modules that are installed the names they had in the release that a checkout was written for.

    Names that they have already stay as they are.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, attributes in modules.items():
            module = importlib.import_module(name)
            for key, value in attributes.items():
                if not hasattr(module, key):
                    patch.setattr(module, key, value, raising=False)
        yield


@contextmanager
def xformers_by_sdpa() -> Iterator[types.ModuleType]:
    """Stand in for `xformers.ops.memory_efficient_attention`, whose real kernel exists on CUDA only."""
    with (
        stand_in("xformers", __version__="0.0.35"),
        stand_in("xformers.ops", memory_efficient_attention=memory_efficient_attention) as ops,
    ):
        yield ops


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Let every import of these modules fail, whether or not they are installed."""
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, None)
        yield


@contextmanager
def without_xformers() -> Iterator[None]:
    with without("xformers", "xformers.ops"):
        yield


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
) -> Tensor:
    """The operator's two layouts, `[A, L, D]` and `[A, L, K, D]`, computed by PyTorch."""
    if query.ndim == 4:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias, dropout_p=p, scale=scale)
        return output.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias, dropout_p=p, scale=scale)


def _empty(name: str, attributes: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []  # a package, so that submodules may be stood in for as well
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)  # find_spec() asks for it
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def _places(module: types.ModuleType | None) -> list[str]:
    """Files and folders a module came from."""
    file = getattr(module, "__file__", None)
    if isinstance(file, str):
        return [file]
    try:
        return [place for place in getattr(module, "__path__", []) if isinstance(place, str)]
    except (KeyError, TypeError):  # the path of a namespace package whose parent is gone
        return []
