"""The two ways of finding correspondence: nearest neighbours of point maps, and projection of depth.

Axes: B samples, V views, H W image pixels, h w token grid, N = h*w tokens per view (row-major).
Arguments are taken as checked; :class:`cameo.correspondence.Correspondence` is the door for users.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from cameo.cameras import full_precision
from cameo.depth import inverse_depth_slopes, sample_slopes
from cameo.geometry import camera_rays, cell_centres, invert_extrinsics, to_pixels

__all__ = ["match_depth", "match_point_maps"]

# Entries of one block of pairwise distances.
BLOCK_ENTRIES = 1 << 22

Sizes = tuple[tuple[int, int], ...]


@torch.no_grad()
def match_point_maps(
    points: Tensor, sizes: Sizes, cycle_threshold: float, max_distance: float | None
) -> tuple[Tensor, Tensor]:
    """Match ``points [B, V, 3, H, W]`` by cycle-consistent nearest neighbours.

    Returns:
        Index and distance ``[B, V, V, N]`` as in :class:`cameo.correspondence.Correspondence`.
    """
    batch, views = points.shape[:2]
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    shape = (batch, views, views, max(h * w for h, w in sizes))
    index = torch.full(shape, -1, dtype=torch.int64, device=points.device)
    distance = points.new_full(shape, math.inf)
    tokens = [_resample(points[:, view], sizes[view]) for view in range(views)]
    for i in range(views):
        for j in range(i + 1, views):
            forward, backward, near, near_back = _nearest_both_ways(tokens[i], tokens[j])
            for a, b, go, back, apart in (
                (i, j, forward, backward, near),
                (j, i, backward, forward, near_back),
            ):
                kept = (go >= 0) & _returns(go, back, sizes[a][1], cycle_threshold)
                if max_distance is not None:
                    kept &= apart <= max_distance
                index[:, a, b, : go.shape[-1]] = torch.where(kept, go, -1)
                distance[:, a, b, : go.shape[-1]] = apart
    return index, distance


@torch.no_grad()
@full_precision
def match_depth(
    depth: Tensor, intrinsics: Tensor, extrinsics: Tensor, sizes: Sizes, depth_tolerance: float
) -> tuple[Tensor, Tensor]:
    """Match ``depth [B, V, 1, H, W]`` by projecting each token's surface point into every other view.

    Returns:
        Index and distance ``[B, V, V, N]`` as in :class:`cameo.correspondence.Correspondence`.
    """
    views = depth.shape[1]
    depth = depth.to(torch.promote_types(depth.dtype, torch.float32))
    intrinsics = intrinsics.to(depth)
    slopes = inverse_depth_slopes(depth)
    centres = _padded_centres(sizes, depth)
    # [B, V, N] depth at the token centres, NaN for padding and missing depth
    centre_depth = sample_slopes(slopes, centres.expand(depth.shape[0], -1, -1, -1))
    surface = camera_rays(centres, intrinsics) * centre_depth[..., None]
    pose = _relative_poses(extrinsics).to(depth)
    # Axis j leads: the points of all views are looked up in view j together.
    point = einsum(pose[..., :3, :3], surface, "b j i r c, b i n c -> b j i n r") + pose[..., None, :3, 3]
    point = rearrange(point, "b j i n c -> b j (i n) c")
    xy, z = to_pixels(point, intrinsics)
    seen = sample_slopes(slopes, xy)
    token = _token_at(xy, sizes, depth.shape[-2:])
    measured = torch.gather(centre_depth, -1, token.clamp(min=0)).isfinite()
    visible = measured & (token >= 0) & ((z - seen).abs() <= depth_tolerance * seen)
    # The surface that is seen there lies on the same ray, so it is the point scaled to that depth.
    apart = ((seen / z)[..., None] * point - point).norm(dim=-1)
    index = rearrange(torch.where(visible, token, -1), "b j (i n) -> b i j n", i=views)
    distance = rearrange(torch.where(apart.isfinite(), apart, math.inf), "b j (i n) -> b i j n", i=views)
    own = torch.eye(views, dtype=torch.bool, device=depth.device)[..., None]
    return index.masked_fill(own, -1), distance.masked_fill(own, math.inf)


def _resample(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring ``[B, 3, H, W]`` to the token grid, ``[B, N, 3]``, NaN where any touched pixel is missing."""
    missing = ~points.isfinite().all(dim=1, keepdim=True)
    stacked = torch.cat([points.masked_fill(missing, 0), missing.to(points)], dim=1)
    resampled = F.interpolate(stacked, size=size, mode="bilinear", align_corners=False, antialias=False)
    tokens = rearrange(resampled, "b c h w -> b (h w) c")
    return tokens[..., :3].masked_fill(tokens[..., 3:] > 0, math.nan)


