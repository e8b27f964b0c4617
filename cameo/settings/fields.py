"""Declarations of settings in dataclasses, and the checks that follow from them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_origin

from cameo.errors import unknown_name
from cameo.renamed import old_fields, warn_renamed
from cameo.settings.convert import describe, members, null_is_none, setting_fields, types_of
from cameo.settings.interpolation import Interpolated, marked

__all__ = ["Settings", "current_names", "renamed_settings", "setting"]

Kind = TypeVar("Kind", bound=type)
# torch, numpy and JSON readers hold whole numbers in 64 bits.
LARGEST = 2**63 - 1


def setting(
    default: Any = None,
    *,
    factory: Callable[[], Any] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    share: str | None = None,
    choices: Sequence[str] | None = None,
    null: str | None = None,
    path: bool = False,
    secret: bool = False,
    changeable: bool = False,
    positional: bool = False,
) -> Any:
    """Declare a setting; the comment above it is its help.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Loss(Settings):
        ...     # Factor of the loss. 0.02 is the paper's.
        ...     loss_weight: float = setting(0.02, at_least=0)
        >>> Loss(loss_weight=-1)
        Traceback (most recent call last):
        ValueError: loss_weight: expected at least 0, got -1.0

    Args:
        default: value where none is given.
        factory: called to make the default, for one that can change, such as a list.
        at_least: smallest value that is allowed.
        above: value that the setting must exceed.
        share: range of a share, "[0, 1]" or "[0, 1)".
        choices: names that are allowed; where "none" is one of them, null means it.
        null: "none" where null means the text "none".
        path: whether it is a file or folder, so that a leading `~/` is the home folder.
        secret: whether its value is never written or shown.
        changeable: whether a run that is resumed may have another value.
        positional: whether arguments without a name are its values.
    """
    given = locals()
    facts = {name: given[name] for name in ("at_least", "above", "share", "choices", "null")}
    facts |= {"path": path, "secret": secret, "changeable": changeable, "positional": positional}
    initial: dict[str, Any] = {"default": default} if factory is None else {"default_factory": factory}
    return field(**initial, repr=not secret, metadata={name: fact for name, fact in facts.items() if fact is not None})


class Settings:
    """Base of a dataclass of settings: checks every field, then calls the `check` of each class that has one."""

    # Old names of settings, which are accepted with a warning; see `renamed_settings`.
    renamed: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        for name, entry in setting_fields(type(self)).items():
            given = getattr(self, name)
            value = _checked(given, types_of(type(self))[name], entry)
            if value is not given:
                object.__setattr__(self, name, value)  # some are frozen
        for component in reversed(type(self).__mro__):
            if "check" in vars(component):
                component.check(self)  # type: ignore[attr-defined]

    if not TYPE_CHECKING:  # type checkers are to know the new names alone

        def __getattr__(self, name: str) -> Any:
            if name in type(self).renamed:
                return getattr(self, _current_name(type(self), name))
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, _current_name(type(self), name), value)


def renamed_settings(table: Mapping[str, str]) -> Callable[[Kind], Kind]:
    """Class decorator that accepts old names as keywords, attributes, in YAML and on command lines, with a warning.

    Example:
        >>> import warnings
        >>> from dataclasses import dataclass
        >>> @renamed_settings({"weight": "loss_weight"})
        ... @dataclass
        ... class Loss(Settings):
        ...     loss_weight: float = 0.02
        >>> with warnings.catch_warnings(action="ignore"):
        ...     Loss(weight=0.5).loss_weight
        0.5
    """

    def decorate(kind: Kind) -> Kind:
        kind.renamed = table  # type: ignore[attr-defined]
        return old_fields(table)(kind)

    return decorate


def current_names(kind: type, given: Mapping[str, Any], *, warn: bool = True) -> dict[str, Any]:
    """Replace the old names among settings by the current ones.

    Raises:
        ValueError: if a setting is given under both.
    """
    renamed, found = getattr(kind, "renamed", {}), {}
    for name, value in given.items():
        current = _current_name(kind, name, warn=warn, stacklevel=3)
        if current in found or (current != name and current in given):
            old = next(old for old, new in renamed.items() if new == current)
            raise ValueError(f"{old}: is the old name of {current}, and both are given; leave out {old}")
        found[current] = value
    return found


def _current_name(kind: type, name: str, *, warn: bool = True, stacklevel: int = 2) -> str:
    """Return the new name of a setting; `stacklevel` of the warning counts from the caller of this function."""
    current: str = getattr(kind, "renamed", {}).get(name, name)
    if warn and current != name:
        warn_renamed(f"the setting {name}", current, stacklevel=stacklevel + 1)
    return current


def _checked(value: Any, expected: Any, entry: Field[Any]) -> Any:
    """Return the value of a setting in its own type; raises an error if it is of another type or out of range."""
    facts, name = entry.metadata, entry.name
    if value is None and type(None) not in members(expected) and null_is_none(entry):
        return "none"
    try:
        value = _as_type(value, expected)
    except TypeError:
        shown = "a value that is not shown" if facts.get("secret") else repr(value)
        raise ValueError(f"{name}: expected {describe(expected)}, got {shown}") from None
    if value is None:
        return None
    if facts.get("path") and isinstance(value, str) and value.startswith("~"):
        value = marked(os.path.expanduser(value), value)  # noqa: PTH111 - pathlib raises where there is no such user
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, Real) and not isinstance(number, bool):
            _check_number(number, entry)
    if "choices" in facts and value not in facts["choices"]:
        raise unknown_name(name, value, facts["choices"])
    return value


def _check_number(value: Any, entry: Field[Any]) -> None:
    facts = entry.metadata
    shown = value.source if isinstance(value, Interpolated) else value
    if not math.isfinite(value):
        raise ValueError(f"{entry.name}: expected a finite number, got {shown}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{entry.name}: expected a whole number of at most 64 bits, got {shown}")
    if "at_least" in facts and not value >= facts["at_least"]:
        raise ValueError(f"{entry.name}: expected at least {facts['at_least']}, got {shown}")
    if "above" in facts and not value > facts["above"]:
        raise ValueError(f"{entry.name}: expected a number > {facts['above']}, got {shown}")
    if "share" in facts and not (0 <= value < 1 or (value == 1 and facts["share"].endswith("]"))):
        raise ValueError(f"{entry.name}: expected a share in {facts['share']}, got {shown}")


def _as_type(value: Any, expected: Any) -> Any:
    """Return a value in the first of the types that it fits, as a float where a whole number was given for one."""
    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy and torch
    for kind in members(expected):
        origin = get_origin(kind) or kind
        if kind is Any or (kind is type(None) and value is None) or (kind is bool and isinstance(value, bool)):
            return value
        if kind is int and isinstance(value, Integral) and not isinstance(value, bool):
            return value if isinstance(value, int) else int(value)
        if kind is float and isinstance(value, Real) and not isinstance(value, bool):
            return value if isinstance(value, float) else float(value)
        if kind is str and isinstance(value, str | os.PathLike):
            return value if isinstance(value, str) else os.fspath(value)
        if origin is dict and isinstance(value, Mapping):
            return value if isinstance(value, dict) else dict(value)
        if origin in (list, tuple) and isinstance(value, list | tuple):
            inner = get_args(kind)
            any_length = origin is list or inner[-1] is Ellipsis
            if any_length or len(inner) == len(value):
                parts = [_as_type(part, inner[0] if any_length else inner[place]) for place, part in enumerate(value)]
                return value if isinstance(value, origin) and parts == list(value) else origin(parts)
    raise TypeError
