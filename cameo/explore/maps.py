"""Where the tokens of a view look in the other views: the attention of some layers on some samples, view by view.

Axes: B samples, V views, N tokens of the query view, M tokens of the key view, K heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cameo.alignment import AlignmentHead
from cameo.attention.capture import AttentionLayer
from cameo.geometry.grids import TokenGrid
from cameo.model import CameoModel
from cameo.pipeline import TrainingInputs
from cameo.probing.hits import attention_maps
from cameo.probing.mode import evaluation_mode, native_precision
from cameo.probing.tally import BatchMatches

__all__ = ["MEAN", "THROUGH_HEAD", "ViewMaps", "layer_maps", "map_sizes", "single_head", "why_not_shown"]

# Names of the readouts, as the page shows them.
MEAN, THROUGH_HEAD = "mean", "through the alignment head"


def single_head(number: int) -> str:
    """Name the readout of one attention head."""
    return f"head {number}"


@dataclass(frozen=True, eq=False)
class ViewMaps:
    """How the tokens of one view of a sample attend to the tokens of another view.

    Example:
        >>> import torch
        >>> maps = ViewMaps(0, 1, 0, (1, 2), (1, 2), torch.tensor([1, -1]), {"mean": torch.eye(2)})
        >>> maps.readouts["mean"].argmax(-1).tolist()
        [0, 1]

    Attributes:
        sample: number of the sample in its batch.
        query_view, key_view: views of the sample, the one whose tokens look and the one in which they look.
        query_grid, key_grid: token grids `(h, w)` of these views.
        target: true match of each query token, int64 `[N]`; -1 for a token without a match.
        readouts: probabilities `[N, M]`, of which each row sums to 1: `MEAN`, the mean over the heads; `THROUGH_HEAD`,
            where the alignment head was trained; and each `single_head`.
    """

    sample: int
    query_view: int
    key_view: int
    query_grid: TokenGrid
    key_grid: TokenGrid
    target: Tensor
    readouts: dict[str, Tensor]


def why_not_shown(layer: AttentionLayer) -> str | None:
    """Return why the attention of a layer cannot be shown as maps over whole views, or None if it can."""
    if layer.unsupported is not None:
        return layer.unsupported
    return None if layer.layout.reach == "all" else "a token attends to a part of each other view"


def map_sizes(layer: AttentionLayer, matches: BatchMatches) -> list[tuple[int, int]]:
    """Return the size `(N, M)` of every map of one readout of a layer on a batch."""
    local = layer.layout.localize(matches.match(layer))
    tokens = [height * width for height, width in local.token_grids]
    pairs = [(tokens[i], tokens[j]) for i in range(local.num_views) for j in range(local.num_views) if i != j]
    return pairs * local.batch_size


def layer_maps(
    model: CameoModel,
    matches: BatchMatches,
    inputs: TrainingInputs,
    layers: Sequence[AttentionLayer],
    *,
    trained_head: bool,
) -> tuple[dict[str, Iterator[ViewMaps]], Any]:
    """Run the model once; return the maps of each layer by its path, and the output of the denoiser.

    The maps of a layer are computed as they are taken, a pair of views at a time, to bound the memory.

    Args:
        model: wraps the denoiser that `inputs` are for.
        matches: collated samples, with their true matches.
        inputs: of the denoiser, made from the batch.
        layers: layers that `why_not_shown` has nothing against.
        trained_head: whether the alignment heads of the supervised layers were trained with these weights.
    """
    with evaluation_mode(model), native_precision(model), model.capture(list(layers)) as captured:
        output = model.base_model(*inputs.args, **inputs.kwargs)
    heads = {
        layer.path: head
        for layer, head in zip(model.supervised_layers, model.alignment_heads, strict=True)
        if trained_head and isinstance(head, AlignmentHead) and head.weights()
    }
    maps = {layer.path: _maps_of(model, layer, matches, captured.take(layer.path), heads) for layer in layers}
    return maps, output


def _maps_of(
    model: CameoModel, layer: AttentionLayer, matches: BatchMatches, seen: Any, heads: Mapping[str, AlignmentHead]
) -> Iterator[ViewMaps]:
    match = matches.match(layer)
    query, key, local = model.split(layer, seen, match)
    order, head = layer.layout.view_order, heads.get(layer.path)
    for row in range(local.batch_size):
        for query_view in range(local.num_views):
            for key_view in range(local.num_views):
                if query_view == key_view:
                    continue
                grids = local.token_grids[query_view], local.token_grids[key_view]
                tokens = [height * width for height, width in grids]
                queries = query[row : row + 1, :, query_view : query_view + 1, : tokens[0]]
                keys = key[row : row + 1, :, key_view : key_view + 1, : tokens[1]]
                with evaluation_mode(model):
                    maps = attention_maps(queries, keys, grids[1:], head, seen.scale)
                readouts = {MEAN: maps["mean"][0, 0, 0, :, 0].cpu()}
                if "through_head" in maps:
                    readouts[THROUGH_HEAD] = maps["through_head"][0, 0, 0, :, 0].cpu()
                for number, of_head in enumerate(maps["best_head"][0]):
                    readouts[single_head(number)] = of_head[0, :, 0].cpu()
                sample, of_query = order.origin(row, query_view, match.num_views)
                _, of_key = order.origin(row, key_view, match.num_views)
                target = local.index[row, query_view, key_view, : tokens[0]].cpu()
                yield ViewMaps(sample, of_query, of_key, *grids, target, readouts)
