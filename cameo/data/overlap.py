"""Overlap of views: the share of one view that another view shows, from depth, tracks or the cameras alone.

Axes: F views of a scene, P = grid x grid points of a view.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from cameo.correspondence.tracks import Tracks
from cameo.data.readers.source import PosedScenes
from cameo.files import write_atomically
from cameo.geometry import check_cameras, invert_extrinsics, transform
from cameo.geometry.cameras import camera_centers
from cameo.geometry.depth import is_measured
from cameo.geometry.projection import camera_rays
from cameo.geometry.visibility import DEPTH_TOLERANCE
from cameo.scenes.cache import default_cache_dir, fingerprint
from cameo.scenes.views import LazySource, SceneCameras, Views, WholeScenes

__all__ = ["scene_overlap", "view_overlap"]

GRID = 16
# Scenes of up to so many views are compared completely, in others each view with so many candidates.
COMPLETE, CANDIDATES = 256, 64
# Depth values of a scene that are kept while it is measured; with more, the depth is coarsened.
KEPT_PIXELS = 2**23
# Points of a view by which its candidates are found, and views into which they are projected at a time.
FEW_POINTS, VIEWS_AT_A_TIME = 9, 64
# Scenes of fewer views are measured before a progress bar could be read.
SHOWN_FROM = 128
# Changed whenever another overlap is measured for the same views.
VERSION = 1


@torch.no_grad()
def view_overlap(views: Views, *, grid: int = GRID) -> Tensor:
    """Return `[F, F]`: the share of view i's measured surface points that view j shows, in [0, 1].

    Points are taken on a `grid` x `grid` raster of each view; a point counts as shown if it falls inside view j and its
    depth lies in the range of the 3x3 pixels there. This is a coarser test than `Correspondence.from_depth`, and fast
    enough for long sequences. The diagonal is 1; the row of a view without any depth is otherwise 0. Scenes of more
    than 256 views are not compared completely: each view is compared with 64 others among those that may show a part
    of it, evenly spread over the sequence, and the others count as 0.

    Where no view has depth, the overlap is the share of view i's `tracks` that view j has too. Without tracks it is
    estimated from the cameras: points are placed where the optical axes meet, and the share that lies inside view j is
    multiplied by (1 + cos a) / 2 with the angle a between the two lines of sight, which is what two views of a sphere
    share.

    Example:
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).repeat(2, 1, 1)
        >>> extrinsics = torch.eye(4).repeat(2, 1, 1)
        >>> extrinsics[1, 0, 3] = 1.0
        >>> images, depth = torch.zeros(2, 3, 8, 8), torch.full((2, 1, 8, 8), 2.0)
        >>> wall = Views(images, depth, intrinsics, extrinsics, "wall")
        >>> view_overlap(wall, grid=8).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    cameras = SceneCameras(
        views.intrinsics,
        views.extrinsics,
        views.size,
        views.key,
        tracks=views.tracks,
        has_depth=bool(is_measured(views.depth).any()),
    )
    return _overlap(cameras, iter(views.depth), grid=grid, progress=False)


@torch.no_grad()
def scene_overlap(source: LazySource, scene: int, *, progress: bool = True) -> Tensor:
    """Return the `view_overlap` of a scene of which one view at a time is decoded.

    The overlap in scenes of `cameo.data.open_views` is kept in the folder of `CAMEO_CACHE`, under a name that changes
    with the cameras and with the content of the depth files. Longer scenes show a progress bar.
    """
    if isinstance(source, WholeScenes):
        return view_overlap(source.views(scene))
    cameras = source.cameras(scene)
    if not isinstance(source, PosedScenes):
        depths = (source.select(scene, [index]).depth[0] for index in range(len(cameras)))
        return _overlap(cameras, depths, progress=progress)
    facts = {"scene": source.fingerprint(scene), "version": VERSION, "grid": GRID, "complete": COMPLETE}
    path = default_cache_dir() / "overlaps" / f"{fingerprint({**facts, 'candidates': CANDIDATES})}.npy"
    stored = _stored(path, len(cameras))
    if stored is not None:
        return stored
    largest = 0.0

    def depths_of_files() -> Iterator[Tensor]:
        nonlocal largest
        for index in range(len(cameras)):
            depth = source.depth(scene, index)
            largest = max(largest, depth.max().item())
            yield depth

    overlap = _overlap(cameras, depths_of_files(), progress=progress)
    if source.check_depth(scene, largest):  # otherwise its warning would be given once and never again
        _store(path, overlap)
    return overlap


