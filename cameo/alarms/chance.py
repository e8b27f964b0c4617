"""What an alignment loss is compared with: the loss of uniform attention, and how many matches there could be.

Axes: B samples, V views, N tokens per view, i query view, j key view.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cameo.alignment import supervision_weights
from cameo.attention.capture import AttentionLayer
from cameo.attention.layout import TokenLayout
from cameo.config import CameoConfig
from cameo.correspondence import Correspondence
from cameo.geometry.grids import TokenGrids

__all__ = ["alignment_chance", "matchable_tokens"]


def alignment_chance(
    layers: Sequence[AttentionLayer], matches: Sequence[Correspondence], config: CameoConfig
) -> Tensor:
    """Return the alignment loss that these matches would have if every layer attended uniformly; a scalar, in nats.

    Example:
        >>> layer = AttentionLayer(0, "attn", heads=2, layout=TokenLayout("b (v h w)"))
        >>> index = torch.full((1, 2, 2, 16), -1)
        >>> index[0, 0, 1, 3] = 5
        >>> match = Correspondence(index, token_grids=((4, 4), (4, 4)))
        >>> config = CameoConfig(None, ["attn"], layouts=[layer.layout.to_dict()])
        >>> round(alignment_chance([layer], [match], config).item(), 4)  # log(16)
        2.7726

    It is the logarithm of the number of keys over which the softmax of a match runs, with the weights of the loss, and
    0 where there is no match, as the loss is. Keys that a mask hides are counted: with masks it is an upper bound.

    Args:
        layers: the supervised layers.
        matches: those of each layer, as the model is called with.
        config: normalization, reduction and reference views of the model.
    """
    losses = []
    for layer, match, normalize in zip(layers, matches, config.normalize_of_layers(), strict=True):
        local = layer.layout.localize(match)
        if (references := config.references_among(match.num_views)) is not None:
            references = layer.layout.view_order.num_references(references)
        weights = supervision_weights(local, reduction=config.reduction, num_reference_views=references)
        keys = _log_keys(local.token_grids, normalize, str(local.device))
        losses.append((weights.sum(dim=(0, 3)) * keys).sum())
    return torch.stack(losses).mean()


@functools.lru_cache(maxsize=64)
def _log_keys(token_grids: TokenGrids, normalize: str, device: str) -> Tensor:
    """Logarithm of the number of keys over which the softmax of a match runs, `[V, V]` (query view, key view)."""
    tokens = [height * width for height, width in token_grids]
    views = range(len(tokens))
    counts = [[tokens[j] if normalize == "per_view" else sum(tokens) - tokens[i] for j in views] for i in views]
    return torch.tensor([[math.log(max(count, 1)) for count in row] for row in counts], device=device)


def matchable_tokens(layer: AttentionLayer, token_grids: TokenGrids) -> int:
    """Return how many matches of one sample the layer could supervise at most: its queries, once for each view reached.

    Example:
        >>> layer = AttentionLayer(0, "attn", heads=2, layout=TokenLayout("b (v h w)"))
        >>> matchable_tokens(layer, ((4, 4),) * 3)  # 48 queries, 2 other views each
        96
    """
    return _matchable(layer.layout, tuple(token_grids))


@functools.lru_cache(maxsize=64)
def _matchable(layout: TokenLayout, token_grids: TokenGrids) -> int:
    views, tokens = len(token_grids), torch.tensor([height * width for height, width in token_grids])
    # Each token matches the one at its own place, which every layout lets it reach where it reaches that view at all.
    place = torch.arange(int(tokens.max()))
    index = place.expand(views, views, -1).minimum(tokens[None, :, None] - 1)
    is_match = ~torch.eye(views, dtype=torch.bool)[..., None] & (place < tokens[:, None, None])
    match = Correspondence(index.where(is_match, -1)[None], token_grids)
    return int(layout.localize(match).matched.sum())
