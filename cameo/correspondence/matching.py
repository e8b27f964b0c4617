"""The ways of finding correspondence: nearest neighbors of point maps or image features, and projection of depth.

Axes: B samples, V views, C channels, H W image pixels, h w token grid, N = h*w tokens per view (row-major).
Arguments are not checked here; users call :class:`cameo.correspondence.Correspondence`, which checks them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from cameo.correspondence.neighbors.nearest import cycle_consistent, match_tokens, triton_refusal
from cameo.geometry import camera_rays, cell_centres
from cameo.geometry.cameras import full_precision, invert_extrinsics, most_exact
from cameo.geometry.depth import read_depth
from cameo.geometry.grids import TokenGrid, TokenGrids
from cameo.geometry.visibility import look_up

__all__ = ["match_depth", "match_features", "match_point_maps", "resample_features", "token_at"]

# Bytes that matching by depth may take beyond its result, unless a single key view of one sample needs more; and how
# many it takes for each match that it computes, in float32.
WORKSPACE_BYTES = 64 << 20
DEPTH_BYTES = 576
# Number of similarities in one block of two views: 64 MiB in float32.
BLOCK = 1 << 24


@torch.no_grad()
def match_point_maps(
    points: Tensor, token_grids: TokenGrids, cycle_threshold: float, max_distance: float | None
) -> tuple[Tensor, Tensor]:
    """Match ``points [B, V, 3, H, W]`` by cycle-consistent nearest neighbors.

    Returns:
        Index and distance ``[B, V, V, N]`` as in :class:`cameo.correspondence.Correspondence`.
    """
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    index, distance = match_tokens(
        _token_points(points, token_grids), tuple(w for _, w in token_grids), cycle_threshold
    )
    if max_distance is not None:
        index.masked_fill_(distance > max_distance, -1)
    return index, distance


@torch.no_grad()
@full_precision
def match_depth(
    depth: Tensor, intrinsics: Tensor, extrinsics: Tensor, token_grids: TokenGrids, depth_tolerance: float
) -> tuple[Tensor, Tensor]:
    """Match ``depth [B, V, 1, H, W]`` by projecting each token's surface point into every other view.

    Returns:
        Index and distance ``[B, V, V, N]`` as in :class:`cameo.correspondence.Correspondence`.
    """
    depth = depth.to(torch.promote_types(depth.dtype, torch.float32))
    if depth.dtype == torch.float32 and depth.device.type != "cpu" and triton_refusal(depth.device) is None:
        from cameo.correspondence import triton_depth

        return triton_depth.match_depth(depth, intrinsics, extrinsics, token_grids, depth_tolerance)
    batch, views = depth.shape[:2]
    intrinsics = intrinsics.to(depth)
    centres = _padded_centres(token_grids, depth)
    # [B, V, N]: depth at the token centers, NaN for padding and missing depth.
    centre_depth = read_depth(depth, centres.expand(batch, -1, -1, -1))
    surface = camera_rays(centres, intrinsics) * centre_depth[..., None]
    pose = _relative_poses(extrinsics).to(depth)
    rows, columns = (_per_view(lengths, depth) for lengths in zip(*token_grids, strict=True))
    index = torch.empty(batch, views, *surface.shape[1:3], dtype=torch.int64, device=depth.device)
    distance = depth.new_empty(index.shape)
    # Some key views of some samples at a time, so that the workspace is bounded.
    of_view = DEPTH_BYTES * index[0, :, 0].numel() * depth.element_size() // 4
    keys = min(views, max(1, WORKSPACE_BYTES // of_view))
    samples = max(1, WORKSPACE_BYTES // (views * of_view)) if keys == views else 1
    for b, j in itertools.product(range(0, batch, samples), range(0, views, keys)):
        part = (slice(b, b + samples), slice(j, j + keys))
        found = _match_key_views(
            depth[part],
            intrinsics[part],
            pose[part],
            surface[part[0]],
            centre_depth[part],
            rows[part[1]],
            columns[part[1]],
            depth_tolerance,
        )
        index[part[0], :, part[1]], distance[part[0], :, part[1]] = found
    same_view = torch.eye(views, dtype=torch.bool, device=depth.device)[..., None]
    return index.masked_fill_(same_view, -1), distance.masked_fill_(same_view, math.inf)


def _match_key_views(
    depth: Tensor,
    intrinsics: Tensor,
    pose: Tensor,
    surface: Tensor,
    centre_depth: Tensor,
    rows: Tensor,
    columns: Tensor,
    depth_tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Match all views `[B, i]` with some key views `[B, j]`; index and distance ``[B, i, j, N]``, also for i = j.

    Args:
        depth, intrinsics, centre_depth: of the key views.
        pose: from the camera of i to that of j, ``[B, j, i, 4, 4]``.
        surface: the tokens' surface points, each in its own camera, ``[B, i, N, 3]``.
        rows, columns: those of the tokens of each key view, ``[j, 1]``.
        depth_tolerance: as of `match_depth`.
    """
    # The target view j comes first, so that the points of all views are looked up in view j together.
    point = einsum(pose[..., :3, :3], surface, "b j i r c, b i n c -> b j i n r") + pose[..., None, :3, 3]
    point = rearrange(point, "b j i n c -> b j (i n) c")
    seen = look_up(point, intrinsics, lambda xy, _: read_depth(depth, xy), depth_tolerance)
    token = token_at(seen.xy, rows, columns, depth.shape[-2:])
    measured = torch.gather(centre_depth, -1, token.clamp(min=0)).isfinite()
    matched = measured & (token >= 0) & seen.visible
    # The surface that the view shows there lies on the same ray: it is the point scaled to the surface's depth.
    apart = ((seen.surface / seen.z)[..., None] * point - point).norm(dim=-1)
    index = rearrange(torch.where(matched, token, -1), "b j (i n) -> b i j n", i=surface.shape[1])
    distance = rearrange(torch.where(apart.isfinite(), apart, math.inf), "b j (i n) -> b i j n", i=surface.shape[1])
    return index, distance


