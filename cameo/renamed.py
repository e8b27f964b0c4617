"""Keywords, attributes and keys of saved files under the names they had in earlier releases.

The tables below are the only place that knows an old name; `cameo.moved` is the same for modules. Every use of an old
name gives a `FutureWarning` that says what to write instead.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

__all__ = ["ATTRIBUTES", "CONFIG_KEYS", "KEYWORDS", "old_attributes", "old_keywords", "rename_keys", "warn_renamed"]

P = ParamSpec("P")
R = TypeVar("R")
Class = TypeVar("Class", bound=type)

# Callable, by its qualified name: old keyword, new keyword.
KEYWORDS: dict[str, dict[str, str]] = {}
# Class: old attribute, new attribute.
ATTRIBUTES: dict[str, dict[str, str]] = {}
# Keys of `cameo_config.json`: old key, new key.
CONFIG_KEYS: dict[str, str] = {}


def warn_renamed(old: str, new: str, *, stacklevel: int) -> None:
    """Warn that `old` is called `new` today; `stacklevel` counts from the caller of this function."""
    warnings.warn(f"{old} is called {new} now; the old name goes with the next release", FutureWarning, stacklevel + 1)


def old_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: accept the keywords that `KEYWORDS` lists for this function under their old names too.

    Raises:
        TypeError: in the call, if a value is given under both names.
    """
    table = KEYWORDS[function.__qualname__]

    @functools.wraps(function)
    def accepting(*args: P.args, **kwargs: P.kwargs) -> R:
        if not table.keys().isdisjoint(kwargs):
            _rename(kwargs, table, function.__qualname__)
        return function(*args, **kwargs)

    return accepting


def old_attributes(cls: Class) -> Class:
    """Class decorator: give the attributes that `ATTRIBUTES` lists for this class under their old names too."""
    for old, new in ATTRIBUTES[cls.__name__].items():
        setattr(cls, old, _old_attribute(cls.__name__, old, new))
    return cls


def rename_keys(values: Mapping[str, Any], table: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return the values of a saved file with the keys of today; no warning, since a saved file is no mistake.

    Example:
        >>> rename_keys({"normalise": "per_view", "weight": 0.1}, {"normalise": "normalize"}, "cameo_config.json")
        {'normalize': 'per_view', 'weight': 0.1}

    Raises:
        ValueError: if the file holds a value under both names.
    """
    renamed = {table.get(name, name): value for name, value in values.items()}
    if len(renamed) < len(values):
        twice = [f"{old} and {new}" for old, new in table.items() if old in values and new in values]
        raise ValueError(f"{where}: holds {twice[0]}, which are one setting; remove the first")
    return renamed


def _rename(kwargs: dict[str, Any], table: Mapping[str, str], function: str) -> None:
    for old in table.keys() & kwargs.keys():
        new = table[old]
        if new in kwargs:
            raise TypeError(f"{function}: got {old}= and {new}=, which are one argument; give {new}= alone")
        warn_renamed(f"{function}({old}=)", f"{new}=", stacklevel=4)
        kwargs[new] = kwargs.pop(old)


def _old_attribute(owner: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn_renamed(f"{owner}.{old}", new, stacklevel=3)
        return getattr(self, new)

    def write(self: Any, value: Any) -> None:
        warn_renamed(f"{owner}.{old}", new, stacklevel=3)
        setattr(self, new, value)

    return property(read, write, doc=f"Old name of `{new}`.")
