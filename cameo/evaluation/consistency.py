"""Consistency of generated views: views warped onto each other, and matches checked with the epipolar geometry.

Axes: B samples, V views, H W image pixels, M points, J other views. Images are floating point RGB in [0, 1]; cameras,
depth and pixel positions are as in :mod:`cameo.geometry`. If the true images are given, both measures are computed for
them too: because of interpolation, shading and mirrors they are not perfect either, and limit what a model can reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.errors import ShapeError
from cameo.evaluation.keypoints import find_keypoints, match_descriptors
from cameo.evaluation.metrics import psnr_of_error
from cameo.geometry import relative_extrinsics, transform, unproject
from cameo.geometry.cameras import (
    at_least_float32,
    camera_centers,
    check_cameras,
    check_depth,
    full_precision,
    invert_extrinsics,
    most_exact,
)
from cameo.geometry.depth import sample_depth
from cameo.geometry.visibility import DEPTH_TOLERANCE, check_tolerance, look_up
from cameo.probing.truth import view_angles

__all__ = ["EpipolarPair", "WarpedPair", "symmetric_epipolar_distance", "tsed", "warp_error"]

ViewPairs = Sequence[tuple[int, int]]  # view, other view

# Camera centers nearer than this share of their distance from the origin are one point, without epipolar lines.
SAME_CENTER = 1e-5


@dataclass(frozen=True)
class WarpedPair:
    """Photometric error of one view against another view warped onto it, over the pixels that both show.

    Attributes:
        sample, view, other: sample and views of the pair; ``other`` is warped onto ``view``.
        angle: angle between the optical axes, in degrees.
        pixels: number of pixels of ``view`` whose surface point ``other`` shows.
        absolute: mean absolute difference of the colors in [0, 1]; None without pixels.
        psnr: PSNR of the warped view in dB; None without pixels.
        true_absolute, true_psnr: the same for the true images; None without pixels, or without true images.
    """

    sample: int
    view: int
    other: int
    angle: float
    pixels: int
    absolute: float | None
    psnr: float | None
    true_absolute: float | None
    true_psnr: float | None


@dataclass(frozen=True)
class EpipolarPair:
    """How well the SIFT matches of two views agree with their cameras.

    Attributes:
        sample, view, other: sample and views of the pair.
        angle: angle between the optical axes, in degrees.
        keypoints: number of keypoints in ``view`` and in ``other``.
        matches: number of matches between them.
        distance: median symmetric epipolar distance of the matches in pixels; None without a match.
        consistent: whether there are enough matches and the distance is small enough; None if this cannot be judged.
        reason: why ``consistent`` is not True, or None.
    """

    sample: int
    view: int
    other: int
    angle: float
    keypoints: tuple[int, int]
    matches: int
    distance: float | None
    consistent: bool | None
    reason: str | None


@torch.no_grad()
@full_precision
def warp_error(
    images: Tensor,
    depth: Tensor,
    intrinsics: Tensor,
    extrinsics: Tensor,
    *,
    truth: Tensor | None = None,
    pairs: ViewPairs | None = None,
    depth_tolerance: float = DEPTH_TOLERANCE,
) -> list[WarpedPair]:
    """Warp views onto each other with the true depth and compare their colors where both show the surface.

    Each pixel center of a view is projected to where the other view sees its surface point, and the color is sampled
    there bilinearly. Pixels without depth, outside the other view, or occluded in it do not count.

    Example:
        >>> depth = torch.full((1, 2, 1, 8, 8), 2.0)
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(1, 2, 3, 3)
        >>> extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
        >>> extrinsics[0, 1, 0, 3] = -1.0  # the second camera stands 4 pixels to the right
        >>> images = torch.zeros(1, 2, 3, 8, 8)
        >>> images[0, 1] = 0.1
        >>> pair, _ = warp_error(images, depth, intrinsics, extrinsics)
        >>> pair.pixels, round(pair.absolute, 4), round(pair.psnr, 4)
        (32, 0.1, 20.0)

    Args:
        images: ``[B, V, 3, H, W]``, the views to judge.
        depth: ``[B, V, 1, H, W]`` true z-depth.
        intrinsics: ``[B, V, 3, 3]`` in pixels.
        extrinsics: ``[B, V, 4, 4]`` world-to-camera.
        truth: ``[B, V, 3, H, W]``, the true images, which are measured in the same way.
        pairs: ordered pairs (view, other); None for all.
        depth_tolerance: see `Correspondence.from_depth`.

    Returns:
        One `WarpedPair` per sample and pair, sample by sample, with the pairs of a view together.

    Raises:
        ShapeError: a wrong shape.
        ValueError: unusable cameras, images that are not floating point or not finite, unknown pairs, or a wrong
            tolerance.
    """
    check_depth(depth, intrinsics, extrinsics)
    _check_images("images", images, depth.shape[:2], depth.shape[-2:])
    if truth is not None:
        _check_images("truth", truth, depth.shape[:2], depth.shape[-2:])
    check_tolerance(depth_tolerance)
    chosen = _checked_pairs(pairs, depth.shape[1])
    angles = view_angles(extrinsics)
    warped = []
    for sample in range(depth.shape[0]):
        this = slice(sample, sample + 1)
        geometry = depth[this], intrinsics[this], extrinsics[this]
        # One view at a time, to bound the memory: reading the depth takes about twenty values per position.
        for view, others in _by_view(chosen):
            xy, visible = _seen_from(view, others, geometry, depth_tolerance)
            errors = _warped_errors(images[sample], view, others, xy, visible)
            true_errors: list[tuple[float | None, float | None]] = [(None, None)] * len(others)
            if truth is not None:
                true_errors = _warped_errors(truth[sample], view, others, xy, visible)
            for column, other in enumerate(others):
                angle, pixels = float(angles[sample, view, other]), int(visible[column].sum())
                warped.append(WarpedPair(sample, view, other, angle, pixels, *errors[column], *true_errors[column]))
    return warped


@full_precision
def symmetric_epipolar_distance(points: Tensor, others: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> Tensor:
    """Distance of matched points from each other's epipolar line, mean over the two images, ``[M]`` in pixels.

    Example:
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).expand(2, 3, 3)
        >>> extrinsics = torch.eye(4).repeat(2, 1, 1)
        >>> extrinsics[1, 0, 3] = -1.0  # side by side: the epipolar lines are the image rows
        >>> others = torch.tensor([[1.0, 5.0], [1.0, 5.5]])
        >>> symmetric_epipolar_distance(torch.tensor([[5.0, 5.0]] * 2), others, intrinsics, extrinsics).tolist()
        [0.0, 0.5]

    Args:
        points: ``[M, 2]``: x, y in the first image, pixel centers at +0.5.
        others: ``[M, 2]``: x, y in the second image.
        intrinsics: ``[2, 3, 3]`` in pixels.
        extrinsics: ``[2, 4, 4]`` world-to-camera.

    Returns:
        In float64. NaN where a point is an epipole, and everywhere if the two camera centers are the same point, since
        no epipolar line is defined there.

    Raises:
        ShapeError: a wrong shape.
        ValueError: unusable cameras.

    Source: Hartley and Zisserman, "Multiple view geometry", 2004, section 11.4; there the distances are squared.
    """
    for name, value in (("points", points), ("others", others)):
        if value.ndim != 2 or value.shape[1] != 2 or len(value) != len(points):
            raise ShapeError(name, expected=f"[{len(points)}, 2]", got=value.shape)
    if intrinsics.shape != (2, 3, 3):
        raise ShapeError("intrinsics", expected="[2, 3, 3]", got=intrinsics.shape)
    if extrinsics.shape != (2, 4, 4):
        raise ShapeError("extrinsics", expected="[2, 4, 4]", got=extrinsics.shape)
    check_cameras(intrinsics[None], extrinsics[None])
    first, second = (F.pad(value.double(), (0, 1), value=1.0) for value in (points, others))
    if _same_center(extrinsics):
        return first.new_full((len(first),), math.nan)
    fundamental = _fundamental_matrix(intrinsics.double(), extrinsics.double())
    line, other_line = second @ fundamental, first @ fundamental.mT
    residual = (second * other_line).sum(-1).abs()
    lengths = torch.stack([line[:, :2].norm(dim=-1), other_line[:, :2].norm(dim=-1)])
    return torch.where((lengths > 0).all(0), (residual / lengths).mean(0), math.nan)


def tsed(
    images: Tensor,
    intrinsics: Tensor,
    extrinsics: Tensor,
    *,
    truth: Tensor | None = None,
    pairs: ViewPairs | None = None,
    max_distance: float = 2.0,
    min_matches: int = 10,
) -> list[EpipolarPair]:
    """Thresholded symmetric epipolar distance: do SIFT matches between views lie on each other's epipolar lines?

    Two views are consistent if they have enough matches, and the median of the matches' distances is small. Matches are
    mutual nearest neighbors that pass the ratio test in both directions. Views with too few matches, such as blurred
    ones, count as inconsistent, as in the source. If the true images are given, pairs of views whose true images are
    not consistent either are not judged (``consistent=None``), since small or smooth images have too few keypoints.
    Distances are in pixels, so that results of different image sizes cannot be compared (source: 256 pixels).

    Example:
        >>> intrinsics = torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(1, 2, 3, 3)
        >>> extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
        >>> extrinsics[0, 1, 0, 3] = -1.0
        >>> pair, = tsed(torch.zeros(1, 2, 3, 32, 32), intrinsics, extrinsics)  # doctest: +SKIP
        >>> pair.consistent, pair.reason  # doctest: +SKIP
        (False, '0 matches, at least 10 needed')

    Args:
        images: ``[B, V, 3, H, W]``, the views to judge.
        intrinsics: ``[B, V, 3, 3]`` in pixels.
        extrinsics: ``[B, V, 4, 4]`` world-to-camera.
        truth: ``[B, V, 3, H, W]``, the true images.
        pairs: pairs (view, other) in any order. None for each pair of views once.
        max_distance: bound of the median distance in pixels.
        min_matches: smallest number of matches.

    Returns:
        One `EpipolarPair` per sample and pair, sample by sample.

    Raises:
        ShapeError: a wrong shape.
        ValueError: unusable cameras, images that are not floating point or not finite, unknown pairs, or a wrong
            threshold.
        ImportError: OpenCV is not installed.

    Source: Yu et al. 2023 (arXiv 2304.10700), and the authors' code (YorkUCVIL/Photoconsistent-NVS,
    compute_sed.py and eval_consistency.py) for the defaults.
    """
    check_cameras(intrinsics, extrinsics)
    _check_images("images", images, intrinsics.shape[:2], images.shape[-2:])
    if truth is not None:
        _check_images("truth", truth, intrinsics.shape[:2], images.shape[-2:])
    if not max_distance > 0:
        raise ValueError(f"max_distance: expected more than 0 pixels, got {max_distance}")
    if min_matches < 1:
        raise ValueError(f"min_matches: expected at least 1, got {min_matches}")
    views = intrinsics.shape[1]
    chosen = _checked_pairs([(i, j) for i in range(views) for j in range(i)] if pairs is None else pairs, views)
    angles = view_angles(extrinsics)
    judged = []
    for sample in range(intrinsics.shape[0]):
        needed = sorted({view for pair in chosen for view in pair})
        found, *found_in_truth = (
            {view: find_keypoints(source[sample, view]) for view in needed}
            for source in (images, truth)
            if source is not None
        )
        for view, other in chosen:
            cameras = intrinsics[sample, [view, other]].cpu(), extrinsics[sample, [view, other]].cpu()
            verdict = _judge(found[view], found[other], cameras, max_distance, min_matches)
            for true in found_in_truth if verdict.consistent is not None else ():
                expected = _judge(true[view], true[other], cameras, max_distance, min_matches)
                if not expected.consistent:
                    reason = f"the true images are not found consistent either: {expected.reason}"
                    verdict = verdict._replace(consistent=None, reason=reason)
            keypoints = (len(found[view][0]), len(found[other][0]))
            judged.append(EpipolarPair(sample, view, other, float(angles[sample, view, other]), keypoints, *verdict))
    return judged


def _by_view(pairs: ViewPairs) -> list[tuple[int, list[int]]]:
    """Group pairs (view, other) by view."""
    return [(view, [j for i, j in pairs if i == view]) for view in dict.fromkeys(i for i, _ in pairs)]


def _seen_from(
    view: int, others: list[int], geometry: tuple[Tensor, Tensor, Tensor], tolerance: float
) -> tuple[Tensor, Tensor]:
    """Project the surface points of a view's pixels into other views of the same sample.

    Args:
        view: the view.
        others: J other views.
        geometry: depth `[1, V, 1, H, W]`, intrinsics and extrinsics of the sample.
        tolerance: share by which the depth may differ.

    Returns:
        Position ``[J, H*W, 2]`` in pixels of each other view, and whether the point is visible there, ``[J, H*W]``.
    """
    depth, intrinsics, extrinsics = geometry
    depth = depth.to(at_least_float32(depth))
    # Poses relative to the view, so that a distant world origin does not cost accuracy.
    pose = relative_extrinsics(most_exact(extrinsics), reference=view).to(depth)
    intrinsics = intrinsics.to(depth)
    this = slice(view, view + 1)
    points = unproject(depth[:, this], intrinsics[:, this], pose[:, this]).flatten(3).mT
    in_camera = transform(points.expand(-1, len(others), -1, -1), pose[:, others])
    seen = look_up(in_camera, intrinsics[:, others], lambda xy, _: sample_depth(depth[:, others], xy), tolerance)
    return seen.xy[0], seen.visible[0]


def _warped_errors(
    images: Tensor, view: int, others: list[int], xy: Tensor, visible: Tensor
) -> list[tuple[float | None, float | None]]:
    """Mean absolute error and PSNR of each other view warped onto ``view``; `images [V, 3, H, W]`."""
    height, width = images.shape[-2:]
    grid = torch.where(visible[..., None], xy, 0.0) / xy.new_tensor([width, height]) * 2 - 1
    warped = F.grid_sample(
        images[others].to(grid), grid[:, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    error = torch.where(visible[:, None], warped[:, :, 0] - images[view].to(grid).flatten(1), 0.0)  # [J, 3, H*W]
    count = visible.sum(-1) * error.shape[1]
    absolute, squared = error.abs().sum(dim=(1, 2)) / count, error.square().sum(dim=(1, 2)) / count
    values = zip(absolute.tolist(), psnr_of_error(squared).tolist(), count.tolist(), strict=True)
    return [(mean, decibels) if pixels else (None, None) for mean, decibels, pixels in values]


def _same_center(extrinsics: Tensor) -> bool:
    """Whether two cameras `[2, 4, 4]` have the same center, within the accuracy of their poses."""
    centers = camera_centers(extrinsics.double())
    return bool((centers[0] - centers[1]).norm() <= SAME_CENTER * centers.norm(dim=-1).max())


def _fundamental_matrix(intrinsics: Tensor, extrinsics: Tensor) -> Tensor:
    """Return F `[3, 3]` with ``x1 F x0 = 0`` for matched points of two cameras."""
    pose = extrinsics[1] @ invert_extrinsics(extrinsics[0])
    x, y, z = pose[:3, 3]
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3)
    inverse = torch.linalg.inv(intrinsics)
    return inverse[1].mT @ cross @ pose[:3, :3] @ inverse[0]


class _Verdict(NamedTuple):
    """What `EpipolarPair` says of the keypoints of two views."""

    matches: int
    distance: float | None
    consistent: bool | None
    reason: str | None


def _judge(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    cameras: tuple[Tensor, Tensor],
    max_distance: float,
    min_matches: int,
) -> _Verdict:
    """Match the keypoints of two views and compare the matches with the epipolar geometry of the cameras."""
    in_first, in_second = match_descriptors(first[1], second[1]).unbind(1)
    if _same_center(cameras[1]):
        reason = "the two cameras stand at one point, so there are no epipolar lines"
        return _Verdict(len(in_first), None, None, reason)
    distances = symmetric_epipolar_distance(first[0][in_first], second[0][in_second], *cameras)
    distances = distances[distances.isfinite()]
    count, median = len(distances), float(distances.quantile(0.5)) if len(distances) else None
    if count < min_matches or median is None:
        return _Verdict(count, median, False, f"{count} matches, at least {min_matches} needed")
    if not median < max_distance:
        return _Verdict(count, median, False, f"median distance {median:.2f} px, less than {max_distance:g} needed")
    return _Verdict(count, median, True, None)


def _checked_pairs(pairs: ViewPairs | None, views: int) -> list[tuple[int, int]]:
    """Return the given pairs, checked, or all ordered pairs."""
    if pairs is None:
        return [(i, j) for i in range(views) for j in range(views) if i != j]
    chosen = [(int(i), int(j)) for i, j in pairs]
    wrong = [pair for pair in chosen if pair[0] == pair[1] or not all(0 <= view < views for view in pair)]
    if wrong:
        raise ValueError(f"pairs: expected two different views of 0..{views - 1} each, got {wrong[0]}")
    return chosen


def _check_images(name: str, images: Any, views: Sequence[int], size: Sequence[int]) -> None:
    """Raise unless ``images`` are floating point ``[B, V, 3, H, W]`` with these B, V and H, W."""
    expected = [*views, 3, *size]
    if not isinstance(images, Tensor) or list(images.shape) != expected:
        raise ShapeError(name, expected=str(expected), got=images.shape if isinstance(images, Tensor) else str(images))
    if not images.is_floating_point():
        raise ValueError(f"{name}: expected floating point in [0, 1], got {images.dtype}. Cure: divide by 255")
    if not bool(images.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
