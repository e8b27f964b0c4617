"""Find the reading of cameras and depth that explains the views best, with as few mistakes as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from cameo.inspection.readings import AS_GIVEN, Reading, combinations, variations
from cameo.inspection.scenes import InspectedScene

__all__ = ["GROSS", "LEAST_QUALITY", "Search", "advantage", "is_better"]

# A reading is better than another one if its quality, averaged over the quarters of all pairs, is more by this share of
# itself, and by this many standard errors. benchmarks/correspondence/check_data.md says from which scenes they come.
LEAST_GAIN = 0.08
LEAST_CERTAINTY = 4.0
# Quality of a reading that explains anything at all.
LEAST_QUALITY = 0.03
# If the data fits as well by one of these readings, it cannot be told that it is right.
GROSS = (Reading(axes="OpenGL"), Reading(camera_to_world=True), Reading(unit=1000.0), Reading(unit=1 / 1000.0))
# Mistakes that can come together.
MOST_MISTAKES = 4


def advantage(quality: Tensor, other: Tensor) -> tuple[float, float]:
    """Return how much better one reading explains the same pairs than another: mean gain, and in standard errors.

    Example:
        >>> import torch
        >>> gain, certainty = advantage(torch.tensor([1.0, 1.2, 0.8]), torch.tensor([0.0, 0.1, -0.1]))
        >>> round(gain, 3), round(certainty)
        (1.0, 17)
    """
    gained = (quality - other)[quality.isfinite() & other.isfinite()].double()
    if len(gained) < 2:
        return 0.0, 0.0
    error = gained.std().item() / math.sqrt(len(gained))
    mean = gained.mean().item()
    return mean, mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0


def is_better(quality: Tensor, other: Tensor) -> bool:
    """Tell whether one reading explains the same pairs certainly better than another one, and not just a little."""
    gain, certainty = advantage(quality, other)
    mean = quality.nanmean().item()
    return mean >= LEAST_QUALITY and gain >= LEAST_GAIN * mean and certainty >= LEAST_CERTAINTY


@dataclass
class Search:
    """Scores of the readings that were tried on some scenes.

    - `scenes`: that are read; all of them are read alike.
    - `quality_of`: returns the quality of a reading for each part of each pair, NaN for parts that say nothing.
    - `fits`: tells whether a reading fits as it should, and not just better than others.
    - `applies`: tells whether a reading could make a difference.
    """

    scenes: Sequence[InspectedScene]
    quality_of: Callable[[Reading], Tensor]
    fits: Callable[[Reading], bool]
    applies: Callable[[Reading], bool]
    tried: dict[Reading, Tensor] = field(default_factory=dict)

    def quality(self, reading: Reading) -> Tensor:
        """Return the quality of a reading, computed once."""
        if reading not in self.tried:
            self.tried[reading] = self.quality_of(reading)
        return self.tried[reading]

    def mean(self, reading: Reading) -> float:
        """Return the mean quality of a reading; 0 where nothing can be said."""
        return self.quality(reading).nanmean().nan_to_num(0.0).item()

    def best(self) -> Reading:
        """Return the reading that is better than each with fewer mistakes that was tried; the given one if none is."""
        best = self._extended(AS_GIVEN)
        if not self.fits(best):
            views = self.scenes[0].views
            every = [one for one in combinations(views.intrinsics, views.size) if self.applies(one)]
            other = self._extended(max(every, key=self.mean))
            best = other if self.mean(other) > self.mean(best) else best
        return self._reduced(best)

    def _extended(self, reading: Reading) -> Reading:
        """Add one mistake after the other as long as that is better."""
        views, frames = self.scenes[0].views, all(scene.has_neighbors for scene in self.scenes)
        while len(reading.names) < MOST_MISTAKES:
            more = [
                one for one in variations(reading, views.intrinsics, views.size, frames=frames) if self.applies(one)
            ]
            candidate = max(more, key=self.mean)
            if not is_better(self.quality(candidate), self.quality(reading)):
                break
            reading = candidate
        return reading

    def _reduced(self, reading: Reading) -> Reading:
        """Drop the mistakes without which it is no worse."""
        for fewer in _parts(reading):
            if not is_better(self.quality(reading), self.quality(fewer)):
                return self._reduced(fewer)
        return reading

    def alike(self, reading: Reading, others: Iterable[Reading]) -> list[Reading]:
        """Return the readings than which a given one is no better."""
        return [
            other
            for other in others
            if self.applies(other) and not is_better(self.quality(reading), self.quality(other))
        ]


def _parts(reading: Reading) -> list[Reading]:
    """Return the readings that lack one of the mistakes of a reading."""
    groups = (
        ("late", "shift"),
        ("ray_length",),
        ("focal",),
        ("intrinsics",),
        ("unit",),
        ("camera_to_world",),
        ("axes",),
    )
    lacking = [replace(reading, **{name: getattr(AS_GIVEN, name) for name in names}) for names in groups]
    return [one for one in lacking if one != reading]
