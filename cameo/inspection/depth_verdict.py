"""The verdict where there is depth: which reading of it explains the views, and whether that is good enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from cameo.inspection.readings import AS_GIVEN, Reading
from cameo.inspection.registration import Registration, register, with_moved_depth
from cameo.inspection.report import AGREES, CANNOT_TELL, NOT_REGISTERED, WRONG, DataCheck
from cameo.inspection.scenes import InspectedScene
from cameo.inspection.scores import Score, score
from cameo.inspection.search import GROSS, LEAST_QUALITY, Search

__all__ = ["judge_depth"]

# The figures below separate right data from wrong on the scenes named in benchmarks/correspondence/check_data.md.
# Share of the compared points in front of what the other view shows: up to which data fits, and from which it does not.
IN_FRONT_FITS, IN_FRONT_WRONG = 0.1, 0.2
# The same for the color difference of matches over that of random tokens.
COLOR_FITS, COLOR_WRONG = 0.75, 0.85
# Share of the tokens with depth that must fall on depth of the other view for anything to be concluded.
LEAST_COMPARED = 0.05


@dataclass
class _Found:
    """The search on some scenes, and the reading that it found."""

    search: Search
    scores: dict[Reading, Score]
    reading: Reading

    @property
    def score(self) -> Score:
        return self.scores[self.reading]

    @property
    def rank(self) -> tuple[bool, int, float]:
        """The smaller, the better: whether it still does not fit, how many mistakes it takes, and less its quality."""
        return _is_wrong(self.score), len(self.reading.names), -self.search.mean(self.reading)


def judge_depth(scenes: Sequence[InspectedScene]) -> DataCheck:
    """Return the verdict on scenes with depth, without figures of pairs."""
    found = _search(scenes)
    given = found.scores[AS_GIVEN]
    registration = register(scenes)
    moved = registration.is_moved and found.reading.late not in ("depth", "images")
    if moved and (found.reading != AS_GIVEN or _is_wrong(given)):
        # Depth that is not registered has other intrinsics than its colors, which looks like another mistake.
        then = _search([with_moved_depth(scene, registration) for scene in scenes])
        found = min(found, then, key=lambda one: one.rank)
    check = DataCheck(CANNOT_TELL, "", AS_GIVEN, pairs=(), registration=registration)
    if (moved or found.reading != AS_GIVEN) and not _is_wrong(found.score):
        return _explained(check, given, found, registration if moved else None)
    return _unexplained(check, given, found.search)


def _search(scenes: Sequence[InspectedScene]) -> _Found:
    scores: dict[Reading, Score] = {}

    def quality_of(reading: Reading) -> Tensor:
        scores[reading] = score(scenes, reading)
        return scores[reading].quality.flatten()

    search = Search(scenes, quality_of, fits=lambda reading: _fits(scores[reading]), applies=lambda _: True)
    return _Found(search, scores, search.best())


def _explained(check: DataCheck, given: Score, found: _Found, registration: Registration | None) -> DataCheck:
    words = [f"it looks like {found.reading.words}"] if found.reading.words else []
    names = list(found.reading.names)
    if registration is not None:
        words.append(f"it looks like {registration.words}")
        names.append(NOT_REGISTERED)
    if found.reading != AS_GIVEN:
        words.append(
            f"{found.score.matched_share:.1%} of the tokens are then matched instead of {given.matched_share:.1%}, and "
            f"{_percent(found.score.in_front_share)} of the compared points instead of "
            f"{_percent(given.in_front_share)} lie in front of what the other view shows"
        )
    return replace(check, verdict=WRONG, words=". ".join(words), reading=found.reading, mistakes=tuple(names))


def _unexplained(check: DataCheck, given: Score, search: Search) -> DataCheck:
    """Return the verdict where no reading explains the views better than the given one."""
    compared = (given.compared.sum() / given.measured.sum().clamp(min=1)).item()
    if compared < LEAST_COMPARED:
        words = (
            f"of the tokens with depth, {compared:.1%} fall on depth of the other view: the views hardly overlap, or "
            "the cameras are wrong in a way that was not tried. Look at the picture, or compare more pairs"
        )
        return replace(check, words=words)
    if _is_wrong(given):
        return replace(check, verdict=WRONG, words=f"{_misfit(given)}, and none of the mistakes tried explains it")
    if alike := search.alike(AS_GIVEN, GROSS):
        words = (
            "in these views the data would fit as well with another reading: "
            f"{', '.join(one.words.partition(';')[0] for one in alike)}. Views with more parallax, from directions "
            "that differ more, would tell"
        )
        return replace(check, words=words)
    if not _fits(given):
        return replace(check, words=f"{_misfit(given)}. That may be noise of the depth; look at the picture")
    return replace(check, verdict=AGREES, words=f"{given.matched_share:.1%} of the tokens have a match in another view")


def _fits(found: Score) -> bool:
    """Tell whether everything that can be measured is as it is for right data; without compared points it is not."""
    color = found.color_ratio
    return (
        found.quality.nanmean().item() >= LEAST_QUALITY
        and found.in_front_share <= IN_FRONT_FITS
        and (math.isnan(color) or color <= COLOR_FITS)
    )


def _is_wrong(found: Score) -> bool:
    """Tell whether something is as it never is for right data."""
    return found.in_front_share > IN_FRONT_WRONG or found.color_ratio > COLOR_WRONG


def _misfit(found: Score) -> str:
    return (
        f"{_percent(found.in_front_share)} of the compared points lie in front of what the other view shows (right "
        f"data: below {IN_FRONT_FITS:.0%}), and matches differ in color {found.color_ratio:.2f} times as much as "
        f"random tokens (right data: below {COLOR_FITS:g})"
    )


def _percent(share: float) -> str:
    return "none" if math.isnan(share) else f"{share:.1%}"
