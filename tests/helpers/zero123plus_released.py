"""A small Zero123++ with all components of a release."""

from __future__ import annotations

import copy
import functools

from cameo.adapters.zero123plus.pipeline import Zero123PlusPipeline
from tests.helpers import zero123plus_models as parts

REFERENCE = parts.REFERENCE


@functools.cache
def _released() -> Zero123PlusPipeline:
    return Zero123PlusPipeline(**parts.components(), ramping_coefficients=parts.RAMP)


def released() -> Zero123PlusPipeline:
    return copy.deepcopy(_released())
