"""Matches for a training batch, from whatever geometry its samples carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cameo.correspondence import Correspondence
from cameo.errors import DataError
from cameo.geometry import unproject

__all__ = ["match_batch"]


def match_batch(
    batch: Mapping[str, Any], size: tuple[int, int], *, kind: str = "depth", cycle_threshold: float = 1.5
) -> Correspondence:
    """Build the correspondence of a collated batch at a token grid.

    Args:
        batch: with `depth` and cameras, or `point_map` `[B, V, 3, H, W]`.
        size: token grid `(h, w)` of the supervised layer.
        kind: "depth" projects each token's surface point into the other views; "point_map" takes nearest neighbours
            in 3D with the cycle check of the paper.
        cycle_threshold: in tokens, for "point_map".

    Raises:
        DataError: if the batch carries no geometry.
    """
    if kind == "depth" and "depth" in batch:
        return Correspondence.from_depth(batch["depth"], batch["intrinsics"], batch["extrinsics"], size=size)
    if "point_map" in batch:
        return Correspondence.from_point_maps(batch["point_map"], size=size, cycle_threshold=cycle_threshold)
    if "depth" in batch:
        points = unproject(batch["depth"], batch["intrinsics"], batch["extrinsics"])
        return Correspondence.from_point_maps(points, size=size, cycle_threshold=cycle_threshold)
    raise DataError(
        f"sample {batch.get('key', '?')}: has neither depth nor point_map, so there are no correspondences. "
        "Use data with geometry, or weight=0 to train without CAMEO"
    )
