"""How far matches are from where the colors fit best.

Axes: P ordered pairs of views, N tokens of a view, K offsets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from cameo.inspection.scenes import InspectedScene
from cameo.inspection.scores import Matched

__all__ = ["token_error"]

# Offsets in tokens along x and y at which colors are compared.
OFFSETS = tuple(half / 2 for half in range(-3, 4))
# A view is compared in parts of about this many tokens along each side; fewer tokens with a match say nothing.
PART, LEAST_TOKENS = 8, 12
# A part shows where it fits if the color difference there is below this share of its mean over all offsets.
DISTINCT = 0.7
QUANTILE = 0.9


@torch.no_grad()
def token_error(scenes: Sequence[InspectedScene], matches: Sequence[Matched]) -> float:
    """Return within how many tokens nine of ten parts of the images fit best by their colors; NaN for none.

    The colors around the matches of each part of each pair are compared at offsets up to 1.5 tokens, all tokens of the
    part together.
    """
    found = torch.cat([_offsets(scene, matched) for scene, matched in zip(scenes, matches, strict=True)])
    return found.quantile(QUANTILE).item() if len(found) else math.nan


def _offsets(scene: InspectedScene, matched: Matched) -> Tensor:
    """Largest of the x and y offset in tokens at which each part fits best, for parts that show it."""
    rows, columns = scene.token_grid
    height, width = scene.views.size
    token = torch.tensor([width / columns, height / rows])
    first, second = (scene.at(view) for view in scene.pairs.T)
    colors = scene.token_colors[first]
    offsets = torch.cartesian_prod(torch.tensor(OFFSETS), torch.tensor(OFFSETS))
    count = _parts(matched.visible.float(), scene.token_grid)
    differences = []
    for offset in offsets:
        apart = (colors - scene.color_at(second, matched.xy + offset * token)).abs().mean(-1)
        differences.append(_parts(torch.where(matched.visible, apart, 0.0), scene.token_grid))
    difference = torch.stack(differences)
    least = difference.amin(0)
    # Of several offsets that fit alike, the smallest counts.
    size = offsets.abs().amax(-1)
    alike = torch.where(difference <= least * 1.02 + 1e-6, size[:, None], math.inf).amin(0)
    shows = (count >= LEAST_TOKENS) & (least < DISTINCT * difference.mean(0))
    return alike[shows]


def _parts(values: Tensor, token_grid: tuple[int, int]) -> Tensor:
    """Sum values `[P, N]` over the parts of each view, `[P * parts]`."""
    rows, columns = token_grid
    grid = rearrange(values, "p (h w) -> p h w", h=rows, w=columns)
    parts = [
        part.sum((1, 2))
        for band in grid.tensor_split(max(1, rows // PART), 1)
        for part in band.tensor_split(max(1, columns // PART), 2)
    ]
    return torch.cat(parts)
