"""Frames of a video and its latent frames: which stand for which, and how matches pass from one to the other.

A video VAE packs several frames into one latent frame, and the views of a video transformer are its latent frames.

Axes: B samples, V views (frames), G latent frames, N tokens per view, P pairs of frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cameo.correspondence.correspondence import Correspondence
from cameo.errors import as_integer

__all__ = ["latent_frames", "merge_views"]


def latent_frames(num_frames: int, factor: int, *, first_alone: bool = True) -> tuple[tuple[int, ...], ...]:
    """Return for each latent frame the frames that it stands for.

    Example:
        >>> latent_frames(9, factor=4)
        ((0,), (1, 2, 3, 4), (5, 6, 7, 8))
        >>> len(latent_frames(49, factor=4)), len(latent_frames(121, factor=8))  # CogVideoX, LTX-Video
        (13, 16)

    Args:
        num_frames: frames of the video.
        factor: frames per latent frame: 4 for CogVideoX, HunyuanVideo and Wan, 6 for Mochi, 8 for LTX-Video and
            Cosmos. In diffusers most pipelines have it as `vae_scale_factor_temporal`.
        first_alone: whether the first latent frame stands for the first frame alone, as in all of these, whose
            convolutions over time are causal.

    Raises:
        ValueError: the frames are no whole number of latent frames; the message has the next number that is.
    """
    num_frames, factor = as_integer("num_frames", num_frames, least=1), as_integer("factor", factor, least=1)
    first = 1 if first_alone else 0
    if rest := (num_frames - first) % factor:
        below, above = num_frames - rest, num_frames - rest + factor
        fits = f"{below} or {above}" if below > 0 else str(above)
        raise ValueError(
            f"num_frames: expected a multiple of {factor}{' and 1 more' if first_alone else ''}, as {fits}, got "
            f"{num_frames}"
        )
    alone = [(0,)] if first_alone else []
    return (*alone, *(tuple(range(start, start + factor)) for start in range(first, num_frames, factor)))


def merge_views(match: Correspondence, groups: Sequence[Sequence[int]], *, least_share: float = 0.0) -> Correspondence:
    """Make one view of each group of views, such as the frames of a latent frame, whose tokens cover the same places.

    The pairs of views of two groups vote: token x of one group matches that token of the other which most pairs match
    it with. A pair without a match does not vote, and a vote counts as much as its match weight. Of tokens with equally
    many votes the one of the pair that is nearest to the middle of both groups wins, and the earlier one of such pairs.

    Example:
        >>> index = torch.full((1, 4, 4, 3), -1)
        >>> index[0, 0, 1:, 2] = torch.tensor([1, 0, 0])  # what frames 1 to 3 show of token 2 of frame 0
        >>> match = Correspondence(index, token_grids=((1, 3),) * 4)
        >>> merge_views(match, latent_frames(4, factor=3)).index[0, 0, 1].tolist()
        [-1, -1, 0]

    To compute less, match one frame of each group alone: `[group[len(group) // 2] for group in groups]` are those in
    the middle.

    Args:
        match: matches of the single views.
        groups: views of each new view, as `latent_frames` returns them. Views in no group are left out.
        least_share: drop a match for which less than this share of all pairs of views votes, in [0, 1].

    Returns:
        Matches between G views. Their match weight is the mean of those that agree, their distance the smallest of all
        pairs.

    Raises:
        ValueError: a group is empty, holds an unknown view, one of another group or views of different token grids, or
            `least_share` is out of range.
    """
    groups = [[int(view) for view in group] for group in groups]
    _check_groups(match, groups)
    if not 0 <= least_share <= 1:
        raise ValueError(f"least_share: expected a share in [0, 1], got {least_share}")
    grids = tuple(match.token_grids[group[0]] for group in groups)
    tokens = max(height * width for height, width in grids)
    shape = match.batch_size, len(groups), len(groups), tokens
    index = match.index.new_full(shape, -1)
    weights = None if match.match_weight is None else match.match_weight.new_zeros(shape)
    distances = None if match.distance is None else match.distance.new_full(shape, torch.inf)
    for place, queries in enumerate(groups):
        for other, keys in enumerate(groups):
            if distances is not None and match.distance is not None:
                distances[:, place, other] = _of_pairs(match.distance, queries, keys, tokens).amin(-1)
            if place == other:
                continue
            found, weight = _vote(match, queries, keys, tokens, least_share)
            index[:, place, other] = found
            if weights is not None:
                weights[:, place, other] = weight.to(weights.dtype)
    return Correspondence(index, grids, weights, distances)


def _of_pairs(values: Tensor, queries: Sequence[int], keys: Sequence[int], tokens: int) -> Tensor:
    """Bring `[B, V, V, N]` to `[B, N, P]`, the pairs of two groups, those in the middle first."""
    pairs = sorted(
        ((query, key) for query in queries for key in keys),
        key=lambda pair: sum(abs(2 * view - of[0] - of[-1]) for view, of in zip(pair, (queries, keys), strict=True)),
    )
    first, second = (list(side) for side in zip(*pairs, strict=True))
    return values[:, first, second, :tokens].transpose(1, 2)


def _vote(
    match: Correspondence, queries: Sequence[int], keys: Sequence[int], tokens: int, least_share: float
) -> tuple[Tensor, Tensor]:
    """Return the token with most votes, -1 for none, and the mean weight of the matches with it, `[B, N]` each."""
    named = _of_pairs(match.index, queries, keys, tokens)
    weight = torch.ones_like(named, dtype=torch.float32)
    if match.match_weight is not None:
        weight = _of_pairs(match.match_weight, queries, keys, tokens).float()
    weight = weight.masked_fill(named < 0, 0)
    agree = (named[..., :, None] == named[..., None, :]) & (named[..., None, :] >= 0)
    votes = (agree * weight[..., None, :]).sum(-1).masked_fill(named < 0, -1)
    best = votes.argmax(-1, keepdim=True)  # the first of the largest
    count = agree.sum(-1).gather(-1, best)
    enough = count >= max(1.0, least_share * named.shape[-1])
    found = named.gather(-1, best).where(enough, -1)[..., 0]
    return found, (votes.gather(-1, best) / count.clamp(min=1))[..., 0].clamp(min=0)


def _check_groups(match: Correspondence, groups: Sequence[Sequence[int]]) -> None:
    views = [view for group in groups for view in group]
    if not groups or not all(groups) or len(set(views)) < len(views):
        raise ValueError(f"groups: expected groups of one view at least, each view in one group, got {groups}")
    if not all(0 <= view < match.num_views for view in views):
        raise ValueError(f"groups: expected views of 0..{match.num_views - 1}, got {sorted(views)}")
    for group in groups:
        grids = {match.token_grids[view] for view in group}
        if len(grids) > 1:
            raise ValueError(f"groups: expected views of one token grid in each, got {sorted(grids)} in {group}")
