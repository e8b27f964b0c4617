"""The verdict where there are tracks of surface points and no depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from cameo.inspection.epipolar import TrackScore, score_tracks
from cameo.inspection.readings import AS_GIVEN, Reading
from cameo.inspection.report import AGREES, CANNOT_TELL, WRONG, DataCheck
from cameo.inspection.scenes import InspectedScene
from cameo.inspection.search import GROSS, Search

__all__ = ["judge_tracks"]

# Share of the tracked points within a token of their epipolar line and in front of both cameras: from which the data
# fits, and below which it does not. Trackers have outliers.
TRACKS_FIT, TRACKS_WRONG = 0.8, 0.5


def judge_tracks(scenes: Sequence[InspectedScene]) -> DataCheck:
    """Return the verdict on scenes without depth, without figures of pairs."""
    scores: dict[Reading, TrackScore] = {}

    def quality_of(reading: Reading) -> Tensor:
        scores[reading] = score_tracks(scenes, reading)
        return scores[reading].fit

    def fits(reading: Reading) -> bool:
        return bool(scores[reading].fit.mean() >= TRACKS_FIT)

    def applies(reading: Reading) -> bool:
        return reading.unit == 1 and not reading.ray_length and reading.late in ("", "poses")

    search = Search(scenes, quality_of, fits, applies)
    given = search.quality(AS_GIVEN)
    check = DataCheck(CANNOT_TELL, "", AS_GIVEN, pairs=())
    if not len(given):
        return replace(check, words="there is neither depth nor a track of points that two compared views share")
    reading = search.best()
    if reading != AS_GIVEN and scores[reading].fit.mean() >= TRACKS_WRONG:
        words = (
            f"it looks like {reading.words}. {scores[reading].fit.mean():.1%} of the tracked points then lie within a "
            f"token of their epipolar line and in front of both cameras, instead of {given.mean():.1%}"
        )
        return replace(check, verdict=WRONG, words=words, reading=reading, mistakes=reading.names)
    error, fit = scores[AS_GIVEN].error.median().item(), given.mean().item()
    shown = (
        f"tracked points lie {error:.2g} tokens from their epipolar lines (median), {fit:.1%} of them within a token"
    )
    if fit < TRACKS_WRONG:
        return replace(check, verdict=WRONG, words=f"{shown}, and none of the mistakes tried explains it")
    if alike := search.alike(AS_GIVEN, GROSS):
        readings = ", ".join(one.words.partition(";")[0] for one in alike)
        return replace(
            check, words=f"{shown}; in these views the data would fit as well with another reading: {readings}"
        )
    if fit < TRACKS_FIT:
        return replace(check, words=f"{shown} and in front of both cameras; right data has {TRACKS_FIT:.0%} or more")
    return replace(check, verdict=AGREES, words=f"{shown}. Without depth nothing else is compared")
