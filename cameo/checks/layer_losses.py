"""The alignment losses of the supervised layers of a model: planned before a forward, computed after it.

Before the forward the matches are known, and the device has little to do: they are weighed and counted there, and the
counts are on the host when the forward has been queued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cameo.alignment import AlignmentHead
from cameo.alignment.loss import PlannedMatches, plan_matches, planned_loss
from cameo.alignment.supervision import match_totals
from cameo.attention.capture import AttentionLayer, CapturedAttention
from cameo.attention.visibility import split_call
from cameo.config import CameoConfig
from cameo.correspondence import Correspondence

__all__ = ["LayerLoss", "layer_totals", "plan_losses"]


@dataclass(frozen=True)
class LayerLoss:
    """What is known of the loss of one layer before its queries and keys are.

    Attributes:
        layer: the supervised layer.
        head: its alignment head.
        match: the matches that the forward was given.
        local: the matches as the layer sees them.
        planned: their weights and counts.
        options: of `plan_matches`.
        normalize: of the layer.
    """

    layer: AttentionLayer
    head: AlignmentHead
    match: Correspondence
    local: Correspondence
    planned: PlannedMatches
    options: dict[str, Any]
    normalize: str

    def compute(
        self, seen: CapturedAttention, *, softness: float, implementation: str, gelu: str
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a captured call, and the number of its matches; see `cameo.alignment_loss`."""
        local = self.local if self.local.device == seen.query.device else None
        query, key, local, visible = split_call(self.layer, seen, self.match, self.normalize, local)
        dtype = torch.promote_types(query.dtype, torch.float32)
        # A mask of the layer removes matches, which only the forward could tell.
        fits = local is self.local and self.planned.weights.dtype == dtype
        loss = planned_loss(
            query, key, local, self.head, self.planned if fits else partial(plan_matches, **self.options),
            scale=seen.scale, normalize=self.normalize, visible=visible, softness=softness,
            implementation=implementation, gelu=gelu,
        )  # fmt: skip
        return loss, local.matched.sum()


def plan_losses(
    layers: Sequence[AttentionLayer],
    heads: nn.ModuleList,
    matches: Sequence[Correspondence],
    config: CameoConfig,
    device: torch.device,
    totals: Tensor | None = None,
    **options: Any,
) -> list[LayerLoss]:
    """Plan the losses of all layers.

    Args:
        layers, heads, matches: one of each for every layer.
        config: normalization, reduction and reference views.
        device: of the model.
        totals: what each layer divides by, see `layer_totals`; None: the sums of these matches.
        options: further ones of `cameo.alignment.loss.plan_matches`.

    Raises:
        ValueError: the matches have fewer views than `num_reference_views`.
    """
    planned = []
    for number, (layer, head, match, normalize) in enumerate(
        zip(layers, heads, matches, config.normalize_of_layers(), strict=True)
    ):
        assert isinstance(head, AlignmentHead)
        chosen = {
            "normalize": normalize,
            "totals": None if totals is None else totals[number],
            **_reduction(layer, match, config),
            **options,
        }
        match = match.to(device, non_blocking=device.type != "mps")
        local = layer.layout.localize(match)
        parameter = next(head.parameters(), None)
        dtype = torch.float32 if parameter is None else torch.promote_types(parameter.dtype, torch.float32)
        found = plan_matches(local, dtype, **chosen)
        counted = found if device.type == "cpu" else found.counted(normalize)
        planned.append(LayerLoss(layer, head, match, local, counted, chosen, normalize))
    return planned


def layer_totals(
    layers: Sequence[AttentionLayer], matches: Sequence[Correspondence], config: CameoConfig, device: torch.device
) -> Tensor:
    """Return what the losses of the layers divide by, `[layers, P]`, see `cameo.alignment.supervision.match_totals`.

    Matches that a mask of the layer hides count too: only the forward knows them.
    """
    totals = []
    for layer, match in zip(layers, matches, strict=True):
        local = layer.layout.localize(match.to(device, non_blocking=device.type != "mps"))
        totals.append(match_totals(local, **_reduction(layer, match, config)))
    return torch.stack(totals)


def _reduction(layer: AttentionLayer, match: Correspondence, config: CameoConfig) -> dict[str, Any]:
    """Return how the losses of the matches of a layer are joined, as arguments of `supervision_weights`."""
    if (references := config.references_among(match.num_views)) is not None:
        references = layer.layout.view_order.num_references(references)
    return {"reduction": config.reduction, "num_reference_views": references}
