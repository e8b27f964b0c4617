"""Which matches are supervised: how much each counts in the alignment loss, how many there are; and its options.

Axes: B samples, V views, N tokens per view, i query view, j key view.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from cameo.choices import GELUS, IMPLEMENTATIONS, NORMALIZATIONS, REDUCTIONS
from cameo.errors import ShapeError, as_integer, unknown_name
from cameo.geometry.grids import TokenGrid
from cameo.memory import sent_to

if TYPE_CHECKING:
    from cameo.correspondence import Correspondence

__all__ = [
    "Window",
    "check_choice",
    "check_counts",
    "check_matches",
    "check_options",
    "count_rows",
    "match_totals",
    "sampled_weights",
    "supervision_weights",
]

# The Gaussian of soft targets is cut off at this many standard deviations.
CUTOFF = 3

CHOICES = {
    "normalize": NORMALIZATIONS,
    "reduction": REDUCTIONS,
    "implementation": IMPLEMENTATIONS,
    "gelu": GELUS,
}


def supervision_weights(
    correspondence: Correspondence,
    *,
    pairs: str | Tensor = "all",
    reduction: str = "mean",
    num_reference_views: int | None = None,
    totals: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weight [B, V, V, N] of each -log p[match] in the alignment loss, which is their weighted sum.

    Example:
        >>> from cameo import Correspondence
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1, :2] = 3
        >>> supervision_weights(Correspondence(index=index, token_grids=((2, 2), (2, 2))))[0, 0, 1].tolist()
        [0.5, 0.5, 0.0, 0.0]

    "released": among all other views of a query token only the view with the nearest 3D point carries a target,
    and only if there is a match in it; yet every match counts in the mean. The queries of the first
    `num_reference_views` views and those of the other views are averaged separately and the two means are added; the
    mean of an empty part is 0.

    `totals` takes the place of the sums that a mean divides by, see `match_totals`.

    Raises:
        ShapeError: `pairs`, `match_weight` or `distance` has another shape.
        ValueError: the reduction is unknown, a match weight on the CPU is negative or not finite, or something that
            "released" needs is missing.

    Source: arXiv 2512.03045 and the code released with it.
    """
    check_choice("reduction", reduction)
    weights = _match_weights(correspondence, pairs, dtype)
    if reduction == "sum":
        if totals is not None:
            raise ValueError('totals: reduction="sum" divides by nothing; leave them out')
        return weights
    count = 0 if reduction == "mean" else _check_reference_views(num_reference_views, correspondence.num_views)
    sums = _sums(weights, reduction, count) if totals is None else totals.to(weights)
    if reduction == "mean":
        return weights / _nonzero(sums[0])
    nearest = _nearest_view(correspondence)
    halves = [part / _nonzero(total) for part, total in zip(_halves(weights, count), sums, strict=True)]
    return torch.cat(halves, dim=1) * nearest


