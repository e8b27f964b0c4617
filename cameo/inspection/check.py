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
from cameo.inspection.depth_verdict import judge_depth
from cameo.inspection.epipolar import score_tracks
from cameo.inspection.readings import AS_GIVEN, are_normalized
from cameo.inspection.report import DataCheck, PairCheck
from cameo.inspection.residual import token_error
from cameo.inspection.scenes import InspectedScene, at_grid, inspected_scenes
from cameo.inspection.scores import Matched, match_pairs
from cameo.inspection.track_verdict import judge_tracks
from cameo.scenes.views import SceneSource, Views

__all__ = ["check_views"]

# Token grid on which readings are compared; on a finer one that takes longer and comes out alike.
SEARCH_GRID = (16, 16)


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
    if any(bool((scene.views.depth > 0).any()) for scene in coarse):
        matches = [match_pairs(scene, AS_GIVEN) for scene in fine]
        check = replace(judge_depth(coarse), token_error=token_error(fine, matches))
        return replace(check, pairs=_pair_checks(fine, matches), scenes=fine)
    return replace(judge_tracks(fine), pairs=_pair_checks(fine, None), scenes=fine)


def _check_cameras(views: Views) -> None:
    intrinsics = views.intrinsics[None].float()
    if are_normalized(views.intrinsics):
        intrinsics = intrinsics * intrinsics.new_tensor([views.size[1], views.size[0], 1])[:, None]
    try:
        check_cameras(intrinsics, views.extrinsics[None])
    except ValueError as error:
        raise DataError(f"scene {views.key}: {error}") from error


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