def _nearest_both_ways(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nearest token of ``second [B, M, 3]`` for each of ``first [B, N, 3]`` and the reverse, with distances.

    Ties go to the lower index. Tokens without measurement get -1 and inf, and are nobody's neighbour.
    """
    batch, count, _ = first.shape
    rows = max(1, BLOCK_ENTRIES // max(1, batch * second.shape[1]))
    backward = torch.full(second.shape[:2], -1, dtype=torch.int64, device=first.device)
    near_back = torch.full(second.shape[:2], math.inf, dtype=first.dtype, device=first.device)
    forward, near = [], []
    for start in range(0, count, rows):
        block = first[:, start : start + rows]
        # Differences, not the expanded square |a|^2 - 2ab + |b|^2: that one cancels far from the origin.
        squared = sum((block[..., None, c] - second[:, None, :, c]).square_() for c in range(3))
        squared = squared.masked_fill_(squared.isnan(), math.inf)  # type: ignore[union-attr]
        best = squared.argmin(dim=2)
        apart = torch.gather(squared, 2, best[..., None]).squeeze(2)
        forward.append(torch.where(apart.isfinite(), best, -1))
        near.append(apart)
        best = squared.argmin(dim=1)
        apart = torch.gather(squared, 1, best[:, None]).squeeze(1)
        closer = apart < near_back
        backward = torch.where(closer, best + start, backward)
        near_back = torch.where(closer, apart, near_back)
    return torch.cat(forward, 1), backward, torch.cat(near, 1).sqrt(), near_back.sqrt()


def _returns(forward: Tensor, backward: Tensor, width: int, threshold: float) -> Tensor:
    """Tell which tokens come back, there and back again, less than ``threshold`` tokens from their start."""
    start = torch.arange(forward.shape[-1], device=forward.device)
    end = torch.gather(backward, -1, forward.clamp(min=0))
    rows, columns = end // width - start // width, end % width - start % width
    return (rows.square() + columns.square()) < threshold**2


def _padded_centres(sizes: Sizes, depth: Tensor) -> Tensor:
    """Token centres in pixels, ``[V, N, 2]``, NaN for padding."""
    image_size = (depth.shape[-2], depth.shape[-1])
    centres = depth.new_full((len(sizes), max(h * w for h, w in sizes), 2), math.nan)
    for view, size in enumerate(sizes):
        grid = cell_centres(size, image_size, dtype=depth.dtype, device=depth.device)
        centres[view, : size[0] * size[1]] = grid.flatten(0, 1)
    return centres


def _relative_poses(extrinsics: Tensor) -> Tensor:
    """Transform from camera i to camera j, ``[B, j, i, 4, 4]``.

    In double precision where there is any, so that a world origin far away costs no accuracy.
    """
    exact = extrinsics if extrinsics.device.type == "mps" else extrinsics.double()
    return exact[:, :, None] @ invert_extrinsics(exact)[:, None]


def _token_at(xy: Tensor, sizes: Sizes, image_size: Sequence[int]) -> Tensor:
    """Token of view j that holds the position ``xy [B, j, M, 2]``, -1 outside the frame."""
    height, width = image_size
    grid = torch.tensor(sizes, device=xy.device)
    rows, columns = grid[:, 0, None], grid[:, 1, None]
    x, y = xy.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    column = (torch.where(inside, x, 0) * columns / width).long().clamp(max=columns - 1)
    row = (torch.where(inside, y, 0) * rows / height).long().clamp(max=rows - 1)
    return torch.where(inside, row * columns + column, -1)
