"""Collated batches: their device, and their matches, which are computed from geometry or returned by the loader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cameo.attention.capture import AttentionLayer
from cameo.correspondence import Correspondence, GridSize
from cameo.data.matches import MatchReader
from cameo.data.shards import RECIPE
from cameo.errors import DataError, unknown_name
from cameo.geometry import unproject
from cameo.geometry.grids import TokenGrids
from cameo.scenes.views import MultiViewSample, collate, images_to_float

__all__ = ["MatchedDataset", "kind_of_truth", "layer_grids", "match_batch", "match_layers", "to_device"]

KINDS = ("depth", "point_map", "features", "tracks", "matcher")
# Where a batch holds the tracks of a kind, and where they come from.
TRACKS = {
    "tracks": ("tracks", "a source whose views have tracks, such as a COLMAP model, or correspondence=matcher"),
    "matcher": (
        "pixel_matches",
        "cameo.correspondence.matcher.KeypointMatcher, whose tracks belong into the batch, or correspondence=depth",
    ),
}


def match_batch(
    batch: Mapping[str, Any], size: GridSize, *, kind: str = "depth", cycle_threshold: float = 1.5
) -> Correspondence:
    """Build the correspondence of a collated batch at a token grid.

    Args:
        batch: with `depth` and cameras, `point_map` `[B, V, 3, H, W]`, `features` `[B, V, C, h, w]`, or `images` and
            the `cameo.Tracks` of each sample, as `tracks`, or `pixel_matches` for those of a matcher.
        size: token grid of the supervised layer, `(h, w)` or one per view.
        kind: "depth" projects each token's surface point into the other views; "point_map" takes nearest neighbors
            in 3D with the cycle check of the paper; "features" takes nearest neighbors in cosine similarity with
            the same check; "tracks" and "matcher" take the tokens in which the same points were seen, with it too.
        cycle_threshold: in tokens, for all but "depth".

    Raises:
        DataError: if the batch carries no geometry for `kind`, no features or no tracks.
        ValueError: for an unknown kind.
    """
    if kind not in KINDS:
        raise unknown_name("correspondence", kind, KINDS)
    # The data sets here have checked their cameras; a loader of somebody else may not have. On a CPU checking again
    # takes a fraction of a millisecond, on a GPU the host would have to wait for it.
    on_cpu = "depth" in batch and batch["depth"].device.type == "cpu"
    if kind == "depth" and "depth" in batch:
        return Correspondence.from_depth(
            batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grid=size, check_values=on_cpu
        )
    if kind == "point_map" and ("point_map" in batch or "depth" in batch):
        points = batch.get("point_map")
        if points is None:
            points = unproject(batch["depth"], batch["intrinsics"], batch["extrinsics"], check_values=on_cpu)
        return Correspondence.from_point_maps(points, token_grid=size, cycle_threshold=cycle_threshold)
    if kind == "features":
        if "features" in batch:
            return Correspondence.from_features(batch["features"], token_grid=size, cycle_threshold=cycle_threshold)
        raise DataError(
            f"sample {batch.get('key', '?')}: has no features, so there are no correspondences. Put those of "
            "cameo.correspondence.features.FeatureExtractor into the batch, or use correspondence=depth"
        )
    if kind in TRACKS:
        name, cure = TRACKS[kind]
        if name in batch:
            found = Correspondence.from_tracks(
                batch[name],
                image_size=tuple(batch["images"].shape[-2:]),
                token_grid=size,
                cycle_threshold=cycle_threshold,
            )
            return found.to(batch["images"].device)
        raise DataError(f"sample {batch.get('key', '?')}: has no {name}, so there are no correspondences. Use {cure}")
    cure = "correspondence=point_map" if "point_map" in batch else "data with geometry"
    raise DataError(
        f"sample {batch.get('key', '?')}: has no depth{'' if 'point_map' in batch else ' and no point_map'}, so there "
        f"are no correspondences. Use {cure}, or loss_weight=0 to train without CAMEO"
    )


def match_layers(layers: Sequence[AttentionLayer], batch: Mapping[str, Any], **options: Any) -> list[Correspondence]:
    """Return the correspondence of each layer; layers with the same token grid share it.

    Matches that the loader has returned as `correspondences` are used; those at other token grids are computed here,
    with the options of `match_batch`.
    """
    token_grids = [layer_grids(layer, batch) for layer in layers]
    matches = {match.token_grids: match for match in batch.get("correspondences", ())}
    matches |= {grids: match_batch(batch, grids, **options) for grids in set(token_grids) - matches.keys()}
    return [matches[grids] for grids in token_grids]


def kind_of_truth(batch: Mapping[str, Any]) -> str:
    """Return the kind of correspondence to which a batch is compared: "depth", or "tracks" where none was measured.

    Example:
        >>> kind_of_truth({"depth": torch.zeros(1, 2, 1, 4, 4), "tracks": []})
        'tracks'
    """
    has_depth = "depth" in batch and bool((batch["depth"] > 0).any())
    return "tracks" if not has_depth and "tracks" in batch else "depth"


def layer_grids(layer: AttentionLayer, batch: Mapping[str, Any]) -> TokenGrids:
    """Return the token grid `(h, w)` of each view of a batch in a layer.

    Raises:
        ValueError: if the image pixels per token are not known.
    """
    views, _, height, width = batch["images"].shape[1:]
    return layer.token_grids(height, width, views)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch, and its correspondences; images of 8 bits become floats in [0, 1] there.

    From pinned memory, a GPU copies in the background.
    """
    moved = {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(images := moved.get("images"), Tensor) and images.dtype == torch.uint8:
        moved["images"] = images_to_float(images)
    return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor | Correspondence):
        return value.to(device, non_blocking=device.type == "cuda")
    return [_moved(item, device) for item in value] if isinstance(value, list) else value