def match_totals(
    correspondence: Correspondence,
    *,
    pairs: str | Tensor = "all",
    reduction: str = "mean",
    num_reference_views: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the sums of match weights that the alignment loss divides by.

    Where a batch is cut into parts, in several processes or one after the other, the mean over the whole batch is what
    the parts give with the sum of their totals: the sum of the losses of the parts, and of their gradients.

    Example:
        >>> from cameo import Correspondence
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1, :2] = 3
        >>> match_totals(Correspondence(index=index, token_grids=((2, 2), (2, 2)))).tolist()
        [2.0]

    Returns:
        `[1]` for "mean"; `[2]` for "released", of the queries in reference views and of the others.

    Raises:
        ValueError: for "sum", which divides by nothing.
    """
    check_choice("reduction", reduction)
    if reduction == "sum":
        raise ValueError('reduction="sum" divides by nothing, so there are no totals')
    count = 0 if reduction == "mean" else _check_reference_views(num_reference_views, correspondence.num_views)
    return _sums(_match_weights(correspondence, pairs, dtype), reduction, count)


def _halves(weights: Tensor, num_reference_views: int) -> tuple[Tensor, Tensor]:
    return weights[:, :num_reference_views], weights[:, num_reference_views:]


def _sums(weights: Tensor, reduction: str, num_reference_views: int) -> Tensor:
    if reduction == "mean":
        return weights.sum()[None]
    return torch.stack([part.sum() for part in _halves(weights, num_reference_views)])


def _match_weights(correspondence: Correspondence, pairs: str | Tensor, dtype: torch.dtype) -> Tensor:
    """Weight [B, V, V, N] of each match before any reduction, 0 where there is none."""
    supervised = correspondence.matched
    if (mask := _pair_mask(pairs, correspondence)) is not None:
        supervised = supervised & mask[None, :, :, None]
    weights = supervised.to(dtype)
    if correspondence.match_weight is not None:
        _check_like_index("correspondence.match_weight", correspondence.match_weight, correspondence)
        if not _usable(correspondence.match_weight):
            raise ValueError(
                f"correspondence.match_weight: expected finite values of at least 0, got a minimum of "
                f"{correspondence.match_weight.min().item():g}; clamp the weights"
            )
        # where, not a product: the weight of a pair without a match has no meaning and may be NaN.
        weights = torch.where(supervised, correspondence.match_weight.to(dtype), 0)
    return weights


class Window:
    """Spreads each match over the tokens around it, by a Gaussian on the token grid.

    The weight of a match is distributed over the tokens of the grid within 3 standard deviations, so that its sum is
    preserved. With `softness=0` a match keeps its single token.

    Example:
        >>> view = token = torch.zeros(1, 1, dtype=torch.int64)
        >>> views, tokens, weights = Window([(2, 2)], 0.5).spread(view, token, torch.ones(1, 1))
        >>> sorted(round(weight, 3) for weight in weights[weights > 0].tolist())
        [0.014, 0.105, 0.105, 0.776]

    Args:
        token_grids: token grid `(h, w)` of each view.
        softness: standard deviation in tokens, at least 0.
    """

    def __init__(self, token_grids: Sequence[TokenGrid], softness: float) -> None:
        self.softness = softness
        self.grids = torch.tensor(token_grids)
        reach = min(math.floor(CUTOFF * softness), max(itertools.chain(*token_grids)) - 1)
        offsets = [
            (down, right)
            for down, right in itertools.product(range(-reach, reach + 1), repeat=2)
            if down**2 + right**2 <= (CUTOFF * softness) ** 2
        ]
        self.offsets = torch.tensor(offsets)

    def spread(self, views: Tensor, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn the views, tokens and weights `[..., T]` of matches into those of soft targets, `[..., T * S]`.

        S is the number of tokens in the window; the weight of a token outside the grid is 0.
        """
        if len(self.offsets) == 1:
            return views, tokens, weights
        down, right = sent_to(tokens.device, self.offsets).unbind(-1)
        height, width = sent_to(tokens.device, self.grids)[views].unsqueeze(-2).unbind(-1)
        row, column = tokens[..., None] // width + down, tokens[..., None] % width + right
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        share = torch.exp((down.square() + right.square()).to(weights.dtype) / (-2 * self.softness**2))
        share = torch.where(inside, share, 0)
        share = share / share.sum(dim=-1, keepdim=True)
        token = torch.where(inside, row * width + column, tokens[..., None])
        return (
            views[..., None].expand_as(token).flatten(-2),
            token.flatten(-2),
            (weights[..., None] * share).flatten(-2),
        )


def sampled_weights(weights: Tensor, normalize: str, max_queries: int, generator: torch.Generator | None) -> Tensor:
    """Keep at most `max_queries` rows of the loss, drawn at random, with weights from which the loss is unbiased.

    Each set of so many rows is as likely as any other, and the weights are multiplied by the number of all rows over
    that of the kept ones, so the mean over the draws is what all rows give, of the loss and of its gradient.

    Example:
        >>> weights = torch.zeros(1, 2, 2, 4)
        >>> weights[0, 0, 1] = 0.25
        >>> kept = sampled_weights(weights, "per_view", 2, torch.Generator().manual_seed(0))
        >>> sorted(kept[0, 0, 1].tolist())
        [0.0, 0.0, 0.5, 0.5]

    Args:
        weights: `[B, V, V, N]` of `supervision_weights`.
        normalize: "per_view": a row is a query token with the keys of one other view; "all_views": of all others.
        max_queries: at least 1.
        generator: of the random numbers; None is torch's own on the CPU.
    """
    carries = weights != 0 if normalize == "per_view" else (weights != 0).any(dim=2, keepdim=True)
    if carries.numel() <= max_queries:
        return weights
    device = generator.device if generator is not None else torch.device("cpu")
    drawn = sent_to(weights.device, torch.rand(carries.shape, generator=generator, device=device))
    first = drawn.masked_fill(~carries, 2).flatten().topk(max_queries, largest=False, sorted=False).indices
    chosen = torch.zeros_like(carries).flatten().scatter_(0, first, value=True).view(carries.shape)
    count = carries.sum()
    factor = count.to(weights.dtype) / count.clamp(min=1, max=max_queries)
    return torch.where(chosen, weights * factor, 0)


def check_matches(index: Tensor, token_grids: Sequence[TokenGrid]) -> None:
    """Refuse a match outside its view's token grid; `Correspondence` itself reads values on the CPU only.

    Args:
        index: int64 `[B, V, V, N]`, as in `cameo.Correspondence`.
        token_grids: token grid `(h, w)` of each view.

    Raises:
        ValueError: the message names the match.
    """
    wrong = _wrong_matches(index, token_grids)
    if bool(wrong.any()):
        b, i, j, x = torch.nonzero(wrong)[0].tolist()
        raise ValueError(
            f"correspondence.index[{b}, {i}, {j}, {x}]: expected -1, or a token of view {j} with grid "
            f"{token_grids[j]} for a token of another view {i} with grid {token_grids[i]}, got "
            f"{index[b, i, j, x].item()}. "
            "Build the correspondence with token_grid=model.token_grid(height, width)"
        )


