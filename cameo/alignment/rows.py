"""Which queries the alignment loss supervises, and in which portions they are computed.

A row is one softmax: a query token and the keys that it is compared with. Rows with the same keys form a group.
A portion, the class `Rows`, is computed at once: some rows of one large group, or several small groups side by side.

Axes: B samples, V views, N tokens per view, L = V * N tokens of a sample, G groups, R rows of a group, M keys of a
group, T targets of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cameo.alignment.supervision import Window, count_rows
from cameo.geometry.grids import TokenGrid
from cameo.memory import sent_to

__all__ = ["Rows", "plan_rows"]

Ranges = tuple[tuple[int, int], ...]

# Groups that fill at most this share of a portion are computed side by side: on a CPU, and where each operator is a
# launch.
SMALL_GROUP = {"cpu": 0.25}
SMALL_GROUP_ON_DEVICE = 0.5
# Targets and their weights are computed for portions of together about so many rows times targets at once.
TARGETS_AT_ONCE = 1 << 20
# A portion of a large group has at least this many rows, or reading its keys would take longer than the products.
LEAST_ROWS = 32


@dataclass(frozen=True)
class Rows:
    """A portion: rows of G groups, and the keys of each group.

    - `samples`: the sample of each group.
    - `ranges`: for each group the ranges `(start, stop)` of its keys among the L tokens of the sample; the columns
      `0..M-1` are these ranges in order. All groups have the same M; if G > 1, each has all of its rows here.
    - `queries`: `[G, R]`, the query's position among the tokens of the sample. Groups with fewer than R rows are padded
      with their last row, whose weights are then all 0.
    - `targets`, `weights`: `[G, R, T]`, the column of each target and its weight; 0 = no target.
    - `excluded`: `[G, R, 2]`, the half-open range of columns that a row does not see, those of its own view; None where
      every row sees every column.
    - `most_pairs`: number of query-key pairs of the largest portion of the plan, with the padding: with a buffer of
      that size from the start, none is replaced by a larger one while it is held.
    - `slots`, `first`: `[B, C, L]`, the row of each query and each of its C softmaxes, numbered over many portions; -1
      for none. `first` is the number of the first row here; the others follow group by group, with the padding. None
      unless the rows are numbered.
    - `sample_index`, `key_index`: if G > 1, `[G, 1]` and `[G, M]`, sample and position of each key on the device.
    """

    samples: tuple[int, ...]
    ranges: tuple[Ranges, ...]
    queries: Tensor
    targets: Tensor
    weights: Tensor
    most_pairs: int
    slots: Tensor | None
    first: int
    excluded: Tensor | None = None
    sample_index: Tensor | None = None
    key_index: Tensor | None = None

    @property
    def keys(self) -> int:
        """M."""
        return _length(self.ranges[0])


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
    numbered: bool = False,
    counts: Sequence[int] = (),
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
        numbered: whether the rows are numbered, for a kernel that looks for those of each query, see `Rows`.
        counts: what `count_rows` returned; empty: it is called here, and the host waits for it.
    """
    counts = counts or count_rows(index, weights, token_grids, normalize).tolist()
    share = SMALL_GROUP.get(index.device.type, SMALL_GROUP_ON_DEVICE)
    groups = _groups_per_view if normalize == "per_view" else _groups_all_views
    portions: list[list[_Group]] = []
    waiting: list[_Group] = []
    longest = 0
    for group in groups(counts[:-1], index.shape, token_grids, share * pairs):
        small = not group.shares_keys and group.rows * group.keys <= share * pairs
        longest = max(longest, group.rows) if waiting else group.rows
        if waiting:
            count = len(waiting) + 1
            full = count * longest * group.keys > pairs or count * max(longest, group.keys) > most_tokens
            if not small or full or group.keys != waiting[0].keys:
                portions.append(waiting)
                waiting, longest = [], group.rows
        if small:
            waiting.append(group)
            continue
        count = max(pairs // group.keys, min(LEAST_ROWS, most_pairs // group.keys))
        count = max(1, min(count, most_tokens))
        portions += [[group.cut(start, start + count)] for start in range(0, group.rows, count)]
    if waiting:
        portions.append(waiting)
    return _on_device(portions, index, weights, token_grids, normalize, softness, numbered)


@dataclass(frozen=True)
class _Group:
    """All rows with the same keys, or some of them.

    - `sample`, `ranges`: as in `Rows`.
    - `first`, `rows`: the first of its rows among all supervised ones, and their number.
    - `without`: the view that has no keys here, None for none.
    - `shares_keys`: whether another group of the same sample has some of the same keys.
    """

    sample: int
    ranges: Ranges
    first: int
    rows: int
    without: int | None = None
    shares_keys: bool = False

    @property
    def keys(self) -> int:
        return _length(self.ranges)

    def cut(self, start: int, stop: int) -> _Group:
        return replace(self, first=self.first + start, rows=min(stop, self.rows) - start)


def _length(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def _groups_per_view(
    counts: Sequence[int], shape: Sequence[int], token_grids: Sequence[TokenGrid], small: float
) -> Iterator[_Group]:
    """All supervised queries of a sample against one key view."""
    _, views, _, tokens = shape
    first = 0
    for group, count in enumerate(counts):
        sample, view = divmod(group, views)
        if count:
            keys = (view * tokens, view * tokens + math.prod(token_grids[view]))
            yield _Group(sample, (keys,), first, count)
        first += count


def _groups_all_views(
    counts: Sequence[int], shape: Sequence[int], token_grids: Sequence[TokenGrid], small: float
) -> Iterator[_Group]:
    """All supervised queries of a view against the keys of all other views.

    All supervised queries of a small sample are one group with the keys of all views; each row excludes the columns of
    its own view.
    """
    batch, views, _, tokens = shape
    lengths = [math.prod(grid) for grid in token_grids]
    of_all = _joined(lengths, tokens, without=None)
    of_others = [_joined(lengths, tokens, without=view) for view in range(views)]
    first = 0
    for sample in range(batch):
        of_views = counts[sample * views : (sample + 1) * views]
        if 0 < sum(of_views) * sum(lengths) <= small:
            yield _Group(sample, of_all, first, sum(of_views))
            first += sum(of_views)
            continue
        for view, count in enumerate(of_views):
            if count:
                yield _Group(sample, of_others[view], first, count, without=view, shares_keys=True)
            first += count


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


def _on_device(
    portions: list[list[_Group]],
    index: Tensor,
    weights: Tensor,
    token_grids: Sequence[TokenGrid],
    normalize: str,
    softness: float,
    numbered: bool,
) -> Iterator[Rows]:
    """Bring portions to the device, many at once, for which the host waits nowhere."""
    if not portions:
        return
    window = Window(token_grids, softness)
    supervised = (_Matches if normalize == "per_view" else _MatchesOfAll)(index, weights, token_grids)
    most_pairs = max(_padded(portion) * portion[0].keys for portion in portions)
    start = total = 0
    for stop, portion in enumerate(portions, start=1):
        total += _padded(portion) * supervised.targets * len(window.offsets)
        if stop == len(portions) or total > TARGETS_AT_ONCE:
            yield from supervised.rows(portions[start:stop], window, most_pairs, numbered)
            start, total = stop, 0


def _padded(portion: list[_Group]) -> int:
    """G * R."""
    return len(portion) * max(group.rows for group in portion)


class _Matches:
    """The matches with a weight, on the device: of each sample and key view, one target in a row.

    Attributes:
        targets: T before the matches are spread.
    """

    def __init__(self, index: Tensor, weights: Tensor, token_grids: Sequence[TokenGrid]) -> None:
        self.batch, self.views, _, self.length = index.shape
        self.device, self.token_grids = index.device, token_grids
        self.tokens, self.weights = self.arranged(index), self.arranged(weights)
        self.targets = self.tokens.shape[1]
        # The positions of all rows with a weight, in order. No shape depends on values, so the host need not wait.
        supervised = (self.weights != 0).any(dim=1) if self.targets > 1 else self.weights[:, 0] != 0
        place = supervised.cumsum(0) * supervised  # counted from 1; the others share 0
        self.order = place.new_zeros(len(place) + 1).scatter_(0, place, torch.arange(len(place), device=self.device))[
            1:
        ]

    def rows(self, portions: list[list[_Group]], window: Window, most_pairs: int, numbered: bool) -> Iterator[Rows]:
        """Gather the rows of some portions, and spread their matches."""
        several = [portion for portion in portions if len(portion) > 1]
        sent = sent_to(self.device, torch.cat([*map(_samples_and_keys, several), torch.zeros(0, dtype=torch.int64)]))
        position, kept = self.positions(portions)
        weight = self.weights[position]
        if kept is not None:
            weight = weight.masked_fill(~kept[:, None], 0)
        targets, weight, excluded = self.columns(portions, position, weight, window)
        queries = position % (self.views * self.length)
        slots = self.slots(position, kept) if numbered else None
        at = sent_at = 0
        for portion in portions:
            groups, keys, count = len(portion), portion[0].keys, _padded(portion)
            part, shape = slice(at, at := at + count), (groups, count // groups)
            samples = key_index = None
            if groups > 1:
                samples, key_index = sent[sent_at : (sent_at := sent_at + groups * (1 + keys))].split(
                    [groups, groups * keys]
                )
                samples, key_index = samples[:, None], key_index.view(groups, keys)
            yield Rows(
                tuple(group.sample for group in portion),
                tuple(group.ranges for group in portion),
                queries[part].view(shape),
                targets[part].unflatten(0, shape),
                weight[part].unflatten(0, shape),
                most_pairs,
                slots,
                part.start,
                None if excluded is None or portion[0].without is not None else excluded[part].unflatten(0, shape),
                samples,
                key_index,
            )

    def positions(self, portions: list[list[_Group]]) -> tuple[Tensor, Tensor | None]:
        """Position of each row, and which rows are no padding; None where none is."""
        numbers, kept = [], []
        for portion in portions:
            first, rows = torch.tensor([(group.first, group.rows) for group in portion]).unbind(1)
            offset = torch.arange(int(rows.max()))
            kept.append((offset < rows[:, None]).flatten())
            numbers.append((first[:, None] + offset.minimum(rows[:, None] - 1)).flatten())
        if all(bool(part.all()) for part in kept):  # the groups follow each other
            start = portions[0][0].first
            return self.order[start : start + sum(map(len, numbers))], None
        return self.order[sent_to(self.device, torch.cat(numbers))], sent_to(self.device, torch.cat(kept))

    def slots(self, position: Tensor, kept: Tensor | None) -> Tensor:
        """Numbers of the rows at these positions, see `Rows`."""
        # Padding repeats a row, and goes to the place behind the last one.
        place = position if kept is None else position.where(kept, len(self.order))
        found = self.order.new_full((len(self.order) + 1,), -1)
        found.scatter_(0, place, torch.arange(len(place), device=self.device))
        return found[:-1].view(self.batch, -1, self.views * self.length)

    def arranged(self, values: Tensor) -> Tensor:
        """Values `[B, V, V, N]` as `[rows, T]`, the rows of a group side by side."""
        return values.transpose(1, 2).reshape(-1, 1)

    def columns(
        self, portions: list[list[_Group]], position: Tensor, weight: Tensor, window: Window
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Columns and weights of the targets `[rows, T * S]`, and the columns that a row does not see `[rows, 2]`."""
        tokens = self.tokens[position]
        if len(window.offsets) > 1:
            views = (position // (self.views * self.length) % self.views)[:, None]
            _, tokens, weight = window.spread(views, tokens, weight)
        return tokens, weight, None


class _MatchesOfAll(_Matches):
    """The same for one softmax over all other views: of each sample and query view, a target in each view."""

    def arranged(self, values: Tensor) -> Tensor:
        return values.transpose(2, 3).reshape(-1, self.views)

    def columns(
        self, portions: list[list[_Group]], position: Tensor, weight: Tensor, window: Window
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        views = torch.arange(self.views, device=self.device).expand_as(weight)
        views, tokens, weight = window.spread(views, self.tokens[position].clamp(min=0), weight)
        # First column of each view among the keys of all views, and, for each view left out, among those of the others.
        lengths = torch.tensor([math.prod(grid) for grid in self.token_grids])
        of_all = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        of_others = of_all[:-1] - lengths[:, None] * torch.ones(self.views, self.views, dtype=torch.int64).triu(1)
        first_column = sent_to(self.device, torch.cat([of_all[None, :-1], of_others]))
        kinds = [0 if portion[0].without is None else portion[0].without + 1 for portion in portions]
        kind = torch.tensor(kinds).repeat_interleave(torch.tensor([_padded(portion) for portion in portions]))
        columns = first_column[sent_to(self.device, kind)[:, None], views] + tokens
        excluded = None
        if 0 in kinds:
            ends = sent_to(self.device, torch.stack([of_all[:-1], of_all[1:]], dim=1))
            excluded = ends[position // self.length % self.views]
        # Without a weight a target has no meaning, but its column must exist.
        return torch.where(weight > 0, columns, 0), weight, excluded


def _samples_and_keys(portion: list[_Group]) -> Tensor:
    """Samples `[G]` of several groups side by side, and the position of each of their keys `[G, M]`, in one row."""
    starts = torch.tensor([[start for start, _ in group.ranges] for group in portion])
    offsets = [torch.arange(stop - start) for start, stop in portion[0].ranges]
    positions = torch.cat([starts[:, place, None] + offset for place, offset in enumerate(offsets)], dim=1)
    return torch.cat([torch.tensor([group.sample for group in portion]), positions.flatten()])
