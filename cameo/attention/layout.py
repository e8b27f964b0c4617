"""What the batch axis and the token axis of an attention call are made of, as an einops-like pattern.

Axes: B samples, V views, h w token grid of a view, K heads, D head dimension, AB attention batch, L tokens
of the call. Folded form [B', K, V, N', D]: B' is B times the groups of views that are kept apart and the grid axes in
the batch part (in the order b, groups, h, w), N' the number of tokens of a view that a query can reach; views with
fewer tokens are padded with zeros. Where the tokens of a view stand for those of another (`own_view_shows`), each such
view is a sample of its own with V = 2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from torch import Tensor

from cameo.attention.folding import fold_matches, fold_tokens, split_matches
from cameo.attention.layouts.axes import check_place, num_positions
from cameo.attention.layouts.axis_lengths import axis_lengths
from cameo.attention.layouts.open_segment import check_open, open_segment, without_open_segment
from cameo.attention.layouts.pattern import RESERVED, Pattern, Segment, read_pair
from cameo.attention.layouts.places import TokenPlaces, view_axes
from cameo.attention.layouts.shape_check import check_shape
from cameo.attention.layouts.view_order import ViewOrder
from cameo.attention.splitting import split_views
from cameo.choices import NORMALIZATIONS
from cameo.errors import as_integer, unknown_name
from cameo.geometry.grids import TokenGrids
from cameo.renamed import old_attributes, old_keywords

if TYPE_CHECKING:
    from cameo.correspondence import Correspondence

__all__ = ["TokenLayout"]

REACH: dict[Segment, str] = {(): "all", ("h",): "row", ("w",): "column", ("h", "w"): "cell"}


@old_attributes
class TokenLayout:
    """Maps between (view, row, column) and the axes of an attention call.

    Example:
        >>> import torch
        >>> layout = TokenLayout("b (v h w)")
        >>> query = torch.zeros(2, 8, 3 * 16 * 16, 64)  # [AB, K, L, D]
        >>> layout.split_query(query, batch=2, token_grids=((16, 16),) * 3).shape
        torch.Size([2, 8, 3, 256, 64])
        >>> TokenLayout("(b h) (v w)").reach
        'row'
        >>> TokenLayout("b (r h c w)", key="b (r h c w + h' w')", r=3, c=2)  # Zero123++
        TokenLayout("b (r h c w)", key="b (r h c w + h' w')", r=3, c=2)
        >>> TokenLayout("(b v) (h w)", own_view_shows=0, references_absent=1)  # Zero-1-to-3
        TokenLayout("(b v) (h w)", own_view_shows=0, references_absent=1)

    A pattern is `<batch part> <token part>`; each part is one axis or a parenthesised product, slowest first.

    - `b` samples; `h`, `w` the token grid; `v` views. Instead of `v`, named tile axes with their lengths as
      keywords: `"b (r h c w)", r=3, c=2` is an image of 3 x 2 tiles, view = 2 * r + c (the query's order).
    - `+` joins segments of the token part. `h' w'` is one more view with a grid of its own, after the others
      in view order. Any other single name stands for tokens of no view, such as text; their number is a keyword, or
      None for one of them: what is left over, which may differ between calls and, where a mask or the lengths of the
      rows tell, between samples.
    - Grid axes in the batch part limit what a query reaches: its row in `(b h) (v w)`, its cell in `(b h w) v`.
    - View axes in the batch part of queries and keys keep views apart: `"(b f) (v h w)", f=8` attends within each of 8
      frames, `"(b v) (f h w)", f=8` within the frames of each camera. `v` is the fastest axis in the view order of the
      correspondence, here view = v * frame + camera, and matches between views that are kept apart are dropped.
    - Queries may hold the views in the batch part: `(b v) (h w)`. Their keys then hold `u`, identical copies,
      one per query view: `(b u) (v h w)`. The first copy is used.

    Args:
        query: pattern of the queries.
        key: pattern of the keys; None is the pattern of the queries.
        unsupervised_views: n; the last n views of the attention are in no correspondence, and are removed.
        references_last: n; the last n views of the attention are the first n of the correspondence, where reference
            views come first. With as many `unsupervised_views`, these views and their matches are removed.
        own_view_shows: view of the correspondence that every view carries in its input channels, as models do that
            concatenate their reference: the keys of a view stand for those of this view too. Supervised are the matches
            with it, each by the attention within the view that they start from; its own queries are not, since each of
            its tokens would match itself. None, the default: keys stand for their own view only.
        references_absent: n; the first n views of the correspondence are not among the views of the attention. Only
            with `own_view_shows`.
        reference_keys: n; the keys hold the first n views of the correspondence alone, the reference views, and the
            queries the others: `TokenLayout("(b v) (h w)", key="(b u) (v h w)", reference_keys=1)`. Supervised are the
            matches from these to the reference views.
        reference_queries: n; the queries hold the n reference views of `reference_keys` as well.
        **lengths: lengths of tile axes and of those that keep views apart, and numbers of tokens that belong to no
            view; one of the latter may be None.

    Raises:
        ValueError: a pattern cannot be read; the message holds the pattern and the reason.
    """

    def __init__(
        self,
        query: str,
        key: str | None = None,
        *,
        unsupervised_views: int = 0,
        references_last: int = 0,
        own_view_shows: int | None = None,
        references_absent: int = 0,
        reference_keys: int = 0,
        reference_queries: int = 0,
        **lengths: int | None,
    ) -> None:
        self.query, self.key = query, query if key is None else key
        order = ViewOrder(
            unsupervised_views, references_last, own_view_shows, references_absent, reference_keys, reference_queries
        )
        for name, length in lengths.items():
            if name in RESERVED:
                raise ValueError(f"{name}={length!r}: batch and token_grids tell how long axis {name} is; leave it out")
        self.lengths = {
            name: None if length is None else as_integer(name, length, least=1) for name, length in lengths.items()
        }
        self._query, self._key = read_pair(
            self.query,
            self.key,
            self.lengths,
            within_views=own_view_shows is not None,
            reference_keys=order.reference_keys,
        )
        check_open(self._query, self._key, self.lengths)
        order.check(self._key)
        self.view_order = dataclasses.replace(order, **self._groups())
        if unused := set(lengths) - self._query.names - self._key.names:
            raise ValueError(f"{self!r}: no axis is called {', '.join(sorted(unused))}")

    def _groups(self) -> dict[str, int]:
        """The groups of views that are kept apart, as attributes of `ViewOrder`."""
        groups = self._key.groups
        if not groups:
            return {}
        named = groups if groups != ("v",) else self._key.views
        return {
            "group_count" if named is groups else "group_size": math.prod(self.lengths[name] or 1 for name in named)
        }

    def __repr__(self) -> str:
        """Show the call that builds this layout."""
        settings = [f'"{self.query}"']
        settings += [f'key="{self.key}"'] if self.key != self.query else []
        settings += [f"{name}={value}" for name, value in (self.view_order.settings() | self.lengths).items()]
        return f"TokenLayout({', '.join(settings)})"

    def __eq__(self, other: object) -> bool:
        """Two layouts are equal if the same settings build them."""
        return isinstance(other, TokenLayout) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))

    def to_dict(self) -> dict[str, str | int | None]:
        """Return the settings as plain values: `TokenLayout(**layout.to_dict()) == layout`.

        Example:
            >>> TokenLayout("b (t + v h w)", t=77).to_dict()
            {'query': 'b (t + v h w)', 'key': 'b (t + v h w)', 'unsupervised_views': 0, 'references_last': 0, 't': 77}
        """
        patterns: dict[str, str | int | None] = {"query": self.query, "key": self.key}
        counts = {"unsupervised_views": 0, "references_last": 0, **self.view_order.settings()}
        return patterns | counts | dict(sorted(self.lengths.items()))

    @property
    def unsupervised_views(self) -> int:
        """How many of the last views of the attention are not supervised."""
        return self.view_order.unsupervised_views

    @property
    def references_last(self) -> int:
        """How many of the last views of the attention are the first of the correspondence."""
        return self.view_order.references_last

    @property
    def own_view_shows(self) -> int | None:
        """The view of the correspondence that every view shows in its own tokens, or None."""
        return self.view_order.own_view_shows

    @property
    def within_views(self) -> bool:
        """Whether a query sees the keys of its own view only; possible with `own_view_shows` alone."""
        return any(name in self._key.batch for name in self._key.views)

    @property
    def reference_keys(self) -> int:
        """How many views of the correspondence, the first ones, the keys hold alone; 0 where they hold all."""
        return self.view_order.reference_keys

    @property
    def folds_nothing(self) -> bool:
        """Whether samples alone are in the batch parts, so that a row of the attention is a sample."""
        return self._query.batch == self._key.batch == ("b",)

    @property
    def text_before_views(self) -> bool:
        """Whether the tokens whose number is open stand before those of the views."""
        segment = open_segment(self._key, self.lengths)
        return segment is not None and self._key.segments.index(segment) < self._key.segments.index(self._key.main)

    @property
    def reach(self) -> str:
        """What a query sees of each view: "all", its "row", its "column" or its "cell"."""
        return REACH[self._key.folded]

    @old_keywords
    def refusal(self, normalize: str, num_views: int | None = None, reduction: str = "mean") -> str | None:
        """Return why this attention cannot be supervised with these options of the loss, or None if it can.

        Example:
            >>> TokenLayout("(b h w) v").refusal("per_view")
            'a query reaches one token per view, so a softmax per view is constant; use normalize="all_views"'
            >>> TokenLayout("(b h w) v").refusal("all_views") is None
            True
        """
        if normalize not in NORMALIZATIONS:
            raise unknown_name("normalize", normalize, NORMALIZATIONS)
        return self.view_order.unsupervised(self.reach, normalize, num_views, reduction)

    @old_keywords
    def shape(self, of: str, *, batch: int, token_grids: TokenGrids) -> tuple[int, int]:
        """Return attention batch and number of tokens (AB, L) of a call, without tokens whose number is open.

        `of` is "query" or "key".

        Example:
            >>> TokenLayout("(b h) (v w)").shape("key", batch=2, token_grids=((16, 24),) * 6)
            (32, 144)
        """
        pattern, lengths = self.pattern(of), self._lengths(of, batch, token_grids)
        tokens = sum(num_positions(segment, lengths) for segment in pattern.segments)
        return num_positions(pattern.batch, lengths), tokens

    def views_with_own_grid(self, num_views: int) -> list[int]:
        """List the views, in correspondence order, whose tokens are a segment of their own.

        Example:
            >>> TokenLayout("b (v h w + h' w')").views_with_own_grid(5)
            [4]
        """
        first = num_views - len(self._key.extra) + self.references_last
        return sorted(view % num_views for view in range(first, first + len(self._key.extra)))

    @old_keywords
    def split_query(
        self, tensor: Tensor, *, batch: int, token_grids: TokenGrids, lengths: Tensor | None = None
    ) -> Tensor:
        """Bring queries [AB, K, L, D] to [B', K, V, N', D]; views without queries are zeros.

        With `own_view_shows` both views of a sample hold the tokens of the view that it is about.

        Example:
            >>> import torch
            >>> layout = TokenLayout("(b v h) w", key="(b u h) (v w)")  # MV-Adapter
            >>> layout.split_query(torch.zeros(2 * 6 * 16, 8, 24, 64), batch=2, token_grids=((16, 24),) * 6).shape
            torch.Size([32, 8, 6, 24, 64])

        Args:
            tensor: [AB, K, L, D] as the kernel receives it.
            batch: B, number of samples.
            token_grids: token grid (h, w) of each view, as `Correspondence.token_grids`.
            lengths: [AB], how many of the L tokens of each row are no padding at its end; None for all.

        Raises:
            ShapeError: AB or L does not fit the pattern; the message holds the expected numbers and the cure.
            ValueError: the token grids do not fit the pattern.
        """
        return self._split("query", tensor, batch, token_grids, lengths)

    @old_keywords
    def split_key(
        self, tensor: Tensor, *, batch: int, token_grids: TokenGrids, lengths: Tensor | None = None
    ) -> Tensor:
        """Bring keys [AB, K, L, D] to [B', K, V, N', D]; arguments and errors as `split_query`.

        Example:
            >>> import torch
            >>> layout = TokenLayout("(b v h) w", key="(b u h) (v w)")  # MV-Adapter
            >>> layout.split_key(torch.zeros(2 * 6 * 16, 8, 6 * 24, 64), batch=2, token_grids=((16, 24),) * 6).shape
            torch.Size([32, 8, 6, 24, 64])
        """
        return self._split("key", tensor, batch, token_grids, lengths)

    def localize(self, correspondence: Correspondence) -> Correspondence:
        """Express a correspondence in the folded form, without matches out of reach and of views without queries.

        Example:
            >>> import torch
            >>> from cameo import Correspondence
            >>> index = torch.full((1, 2, 2, 4), -1)
            >>> index[0, 0, 1] = torch.tensor([1, 0, 0, 3])  # token 2 (row 1) matches token 0 (row 0)
            >>> match = Correspondence(index=index, token_grids=((2, 2), (2, 2)))
            >>> rows = TokenLayout("(b h) (v w)").localize(match)
            >>> rows.index[:, 0, 1].tolist(), rows.token_grids
            ([[1, 0], [-1, 1]], ((1, 2), (1, 2)))
        """
        token_grids = correspondence.token_grids
        for of in ("query", "key"):
            self._lengths(of, correspondence.batch_size, token_grids)
        if self.view_order.samples(len(token_grids)) is not None:
            correspondence = split_matches(correspondence, self.view_order)
        elif removed := self.view_order.removed:
            correspondence = correspondence.take_views(range(removed, len(token_grids)))
        views, axes = len(token_grids), {"query": 1, "key": 2}
        if missing := [(axis, view) for of, axis in axes.items() for view in self._missing_views(of, views)]:
            index = correspondence.index.clone()
            for axis, view in missing:  # one by one: a GPU would wait for the copy of a list
                index.select(axis, view).fill_(-1)
            correspondence = dataclasses.replace(correspondence, index=index)
        return fold_matches(correspondence, self.reach)

    def localize_tokens(self, values: Tensor, token_grids: TokenGrids) -> Tensor:
        """Bring values of the tokens `[B, V, N, C]` to `[B', V', N', C]`, for the samples and views of `localize`.

        Example:
            >>> import torch
            >>> TokenLayout("(b h) (v w)").localize_tokens(torch.zeros(2, 3, 24, 7), ((4, 6),) * 3).shape
            torch.Size([8, 3, 6, 7])
        """
        supervised = token_grids[self.view_order.removed :]
        tokens = max(height * width for height, width in supervised)
        return fold_tokens(self.view_order.take_views(values)[:, :, :tokens], self.reach, supervised[-1])

    @old_keywords
    def locate(
        self, view: int, row: int, col: int, *, batch_index: int, batch: int, token_grids: TokenGrids,
        of: str = "query", tokens: int | None = None,
    ) -> tuple[int, int]:  # fmt: skip
        """Return the position (attention batch index, token index) of one token of a view; of keys in their first copy.

        Example:
            >>> layout = TokenLayout("b (r h c w)", r=3, c=2)
            >>> layout.locate(3, 1, 2, batch_index=0, batch=1, token_grids=((20, 20),) * 6)  # tile row 1, column 1
            (0, 862)

        Raises:
            ValueError: the place is outside the batch, the views or the grid, the view has no queries, or `tokens`, the
                L of the call, is not given where the number of tokens before the views is open.
        """
        places = self._places(of, batch, token_grids).of_call(self.lengths, tokens)
        check_place("batch_index", batch_index, batch)
        check_place("view", view, len(token_grids))
        check_place("row", row, token_grids[view][0])
        check_place("col", col, token_grids[view][1])
        if view in self._missing_views(of, len(token_grids)):
            side, text = ("queries", self.query) if of == "query" else ("keys", self.key)
            raise ValueError(f'view: view {view} has no {side} in "{text}"')
        if view < self.view_order.references_absent:
            raise ValueError(f"view: view {view} is not in the attention: {self!r}")
        return places.position(view, {"b": batch_index, "u": 0, "h": row, "w": col})

    def places(self, of: str, *, batch: int, token_grids: TokenGrids, tokens: int | None = None) -> Tensor:
        """Return sample, view, row and column of every position of a call, [AB, L, 4]; -1 for tokens of no view.

        The inverse of `locate`, with every copy of the keys; the views are those of the correspondence. `tokens` is L,
        where the number of text tokens is open.

        Example:
            >>> layout = TokenLayout("b (t + v h w)", t=1)
            >>> layout.places("query", batch=1, token_grids=((1, 2), (1, 2)))[0].tolist()
            [[-1, -1, -1, -1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 1]]
        """
        missing, views = self._missing_views(of, len(token_grids)), range(len(token_grids))
        held = [view for view in views[self.view_order.references_absent :] if view not in missing]
        return self._places(of, batch, token_grids).of_call(self.lengths, tokens).all(held)

    def pattern(self, of: str) -> Pattern:
        """Return the parsed pattern; `of` is "query" or "key"."""
        if of not in ("query", "key"):
            raise unknown_name("of", of, ["query", "key"])
        return self._query if of == "query" else self._key

    def _places(self, of: str, batch: int, token_grids: TokenGrids) -> TokenPlaces:
        # Keys that hold the same views have them in the order of the queries.
        axes = view_axes(self._key if self.reference_keys and of == "key" else self._query)
        lengths = self._lengths(of, batch, token_grids)
        return TokenPlaces(of, self.pattern(of), axes, self._key.extra, self.view_order, lengths, token_grids)

    def _missing_views(self, of: str, num_views: int) -> list[int]:
        """Return the views of the correspondence that have no queries or no keys, but the other."""
        if self.reference_keys:
            return sorted(set(range(num_views)) - set(self.view_order.attended(num_views, of)))
        extra = enumerate(self._key.extra, start=num_views - len(self._key.extra) + self.references_last)
        return [view % num_views for view, segment in extra if segment not in self.pattern(of).segments]

    def _lengths(self, of: str, batch: int, token_grids: TokenGrids) -> dict[str, int]:
        """Return the length of every axis for this batch and these token grids, 0 for the one that is open."""
        given = (repr(self), self._query, self._key, self.lengths, self.view_order)
        return axis_lengths(*given, of=of, batch=batch, token_grids=token_grids)

    def _split(
        self, of: str, tensor: Tensor, batch: int, token_grids: TokenGrids, rows: Tensor | None = None
    ) -> Tensor:
        pattern, places = self.pattern(of), self._places(of, batch, token_grids)
        expected = self.shape(of, batch=batch, token_grids=token_grids)
        if (segment := open_segment(pattern, self.lengths)) is not None:
            tensor = without_open_segment(tensor, pattern, segment, places.lengths, rows)
        check_shape(of, tensor, expected, pattern.text, batch=batch, token_grids=token_grids)
        return split_views(tensor, places)