def _overlap(cameras: SceneCameras, depths: Iterator[Tensor], *, grid: int = GRID, progress: bool) -> Tensor:
    """Measure the overlap from depth `[1, H, W]` of one view after the other, from tracks, or from the cameras."""
    intrinsics, extrinsics = cameras.intrinsics.float(), cameras.extrinsics.float()
    check_cameras(intrinsics[None], extrinsics[None])
    if not cameras.has_depth and cameras.tracks is not None:
        return _shared_tracks(cameras.tracks)
    count = len(cameras)
    shown = progress and count >= SHOWN_FROM
    with tqdm(total=2 * count, desc=f"overlap of views, {cameras.key}", disable=not shown) as bar:
        if cameras.has_depth:
            seen = _Surfaces(cameras, _watched(depths, bar), grid)
            points, measured, share_of = seen.points, seen.measured, seen.share
        else:
            points = _raster_points(cameras, plausible_range(cameras)[:, None].expand(-1, grid**2), grid)
            measured, share_of = torch.ones(points.shape[:2], dtype=torch.bool), _Sights(cameras).share
            bar.update(count)
        candidates = candidate_pairs(points, measured, cameras)
        overlap = torch.zeros(count, count)
        for view in range(count):
            others = candidates[view].nonzero().flatten()
            found = share_of(points[view], others) * measured[view]
            overlap[view, others] = found.sum(-1) / measured[view].sum().clamp(min=1)
            bar.update()
    return overlap.fill_diagonal_(1.0)


