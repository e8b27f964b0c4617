"""Random matches, and their hits counted pair by pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cameo.correspondence import Correspondence


def random_matches(samples: int, token_grids: Sequence[tuple[int, int]], seed: int = 0) -> Correspondence:
    """Match every token with a random token of every other view, or with none."""
    generator = torch.Generator().manual_seed(seed)
    views, tokens = len(token_grids), max(h * w for h, w in token_grids)
    index = torch.full((samples, views, views, tokens), -1)
    for i, (height, width) in enumerate(token_grids):
        for j, (key_height, key_width) in enumerate(token_grids):
            if i != j:
                shape = (samples, height * width)
                index[:, i, j, : height * width] = torch.randint(-1, key_height * key_width, shape, generator=generator)
    return Correspondence(index, tuple(token_grids))


def plain_hits(
    maps: dict[str, Tensor], match: Correspondence, within: tuple[int, ...] = (0, 1)
) -> tuple[dict[str, Tensor], int]:
    """Count the hits of `attention_maps` pair by pair."""
    found = {name: torch.zeros(attention.shape[1], len(within)) for name, attention in maps.items()}
    pairs = match.matched.nonzero().tolist()
    for b, i, j, x in pairs:
        width, target = match.token_grids[j][1], int(match.index[b, i, j, x])
        for name, attention in maps.items():
            best = attention[b, :, i, x, j].argmax(-1)
            away = torch.maximum((best // width - target // width).abs(), (best % width - target % width).abs())
            found[name] += (away[:, None] <= torch.tensor(within)).float()
    return found, len(pairs)
