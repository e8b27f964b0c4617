"""Matches of tokens from points that were seen in several views.

Axes: B samples, V views, N tokens of the largest view, S sightings of all samples, P ordered pairs of them, C
candidates: different pairs of a query token and a token of another view.
Arguments are not checked here; users call :class:`cameo.correspondence.Correspondence`, which checks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cameo.correspondence.matching import token_at
from cameo.correspondence.neighbors.nearest import cycle_consistent
from cameo.correspondence.tracks import Tracks
from cameo.geometry.grids import TokenGrids, token_distance

__all__ = ["match_tracks"]

# Weights are whole numbers of this fraction: their sums do not depend on the order, and half precision holds them.
UNIT = 1 << 10


@torch.no_grad()
def match_tracks(
    tracks: Sequence[Tracks], image_size: tuple[int, int], token_grids: TokenGrids, cycle_threshold: float
) -> tuple[Tensor, Tensor]:
    """Match the tokens that hold sightings of the same points.

    Returns:
        Index and match weight ``[B, V, V, N]`` as in :class:`cameo.correspondence.Correspondence`; the weight is 0
        where there is no match.
    """
    views, tokens = len(token_grids), max(h * w for h, w in token_grids)
    seen = _sightings(tracks, token_grids, image_size)
    first, second = _pairs_in_runs(seen.point)
    others = seen.view[first] != seen.view[second]
    first, second = first[others], second[others]
    query = ((seen.sample[first] * views + seen.view[first]) * views + seen.view[second]) * tokens + seen.token[first]
    weight = (seen.nearness[first] * seen.nearness[second] * UNIT).round().long()
    query, token, best = _decide(query, seen.token[second], weight, tokens, token_grids)
    shape = (len(tracks), views, views, tokens)
    index = query.new_full(shape, -1)
    index.view(-1)[query] = token
    match_weight = torch.zeros(shape, device=query.device)
    match_weight.view(-1)[query] = best / UNIT
    consistent = cycle_consistent(index, tuple(w for _, w in token_grids), cycle_threshold)
    return index.masked_fill_(~consistent, -1), match_weight.masked_fill_(~consistent, 0)


class _Sightings(NamedTuple):
    """Sightings inside the images, those of one point of one sample side by side; each `[S]`.

    `nearness` is the share of the sighting's token in a bilinear interpolation at its place, 1 at the token's center.
    """

    sample: Tensor
    point: Tensor
    view: Tensor
    token: Tensor
    nearness: Tensor


def _sightings(tracks: Sequence[Tracks], token_grids: TokenGrids, image_size: tuple[int, int]) -> _Sightings:
    sample = torch.cat([torch.full_like(one.point, number) for number, one in enumerate(tracks)])
    point, view, xy = (torch.cat([getattr(one, name) for one in tracks]) for name in ("point", "view", "xy"))
    xy = xy.to(torch.promote_types(xy.dtype, torch.float32))
    rows, columns = torch.tensor(token_grids, device=view.device).T[:, view]
    token = token_at(xy, rows, columns, image_size)
    in_tokens = xy * torch.stack([columns, rows], dim=-1) / xy.new_tensor([image_size[1], image_size[0]])
    nearness = (1 - (in_tokens % 1 - 0.5).abs()).prod(dim=-1)
    order = torch.sort(point, stable=True).indices  # of one point, the sightings of each sample stay side by side
    order = order[token[order] >= 0]
    sample, point = sample[order], point[order]
    begins = (sample.diff() != 0) | (point.diff() != 0)
    number = torch.cat([begins.new_zeros(min(1, len(order))), begins]).cumsum(0)
    return _Sightings(sample, number, view[order], token[order], nearness[order])


def _decide(
    query: Tensor, token: Tensor, weight: Tensor, tokens: int, token_grids: TokenGrids
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose one of the tokens that the tracks of a query token lead to, or none.

    Args:
        query: number of each pair's query token among all of `[B, V, V, N]`, `[P]`.
        token: token of the other view, `[P]`.
        weight: weight of the pair, `[P]`.
        tokens: N.
        token_grids: of the views.

    Returns:
        The matched query tokens, their tokens, and the largest weight among the pairs that lead there.
    """
    candidate, place = torch.unique(query * tokens + token, return_inverse=True)  # sorted: by query, then by token
    query, token = candidate // tokens, candidate % tokens
    total = torch.zeros_like(candidate).index_add_(0, place, weight)
    largest = torch.zeros_like(candidate).scatter_reduce_(0, place, weight, "amax")
    width = torch.tensor([w for _, w in token_grids], device=query.device)[query // tokens % len(token_grids)]
    first, second = _pairs_in_runs(query)
    near = token_distance(token[first], token[second], width[first]) <= 1
    everything = torch.zeros_like(total).index_add_(0, first, total[second])
    support = torch.zeros_like(total).index_add_(0, first[near], total[second[near]])
    # The most supported candidate of each query comes first; among equals the heaviest, then the lowest token.
    order = torch.sort(total, descending=True, stable=True).indices
    order = order[torch.sort(support[order], descending=True, stable=True).indices]
    order = order[torch.sort(query[order], stable=True).indices]
    leads = torch.ones_like(order, dtype=torch.bool)
    leads[1:] = query[order].diff() != 0
    chosen = order[leads]
    chosen = chosen[2 * support[chosen] > everything[chosen]]
    return query[chosen], token[chosen], largest[chosen]


def _pairs_in_runs(group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions of all ordered pairs of equal entries, with themselves too; equal ones stand side by side.

    Example:
        >>> first, second = _pairs_in_runs(torch.tensor([4, 7, 7]))
        >>> first.tolist(), second.tolist()
        ([0, 1, 1, 2, 2], [0, 1, 2, 1, 2])
    """
    _, count = torch.unique_consecutive(group, return_counts=True)
    begin = (count.cumsum(0) - count).repeat_interleave(count)  # of the run of each entry
    partners = count.repeat_interleave(count)
    first = torch.arange(len(group), device=group.device).repeat_interleave(partners)
    number = torch.arange(len(first), device=group.device) - (partners.cumsum(0) - partners)[first]
    return first, begin[first] + number
