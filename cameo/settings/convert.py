"""Converts the text of a setting to its value, by the annotation of its field."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from cameo.errors import unknown_name
from cameo.settings.interpolation import OPENING, Interpolated, marked
from cameo.settings.text import Quoted, Typed, guess, is_null, parse_yaml

__all__ = ["describe", "members", "null_is_none", "setting_fields", "typed_values", "types_of"]

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
WORDS = {
    bool: ("true", "false"),
    int: ("a whole number",),
    float: ("a number",),
    str: ("a text",),
    dict: ("{key: value}",),
    type(None): ("null",),
}


def setting_fields(kind: type) -> dict[str, Field[Any]]:
    """Return the settings of a dataclass by name."""
    return {entry.name: entry for entry in fields(kind)}


def null_is_none(entry: Field[Any]) -> bool:
    """Tell whether null means the text "none" of a setting."""
    return "none" in entry.metadata.get("choices", ()) or entry.metadata.get("null") == "none"


def types_of(kind: type) -> dict[str, Any]:
    """Return the annotations of a dataclass by name."""
    return _types_of(kind)


@functools.cache
def _types_of(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def members(expected: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type itself."""
    return get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)


def describe(expected: Any) -> str:
    """Say in words what a type is.

    Example:
        >>> describe(int | list[str] | None), describe(tuple[float, float])
        ('a whole number, a list [a, b] or null', 'a list [a, b]')
    """
    kinds = [get_origin(member) or member for member in members(expected)]
    words = [word for kind in kinds for word in WORDS.get(kind, ("a list [a, b]",))]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def typed_values(kind: type, typed: Mapping[str, Typed], *, places: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Convert settings from their text by the annotations of `kind`.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Run:
        ...     revision: str | None = None
        ...     steps: int = 10
        >>> typed_values(Run, {"revision": "7e41298", "steps": "20"})
        {'revision': '7e41298', 'steps': 20}

    Args:
        kind: dataclass of the settings.
        typed: setting to what was typed.
        places: setting to the file that it stands in, for error messages.

    Raises:
        ValueError: for a name that `kind` has not, or a text that is not of its type; names the setting.
    """
    known, values = setting_fields(kind), {}
    for name, text in typed.items():
        where = f"{places[name]}: " if places and name in places else ""
        if name not in known:
            error = unknown_name("setting", name, known)
            raise ValueError(f"{where}{error}")
        try:
            values[name] = _value(text, types_of(kind)[name], known[name])
        except ValueError as error:  # of YAML inside a text
            raise ValueError(f"{where}{name}: {error}") from None
        except _WrongTypeError:
            raise ValueError(
                f"{where}{name}: expected {describe(types_of(kind)[name])}, got {_shown(text, known[name])}"
            ) from None
    return values


class _WrongTypeError(Exception):
    """What was typed is not of the type."""


def _shown(typed: Typed, entry: Field[Any]) -> str:
    if entry.metadata.get("secret"):
        return "a value that is not shown"
    if isinstance(typed, str) and not isinstance(typed, Interpolated):
        cure = f". Give {entry.name}= itself: interpolations are not resolved here" if OPENING in typed else ""
        return ("null" if is_null(typed) else repr(str(typed))) + cure
    return repr(typed)


def _value(typed: Typed, expected: Any, entry: Field[Any]) -> Any:
    """Convert the text of a setting, with what its metadata says about null."""
    alternatives = members(expected)
    if is_null(typed):
        if type(None) in alternatives:
            return None
        if null_is_none(entry):
            return "none"
        raise _WrongTypeError
    return marked(_convert(typed, alternatives), typed)


def _convert(typed: Typed, alternatives: Iterable[Any]) -> Any:
    """Convert what was typed to the first of the types that it fits; text comes last, since everything fits it."""
    kinds = sorted((kind for kind in alternatives if kind is not type(None)), key=lambda kind: kind is str)
    if isinstance(typed, Quoted) and str in kinds:
        return str(typed)
    for expected in kinds:
        origin = get_origin(expected) or expected
        try:
            if expected is Any:
                return guess(typed)
            if origin in (list, tuple):
                return _sequence(typed, expected, origin, commas="," if str in kinds else "")
            if origin is dict:
                return _mapping(typed)
            if len(kinds) > 1 and _opens(typed, "[{"):  # a list or mapping that does not fit is not a text either
                continue
            return _scalar(typed, expected)
        except _WrongTypeError:
            continue
    raise _WrongTypeError


def _scalar(typed: Typed, expected: Any) -> Any:
    if not isinstance(typed, str) or (expected is bool and typed.lower() not in TRUE + FALSE):
        raise _WrongTypeError
    if expected is bool:
        return typed.lower() in TRUE
    try:
        return expected(typed) if expected in (int, float) else str(typed)
    except ValueError:
        raise _WrongTypeError from None


def _opens(typed: Typed, brackets: str) -> bool:
    return isinstance(typed, str) and typed.lstrip().startswith(tuple(brackets))


def _mapping(typed: Typed) -> dict[str, Any]:
    if _opens(typed, "{"):
        typed = parse_yaml(typed)
    if not isinstance(typed, Mapping):
        raise _WrongTypeError
    return {str(name): _remembered(value) for name, value in typed.items()}


def _remembered(typed: Typed) -> Any:
    """Convert texts whose type is not known; values of interpolations remember what was typed."""
    if isinstance(typed, Mapping):
        return _mapping(typed)
    return [_remembered(value) for value in typed] if isinstance(typed, list) else marked(guess(typed), typed)


def _sequence(typed: Typed, expected: Any, origin: Any, *, commas: str) -> Any:
    """Read a list, also without its brackets (`layers=0,2`); `commas` must stand in it where it could be a text."""
    if _opens(typed, "["):
        typed = parse_yaml(typed)
    elif isinstance(typed, str) and commas in typed and not _opens(typed, "{"):
        typed = [part.strip() for part in typed.split(",")]
    kinds = get_args(expected)
    any_length = origin is list or kinds[-1] is Ellipsis
    if not isinstance(typed, list) or not (any_length or len(typed) == len(kinds)):
        raise _WrongTypeError
    pairs = zip(typed, [kinds[0]] * len(typed) if any_length else kinds, strict=True)
    return origin(marked(_convert(value, members(kind)), value) for value, kind in pairs)
