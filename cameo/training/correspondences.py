"""Matches for a training batch, from whatever geometry its samples carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cameo.capture import AttentionSite
from cameo.correspondence import Correspondence, GridSize
from cameo.errors import DataError, unknown_name
from cameo.geometry import unproject
from cameo.wrap import CameoModel

__all__ = ["layer_grids", "match_batch", "match_layers"]

KINDS = ("depth", "point_map")


def match_batch(
    batch: Mapping[str, Any], size: GridSize, *, kind: str = "depth", cycle_threshold: float = 1.5
) -> Correspondence:
    """Build the correspondence of a collated batch at a token grid.

    Args:
        batch: with `depth` and cameras, or `point_map` `[B, V, 3, H, W]`.
        size: token grid of the supervised layer, `(h, w)` or one per view.
        kind: "depth" projects each token's surface point into the other views; "point_map" takes nearest neighbours
            in 3D with the cycle check of the paper.
        cycle_threshold: in tokens, for "point_map".

    Raises:
        DataError: if the batch carries no geometry for `kind`.
        ValueError: for an unknown kind.
    """
    if kind not in KINDS:
        raise unknown_name("correspondence", kind, KINDS)
    if kind == "depth" and "depth" in batch:
        return Correspondence.from_depth(batch["depth"], batch["intrinsics"], batch["extrinsics"], size=size)
    if kind == "point_map" and ("point_map" in batch or "depth" in batch):
        points = batch.get("point_map")
        if points is None:
            points = unproject(batch["depth"], batch["intrinsics"], batch["extrinsics"])
        return Correspondence.from_point_maps(points, size=size, cycle_threshold=cycle_threshold)
    cure = "correspondence=point_map" if "point_map" in batch else "data with geometry"
    raise DataError(
        f"sample {batch.get('key', '?')}: has no depth{'' if 'point_map' in batch else ' and no point_map'}, so there "
        f"are no correspondences. Use {cure}, or weight=0 to train without CAMEO"
    )


def match_layers(model: CameoModel, batch: Mapping[str, Any], **options: Any) -> list[Correspondence]:
    """Build the correspondence of each supervised layer; layers with the same token grid share it."""
    sizes = [layer_grids(site, batch) for site in model.supervised_sites]
    found = {size: match_batch(batch, size, **options) for size in set(sizes)}
    return [found[size] for size in sizes]


def layer_grids(site: AttentionSite, batch: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Return the token grid `(h, w)` of each view of a batch in a layer.

    Raises:
        ValueError: if the image pixels per token are not known.
    """
    views, _, height, width = batch["images"].shape[1:]
    return site.sizes(height, width, views)