def _wrong_matches(index: Tensor, token_grids: Sequence[TokenGrid]) -> Tensor:
    lengths = [height * width for height, width in token_grids]
    limits = [[0 if i == j else length for j, length in enumerate(lengths)] for i in range(len(lengths))]
    limit = sent_to(index.device, torch.tensor(limits))[..., None]
    if len(set(lengths)) > 1:
        token = torch.arange(index.shape[3], device=index.device)
        limit = limit.masked_fill(token >= sent_to(index.device, torch.tensor(lengths))[:, None, None], 0)
    return (index >= limit) & (index >= 0) | (index < -1)


def count_rows(index: Tensor, weights: Tensor, token_grids: Sequence[TokenGrid], normalize: str) -> Tensor:
    """Count what the host must know before it can cut the rows into portions, in one tensor.

    Example:
        >>> index = torch.tensor([[[-1, -1], [0, -1]], [[1, 1], [-1, -1]]])[None]
        >>> count_rows(index, (index >= 0).float(), [(1, 2)] * 2, "per_view").tolist()
        [2, 1, 0]

    Args:
        index, weights, token_grids, normalize: see `cameo.alignment.rows.plan_rows`.

    Returns:
        int64: the number of rows of each sample and view, in turn, key views for "per_view" and query views for
        "all_views"; then the number of matches that `check_matches` would refuse.
    """
    supervised = weights != 0
    of_view = supervised.sum(dim=(1, 3)) if normalize == "per_view" else supervised.any(dim=2).sum(dim=2)
    return torch.cat([of_view.flatten(), _wrong_matches(index, token_grids).sum()[None]])


def check_counts(counts: Sequence[int], index: Tensor, token_grids: Sequence[TokenGrid]) -> None:
    """Refuse what `check_matches` refuses, with the figures that `count_rows` has found."""
    if counts[-1]:
        check_matches(index, token_grids)


def _usable(weight: Tensor) -> bool:
    """Check values on the CPU only: on a GPU the host would wait for them in every training step."""
    return weight.device.type != "cpu" or bool(((weight >= 0) & weight.isfinite()).all())


def _nearest_view(correspondence: Correspondence) -> Tensor:
    """Bool [B, V, V, N]: view j has the 3D point nearest to token x among all views other than i."""
    if correspondence.distance is None:
        raise ValueError(
            'correspondence.distance: reduction="released" needs the 3D distances, got None. '
            "Build the correspondence with Correspondence.from_point_maps"
        )
    _check_like_index("correspondence.distance", correspondence.distance, correspondence)
    same_view = torch.eye(correspondence.num_views, dtype=torch.bool, device=correspondence.index.device)
    distance = correspondence.distance.masked_fill(rearrange(same_view, "i j -> 1 i j 1"), torch.inf)
    nearest = distance.argmin(dim=2, keepdim=True)
    return torch.zeros_like(distance, dtype=torch.bool).scatter(2, nearest, value=True)


def _nonzero(total: Tensor) -> Tensor:
    # The mean of nothing is 0, so its divisor may be any number but 0.
    return torch.where(total > 0, total, 1)


def _pair_mask(pairs: str | Tensor, correspondence: Correspondence) -> Tensor | None:
    views, device = correspondence.num_views, correspondence.index.device
    if isinstance(pairs, str):
        if pairs != "all":
            raise unknown_name("pairs", pairs, ["all"])
        return None
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.bool or pairs.shape != (views, views):
        got = f"{pairs.dtype} {list(pairs.shape)}" if isinstance(pairs, Tensor) else type(pairs).__name__
        raise ShapeError("pairs", expected=f'"all" or a bool tensor [V, V] = [{views}, {views}]', got=got)
    return pairs.to(device)


def _check_reference_views(count: int | None, views: int) -> int:
    try:
        return as_integer("num_reference_views", count, least=0, most=views)
    except ValueError:
        raise ValueError(
            f'num_reference_views: reduction="released" needs a number of views, 0 to {views}, got {count!r}'
        ) from None


def _check_like_index(argument: str, tensor: Tensor, correspondence: Correspondence) -> None:
    if tensor.shape != correspondence.index.shape:
        raise ShapeError(
            argument,
            expected=f"[B, V, V, N] = {list(correspondence.index.shape)} as its index",
            got=tensor.shape,
        )


def check_options(normalize: str, reduction: str, softness: float, implementation: str, gelu: str) -> None:
    """Raise `ValueError` for options that `alignment_loss` would refuse, whatever its tensors are.

    Example:
        >>> check_options(normalize="per_view", reduction="mean", softness=-1.0, implementation="auto", gelu="exact")
        Traceback (most recent call last):
        ValueError: softness: expected a finite number of tokens >= 0, got -1.0
    """
    named = {"normalize": normalize, "reduction": reduction, "implementation": implementation, "gelu": gelu}
    for name, value in named.items():
        check_choice(name, value)
    if reduction == "released" and normalize != "per_view":
        raise ValueError('reduction="released" is defined for normalize="per_view" only')
    if not 0 <= softness < math.inf:
        raise ValueError(f"softness: expected a finite number of tokens >= 0, got {softness}")


def check_choice(name: str, value: str) -> None:
    """Raise `ValueError` if `value` is none of the choices of the option `name`."""
    if value not in CHOICES[name]:
        raise unknown_name(name, value, CHOICES[name])
