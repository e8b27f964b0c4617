"""Counts of one layer over the batches of a probe, and the true matches of each batch.

Axes: B samples, A angle bins, W distances, T noise levels, R readouts of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cameo.alignment import AlignmentHead
from cameo.attention.capture import AttentionLayer, CapturedAttention
from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence
from cameo.data.batches import kind_of_truth, layer_grids, match_batch
from cameo.errors import DataError
from cameo.geometry.grids import TokenGrids
from cameo.model import CameoModel
from cameo.probing.hits import count_hits
from cameo.probing.listing import shown_grids
from cameo.probing.probed_layer import ProbedLayer
from cameo.probing.truth import ANGLE_BINS, TrueMatches, angle_bins, surface_points

__all__ = ["BatchMatches", "LayerHitCounter"]


class BatchMatches:
    """A batch with the true matches of its layers, computed once for each token grid and layout."""

    def __init__(self, batch: Mapping[str, Any], metric: bool) -> None:
        if "depth" not in batch:
            raise DataError(
                f"sample {batch.get('key', '?')}: has no depth, and the probe takes the true matches from it"
            )
        self.batch, self.metric = batch, metric
        self._kind = kind_of_truth(batch)
        self._geometry = (batch["depth"], batch["intrinsics"], batch["extrinsics"])
        self._groups = angle_bins(batch["extrinsics"]).to(batch["depth"].device)
        self._by_grids: dict[TokenGrids, Correspondence] = {}
        self._by_layout: dict[tuple[TokenLayout, TokenGrids], TrueMatches] = {}

    def match(self, layer: AttentionLayer) -> Correspondence:
        """True matches at the token grids of a layer."""
        token_grids = layer_grids(layer, self.batch)
        if token_grids not in self._by_grids:
            self._by_grids[token_grids] = match_batch(self.batch, token_grids, kind=self._kind)
        return self._by_grids[token_grids]

    def true_matches(self, layer: AttentionLayer) -> TrueMatches:
        """The matches that the queries of a layer can find, by angle bin."""
        token_grids = layer_grids(layer, self.batch)
        if (layer.layout, token_grids) not in self._by_layout:
            points = surface_points(*self._geometry, token_grids) if self.metric else None
            self._by_layout[layer.layout, token_grids] = TrueMatches.of_layer(
                layer.layout, self.match(layer), self._groups, len(ANGLE_BINS), points
            )
        return self._by_layout[layer.layout, token_grids]


class BatchTotals(NamedTuple):
    """What a batch offers to a layer: the number of matches, and what uniform attention would find of them.

    `pairs`: `[B, A]`. `chance`: expected hits `[B, A, W]`. `ceiling`: matches that "2cm" can count at most `[B, A]`.
    """

    pairs: Tensor
    chance: Tensor
    ceiling: Tensor | None


Hits = dict[str, Tensor]  # of one forward, `[R, B, A, W]` per readout


@dataclass
class LayerHitCounter:
    """Counts the hits of one layer: of each finished batch, and of the current one by noise level.

    Attributes:
        layer: the layer.
        reason: why the layer cannot be probed, or None.
        tokens: token grids of the views, as shown in tables.
        one_token: whether a query reaches only one token of each view.
        current: hits of the current batch, one entry for each noise level.
        finished: the same of each finished batch.
        totals_by_batch: matches and chance of each batch, the current one included.
    """

    layer: AttentionLayer
    reason: str | None = None
    tokens: str = ""
    one_token: bool = False
    current: list[Hits] = field(default_factory=list)
    finished: list[list[Hits]] = field(default_factory=list)
    totals_by_batch: list[BatchTotals] = field(default_factory=list)

    def count(
        self,
        captured: CapturedAttention,
        matches: BatchMatches,
        within: tuple[int, ...],
        near: float | None,
        head: AlignmentHead | None,
    ) -> None:
        """Add the hits of one captured call.

        Raises:
            ShapeError: if the call is not one of the views and tokens of the batch.
        """
        query, key, _ = CameoModel.split(self.layer, captured, matches.match(self.layer))
        true_matches = matches.true_matches(self.layer)
        if not self.current:
            self.one_token = true_matches.one_token
            ceiling = true_matches.ceiling(near) if near is not None and not self.one_token else None
            self.totals_by_batch.append(BatchTotals(true_matches.pairs, true_matches.chance(within, near), ceiling))
            views, _, height, width = matches.batch["images"].shape[1:]
            self.tokens = shown_grids(self.layer, height, width, views)
        self.current.append(count_hits(query, key, true_matches, head, captured.scale, within, near=near))

    def close_batch(self) -> None:
        """Begin a new batch."""
        if self.reason is None:
            self.finished.append(self.current)
        self.current = []

    def totals(self) -> tuple[Hits, int, list[float]]:
        """Hits of each head `[R, W]` per readout, matches, and expected hits of uniform attention `[W]`, of all calls.

        Where a query reaches only one token of each view, W is 1 and queries with a match are counted, see
        `count_hits`.
        """
        hits: Hits = {}
        pairs, chance = 0, torch.zeros(1, dtype=torch.float64)
        for levels, totals in zip([*self.finished, self.current], self.totals_by_batch, strict=False):
            pairs += len(levels) * int(totals.pairs.sum())
            chance = chance + len(levels) * totals.chance.sum((0, 1))
            for level in levels:
                hits |= {readout: hits.get(readout, 0) + count.sum((1, 2)) for readout, count in level.items()}
        return hits, pairs, chance.tolist()

    def result(self, num_views: int) -> ProbedLayer:
        """Join the counts of all batches, and choose one of several heads."""
        layer, unsupervised = self.layer, self._unsupervised(num_views)
        reach = "cell" if self.one_token else layer.layout.reach
        first_hits = next((levels[0] for levels in self.finished if levels and levels[0]), None)
        if self.reason is None and first_hits is None:
            self.reason = "none of its queries reaches a token that shows the same surface point"
        if self.reason is not None or first_hits is None:
            return ProbedLayer(layer.index, layer.path, reach, self.tokens, self.reason, unsupervised)
        pairs, chance, ceiling = zip(*self.totals_by_batch, strict=True)
        hits: dict[str, np.ndarray] = {}
        heads: dict[str, list[int]] = {}
        for readout, like in first_hits.items():
            of_batches = zip(self.finished, chance, strict=True)
            counts = torch.cat([_stacked(levels, readout, like, expected) for levels, expected in of_batches], dim=2)
            column = min(1, counts.shape[-1] - 1)
            best_heads = counts[..., column].sum((2, 3)).argmax(1)  # [T]
            if counts.shape[1] > 1:
                heads[readout] = best_heads.tolist()
            hits[readout] = counts[torch.arange(len(counts)), best_heads].round().long().numpy()
        return ProbedLayer(
            layer.index,
            layer.path,
            reach,
            self.tokens,
            unsupervised=unsupervised,
            pairs=torch.cat(pairs).numpy(),
            chance=torch.cat(chance).numpy(),
            ceiling=None if ceiling[0] is None else torch.cat(ceiling).numpy(),
            hits=hits,
            heads=heads,
        )

    def _unsupervised(self, num_views: int) -> str | None:
        """Why the layer cannot be supervised, or None."""
        layout = self.layer.layout
        per_view, all_views = (layout.refusal(name, num_views) for name in ("per_view", "all_views"))
        reason = self.layer.unsupported or (all_views if per_view else None)
        if reason is None and self.one_token and layout.reach != "cell":
            return "at this resolution a view is one token: within a view there is no choice"
        return reason


def _stacked(levels: list[Hits], readout: str, like: Tensor, chance: Tensor) -> Tensor:
    """Hits of a batch `[T, R, B, A, W]`; zeros where none of its samples has a match."""
    no_hits = like.new_zeros(len(like), *chance.shape)
    return torch.stack([level.get(readout, no_hits) for level in levels])
