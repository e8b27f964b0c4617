"""Whether cameras agree with tracks of surface points, which needs neither depth nor colors.

Axes: P pairs of views, S sightings of a point in both views of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cameo.correspondence.tracks import Tracks
from cameo.geometry.cameras import invert_extrinsics
from cameo.inspection.readings import Reading, true_cameras
from cameo.inspection.scenes import InspectedScene

__all__ = ["TrackScore", "score_tracks", "shared_points"]

# Fewest sightings in common with which a pair says something about its cameras.
LEAST_SHARED = 8


@dataclass(frozen=True)
class TrackScore:
    """How well the cameras of a reading explain the tracks, one value for each pair that shares enough points.

    - `error` `[P]`: median distance in tokens of a sighting from the epipolar line of the other one.
    - `fit` `[P]`: share of sightings within one token of that line whose point lies in front of both cameras.
    - `pair` `[P]`: which pair of its scene each is, for messages.
    """

    error: Tensor
    fit: Tensor
    pair: Tensor


def shared_points(tracks: Tracks, first: int, second: int) -> tuple[Tensor, Tensor]:
    """Return where two views show the points that both have, `[S, 2]` in pixels of each.

    Example:
        >>> tracks = Tracks(torch.tensor([4, 4, 5]), torch.tensor([0, 1, 0]),
        ...                 torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), num_views=2)
        >>> [xy.tolist() for xy in shared_points(tracks, 0, 1)]
        [[[1.0, 2.0]], [[3.0, 4.0]]]
    """
    found = []
    points = [tracks.point[tracks.view == view] for view in (first, second)]
    both = points[0][torch.isin(points[0], points[1])].unique()
    for view, numbers in zip((first, second), points, strict=True):
        order = numbers.argsort(stable=True)
        found.append(tracks.xy[tracks.view == view][order[torch.searchsorted(numbers[order], both)]])
    return found[0], found[1]


def score_tracks(scenes: Sequence[InspectedScene], reading: Reading) -> TrackScore:
    """Score the cameras of a reading by the tracks of some scenes; nothing where no pair shares enough points."""
    errors, fits, pairs = [], [], []
    for scene in scenes:
        tracks = scene.views.tracks
        if tracks is None:
            continue
        views = scene.views
        intrinsics, extrinsics = true_cameras(reading, views.intrinsics, views.extrinsics, views.size)
        late = reading.shift if reading.late == "poses" else 0
        token = max(side / tokens for side, tokens in zip(views.size, scene.token_grid, strict=True))
        for number, (i, j) in enumerate(scene.pairs[: len(scene.pairs) // 2].tolist()):
            here = scene.at(torch.tensor([i, j]))
            places = shared_points(tracks, *here.tolist())
            if len(places[0]) < LEAST_SHARED:
                continue
            pose = extrinsics[scene.at(torch.tensor([i, j]), late)]
            away, ahead = _epipolar(places, intrinsics[here].double(), pose[1] @ invert_extrinsics(pose[0]))
            errors.append(away.median() / token)
            fits.append(((away <= token) & ahead).double().mean())
            pairs.append(number)
    return TrackScore(torch.tensor(errors), torch.tensor(fits), torch.tensor(pairs))


def _epipolar(places: tuple[Tensor, Tensor], intrinsics: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of sightings `[S]` from their epipolar lines in pixels, and whether the point is in front of both.

    `intrinsics` `[2, 3, 3]`; `pose` `[4, 4]` from the first camera to the second.
    """
    homogeneous = [torch.cat([xy, torch.ones_like(xy[:, :1])], -1).double() for xy in places]
    rays = [xy @ matrix.inverse().T for xy, matrix in zip(homogeneous, intrinsics, strict=True)]
    rotation, (x, y, z) = pose[:3, :3], pose[:3, 3].tolist()
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=pose.dtype)
    fundamental = intrinsics[1].inverse().T @ cross @ rotation @ intrinsics[0].inverse()
    # Sampson's distance: the first-order distance of a pair of sightings from the epipolar constraint.
    lines = homogeneous[0] @ fundamental.T, homogeneous[1] @ fundamental
    miss = (homogeneous[1] * lines[0]).sum(-1).abs()
    away = miss / torch.cat([lines[0][:, :2], lines[1][:, :2]], -1).norm(dim=-1).clamp(min=1e-12)
    # Depths a, b of the point on its two rays, a * R r0 + t = b * r1, by least squares.
    turned = rays[0] @ rotation.T
    system = torch.stack([turned, -rays[1]], -1)
    depths = torch.linalg.lstsq(system, -pose[:3, 3].expand(len(turned), 3)[..., None]).solution[..., 0]
    return away, (depths > 0).all(-1)
