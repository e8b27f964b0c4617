"""The folded form of matches and of other values of the tokens, as `TokenLayout` brings queries and keys to it.

Axes: B samples, V views, N tokens per view, F views whose own tokens stand for those of one other view.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from cameo.attention.layouts.view_order import ViewOrder
from cameo.geometry.grids import TokenGrid

if TYPE_CHECKING:
    from cameo.correspondence import Correspondence

__all__ = ["fold_matches", "fold_tokens", "pair_own_tokens", "split_matches"]


def fold_matches(match: Correspondence, reach: str) -> Correspondence:
    """Make each row, column or cell of the token grid a sample of its own, and drop the matches between them."""
    if reach == "all":
        return match
    height, width = match.token_grids[0]
    index, token = match.index, torch.arange(height * width, device=match.device)
    same_row, same_column = index // width == token // width, index % width == token % width
    reached, local, token_grid, fold = {
        "row": (same_row, index % width, (1, width), "(b h) i j w"),
        "column": (same_column, index // width, (height, 1), "(b w) i j h"),
        "cell": (same_row & same_column, torch.zeros_like(index), (1, 1), "(b h w) i j 1"),
    }[reach]

    def folded(tensor: Tensor) -> Tensor:
        return rearrange(tensor, f"b i j (h w) -> {fold}", h=height, w=width)

    weight, distance = match.match_weight, match.distance
    return replace(
        match,
        index=folded(torch.where(reached & match.matched, local, -1)),
        token_grids=(token_grid,) * match.num_views,
        match_weight=None if weight is None else folded(weight),
        distance=None if distance is None else folded(distance),
    )


def fold_tokens(tokens: Tensor, reach: str, token_grid: TokenGrid) -> Tensor:
    """Rearrange values of the tokens, `[B, V, N, C]`, as `fold_matches` rearranges the matches."""
    patterns = {"all": None, "row": "(b h) v w c", "column": "(b w) v h c", "cell": "(b h w) v 1 c"}
    pattern, (height, width) = patterns[reach], token_grid
    return tokens if pattern is None else rearrange(tokens, f"b v (h w) c -> {pattern}", h=height, w=width)


def split_matches(match: Correspondence, order: ViewOrder) -> Correspondence:
    """Make several samples of each one, as `ViewOrder.samples` lists their views, and drop the matches between them.

    Where the own tokens of a view stand for those of another, the matches are those of the view with it: `[B F, 2, 2,
    N]` from the second view to the first, whose place the second one's own tokens take.
    """
    index, weight, distance = order.take_pairs(match.index), match.match_weight, match.distance
    if order.own_view_shows is not None:
        index[:, 0, 1] = -1
    return replace(
        match,
        index=index,
        token_grids=match.token_grids[:1] * index.shape[1],
        match_weight=None if weight is None else order.take_pairs(weight),
        distance=None if distance is None else order.take_pairs(distance),
    )


def pair_own_tokens(views: Tensor, batch: int) -> Tensor:
    """Make each of F views `[B', K, F, N', D]` a sample of two views, both with its own tokens, without a copy of them.

    Example:
        >>> pair_own_tokens(torch.zeros(4, 8, 3, 16, 32), batch=2).shape
        torch.Size([12, 8, 2, 16, 32])

    Args:
        views: queries or keys in folded form.
        batch: number of samples B; B' is B times the rows, columns or cells of each, which stay together.
    """
    samples = rearrange(views, "(b f) k v n d -> (b v f) k n d", b=batch)
    return samples[:, :, None].expand(-1, -1, 2, -1, -1)
