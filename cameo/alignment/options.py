"""The options of the alignment loss, and the one check of them."""

from __future__ import annotations

import math

from cameo.choices import GELUS, IMPLEMENTATIONS, NORMALIZATIONS, REDUCTIONS
from cameo.errors import unknown_name

__all__ = ["check_choice", "check_options"]

CHOICES = {
    "normalize": NORMALIZATIONS,
    "reduction": REDUCTIONS,
    "implementation": IMPLEMENTATIONS,
    "gelu": GELUS,
}


def check_options(normalize: str, reduction: str, softness: float, implementation: str, gelu: str) -> None:
    """Raise `ValueError` for options that `alignment_loss` would refuse, whatever its tensors are.

    Example:
        >>> check_options(normalize="per_view", reduction="mean", softness=-1.0, implementation="auto", gelu="exact")
        Traceback (most recent call last):
        ValueError: softness: expected a finite number of tokens >= 0, got -1.0
    """
    named = {"normalize": normalize, "reduction": reduction, "implementation": implementation, "gelu": gelu}
    for name, value in named.items():
        check_choice(name, value)
    if reduction == "released" and normalize != "per_view":
        raise ValueError('reduction="released" is defined for normalize="per_view" only')
    if not 0 <= softness < math.inf:
        raise ValueError(f"softness: expected a finite number of tokens >= 0, got {softness}")


def check_choice(name: str, value: str) -> None:
    """Raise `ValueError` if `value` is none of the choices of the option `name`."""
    if value not in CHOICES[name]:
        raise unknown_name(name, value, CHOICES[name])