class MatchedDataset(Dataset[MultiViewSample]):
    """The samples of a data set with their `correspondences`, read from a folder or computed in the data worker.

    Args:
        dataset: samples with geometry, and with `scene` and `scene_views` if their matches are to be looked up.
        token_grids: token grids of the views in the supervised layers, each different set of grids once.
        kind, cycle_threshold: options of `match_batch`, for matches that are computed. Those of a matcher are not
            computed here, but read.
        distances: whether the loss needs the 3D distances.
        precomputed: reader of the matches; None computes all of them. If the folder lacks a pair of a sample, the
            matches of the sample are computed, and `not_precomputed` is true.
        until: samples from this number on get no matches, because the run does not use them.

    Raises:
        DataError: from a sample whose data differ from those from which its matches were computed, or whose matches
            are those of a matcher and not in the folder.
    """

    def __init__(
        self,
        dataset: Dataset[MultiViewSample],
        token_grids: Sequence[TokenGrids],
        *,
        kind: str = "depth",
        cycle_threshold: float = 1.5,
        distances: bool = False,
        precomputed: MatchReader | None = None,
        until: int | None = None,
    ) -> None:
        self.dataset, self.token_grids, self.precomputed = dataset, list(token_grids), precomputed
        self.kind, self.cycle_threshold, self.distances = kind, cycle_threshold, distances
        self.until = until

    def __getitem__(self, index: int) -> MultiViewSample:
        """Return a sample of the data set, with its matches while the run uses them."""
        sample = self.dataset[index]
        if self.until is not None and index >= self.until:
            return sample
        stored = [self._read(sample, token_grids) for token_grids in self.token_grids]
        matches = [
            match or self._compute(sample, token_grids)
            for match, token_grids in zip(stored, self.token_grids, strict=True)
        ]
        extra = {} if self.precomputed is None else {"not_precomputed": any(match is None for match in stored)}
        return MultiViewSample(**sample, correspondences=matches, **extra)  # type: ignore[typeddict-item]

    def _read(self, sample: MultiViewSample, token_grids: TokenGrids) -> Correspondence | None:
        if self.precomputed is None:
            return None
        if "scene" not in sample or "scene_views" not in sample:
            raise DataError(
                f"sample {sample['key']}: names no scene and scene_views, so its matches cannot be looked up. Use the "
                "samples of MultiViewDataset, or leave precomputed_correspondence out"
            )
        scene, views = sample["scene"], sample["scene_views"]
        self.precomputed.check_views(scene, views, sample, sample=sample["key"])
        return self.precomputed.read(scene, views, token_grids, distances=self.distances)

    def _compute(self, sample: MultiViewSample, token_grids: TokenGrids) -> Correspondence:
        if self.kind == "matcher":
            raise DataError(
                f"sample {sample['key']}: its views {sample.get('scene_views')} are not all in the folder "
                f"precomputed_correspondence={self.precomputed and self.precomputed.folder}, and a matcher is too slow "
                f"for a data worker. Run {RECIPE} with the settings of this run, which adds them"
            )
        match = match_batch(collate([sample]), token_grids, kind=self.kind, cycle_threshold=self.cycle_threshold)
        return match if self.distances else replace(match, distance=None)
