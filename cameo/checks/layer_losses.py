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
from cameo.attention.capture import AttentionLayer, CapturedAttention
from cameo.attention.visibility import split_call
from cameo.config import CameoConfig
from cameo.correspondence import Correspondence

__all__ = ["LayerLoss", "plan_losses"]


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
    **options: Any,
) -> list[LayerLoss]:
    """Plan the losses of all layers.

    Args:
        layers, heads, matches: one of each for every layer.
        config: normalization, reduction and reference views.
        device: of the model.
        options: further ones of `cameo.alignment.loss.plan_matches`.

    Raises:
        ValueError: the matches have fewer views than `num_reference_views`.
    """
    planned = []
    for layer, head, match, normalize in zip(layers, heads, matches, config.normalize_of_layers(), strict=True):
        assert isinstance(head, AlignmentHead)
        if (references := config.references_among(match.num_views)) is not None:
            references = layer.layout.view_order.num_references(references)
        chosen = {
            "normalize": normalize,
            "reduction": config.reduction,
            "num_reference_views": references,
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
