"""What the batch axis and the token axis of an attention call are made of, as an einops-like pattern.

Axes: B samples, V views, h w token grid of a view, K heads, D head dimension, AB attention batch, L tokens
of the call. Folded form [B', K, V, N', D]: B' is B times the grid axes in the batch part (in the order b, h, w),
N' the number of tokens of a view that a query can reach; views with fewer tokens are padded with zeros. Where the
tokens of a view stand for those of another (`own_view_shows`), each such view is a sample of its own with V = 2.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cameo.attention.axes import check_place, first_position, num_positions, position_of, take_segment
from cameo.attention.axis_lengths import axis_lengths
from cameo.attention.folding import fold_matches, fold_tokens, pair_matches, pair_own_tokens
from cameo.attention.open_segment import check_open, open_length, open_segment, without_open_segment
from cameo.attention.pattern import RESERVED, Pattern, Segment, check_pair
from cameo.attention.shape_check import check_shape
from cameo.attention.view_order import ViewOrder
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
        **lengths: lengths of tile axes, and numbers of tokens that belong to no view; one of the latter may be None.

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
        **lengths: int | None,
    ) -> None:
        self.query, self.key = query, query if key is None else key
        self.view_order = ViewOrder(unsupervised_views, references_last, own_view_shows, references_absent)
        for name, length in lengths.items():
            if name in RESERVED:
                raise ValueError(f"{name}={length!r}: batch and token_grids tell how long axis {name} is; leave it out")
        self.lengths = {
            name: None if length is None else as_integer(name, length, least=1) for name, length in lengths.items()
        }
        self._query, self._key = Pattern(self.query, self.lengths), Pattern(self.key, self.lengths)
        check_open(self._query, self._key, self.lengths)
        check_pair(self._query, self._key, within_views=own_view_shows is not None)
        self.view_order.check(self._key)
        if unused := set(lengths) - self._query.names - self._key.names:
            raise ValueError(f"{self!r}: no axis is called {', '.join(sorted(unused))}")

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
    def refusal(self, normalize: str, num_views: int | None = None) -> str | None:
        """Return why this attention cannot be supervised with this `normalize`, or None if it can.

        Example:
            >>> TokenLayout("(b h w) v").refusal("per_view")
            'a query reaches one token per view, so a softmax per view is constant; use normalize="all_views"'
            >>> TokenLayout("(b h w) v").refusal("all_views") is None
            True
        """
        if normalize not in NORMALIZATIONS:
            raise unknown_name("normalize", normalize, NORMALIZATIONS)
        if self.reach == "cell" and self.own_view_shows is not None:
            return "a query reaches one token of its own view, so the softmax is constant"
        if self.reach == "cell" and normalize == "per_view":
            constant = "a query reaches one token per view, so a softmax per view is constant"
            return f'{constant}; use normalize="all_views"'
        if self.reach == "cell" and num_views == 2:
            return "with 2 views a query reaches one token of other views, so the softmax is constant"
        return None

    @old_keywords
    def shape(self, of: str, *, batch: int, token_grids: TokenGrids) -> tuple[int, int]:
        """Return attention batch and number of tokens (AB, L) of a call, without tokens whose number is open.

        `of` is "query" or "key".

        Example:
            >>> TokenLayout("(b h) (v w)").shape("key", batch=2, token_grids=((16, 24),) * 6)
            (32, 144)
        """
        pattern, lengths = self._pattern(of), self._lengths(batch, token_grids)
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
            >>> layout = TokenLayout("(b v h) w", key="(b u h) (v w)")  # MV-Adapter
            >>> layout.split_key(torch.zeros(2 * 6 * 16, 8, 6 * 24, 64), batch=2, token_grids=((16, 24),) * 6).shape
            torch.Size([32, 8, 6, 24, 64])
        """
        return self._split("key", tensor, batch, token_grids, lengths)

    def localize(self, correspondence: Correspondence) -> Correspondence:
        """Express a correspondence in the folded form, without matches out of reach and of views without queries.

        Example:
            >>> from cameo import Correspondence
            >>> index = torch.full((1, 2, 2, 4), -1)
            >>> index[0, 0, 1] = torch.tensor([1, 0, 0, 3])  # token 2 (row 1) matches token 0 (row 0)
            >>> match = Correspondence(index=index, token_grids=((2, 2), (2, 2)))
            >>> rows = TokenLayout("(b h) (v w)").localize(match)
            >>> rows.index[:, 0, 1].tolist(), rows.token_grids
            ([[1, 0], [-1, 1]], ((1, 2), (1, 2)))
        """
        token_grids = correspondence.token_grids
        self._lengths(correspondence.batch_size, token_grids)
        if self.own_view_shows is not None:
            correspondence = pair_matches(correspondence, self.view_order)
        elif removed := self.view_order.removed:
            correspondence = correspondence.take_views(range(removed, len(token_grids)))
        elif without_queries := self._views_without_queries(len(token_grids)):
            index = correspondence.index.clone()
            index[:, without_queries] = -1
            return dataclasses.replace(correspondence, index=index)
        return fold_matches(correspondence, self.reach)

    def localize_tokens(self, values: Tensor, token_grids: TokenGrids) -> Tensor:
        """Bring values of the tokens `[B, V, N, C]` to `[B', V', N', C]`, for the samples and views of `localize`.

        Example:
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
        lengths = self._lengths(batch, token_grids)
        lengths |= open_length(self._pattern(of), self.lengths, lengths, tokens)
        check_place("batch_index", batch_index, batch)
        check_place("view", view, len(token_grids))
        check_place("row", row, token_grids[view][0])
        check_place("col", col, token_grids[view][1])
        if of == "query" and view in self._views_without_queries(len(token_grids)):
            raise ValueError(f'view: view {view} has no queries in "{self.query}"')
        if view < self.view_order.references_absent:
            raise ValueError(f"view: view {view} is not in the attention: {self!r}")
        place = {"b": batch_index, "u": 0, "h": row, "w": col}
        return self._positions(of, view, place, lengths, len(token_grids))

    def places(self, of: str, *, batch: int, token_grids: TokenGrids, tokens: int | None = None) -> Tensor:
        """Return sample, view, row and column of every position of a call, [AB, L, 4]; -1 for tokens of no view.

        The inverse of `locate`, with every copy of the keys; the views are those of the correspondence. `tokens` is L,
        where the number of text tokens is open.

        Example:
            >>> layout = TokenLayout("b (t + v h w)", t=1)
            >>> layout.places("query", batch=1, token_grids=((1, 2), (1, 2)))[0].tolist()
            [[-1, -1, -1, -1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0], [0, 1, 0, 1]]
        """
        pattern, lengths, views = self._pattern(of), self._lengths(batch, token_grids), len(token_grids)
        lengths |= open_length(pattern, self.lengths, lengths, tokens)
        length = sum(num_positions(segment, lengths) for segment in pattern.segments)
        places = torch.full((num_positions(pattern.batch, lengths), length, 4), -1)
        copies = lengths["u"] if "u" in pattern.batch else 1
        without = self._views_without_queries(views) if of == "query" else []
        for view in range(self.view_order.references_absent, views):
            if view not in without:
                axes = [torch.arange(length) for length in (batch, copies, *token_grids[view])]
                place = dict(zip("buhw", torch.meshgrid(*axes, indexing="ij"), strict=True))
                here = [place["b"], torch.full_like(place["b"], view), place["h"], place["w"]]
                places[self._positions(of, view, place, lengths, views)] = torch.stack(here, dim=-1)
        return places

    def _positions(
        self, of: str, view: int, place: dict[str, Any], lengths: dict[str, int], num_views: int
    ) -> tuple[Any, Any]:
        """Return attention batch index and token index of a view's tokens; a place is a number or a tensor per axis."""
        pattern, place = self._pattern(of), dict(place)
        main_views = num_views - len(self._key.extra)
        view = self.view_order.place(view, num_views)
        if view < main_views:
            segment = pattern.main
            for name in reversed(self._query.views):
                view, place[name] = divmod(view, lengths[name])
        else:
            segment = self._key.extra[view - main_views]
            place |= {name: place[name[0]] for name in segment}
        start = first_position(segment, pattern, lengths)
        return position_of(pattern.batch, place, lengths), start + position_of(segment, place, lengths)

    def _pattern(self, of: str) -> Pattern:
        if of not in ("query", "key"):
            raise unknown_name("of", of, ["query", "key"])
        return self._query if of == "query" else self._key

    def _views_without_queries(self, num_views: int) -> list[int]:
        extra = enumerate(self._key.extra, start=num_views - len(self._key.extra) + self.references_last)
        return [view % num_views for view, segment in extra if segment not in self._query.segments]

    def _lengths(self, batch: int, token_grids: TokenGrids) -> dict[str, int]:
        """Return the length of every axis for this batch and these token grids, 0 for the one that is open."""
        given = (repr(self), self._query, self._key, self.lengths, self.view_order)
        return axis_lengths(*given, batch=batch, token_grids=token_grids)

    def _split(
        self, of: str, tensor: Tensor, batch: int, token_grids: TokenGrids, rows: Tensor | None = None
    ) -> Tensor:
        pattern, lengths = self._pattern(of), self._lengths(batch, token_grids)
        expected = self.shape(of, batch=batch, token_grids=token_grids)
        if (segment := open_segment(pattern, self.lengths)) is not None:
            tensor = without_open_segment(tensor, pattern, segment, lengths, rows)
        check_shape(of, tensor, expected, pattern.text, batch=batch, token_grids=token_grids)
        rest = tuple(name for name in ("h", "w") if name not in pattern.folded)
        main = take_segment(tensor, pattern, pattern.main, lengths, views=self._query.views, grid=rest)
        if self.own_view_shows is not None:
            return pair_own_tokens(self.view_order.showing_views(main, len(token_grids)), batch)
        main = main[:, :, : main.shape[2] - self.unsupervised_views]
        if not self._key.extra:
            return main if self.unsupervised_views else self.view_order.references_first(main)
        empty = main.new_zeros(main.shape[0], main.shape[1], 1, 0, main.shape[4])
        parts = [main]
        for segment in self._key.extra:
            if segment not in pattern.segments:
                parts.append(empty)
                continue
            grid = tuple(sorted(segment))
            parts.append(take_segment(tensor, pattern, segment, lengths, views=(), grid=grid))
        longest = max(height * width for height, width in token_grids)
        return self.view_order.references_first(
            torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[3])) for part in parts], dim=2)
        )
