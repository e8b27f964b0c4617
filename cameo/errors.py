"""Errors that name the argument, what was expected, what came, and the cure."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable

__all__ = ["CaptureError", "DataError", "NoLossError", "ShapeError", "WeightsUnavailable", "as_integer", "unknown_name"]


class ShapeError(ValueError):
    """A tensor has another shape than documented for its axes.

    Example:
        >>> str(ShapeError("depth", expected="[B, V, 1, H, W]", got=(2, 3, 64, 64)))
        'depth: expected [B, V, 1, H, W], got [2, 3, 64, 64]'
    """

    def __init__(self, argument: str, *, expected: str, got: Iterable[int] | str, cure: str = "") -> None:
        shown = got if isinstance(got, str) else str(list(got))
        super().__init__(f"{argument}: expected {expected}, got {shown}" + (f". {cure}" if cure else ""))


class CaptureError(RuntimeError):
    """A supervised attention layer did not provide usable queries and keys."""


class NoLossError(AttributeError, RuntimeError):
    """The latest forward computed no alignment loss; an AttributeError too, so that `hasattr` answers False."""


class DataError(ValueError):
    """A file or folder of a data set cannot be used as it is; the message names the path."""


class WeightsUnavailable(RuntimeError):  # noqa: N818 - it is a state of the machine and not a mistake
    """The released weights of a network are neither on this machine nor reachable; the message says what is skipped."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """Build the error for a name that does not exist: lists what exists and the nearest name.

    Example:
        >>> str(unknown_name("backbone", "cat3", ["cat3d", "mvdream"]))
        "unknown backbone 'cat3': did you mean 'cat3d'? Known: cat3d, mvdream"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}Known: {', '.join(names) or 'none'}")


def as_integer(name: str, value: object, *, least: int | None = None, most: int | None = None) -> int:
    """Read a whole number of any integer type, such as numpy's; a bool, a float and a text are refused.

    Example:
        >>> as_integer("heads", 8, least=1)
        8
        >>> as_integer("heads", 8.0, least=1)
        Traceback (most recent call last):
        ...
        ValueError: heads: expected an integer of at least 1, got 8.0

    Raises:
        ValueError: if it is not one, or lies outside `least` to `most`; names the argument.
    """
    try:
        # That of numpy 1 has an index.
        is_bool = type(value).__name__ in ("bool", "bool_")
        number = None if is_bool else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is not None and (least is None or number >= least) and (most is None or number <= most):
        return number
    limits = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
    raise ValueError(f"{name}: expected an integer{limits}, got {value!r}")