class _Surfaces:
    """Points of each view on its surfaces, and the range of depth around each pixel, from one depth image at a time."""

    def __init__(self, cameras: SceneCameras, depths: Iterable[Tensor], grid: int) -> None:
        (self.height, self.width), count = cameras.size, len(cameras)
        self.projections = _projections(cameras)
        self.cell = 1
        while count * self._cells()[0] * self._cells()[1] > KEPT_PIXELS:
            self.cell += 1
        rows, columns = _raster(cameras.size, grid)
        # The least and the largest depth around each pixel of each view.
        self.ranges, picked = torch.zeros(count, self._cells()[0] * self._cells()[1], 2), torch.zeros(count, grid**2)
        for view, depth in enumerate(depths):
            depth = depth.float()
            picked[view] = depth[0, rows[:, None], columns].flatten()
            valid = is_measured(depth)
            # A cell and the pixels around it.
            near, far = (
                F.max_pool2d(torch.where(valid, part, none), self.cell + 2, self.cell, 1, ceil_mode=True)
                for part, none in ((-depth, -torch.inf), (depth, 0.0))
            )
            self.ranges[view] = torch.stack([-near.flatten(), far.flatten()], dim=-1)
        self.ranges = self.ranges.flatten(0, 1)
        self.measured = is_measured(picked)
        self.points = _raster_points(cameras, torch.where(self.measured, picked, 1.0), grid)

    def _cells(self) -> tuple[int, int]:
        return -(-self.height // self.cell), -(-self.width // self.cell)

    def share(self, points: Tensor, views: Tensor) -> Tensor:
        """Return `[views, P]`: whether each of the views shows each point `[P, 3]` of the world."""
        x, y, z = _projected(self.projections[views], points)
        inside = (z > 0) & (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)
        found = inside.flatten().nonzero()[:, 0]  # most points fall outside of most views
        x, y, z = (part.flatten()[found] for part in (x, y, z))
        rows, columns = self._cells()
        place = (
            views[found // len(points)] * (rows * columns) + (y / self.cell).long() * columns + (x / self.cell).long()
        )
        # The depth in the range around the pixel that is nearest to the depth of the point.
        nearest, farthest = self.ranges.index_select(0, place).unbind(-1)
        surface = z.clamp(nearest, farthest)
        shown = torch.zeros(inside.numel())
        shown[found] = ((z - surface).abs() <= DEPTH_TOLERANCE * surface).float()
        return shown.view_as(inside)


class _Sights:
    """What the cameras alone say of the overlap: lines of sight to points that are placed at a plausible distance."""

    def __init__(self, cameras: SceneCameras) -> None:
        self.height, self.width = cameras.size
        self.projections, self.centers = _projections(cameras), camera_centers(cameras.extrinsics.float())
        self._view = -1

    def share(self, points: Tensor, views: Tensor) -> Tensor:
        """Return `[views, P]`: in [0, 1], how much of the surface at each point of the next view the others share."""
        self._view += 1
        x, y, z = _projected(self.projections[views], points)
        inside = (z > 0) & (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)
        own, other = points - self.centers[self._view], points - self.centers[views][:, None]
        return inside * (1 + torch.cosine_similarity(own[None], other, dim=-1)) / 2


def candidate_pairs(points: Tensor, measured: Tensor, cameras: SceneCameras) -> Tensor:
    """Return `[F, F]` bool: the pairs of views to compare, at most 2 x 64 x F of them if there are more than 256 views.

    A view is a candidate for another if one of a few points `[F, P, 3]` of one lies inside the image of the other. Of
    more candidates than needed, those are taken that are evenly spread over the sequence, so that near and far ones are
    among them.
    """
    count, (height, width) = len(cameras), cameras.size
    if count <= COMPLETE:
        return torch.ones(count, count, dtype=torch.bool)
    order = measured.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    spread = torch.linspace(0, 1, FEW_POINTS) * (measured.sum(1, keepdim=True) - 1).clamp(min=0)
    few = points.gather(1, order.gather(1, spread.long())[..., None].expand(-1, -1, 3)).flatten(0, 1)
    touches, projections = torch.zeros(count, count, dtype=torch.bool), _projections(cameras)
    for first in range(0, count, VIEWS_AT_A_TIME):
        part = slice(first, first + VIEWS_AT_A_TIME)
        x, y, z = _projected(projections[part], few)
        inside = (z > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
        touches[:, part] = inside.unflatten(1, (count, FEW_POINTS)).any(-1).T
    touches = (touches & measured.any(1)[:, None]) | (touches & measured.any(1)[:, None]).T
    for view in range(count):
        others = touches[view].nonzero().flatten()
        if len(others) > CANDIDATES:
            touches[view] = False
            touches[view, others[torch.linspace(0, len(others) - 1, CANDIDATES).round().long()]] = True
    return touches | touches.T


def plausible_range(cameras: SceneCameras) -> Tensor:
    """Return `[F]`: the distance along each optical axis at which it comes nearest to those of the other views.

    It is the median over the others, in the world's unit. For cameras whose axes do not meet in front of them it is
    three times the distance between the two cameras that are farthest apart, and 1 for cameras at one place.

    Example:
        >>> extrinsics = torch.eye(4).repeat(2, 1, 1)
        >>> extrinsics[1, :3, :3] = torch.tensor([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])  # looks along x
        >>> extrinsics[1, :3, 3] = torch.tensor([3.0, 0.0, 2.0])  # from (-2, 0, 3)
        >>> plausible_range(SceneCameras(torch.eye(3).repeat(2, 1, 1), extrinsics, (8, 8), "two")).tolist()
        [3.0, 2.0]
    """
    centers, axes = camera_centers(cameras.extrinsics.double()), cameras.extrinsics[:, 2, :3].double()
    count = len(centers)
    few = torch.linspace(0, count - 1, min(count, COMPLETE)).round().long()
    apart = centers[:, None] - centers[few]
    along = axes @ axes[few].T
    own, other = (apart * axes[:, None]).sum(-1), (apart * axes[few]).sum(-1)
    denominator = 1 - along.square()
    near, far = along * other - own, other - along * own
    meets = (denominator > 1e-3) & (near > 0) & (far > 0)
    distance = torch.where(meets, near / denominator.clamp(min=1e-3), torch.nan)
    extent = apart.norm(dim=-1).max()
    median = distance.nanmedian(dim=1).values
    typical = median.nanmedian()
    fallback = typical if typical.isfinite() else 3 * extent if extent > 0 else extent.new_tensor(1.0)
    return torch.where(median.isfinite(), median, fallback).float()


def _shared_tracks(tracks: Tracks) -> Tensor:
    """The share of each view's points that each other view has too."""
    from scipy.sparse import csr_array

    _, point = torch.unique(tracks.point, return_inverse=True)
    number = int(point.max()) + 1 if len(point) else 1
    seen = csr_array((np.ones(len(point)), (tracks.view.numpy(), point.numpy())), shape=(tracks.num_views, number))
    seen.data[:] = 1.0  # a point that a view has twice counts once
    shared = torch.from_numpy((seen @ seen.T).toarray())
    return (shared / shared.diagonal()[:, None].clamp(min=1)).float().fill_diagonal_(1.0)


def _raster(size: tuple[int, int], grid: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the pixels that are taken of each view."""
    rows = ((torch.arange(grid) + 0.5) * (size[0] / grid)).long()
    return rows, ((torch.arange(grid) + 0.5) * (size[1] / grid)).long()


def _raster_points(cameras: SceneCameras, depth: Tensor, grid: int) -> Tensor:
    """World points `[F, P, 3]` of the raster at the given depths `[F, P]`."""
    rows, columns = _raster(cameras.size, grid)
    xy = torch.stack([columns.expand(grid, grid), rows[:, None].expand(grid, grid)], dim=-1).flatten(0, 1) + 0.5
    rays = camera_rays(xy, cameras.intrinsics[None].float())
    return transform(rays * depth[None, ..., None], invert_extrinsics(cameras.extrinsics[None].float()))[0]


def _projections(cameras: SceneCameras) -> Tensor:
    """From world to pixels times depth, `[F, 3, 4]`."""
    return cameras.intrinsics.float() @ cameras.extrinsics[:, :3].float()


def _projected(projections: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel x and y, and z-depth, of points `[P, 3]` in views `[n, 3, 4]`, each `[n, P]`; one product for all views.

    x and y mean nothing where z is not positive.
    """
    homogeneous = torch.cat([points, torch.ones_like(points[:, :1])], dim=1)
    image = (projections.flatten(0, 1) @ homogeneous.T).unflatten(0, (len(projections), 3))
    z = image[:, 2]
    return image[:, 0] / z, image[:, 1] / z, z


def _watched(depths: Iterator[Tensor], bar: tqdm) -> Iterator[Tensor]:
    for depth in depths:
        yield depth
        bar.update()


def _stored(path: Path, count: int) -> Tensor | None:
    """Read a stored overlap; None where there is none, or a damaged one, which is measured again."""
    if not path.exists():
        return None
    try:
        overlap = torch.from_numpy(np.load(path, allow_pickle=False))
        if (
            overlap.shape != (count, count)
            or overlap.dtype != torch.float32
            or not ((overlap >= 0) & (overlap <= 1)).all()
        ):
            raise ValueError(f"{overlap.dtype} {list(overlap.shape)}")
    except Exception as error:  # numpy raises whatever a damaged file makes it trip over
        warnings.warn(f"{path}: damaged ({error}); the overlap is measured again", stacklevel=4)
        return None
    return overlap


def _store(path: Path, overlap: Tensor) -> None:
    stream = BytesIO()
    np.save(stream, overlap.numpy())
    try:
        write_atomically(path, stream.getvalue())
    except OSError as error:
        warnings.warn(
            f"{path}: cannot keep the overlap ({error}), so that it is measured again next time; set CAMEO_CACHE to a "
            "folder with room and write access",
            stacklevel=4,
        )
