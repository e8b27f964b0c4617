"""Where the attention of the supervised layer looks for the match of every query token of a view.

Axes: B samples, V views, N tokens of the query view, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cameo.alignment import AlignmentHead
from cameo.correspondence import Correspondence
from cameo.data.batches import kind_of_truth, layer_grids, match_batch
from cameo.geometry.grids import TokenGrid, token_distance
from cameo.model import CameoModel
from cameo.pipeline import TrainingInputs
from cameo.probing.hits import attention_maps
from cameo.probing.mode import evaluation_mode, native_precision

__all__ = ["FoundMatches", "find_matches"]


@dataclass(frozen=True, eq=False)
class FoundMatches:
    """The most-attended token of a key view for every query token of another view, beside the true match.

    Example:
        >>> target, found = torch.tensor([[0, 5, -1, 3]]), torch.tensor([[1, 15, 7, 3]])
        >>> matches = FoundMatches(1, 0, (2, 2), (4, 4), target, found, "mean")
        >>> matches.errors.tolist(), matches.shares_within(1)
        ([[1, 2, -1, 0]], [0.6666666865348816])

    Attributes:
        query_view, key_view: views of the batch, the one whose tokens look and the one in which they look.
        query_grid, key_grid: token grids `(h, w)` of these views.
        target: true match of each query token, int64 `[B, N]`; -1 for a token without a match.
        found: token of the key view that receives most of the query's attention within that view, int64 `[B, N]`.
        readout: how the K heads are joined, "mean" or "through_head" as in `cameo.probing.hits.attention_maps`.
    """

    query_view: int
    key_view: int
    query_grid: TokenGrid
    key_grid: TokenGrid
    target: Tensor
    found: Tensor
    readout: str

    @property
    def errors(self) -> Tensor:
        """Distance from the found token to the true match in tokens of the key view, int64 `[B, N]`; -1 without match.

        It is the larger of the row and the column difference, as in all figures of attention precision.
        """
        distance = token_distance(self.found, self.target, torch.tensor(self.key_grid[1]))
        return torch.where(self.target >= 0, distance, -1)

    def shares_within(self, tokens: int) -> list[float]:
        """Return, by sample, the share of the matches that are found within some tokens; NaN without a match."""
        has_match = self.target >= 0
        hits = (self.errors <= tokens) & has_match
        return (hits.sum(1) / has_match.sum(1)).tolist()


def find_matches(
    model: CameoModel, batch: Mapping[str, Any], inputs: TrainingInputs, *, through_head: bool
) -> FoundMatches:
    """Run the model once, and find the most-attended token of every query in its first supervised layer.

    The query view is the first target view, the key view the first reference view. If the layer has no match between
    these two, the next two views with a match are taken; if the layer has no reference views, two target views. Where
    the tokens of a view stand for those of the reference view (`TokenLayout(own_view_shows=)`), the attention within
    the query view is read as attention to the reference view.

    Args:
        model: wraps the denoiser that `inputs` are for.
        batch: collated samples with depth.
        inputs: of the denoiser, made from the batch.
        through_head: whether to read the attention through the alignment head, which is what the loss trains, and not
            as the mean over the K heads. A head without parameters ("mean", "none") is read as the mean.

    Raises:
        ValueError: if no token has a match in the other view, or the layer does not attend across whole views.
    """
    layer, alignment_head = model.supervised_layers[0], model.alignment_heads[0]
    assert isinstance(alignment_head, AlignmentHead)
    match = match_batch(batch, layer_grids(layer, batch), kind=kind_of_truth(batch))
    local, order = layer.layout.localize(match), layer.layout.view_order
    if layer.layout.reach != "all":
        raise ValueError(f"layer {layer.path!r} attends to a part of the other view; its attention is not drawn")
    query_view, key_view = _views_to_read(local, order.num_references(int(batch["num_reference_views"])), batch)
    # Where the views show the reference in their own tokens, each is a sample of its own; the first of each is read.
    samples = slice(None, None, local.batch_size // match.batch_size)
    head = alignment_head if through_head and alignment_head.weights() else None
    with evaluation_mode(model):
        with native_precision(model), model.capture([layer]) as captured:
            model.base_model(*inputs.args, **inputs.kwargs)
        query, key, _ = model.split(layer, captured[layer.path], match)
        query_grid, key_grid = local.token_grids[query_view], local.token_grids[key_view]
        queries = query[:, :, query_view : query_view + 1, : query_grid[0] * query_grid[1]]
        keys = key[:, :, key_view : key_view + 1, : key_grid[0] * key_grid[1]]
        maps = attention_maps(queries, keys, (key_grid,), head, captured[layer.path].scale)
    readout = "mean" if head is None else "through_head"
    return FoundMatches(
        order.origin(0, query_view, match.num_views)[1],
        order.origin(0, key_view, match.num_views)[1],
        query_grid,
        key_grid,
        local.index[samples, query_view, key_view, : query_grid[0] * query_grid[1]].cpu(),
        maps[readout][samples, 0, 0, :, 0].argmax(-1).cpu(),
        readout,
    )


def _views_to_read(local: Correspondence, references: int, batch: Mapping[str, Any]) -> tuple[int, int]:
    """Choose the query view and the key view, by their index in the layer's localized correspondence."""
    has_match = local.matched.any(-1).any(0)
    for query_view in range(references, local.num_views):
        for key_view in range(references or local.num_views):
            if has_match[query_view, key_view]:
                return query_view, key_view
    raise ValueError(
        f"batch {batch['key']}: no token of a target view has a match in "
        f"{'a reference' if references else 'another target'} view"
    )
