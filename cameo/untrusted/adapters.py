"""What the settings of a LoRA or of another adapter may ask for: no more than the weights beside them hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cameo.errors import DataError

__all__ = ["LARGEST_ALPHA", "check_adapter_settings"]

# Scales in use are 1 to 4096. The weights of a LoRA can hold any factor that is needed beyond this.
LARGEST_ALPHA = 1 << 16
MOST_REPEATS = 3
# A repetition of more than this counts as one without end.
LONG_REPEAT = 100
ALPHAS, RANKS = ("lora_alpha", "alpha"), ("r", "lora_r")


def check_adapter_settings(place: str, settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse settings of an adapter from which PEFT would build something else than the weights beside them.

    Example:
        >>> weights = {"to_q.lora_A.weight": (4, 64), "to_q.lora_B.weight": (64, 4)}
        >>> check_adapter_settings("adapter_config.json", {"r": 10**9}, weights)
        Traceback (most recent call last):
        ...
        cameo.errors.DataError: adapter_config.json: r: expected a rank from 1 to 4, the largest of its weights, got ...

    Args:
        place: what errors call the file.
        settings: of a `peft.LoraConfig` or another configuration of PEFT.
        shapes: of the weights, by name.

    Raises:
        DataError: for a rank beyond those of the weights; a scale that is not finite or beyond `LARGEST_ALPHA`; and for
            a pattern of module names that could take forever to match.
    """
    ranks = [shape[0] for name, shape in shapes.items() if ".lora_A." in name and shape]
    largest = max(ranks, default=max((max(shape, default=0) for shape in shapes.values()), default=0))
    for name, rank in _values(place, settings, RANKS, "rank_pattern"):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
            raise DataError(
                f"{place}: {name}: expected a rank from 1 to {largest}, the largest of its weights, got {_shown(rank)}"
                ". Save the adapter again"
            )
    for name, alpha in _values(place, settings, ALPHAS, "alpha_pattern"):
        number = math.nan if isinstance(alpha, bool) or not isinstance(alpha, int | float) else alpha
        if not -LARGEST_ALPHA <= number <= LARGEST_ALPHA:
            raise DataError(
                f"{place}: {name}: expected a finite number of at most {LARGEST_ALPHA}, got {_shown(alpha)}. The "
                "adapter would drown the base model; put a larger factor into its weights"
            )
    for name, pattern in _patterns(settings):
        try:
            is_slow = _is_slow(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise DataError(
                f"{place}: {name}: expected a pattern of module names ({error}), got {pattern!r}"
            ) from error
        if is_slow:
            raise DataError(
                f"{place}: {name}: {pattern[:60]!r} could take forever to match; expected at most {MOST_REPEATS} "
                "repetitions without end, none within another. List the modules by name"
            )


def _values(
    place: str, settings: Mapping[str, Any], names: tuple[str, ...], by_module: str
) -> Iterator[tuple[str, Any]]:
    """The values of settings, and those of single modules."""
    yield from ((name, settings[name]) for name in names if settings.get(name) is not None)
    pattern = settings.get(by_module) or {}
    if not isinstance(pattern, Mapping):
        raise DataError(f"{place}: {by_module}: expected module names with values, got {_shown(pattern)}")
    yield from ((f"{by_module}.{key}", value) for key, value in pattern.items())


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The regular expressions among the settings, with the setting."""
    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = settings.get(name)
        for pattern in [value] if isinstance(value, str) else (value or []) if name == "layers_pattern" else []:
            yield name, str(pattern)
    for name in ("rank_pattern", "alpha_pattern"):
        yield from ((name, str(key)) for key in settings.get(name) or {})


def _is_slow(pattern: str) -> bool:
    """Tell whether matching could take exponential time, or a high power of the length of a name."""
    from re import _constants, _parser  # type: ignore[attr-defined]

    def repeats(parsed: Any) -> Iterator[int]:
        """How many unbounded repetitions are around each unbounded repetition."""
        for operation, argument in parsed:
            is_repeat = operation in (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)
            endless = is_repeat and argument[1] > LONG_REPEAT
            inner = [depth for part in _parts(argument) for depth in repeats(part)]
            if endless:
                yield 0
            yield from (depth + endless for depth in inner)

    depths = list(repeats(_parser.parse(pattern)))
    return len(depths) > MOST_REPEATS or any(depths)


def _parts(argument: Any) -> Iterator[Any]:
    """The patterns within the argument of an operation of a parsed pattern."""
    from re import _parser  # type: ignore[attr-defined]

    if isinstance(argument, _parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for inner in argument:
            yield from _parts(inner)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
