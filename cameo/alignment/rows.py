"""Which queries the alignment loss supervises, and in which portions they are computed.

A row is one softmax: a query token and the keys that it is compared with. Rows with the same keys form a group.
A portion, the class `Rows`, is computed at once: some rows of one large group, or several small groups side by side.

Axes: B samples, V views, N tokens per view, L = V * N tokens of a sample, G groups, R rows of a group, M keys of a
group, T targets of a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cameo.geometry.grids import TokenGrid

__all__ = ["Rows", "Window", "check_matches", "plan_rows"]

Ranges = tuple[tuple[int, int], ...]

# The Gaussian of soft targets is cut off at this many standard deviations.
CUTOFF = 3
# Groups that fill at most this share of a portion are computed side by side.
SMALL_GROUP = 0.25
# A portion of a large group has at least this many rows, or reading its keys would take longer than the products.
LEAST_ROWS = 32


@dataclass(frozen=True)
class Rows:
    """A portion: rows of G groups, and the keys of each group.

    - `samples`: the sample of each group.
    - `ranges`: for each group the ranges `(start, stop)` of its keys among the L tokens of the sample; the columns
      `0..M-1` are these ranges in order. All groups have the same M; if G > 1, each has all of its rows here.
    - `queries`: `[G, R]`, the query's position among the tokens of the sample. Groups with fewer than R rows are padded
      with rows whose weights are all 0.
    - `targets`, `weights`: `[G, R, T]`, the column of each target and its weight; 0 = no target.
    - `excluded`: `[G, R, 2]`, the half-open range of columns that a row does not see, those of its own view; None where
      every row sees every column.
    """

    samples: tuple[int, ...]
    ranges: tuple[Ranges, ...]
    queries: Tensor
    targets: Tensor
    weights: Tensor
    excluded: Tensor | None = None

    @property
    def keys(self) -> int:
        """M."""
        return sum(stop - start for start, stop in self.ranges[0])


def check_matches(index: Tensor, token_grids: Sequence[TokenGrid]) -> None:
    """Refuse a match outside its view's token grid; `Correspondence` itself reads values on the CPU only.

    Args:
        index: int64 `[B, V, V, N]`, as in `cameo.Correspondence`.
        token_grids: token grid `(h, w)` of each view.

    Raises:
        ValueError: the message names the match.
    """
    lengths = torch.tensor([height * width for height, width in token_grids], device=index.device)
    same_view = torch.eye(len(token_grids), dtype=torch.bool, device=index.device)
    token = torch.arange(index.shape[3], device=index.device)
    no_pair = rearrange(same_view, "i j -> 1 i j 1") | (token >= rearrange(lengths, "i -> 1 i 1 1"))
    limit = rearrange(lengths, "j -> 1 1 j 1").masked_fill(no_pair, 0)
    wrong = (index >= limit) & (index >= 0) | (index < -1)
    if bool(wrong.any()):
        b, i, j, x = torch.nonzero(wrong)[0].tolist()
        raise ValueError(
            f"correspondence.index[{b}, {i}, {j}, {x}]: expected -1, or a token of view {j} with grid "
            f"{token_grids[j]} for a token of another view {i} with grid {token_grids[i]}, got "
            f"{index[b, i, j, x].item()}. "
            "Build the correspondence with token_grid=model.token_grid(height, width)"
        )


def plan_rows(
    index: Tensor,
    weights: Tensor,
    token_grids: Sequence[TokenGrid],
    *,
    normalize: str,
    softness: float,
    pairs: int,
    most_pairs: int,
    most_tokens: int,
) -> Iterator[Rows]:
    """Cut the supervised queries into portions of about `pairs` query-key pairs.

    A portion of a large group has at least 32 rows unless these exceed `most_pairs`, and always at least one.

    Args:
        index: int64 `[B, V, V, N]`, as in `cameo.Correspondence`.
        weights: `[B, V, V, N]`, weight of each match; 0 = not supervised.
        token_grids: token grid `(h, w)` of each view.
        normalize: "per_view": the keys of a row are those of one other view. "all_views": of all others.
        softness: standard deviation in tokens of the Gaussian around each match, see `Window`.
        pairs: number of query-key pairs that a portion should have.
        most_pairs: number of query-key pairs that a portion may have, unless a single row has more.
        most_tokens: number of rows that a portion may have, and of keys of several groups side by side.
    """
    window = Window(token_grids, softness, index.device)
    groups = _groups_per_view if normalize == "per_view" else _groups_all_views
    waiting: list[_Group] = []
    longest = 0
    for group in groups(index, weights, token_grids, pairs):
        small = not group.shares_keys and len(group.queries) * group.keys <= SMALL_GROUP * pairs
        longest = max(longest, len(group.queries)) if waiting else len(group.queries)
        if waiting:
            count = len(waiting) + 1
            full = count * longest * group.keys > pairs or count * max(longest, group.keys) > most_tokens
            if not small or full or group.keys != waiting[0].keys:
                yield _side_by_side(waiting, window)
                waiting, longest = [], len(group.queries)
        if small:
            waiting.append(group)
            continue
        count = max(pairs // group.keys, min(LEAST_ROWS, most_pairs // group.keys))
        count = max(1, min(count, most_tokens))
        for start in range(0, len(group.queries), count):
            yield _side_by_side([group.cut(start, start + count)], window)
    if waiting:
        yield _side_by_side(waiting, window)


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
        device: of the matches.
    """

    def __init__(self, token_grids: Sequence[TokenGrid], softness: float, device: torch.device | str = "cpu") -> None:
        self.softness = softness
        self.grids = torch.tensor(token_grids, device=device)
        reach = min(math.floor(CUTOFF * softness), max(itertools.chain(*token_grids)) - 1)
        offsets = [
            (down, right)
            for down, right in itertools.product(range(-reach, reach + 1), repeat=2)
            if down**2 + right**2 <= (CUTOFF * softness) ** 2
        ]
        self.offsets = torch.tensor(offsets, device=device)

    def spread(self, views: Tensor, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turn the views, tokens and weights `[..., T]` of matches into those of soft targets, `[..., T * S]`.

        S is the number of tokens in the window; the weight of a token outside the grid is 0.
        """
        if len(self.offsets) == 1:
            return views, tokens, weights
        down, right = self.offsets.unbind(-1)
        height, width = self.grids[views].unsqueeze(-2).unbind(-1)
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


@dataclass(frozen=True)
class _Group:
    """All rows with the same keys.

    - `sample`, `ranges`: as in `Rows`.
    - `first_column`: `[V]`, the column of each view's first token.
    - `queries`: `[R]`, as in `Rows`.
    - `views`, `tokens`, `weights`: `[R, T]`, view, token and weight of each match.
    - `excluded`: `[R, 2]`, as in `Rows`.
    - `shares_keys`: whether another group of the same sample has some of the same keys.
    """

    sample: int
    ranges: Ranges
    first_column: Tensor
    queries: Tensor
    views: Tensor
    tokens: Tensor
    weights: Tensor
    excluded: Tensor | None = None
    shares_keys: bool = False

    @property
    def keys(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def cut(self, start: int, stop: int) -> _Group:
        rows = {name: getattr(self, name)[start:stop] for name in ("queries", "views", "tokens", "weights")}
        return replace(self, **rows, excluded=None if self.excluded is None else self.excluded[start:stop])


def _groups_per_view(index: Tensor, weights: Tensor, token_grids: Sequence[TokenGrid], pairs: int) -> Iterator[_Group]:
    """All supervised queries of a sample against one key view."""
    _, views, _, tokens = index.shape
    by_key_view = weights.transpose(1, 2)
    b, j, i, x = by_key_view.nonzero(as_tuple=True)
    counts = torch.bincount(b * views + j, minlength=index.shape[0] * views).tolist()
    first_column = torch.zeros(views, dtype=torch.int64, device=index.device)
    query, token, weight = i * tokens + x, index[b, i, j, x], weights[b, i, j, x]
    stop = 0
    for group, count in enumerate(counts):
        if not count:
            continue
        start, stop = stop, stop + count
        sample, view = divmod(group, views)
        keys = (view * tokens, view * tokens + token_grids[view][0] * token_grids[view][1])
        rows, matches = slice(start, stop), (slice(start, stop), None)
        yield _Group(sample, (keys,), first_column, query[rows], j[matches], token[matches], weight[matches])


def _groups_all_views(index: Tensor, weights: Tensor, token_grids: Sequence[TokenGrid], pairs: int) -> Iterator[_Group]:
    """All supervised queries of a view against the keys of all other views.

    All supervised queries of a small sample are one group with the keys of all views; each row excludes the columns of
    its own view.
    """
    batch, views, _, tokens = index.shape
    lengths = [height * width for height, width in token_grids]
    b, i, x = weights.any(dim=2).nonzero(as_tuple=True)
    counts = torch.bincount(b * views + i, minlength=batch * views).view(batch, views).tolist()
    query, token, weight = i * tokens + x, index[b, i, :, x].clamp(min=0), weights[b, i, :, x]
    view = torch.arange(views, device=index.device).expand_as(token)
    # First column of each view among the keys of all views, and, for each view left out, among those of the others.
    columns_of_all = torch.tensor(list(itertools.accumulate(lengths, initial=0)), device=index.device)
    columns_of_others = columns_of_all[:-1] - torch.tensor(lengths, device=index.device)[:, None] * torch.ones(
        views, views, dtype=torch.int64, device=index.device
    ).triu(1)
    excluded = columns_of_all[i[:, None] + torch.arange(2, device=index.device)]
    stop = 0
    for sample, of_views in enumerate(counts):
        if 0 < sum(of_views) * sum(lengths) <= SMALL_GROUP * pairs:
            start, stop = stop, stop + sum(of_views)
            rows = slice(start, stop)
            ranges = _joined(lengths, tokens, without=None)
            group = _Group(sample, ranges, columns_of_all[:-1], query[rows], view[rows], token[rows], weight[rows])
            yield replace(group, excluded=excluded[rows])
            continue
        for of_view, count in enumerate(of_views):
            if not count:
                continue
            start, stop = stop, stop + count
            rows = slice(start, stop)
            ranges = _joined(lengths, tokens, without=of_view)
            first_column = columns_of_others[of_view]
            group = _Group(sample, ranges, first_column, query[rows], view[rows], token[rows], weight[rows])
            yield replace(group, shares_keys=True)


def _joined(lengths: list[int], tokens: int, without: int | None) -> Ranges:
    """Ranges of the tokens of all views except `without`; ranges without padding between them are joined."""
    ranges: list[tuple[int, int]] = []
    for view, length in enumerate(lengths):
        if view == without:
            continue
        start = view * tokens
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, view * tokens + length))
    return tuple(ranges)


def _side_by_side(groups: list[_Group], window: Window) -> Rows:
    """Bring groups into one portion; shorter ones are padded with zeros."""

    def stack(parts: list[Tensor]) -> Tensor:
        return parts[0][None] if len(parts) == 1 else pad_sequence(parts, batch_first=True)

    targets, weights = [], []
    for group in groups:
        views, tokens, weight = window.spread(group.views, group.tokens, group.weights)
        # Without a weight a target has no meaning, but its column must exist.
        targets.append(torch.where(weight > 0, group.first_column[views] + tokens, 0))
        weights.append(weight)
    return Rows(
        tuple(group.sample for group in groups),
        tuple(group.ranges for group in groups),
        stack([group.queries for group in groups]),
        stack(targets),
        stack(weights),
        None if groups[0].excluded is None else stack([g.excluded for g in groups if g.excluded is not None]),
    )
