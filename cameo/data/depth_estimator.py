"""Depth of photographs by a network of transformers, brought to the scale of the cameras by points with known depth.

Axes: V views, H W image pixels.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cameo.correspondence import Tracks
from cameo.errors import DataError, ShapeError, WeightsUnavailable, unknown_name
from cameo.geometry.cameras import full_precision
from cameo.geometry.epipolar import triangulate

__all__ = ["DepthEstimator", "fit_depth"]

# What a network estimates: z-depth up to a scale, z-depth up to scale and shift, or 1 / z-depth up to scale and shift.
OUTPUTS = ("scaled", "relative", "inverse")
# A view with fewer points has no depth: the scale of so few would be that of a false one.
LEAST_POINTS = 8
# Points that a view is fitted to at most: the time of the fit grows with the square of their number.
MOST_POINTS = 1000


class DepthEstimator(nn.Module):
    """A depth estimator of transformers, by Hub id or folder.

    Example:
        >>> estimator = DepthEstimator("depth-anything/Depth-Anything-V2-Small-hf")  # doctest: +SKIP
        >>> depth = fit_depth(estimator(images), tracks, intrinsics, extrinsics, output="inverse")  # doctest: +SKIP

    Raises:
        DataError: the name is no depth estimator.
        WeightsUnavailable: the Hub cannot be reached and the weights are not in its cache.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            self.model: nn.Module = AutoModelForDepthEstimation.from_pretrained(name, trust_remote_code=False)
        except OSError as error:
            raise WeightsUnavailable(
                f"{name}: its weights are not reachable ({error}). Give a folder that `save_pretrained` of "
                "transformers has filled"
            ) from error
        except ValueError as error:
            raise DataError(f"{name}: is no depth estimator of transformers ({error})") from error
        self.model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DepthEstimator:
        """Stay in evaluation mode, since the network is frozen."""
        return super().train(False)

    @torch.no_grad()
    @full_precision
    def forward(self, images: Tensor) -> Tensor:
        """Return what the network estimates, `[V, 1, H, W]`, for images `[V, 3, H, W]` in [0, 1].

        It is no depth yet: `fit_depth` brings it to the scale of the cameras.

        Raises:
            ShapeError: the images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError("images", expected="[V, 3, H, W]", got=images.shape)
        inputs = self.processor(list(images), do_rescale=False, return_tensors="pt").to(images.device)
        estimated: Tensor = self.model(**inputs).predicted_depth
        return F.interpolate(estimated[:, None].float(), size=images.shape[-2:], mode="bilinear")


@full_precision
def fit_depth(
    estimated: Tensor, tracks: Tracks | None, intrinsics: Tensor, extrinsics: Tensor, *, output: str
) -> Tensor:
    """Bring the estimate of each view to the unit of the cameras, by the points of tracks, robustly.

    Example:
        >>> intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).repeat(2, 1, 1)
        >>> extrinsics = torch.eye(4).repeat(2, 1, 1)
        >>> extrinsics[1, 0, 3] = -1.0  # the second camera stands one unit to the right
        >>> x, y = torch.meshgrid(torch.arange(3, 7) + 0.5, torch.arange(1, 7) + 0.5, indexing="ij")
        >>> left = torch.stack([x, y], dim=-1).flatten(0, 1)  # on a wall 4 units away, which the second view shows
        >>> tracks = Tracks.from_pairs({(0, 1): (left, left - torch.tensor([2.0, 0.0]))}, num_views=2)
        >>> fit_depth(torch.full((2, 1, 8, 8), 0.5), tracks, intrinsics, extrinsics, output="scaled").unique()
        tensor([4.])

    The points of the tracks are triangulated with the cameras. For "scaled" the factor is the median of the ratios; for
    the others scale and shift are those of Theil and Sen, the medians over all pairs of points. So up to a quarter of
    the points may be false.

    Args:
        estimated: `[V, 1, H, W]`.
        tracks: points that these views show, in pixels of the same images.
        intrinsics: `[V, 3, 3]` in pixels.
        extrinsics: `[V, 4, 4]` world-to-camera.
        output: what the network estimates: "scaled", z-depth whose scale is not trusted, as of Depth Pro; "relative",
            z-depth up to scale and shift; "inverse", 1 / z-depth up to scale and shift, as of MiDaS and Depth Anything.

    Returns:
        Z-depth `[V, 1, H, W]` in the unit of the camera positions, 0 where there is none. Views with less than 8 points
        have none, and a warning counts them.

    Raises:
        DataError: there are no tracks, or no view has enough points: the depth would be of no known unit.
        ShapeError: the tensors do not fit each other.
        ValueError: the output is unknown.
    """
    if output not in OUTPUTS:
        raise unknown_name("output", output, OUTPUTS)
    if estimated.ndim != 4 or estimated.shape[1] != 1:
        raise ShapeError("estimated", expected="[V, 1, H, W]", got=estimated.shape)
    if tracks is None:
        raise DataError(
            "tracks: the depth of a network has no unit that is known without points whose depth is known. Give the "
            "tracks of a COLMAP model, or those of cameo.correspondence.matcher.KeypointMatcher"
        )
    views, _, height, width = estimated.shape
    if tracks.num_views != views:
        raise ShapeError("tracks", expected=f"of {views} views, as estimated", got=f"{tracks.num_views}")
    point = triangulate(tracks.point, tracks.view, tracks.xy, intrinsics, extrinsics)
    pose = extrinsics[tracks.view].to(point)  # one camera for each sighting
    z = (pose[:, 2, :3] * point).sum(-1) + pose[:, 2, 3]
    column, row = tracks.xy.floor().long().T
    usable = (z > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    depth, without = torch.zeros_like(estimated, dtype=torch.float32), []
    for view in range(views):
        seen = (usable & (tracks.view == view)).nonzero().flatten()
        seen = seen[:: max(1, -(-len(seen) // MOST_POINTS))]
        there = estimated[view, 0, row[seen], column[seen]].float()
        known = there.isfinite()
        fitted = _fitted(estimated[view].float(), there[known], z[seen][known], output)
        if fitted is None:
            without.append(view)
        else:
            depth[view] = torch.where(fitted.isfinite() & (fitted > 0), fitted, 0)
    if len(without) == views:
        raise DataError(f"tracks: expected at least {LEAST_POINTS} points of known depth in a view, got none that has")
    if without:
        warnings.warn(
            f"{len(without)} of {views} views have less than {LEAST_POINTS} points of known depth, or an estimate that "
            f"contradicts them, and so no depth; first: view {without[0]}",
            stacklevel=2,
        )
    return depth


def _fitted(estimated: Tensor, there: Tensor, z: Tensor, output: str) -> Tensor | None:
    """The depth of a view whose estimate at some points of depth `z` is `there`; None if they do not tell it."""
    if len(z) < LEAST_POINTS:
        return None
    if output == "scaled":
        scale = float((z / there).median())
        return estimated * scale if 0 < scale < float("inf") else None
    from scipy.stats import theilslopes

    found = theilslopes((1 / z if output == "inverse" else z).numpy(), there.numpy())
    if not found.slope > 0:
        return None
    fitted = estimated * float(found.slope) + float(found.intercept)
    return torch.where(fitted > 0, 1 / fitted, 0) if output == "inverse" else fitted
