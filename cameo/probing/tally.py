"""Counts of one layer over the batches of a probe, and the true matches they are counted against.

Axes: B samples, V views, N tokens per view, T time steps (levels), A angle bins, W distances, R readouts of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cameo.alignment import AlignmentHead
from cameo.attention.capture import AttentionLayer, CapturedAttention
from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence
from cameo.data.batches import layer_grids
from cameo.errors import DataError
from cameo.geometry.grids import TokenGrids
from cameo.model import CameoModel
from cameo.probing.hits import count_hits
from cameo.probing.listing import shown_grids
from cameo.probing.probed_layer import ProbedLayer
from cameo.probing.truth import ANGLE_BINS, TrueMatches, angle_bins, surface_points

__all__ = ["BatchMatches", "LayerHitCounter"]


class BatchMatches:
    """A batch, and what the queries of its layers should find, computed once for each token grid."""

    def __init__(self, batch: Mapping[str, Any], metric: bool) -> None:
        if "depth" not in batch:
            raise DataError(
                f"sample {batch.get('key', '?')}: has no depth, and the probe takes the true matches from it"
            )
        self.batch, self.metric = batch, metric
        self.geometry = (batch["depth"], batch["intrinsics"], batch["extrinsics"])
        self.groups = angle_bins(batch["extrinsics"]).to(batch["depth"].device)
        self.matches: dict[TokenGrids, Correspondence] = {}
        self.found: dict[tuple[TokenLayout, TokenGrids], TrueMatches] = {}

    def token_grids(self, layer: AttentionLayer) -> TokenGrids:
        """Token grid of each view in a layer."""
        return layer_grids(layer, self.batch)

    def match(self, layer: AttentionLayer) -> Correspondence:
        """True matches at the token grids of a layer."""
        token_grids = self.token_grids(layer)
        if token_grids not in self.matches:
            self.matches[token_grids] = Correspondence.from_depth(*self.geometry, token_grid=token_grids)
        return self.matches[token_grids]

    def truth(self, layer: AttentionLayer) -> TrueMatches:
        """What the queries of a layer can find of them, by angle bin."""
        token_grids = self.token_grids(layer)
        if (layer.layout, token_grids) not in self.found:
            points = surface_points(*self.geometry, token_grids) if self.metric else None
            self.found[layer.layout, token_grids] = TrueMatches.of_layer(
                layer.layout, self.match(layer), self.groups, len(ANGLE_BINS), points
            )
        return self.found[layer.layout, token_grids]


@dataclass
class LayerHitCounter:
    """The counts of one layer: of each finished batch, and by time step of the current one."""

    layer: AttentionLayer
    reason: str | None = None
    tokens: str = ""
    one_token: bool = False
    steps: list[dict[str, Tensor]] = field(default_factory=list)
    hits: list[list[dict[str, Tensor]]] = field(default_factory=list)
    truths: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    def count(
        self,
        seen: CapturedAttention,
        truths: BatchMatches,
        within: tuple[int, ...],
        near: float | None,
        head: AlignmentHead | None,
    ) -> None:
        """Add the hits of one captured call.

        Raises:
            ShapeError: if the call is not one of the views and tokens of the batch.
        """
        query, key, _ = CameoModel.split(self.layer, seen, truths.match(self.layer))
        truth = truths.truth(self.layer)
        if not self.steps:
            self.one_token = truth.one_token
            ceiling = truth.ceiling(near) if near is not None and not self.one_token else None
            self.truths.append((truth.pairs, truth.chance(within, near), ceiling))
            views, _, height, width = truths.batch["images"].shape[1:]
            self.tokens = shown_grids(self.layer, height, width, views)
        self.steps.append(count_hits(query, key, truth, head, seen.scale, within, near=near))

    def close_batch(self) -> None:
        """Begin a new batch."""
        if self.reason is None:
            self.hits.append(self.steps)
        self.steps = []

    def totals(self) -> tuple[dict[str, Tensor], int, list[float]]:
        """Hits of each head `[R, W]` per readout, pairs, and hits expected of uniform attention `[W]`, over all calls.

        Where a query reaches one token of each view W is 1 and a pair is a query, see `count_hits`.
        """
        hits: dict[str, Tensor] = {}
        pairs, chance = 0, torch.zeros(1, dtype=torch.float64)
        for steps, (of_batch, expected, _) in zip([*self.hits, self.steps], self.truths, strict=False):
            pairs += len(steps) * int(of_batch.sum())
            chance = chance + len(steps) * expected.sum((0, 1))
            for step in steps:
                hits |= {name: hits.get(name, 0) + value.sum((1, 2)) for name, value in step.items()}
        return hits, pairs, chance.tolist()

    def result(self, num_views: int) -> ProbedLayer:
        """Join the batches, and choose one of several heads."""
        layout = self.layer.layout
        per_view, all_views = (layout.refusal(name, num_views) for name in ("per_view", "all_views"))
        unsupervised = self.layer.unsupported or (all_views if per_view else None)
        if self.one_token and layout.reach != "cell":
            unsupervised = unsupervised or "at this resolution a view is one token: within a view there is no choice"
        common = (self.layer.index, self.layer.path, "cell" if self.one_token else layout.reach, self.tokens)
        counted = next((steps[0] for steps in self.hits if steps and steps[0]), None)
        if self.reason is None and counted is None:
            self.reason = "none of its queries reaches a token that shows the same surface point"
        if self.reason is not None or counted is None:
            return ProbedLayer(*common, reason=self.reason, unsupervised=unsupervised)
        pairs, chance, ceiling = zip(*self.truths, strict=True)
        hits: dict[str, np.ndarray] = {}
        heads: dict[str, list[int]] = {}
        for name, one in counted.items():
            every = torch.cat(
                [_stacked(steps, name, one, part) for steps, part in zip(self.hits, chance, strict=True)], 2
            )
            column = min(1, every.shape[-1] - 1)
            ranked = every[..., column].sum((2, 3)).argmax(1)  # [T]
            if every.shape[1] > 1:
                heads[name] = ranked.tolist()
            hits[name] = every[torch.arange(len(every)), ranked].round().long().numpy()
        return ProbedLayer(
            *common,
            unsupervised=unsupervised,
            pairs=torch.cat(pairs).numpy(),
            chance=torch.cat(chance).numpy(),
            ceiling=None if ceiling[0] is None else torch.cat(ceiling).numpy(),
            hits=hits,
            heads=heads,
        )


def _stacked(steps: list[dict[str, Tensor]], name: str, like: Tensor, chance: Tensor) -> Tensor:
    """Hits of a batch `[T, R, B, A, W]`; zeros where none of its samples has a pair."""
    nothing = like.new_zeros(len(like), *chance.shape)
    return torch.stack([step.get(name, nothing) for step in steps])
