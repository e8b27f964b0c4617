"""Do cameras, depth and images that a user hands over fit together? If not, what do they look like?

Axes: P pairs of views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cameo.errors import DataError
from cameo.geometry import check_cameras
from cameo.geometry.cameras import camera_centers
from cameo.geometry.grids import as_grid
from cameo.inspection.epipolar import TrackScore, score_tracks
from cameo.inspection.readings import AS_GIVEN, Reading, are_normalized
from cameo.inspection.registration import Registration, register
from cameo.inspection.report import AGREES, CANNOT_TELL, WRONG, DataCheck, PairCheck
from cameo.inspection.residual import token_error
from cameo.inspection.scenes import InspectedScene, at_grid, inspected_scenes
from cameo.inspection.scores import Matched, Score, match_pairs, score
from cameo.inspection.search import LEAST_QUALITY, Search
from cameo.scenes.views import SceneSource, Views

__all__ = ["check_views"]

# Token grid on which readings are compared; on a finer one the comparison takes longer and comes out alike.
SEARCH_GRID = (16, 16)
# The figures below separate right data from wrong on the scenes named in benchmarks/correspondence/check_data.md.
# Share of the compared points in front of what the other view shows: up to which data fits, and from which it does not.
IN_FRONT_FITS, IN_FRONT_WRONG = 0.1, 0.2
# The same for the color difference of matches over that of random tokens.
COLOR_FITS, COLOR_WRONG = 0.75, 0.85
# Share of the tokens with depth that must fall on depth of the other view for anything to be concluded.
LEAST_COMPARED = 0.05
# The same for tracks: median distance from the epipolar line in tokens, share of the points that fit.
EPIPOLAR_FITS, TRACKS_FIT, TRACKS_WRONG = 0.5, 0.8, 0.5
# Depth is not registered if moving it by this share of the image's side or more brings its edges onto edges of color
# that are stronger by this factor, with this certainty.
LEAST_OFFSET, LEAST_EDGE_GAIN, LEAST_EDGE_CERTAINTY = 0.025, 1.25, 4.0
# If the data is as well read in one of these ways, it cannot be told that it is right.
GROSS = (
    Reading(axes="OpenGL"),
    Reading(camera_to_world=True),
    Reading(unit=1000.0),
    Reading(unit=1 / 1000.0),
)


def check_views(
    data: Views | SceneSource,
    *,
    scenes: int = 6,
    pairs: int = 48,
    token_grid: int | tuple[int, int] = 32,
    neighbors: bool = True,
) -> DataCheck:
    """Check whether cameras, depth and images fit together, and say what they look like where they do not.

    Each surface point of a view is projected into another one. If all fits, it lies on the surface that is seen there,
    or behind it, and has its color. Wrong conventions are found by trying them: other axes, camera-to-world poses,
    intrinsics of another image, other units, ray length for depth, poses or images of another frame, and combinations.
    Depth that is not registered to color is found by its edges. Without depth, `Views.tracks` are compared with the
    epipolar lines.

    Example:
        >>> import tempfile
        >>> from dataclasses import replace
        >>> from cameo.data import EmbeddedScenes
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     views = EmbeddedScenes(num_scenes=1, size=(48, 48), cache_dir=folder, progress=False).views(0)
        >>> check_views(views).verdict
        'agrees'
        >>> check = check_views(replace(views, extrinsics=torch.linalg.inv(views.extrinsics)))
        >>> check.verdict, check.mistakes
        ('wrong', ('camera-to-world',))

    Args:
        data: the views of a scene, or a source of scenes.
        scenes: how many scenes of a source are looked at, at most; evenly spread.
        pairs: how many pairs of views are compared, at most, of all scenes together.
        token_grid: (h, w) or an int; errors are told in tokens of it.
        neighbors: whether the views beside those of the pairs are loaded too, up to six for each, without which it
            cannot be told that poses, depth or images are those of another frame.

    Raises:
        DataError: there is no scene with two views, or a camera is none: not finite, a mirror.
        ValueError: a number is below 1.
    """
    for name, value in (("scenes", scenes), ("pairs", pairs)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    coarse = inspected_scenes(data, scenes=scenes, pairs=pairs, token_grid=SEARCH_GRID, neighbors=neighbors)
    for scene in coarse:
        _check_cameras(scene.views)
    fine = [at_grid(scene, as_grid("token_grid", token_grid)) for scene in coarse]
    has_depth = any(bool((scene.views.depth > 0).any()) for scene in coarse)
    if has_depth:
        return _check_depth(coarse, fine)
    return _check_tracks(fine)


def _check_cameras(views: Views) -> None:
    intrinsics = views.intrinsics[None].float()
    if are_normalized(views.intrinsics):
        intrinsics = intrinsics * intrinsics.new_tensor([views.size[1], views.size[0], 1])[:, None]
    try:
        check_cameras(intrinsics, views.extrinsics[None])
    except ValueError as error:
        raise DataError(f"scene {views.key}: {error}") from error


def _check_depth(coarse: Sequence[InspectedScene], fine: Sequence[InspectedScene]) -> DataCheck:
    scores: dict[Reading, Score] = {}

    def quality_of(reading: Reading) -> Tensor:
        scores[reading] = score(coarse, reading)
        return scores[reading].quality.flatten()

    search = Search(coarse, quality_of, fits=lambda reading: _fits(scores[reading]), applies=lambda _: True)
    reading = search.best()
    found = scores[reading]
    matches = [match_pairs(scene, AS_GIVEN) for scene in fine]
    check = DataCheck(
        verdict=CANNOT_TELL,
        words="",
        reading=reading,
        pairs=_pair_checks(fine, matches),
        token_error=token_error(fine, matches),
        scenes=fine,
    )
    given = scores[AS_GIVEN]
    if reading != AS_GIVEN and not _is_wrong(found):
        better = (
            f"{found.matched_share:.1%} of the tokens are then matched instead of {given.matched_share:.1%}, and "
            f"{_percent(found.in_front_share)} of the compared points instead of {_percent(given.in_front_share)} lie "
            "in front of what the other view shows"
        )
        return replace(
            check, verdict=WRONG, words=f"it looks like {reading.words}. {better}", mistakes=reading.names
        )
    check = replace(check, reading=AS_GIVEN)
    compared = given.compared.sum() / given.measured.sum().clamp(min=1)
    if compared < LEAST_COMPARED:
        return replace(
            check,
            words=f"of the tokens with depth, {compared:.1%} fall on depth of the other view: the views hardly overlap, "
            "or the cameras are wrong in a way that is not among those tried. Look at the picture, or compare more pairs",
        )
    if _is_wrong(given):
        return replace(check, verdict=WRONG, words=f"{_misfit(given)}, and none of the mistakes tried explains it")
    if alike := search.alike(AS_GIVEN, GROSS):
        names = " or ".join(" and ".join(one.names) for one in alike)
        return replace(
            check, words=f"in these views the data fits as well with another reading: {names}. Views with more "
            "parallax, from directions that differ more, would tell",
        )
    registration = register(coarse)
    check = replace(check, registration=registration)
    if is_moved(registration):
        return replace(
            check, verdict=WRONG, words=f"it looks like {registration.words}", mistakes=("depth not registered",)
        )
    if not _fits(given):
        return replace(check, words=f"{_misfit(given)}. That may be noise of the depth; look at the picture")
    within = "" if math.isnan(check.token_error) else f"; by their colors, nine of ten image parts are matched to "\
        f"within {max(check.token_error, 0.5):g} tokens"
    return replace(check, verdict=AGREES, words=f"{given.matched_share:.1%} of the tokens have a match in another view{within}")


def is_moved(registration: Registration) -> bool:
    """Tell whether depth is certainly not registered to color."""
    return (
        registration.known
        and registration.offset >= LEAST_OFFSET
        and registration.best >= LEAST_EDGE_GAIN * max(registration.here, 0.0)
        and registration.certainty >= LEAST_EDGE_CERTAINTY
    )


def _fits(found: Score) -> bool:
    """Tell whether everything that can be measured is as it is for right data; NaN is not."""
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


def _check_tracks(fine: Sequence[InspectedScene]) -> DataCheck:
    scores: dict[Reading, TrackScore] = {}

    def quality_of(reading: Reading) -> Tensor:
        scores[reading] = score_tracks(fine, reading)
        return scores[reading].fit

    def fits(reading: Reading) -> bool:
        return bool(scores[reading].fit.mean() >= TRACKS_FIT)

    def applies(reading: Reading) -> bool:
        return reading.unit == 1 and not reading.ray_length and reading.late in ("", "poses")

    search = Search(fine, quality_of, fits, applies)
    given = search.quality(AS_GIVEN)
    check = DataCheck(CANNOT_TELL, "", AS_GIVEN, _pair_checks(fine, None), scenes=fine)
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
    shown = f"tracked points lie {error:.2g} tokens from their epipolar lines (median), {fit:.1%} of them within a token"
    if fit < TRACKS_WRONG:
        return replace(check, verdict=WRONG, words=f"{shown}, and none of the mistakes tried explains it")
    if alike := search.alike(AS_GIVEN, GROSS):
        return replace(
            check, words=f"{shown}, and with another reading too: {' or '.join(' '.join(one.names) for one in alike)}"
        )
    if fit < TRACKS_FIT:
        return replace(check, words=f"{shown} and in front of both cameras; right data has {TRACKS_FIT:.0%} or more")
    return replace(check, verdict=AGREES, words=f"{shown}. Without depth nothing else is compared")


def _pair_checks(scenes: Sequence[InspectedScene], matches: Sequence[Matched] | None) -> tuple[PairCheck, ...]:
    """Figures of all pairs of all scenes, as given; without matches those of the tracks alone."""
    found = []
    for place, scene in enumerate(scenes):
        count = len(scene.pairs) // 2
        tracks = score_tracks([scene], AS_GIVEN)
        epipolar = dict(zip(tracks.pair.tolist(), tracks.error.tolist(), strict=True))
        center = camera_centers(scene.views.extrinsics.double())
        for number, (i, j) in enumerate(scene.pairs[:count].tolist()):
            both = torch.tensor([number, number + count])
            here = scene.at(torch.tensor([i, j]))
            depth = scene.views.depth[here]
            measured = depth[(depth > 0) & depth.isfinite()]
            figures = {} if matches is None else _figures(matches[place], both)
            found.append(
                PairCheck(
                    key=scene.views.key,
                    views=(i, j),
                    epipolar=epipolar.get(number, math.nan),
                    depth=measured.median().item() if len(measured) else math.nan,
                    baseline=(center[here[0]] - center[here[1]]).norm().item(),
                    **{name: figures.get(name, math.nan) for name in ("matched", "in_front", "color", "random")},
                )
            )
    return tuple(found)


def _figures(matched: Matched, both: Tensor) -> dict[str, float]:
    visible = matched.visible[both]

    def share(part: Tensor, whole: Tensor) -> float:
        return part.sum().item() / whole.sum().item() if whole.any() else math.nan

    return {
        "matched": share(visible, matched.measured[both]),
        "in_front": share(matched.in_front[both] & matched.compared[both], matched.compared[both]),
        "color": matched.difference[both][visible].mean().item(),
        "random": matched.random[both].mean().item(),
    }
