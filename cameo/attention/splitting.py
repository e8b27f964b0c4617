"""Queries or keys of one call as a tensor with an axis of views.

Axes: as in `cameo.attention.layout`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.attention.folding import pair_own_tokens
from cameo.attention.layouts.axes import take_segment
from cameo.attention.layouts.places import TokenPlaces

__all__ = ["split_views"]


def split_views(tensor: Tensor, places: TokenPlaces) -> Tensor:
    """Bring queries or keys [AB, K, L, D] to [B', K, V, N', D], as `TokenLayout.split_query` says.

    Args:
        tensor: without the tokens whose number is open.
        places: where the tokens of the views are in it.
    """
    pattern, order, lengths, grids = places.pattern, places.order, places.lengths, places.token_grids
    rest = tuple(name for name in ("h", "w") if name not in pattern.folded)
    views = tuple(name for name in places.axes if name not in pattern.groups)
    main = take_segment(tensor, pattern, pattern.main, lengths, views=views, grid=rest)
    if order.own_view_shows is not None:
        return pair_own_tokens(order.showing_views(main, len(grids)), lengths["b"])
    longest = main.shape[3] if pattern.folded else max(height * width for height, width in grids)
    if order.reference_keys:
        held = order.attended(len(grids), places.of)
        return F.pad(main, (0, 0, 0, longest - main.shape[3], held.start, len(grids) - held.stop))
    main = main[:, :, : main.shape[2] - order.unsupervised_views]
    if not places.extra:
        return main if order.unsupervised_views else order.references_first(main)
    parts = [main]
    for segment in places.extra:
        if segment in pattern.segments:
            grid = tuple(sorted(segment))
            parts.append(take_segment(tensor, pattern, segment, lengths, views=(), grid=grid))
        else:
            parts.append(main.new_zeros(main.shape[0], main.shape[1], 1, 0, main.shape[4]))
    parts = [F.pad(part, (0, 0, 0, longest - part.shape[3])) for part in parts]
    return order.references_first(torch.cat(parts, dim=2))
