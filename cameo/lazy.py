"""Packages whose modules are imported on first use, so that `--help` and `--print-config` answer at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["load_on_use"]


def load_on_use(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package, which find its modules and the public names in them.

    The package repeats the names in imports under `TYPE_CHECKING`, where type checkers and editors find them.

    Example:
        >>> get, names = load_on_use("cameo.data", {"RGBDSequence": "cameo.data.rgbd"})
        >>> get("RGBDSequence").__module__
        'cameo.data.rgbd'

    Args:
        package: name of the package.
        modules: public name to the module that defines it.
    """

    def get(name: str) -> Any:
        if name in modules:
            value = getattr(importlib.import_module(modules[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        if not name.startswith("_"):
            module = f"{package}.{name}"
            try:
                return importlib.import_module(module)
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names