@torch.no_grad()
@full_precision
def match_features(
    features: Tensor, token_grids: TokenGrids, cycle_threshold: float, min_similarity: float | None
) -> Tensor:
    """Match ``features [B, V, C, h, w]`` by cycle-consistent nearest neighbors in cosine similarity.

    Returns:
        Index ``[B, V, V, N]`` as in :class:`cameo.correspondence.Correspondence`.
    """
    index, similarity = _most_similar(_feature_tokens(features, token_grids))
    consistent = cycle_consistent(index, tuple(w for _, w in token_grids), cycle_threshold)
    if min_similarity is not None:
        consistent &= similarity >= min_similarity
    return index.masked_fill_(~consistent, -1)


def resample_features(features: Tensor, token_grid: TokenGrid) -> Tensor:
    """Resample ``[X, C, h, w]`` to a token grid, ``[X, C, *token_grid]``: bilinear, half-pixel centers, antialiased.

    Example:
        >>> resample_features(torch.arange(16.0).view(1, 1, 4, 4), (1, 1)).item()
        7.5
    """
    if features.shape[-2:] == token_grid:
        return features
    return F.interpolate(features, size=token_grid, mode="bilinear", antialias=True)


def _feature_tokens(features: Tensor, token_grids: TokenGrids) -> Tensor:
    """Unit vectors at the token grids, ``[B, V, N, C]``; NaN for padding and where anything needed is missing."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    missing = ~features.isfinite().all(dim=2, keepdim=True) | (features == 0).all(dim=2, keepdim=True)
    features = features.masked_fill(missing, math.nan)
    count = max(h * w for h, w in token_grids)
    tokens = features.new_full((*features.shape[:2], count, features.shape[2]), math.nan)
    for view, (h, w) in enumerate(token_grids):
        tokens[:, view, : h * w] = rearrange(resample_features(features[:, view], (h, w)), "b c h w -> b (h w) c")
    length = tokens.norm(dim=-1, keepdim=True)
    # Vectors that cancel to 0, or whose length overflows, have no direction.
    return tokens / length.masked_fill((length == 0) | length.isinf(), math.nan)


def _most_similar(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Index and cosine ``[B, V, V, N]`` of each token's most similar one in each other view; -1 and -inf for none.

    The host waits for no device, and only one block of similarities is held at a time.
    """
    batch, views, count, _ = tokens.shape
    missing = tokens.isnan().any(dim=-1)
    tokens = tokens.masked_fill(missing[..., None], 0)
    index = torch.full((batch, views, views, count), -1, device=tokens.device)
    best = tokens.new_full(index.shape, -math.inf)
    rows = max(1, BLOCK // max(1, batch * count))
    for i in range(views):
        for j in range(i + 1, views):
            for start in range(0, count, rows):
                stop = min(start + rows, count)
                cosine = tokens[:, i, start:stop] @ tokens[:, j].mT
                cosine.masked_fill_(missing[:, i, start:stop, None] | missing[:, j, None], -math.inf)
                highest, similar = cosine.max(dim=2)
                best[:, i, j, start:stop] = highest
                index[:, i, j, start:stop] = similar.masked_fill_(highest.isinf(), -1)
                highest, similar = cosine.max(dim=1)
                # Later tokens win only if they are closer, so that ties stay with the lower index.
                closer = highest > best[:, j, i]
                index[:, j, i] = torch.where(closer, similar + start, index[:, j, i])
                best[:, j, i] = torch.where(closer, highest, best[:, j, i])
    return index, best


def _token_points(points: Tensor, token_grids: TokenGrids) -> Tensor:
    """Resample ``[B, V, 3, H, W]`` to the token grids, ``[B, V, N, 3]``; smaller views are padded with NaN."""
    if len(set(token_grids)) == 1:
        return _resample(points, token_grids[0])
    tokens = points.new_full((*points.shape[:2], max(h * w for h, w in token_grids), 3), math.nan)
    for view, (h, w) in enumerate(token_grids):
        tokens[:, view, : h * w] = _resample(points[:, view, None], (h, w))[:, 0]
    return tokens


def _resample(points: Tensor, token_grid: TokenGrid) -> Tensor:
    """Resample ``[B, V, 3, H, W]`` to a token grid, ``[B, V, N, 3]``; NaN where a pixel that is read is missing.

    Bilinear with half-pixel centers, as `torch.nn.functional.interpolate`; only the four pixels around each token's
    center are read.
    """
    low, high, share = zip(*map(_interpolated_axis, points.shape[-2:], token_grid, [points] * 2), strict=True)
    rows, columns = (torch.stack(pair) for pair in zip(low, high, strict=True))  # [2, h], [2, w]
    pixel = rows[:, None, :, None] * points.shape[-1] + columns[None, :, None, :]
    around = rearrange(points.flatten(3).index_select(3, pixel.flatten()), "b v c (k n) -> k b v n c", k=4)
    weight_y, weight_x = (torch.stack([1 - part, part]) for part in share)
    weight = (weight_y[:, None, :, None] * weight_x[None, :, None, :]).view(4, -1, 1)
    measured = around.isfinite().all(dim=-1, keepdim=True)
    first, *others = weight[:, None, None] * around.masked_fill_(~measured, 0)
    for other in others:
        first += other
    missing = ~measured & (weight > 0)[:, None, None]
    return first.masked_fill_(missing.any(dim=0), math.nan)


def _interpolated_axis(length: int, cells: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each cell's center the pixels before and after it, and the share of the second pixel, each ``[cells]``."""
    centre = (torch.arange(cells, dtype=like.dtype, device=like.device) + 0.5) * (length / cells) - 0.5
    centre = centre.clamp(min=0)
    low = centre.long().clamp(max=length - 1)
    return low, (low + 1).clamp(max=length - 1), centre - low


def _padded_centres(token_grids: TokenGrids, depth: Tensor) -> Tensor:
    """Token centers in pixels, ``[V, N, 2]``, NaN for padding."""
    image_size = (depth.shape[-2], depth.shape[-1])
    if len(set(token_grids)) == 1:
        grid = cell_centres(token_grids[0], image_size, dtype=depth.dtype, device=depth.device)
        return grid.flatten(0, 1).expand(len(token_grids), -1, -1)
    centres = depth.new_full((len(token_grids), max(h * w for h, w in token_grids), 2), math.nan)
    for view, token_grid in enumerate(token_grids):
        grid = cell_centres(token_grid, image_size, dtype=depth.dtype, device=depth.device)
        centres[view, : math.prod(token_grid)] = grid.flatten(0, 1)
    return centres


def _relative_poses(extrinsics: Tensor) -> Tensor:
    """Transform from camera i to camera j, ``[B, j, i, 4, 4]``, in the highest precision that the device has."""
    exact = most_exact(extrinsics)
    return exact[:, :, None] @ invert_extrinsics(exact)[:, None]


def token_at(xy: Tensor, rows: Tensor, columns: Tensor, image_size: Sequence[int]) -> Tensor:
    """Return the token that holds the position ``xy [..., 2]``, -1 outside the image of `image_size` ``(H, W)``.

    `rows` and `columns` are those of each position's token grid; they broadcast with the positions.
    """
    height, width = image_size
    x, y = xy.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column = (torch.where(inside, x, 0) * columns / width).long().minimum(columns - 1)
    row = (torch.where(inside, y, 0) * rows / height).long().minimum(rows - 1)
    return torch.where(inside, row * columns + column, -1)


def _per_view(lengths: Sequence[int], like: Tensor) -> Tensor:
    """One number per view, ``[V, 1]``; created on the device, because the host would wait for a copy."""
    return torch.cat([torch.full((1, 1), length, device=like.device) for length in lengths])
