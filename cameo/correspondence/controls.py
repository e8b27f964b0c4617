"""Controls of an experiment: matches that must not help, and how often they are right by accident.

Axes: B samples, V views, N tokens per view.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cameo.correspondence.correspondence import Correspondence
from cameo.errors import ShapeError
from cameo.geometry.grids import token_distance, tokens_near

__all__ = ["matches_of_next_sample", "near_tokens", "random_matches", "within_tokens"]


def matches_of_next_sample(match: Correspondence) -> Correspondence:
    """Give each sample the matches of the next one, and the last those of the first.

    A control: the matches are distributed as real ones are, but belong to other images. A model can still learn from
    them what the scenes and camera positions have in common, so an improvement with this control is no evidence that
    the correspondence itself helps.

    Example:
        >>> index = torch.tensor([[[[-1], [0]], [[0], [-1]]], [[[-1], [-1]], [[0], [-1]]]])
        >>> matches_of_next_sample(Correspondence(index, ((1, 1), (1, 1)))).index[:, 0, 1].flatten().tolist()
        [-1, 0]

    Raises:
        ValueError: if there is only one sample.
    """
    if match.batch_size < 2:
        raise ValueError(
            "match: expected at least 2 samples, of which each takes the matches of the next, got 1. Cure: a larger "
            "batch"
        )
    return replace(
        match,
        index=match.index.roll(-1, dims=0),
        match_weight=None if match.match_weight is None else match.match_weight.roll(-1, dims=0),
        distance=None if match.distance is None else match.distance.roll(-1, dims=0),
    )


def random_matches(match: Correspondence, generator: torch.Generator) -> Correspondence:
    """Replace each match by a token of the same view drawn uniformly; tokens without a match stay without.

    A control: the same tokens have a match, but it carries no information.

    Example:
        >>> index = torch.tensor([[[-1, -1], [1, -1]], [[-1, 0], [-1, -1]]])[None]
        >>> drawn = random_matches(Correspondence(index, ((1, 2), (1, 2))), torch.Generator().manual_seed(0))
        >>> bool((drawn.matched == (index >= 0)).all())
        True
    """
    index = match.index
    share = torch.rand(index.shape, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([h * w for h, w in match.token_grids], dtype=torch.float64)[:, None]
    drawn = (share * tokens).long().to(index.device)
    return replace(match, index=torch.where(match.matched, drawn, -1))


def within_tokens(control: Correspondence, match: Correspondence, limit: int) -> Tensor:
    """Return where a control matches a token within `limit` tokens of the true match, bool `[B, V, V, N]`.

    Rows and columns both differ by at most `limit`. Tokens that have no match in one of the two are False.

    Example:
        >>> def row(*index: int) -> Correspondence:
        ...     here = torch.full((1, 2, 2, 3), -1)
        ...     here[0, 0, 1] = torch.tensor(index)
        ...     return Correspondence(here, ((1, 3), (1, 3)))
        >>> within_tokens(row(0, 0, -1), row(1, 2, 2), 1)[0, 0, 1].tolist()
        [True, False, False]

    Raises:
        ShapeError: if the two are of other samples, views or token grids.
    """
    if control.index.shape != match.index.shape or control.token_grids != match.token_grids:
        raise ShapeError(
            "control", expected=f"{list(match.index.shape)} of {match.token_grids}", got=list(control.index.shape)
        )
    width = torch.tensor([w for _, w in match.token_grids], device=match.device)[:, None]  # of the key view
    return control.matched & match.matched & (token_distance(control.index, match.index, width) <= limit)


def near_tokens(match: Correspondence, limit: int) -> Tensor:
    """Return the share of the key view's tokens within `limit` tokens of each match, float64 `[B, V, V, N]`.

    It is how often a token drawn uniformly would be right by accident. Tokens without a match have 0.

    Example:
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1] = torch.tensor([0, 1, -1, 3])
        >>> near_tokens(Correspondence(index, ((1, 4), (1, 4))), 1)[0, 0, 1].tolist()
        [0.5, 0.75, 0.0, 0.5]
    """
    height, width = torch.tensor(match.token_grids, device=match.device).T[..., None]
    share = tokens_near(match.index, limit, height, width).double() / (height * width)
    return torch.where(match.matched, share, 0.0)
