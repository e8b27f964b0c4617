"""Which queries of an attention call see which keys, once each sees those of its own view only.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension, V views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cameo.attention.capture import AttentionLayer
from cameo.attention.layout import TokenLayout
from cameo.attention.layouts.open_segment import open_segment
from cameo.errors import CaptureError
from cameo.geometry.grids import TokenGrids

__all__ = ["ViewPart", "ViewParts"]


@dataclass(frozen=True)
class ViewPart:
    """Queries that see the same keys: their rows of the attention batch (None = all), token positions of both."""

    rows: Tensor | None
    queries: Tensor
    keys: Tensor

    def take(self, tensor: Tensor, tokens: Tensor, axis: int) -> Tensor:
        """Return these rows and tokens; `axis` is the token axis."""
        return tensor.movedim(axis, 1)[self._place(tokens)].movedim(1, axis)

    def take_mask(self, mask: Tensor, axes: int) -> Tensor:
        """Return this part of a mask that broadcasts to `[A, K, L, M]` (axes = 4) or `[A * K, L, M]` (3)."""
        mask = mask[(None,) * (axes - mask.ndim)]
        for axis, places in ((-1, self.keys), (-2, self.queries), (0, self.rows)):
            if places is not None and mask.shape[axis] > 1:
                mask = mask.index_select(axis, places)
        return mask

    def put(self, whole: Tensor, output: Tensor, axis: int) -> None:
        """Write the output of these queries into the output of all, in place."""
        whole.movedim(axis, 1)[self._place(self.queries)] = output.movedim(axis, 1)

    def _place(self, tokens: Tensor) -> tuple[slice | Tensor, Tensor]:
        return (slice(None) if self.rows is None else self.rows[:, None]), tokens


class ViewParts:
    """The parts of the calls of one layer.

    Example:
        >>> layer = AttentionLayer(0, "attn", heads=2, layout=TokenLayout("b (t + v h w)", t=None))
        >>> parts = ViewParts(layer, ((1, 2), (1, 2))).of_call(torch.zeros(1, 2, 7, 4), 7, 7)
        >>> [(part.queries.tolist(), part.keys.tolist()) for part in parts]
        [([3, 4], [0, 1, 2, 3, 4]), ([5, 6], [0, 1, 2, 5, 6]), ([0, 1, 2], [0, 1, 2, 3, 4, 5, 6])]

    Args:
        layer: the layer, for its layout.
        token_grids: token grid of each view, in the order of the correspondence.

    Raises:
        CaptureError: nothing would be left for a query to see, or no other view is seen.
        ValueError: the token grids do not fit the layout.
    """

    def __init__(self, layer: AttentionLayer, token_grids: TokenGrids) -> None:
        self._layer, self._token_grids = layer, tuple(token_grids)
        if layer.layout.within_views:
            raise CaptureError(f"layer {layer.path!r} attends within each view, so there is nothing to cut")
        if layer.layout.reference_keys:
            raise CaptureError(
                f"layer {layer.path!r} attends to the keys of reference views alone, so a query that is cut to its own "
                "view would see nothing"
            )
        self._layout, self._ordered_grids = _in_attention_order(layer.layout, self._token_grids)
        self._known: dict[tuple[object, ...], list[ViewPart]] = {}
        self._lengths = {
            of: self._layout.shape(of, batch=1, token_grids=self._ordered_grids)[1] for of in ("query", "key")
        }
        with_own_grid = layer.layout.views_with_own_grid(len(self._token_grids))
        self._lengths_of_one_view = {math.prod(self._token_grids[view]) for view in with_own_grid}
        self.found = False

    def of_call(
        self, like: Tensor, length: int, key_length: int, ends: Sequence[int] | None = None
    ) -> list[ViewPart] | None:
        """Return which queries see which keys in a call with queries or logits `like`; None if it holds one view only.

        Args:
            like: `[A, K, ...]`, or `[A * K, ...]` of three axes.
            length, key_length: L and M.
            ends: for each row of A how many tokens are no padding at its end, queries and keys alike; None for all.

        Raises:
            CaptureError: the call has another shape than the layout says.
        """
        if not (self._fits("query", length) and self._fits("key", key_length)):
            if length == key_length and length in self._lengths_of_one_view:
                return None
            raise CaptureError(
                f"layer {self._layer.path!r} with {self._layer.layout!r}: expected {self._lengths['query']} queries and"
                f" {self._lengths['key']} keys for token grids {self._token_grids}, got {length} and {key_length}. Pass"
                " the token grids of this batch, layer.token_grids(height, width, num_views); a kernel that takes the "
                "tokens in slices cannot be cut"
            )
        heads = self._layer.heads if like.ndim == 3 else 1
        call = like.shape[0], heads, like.device, length, key_length, None if ends is None else tuple(ends)
        if call not in self._known:
            try:
                self._known[call] = self._find(like.shape[0], heads, (length, key_length), ends)
            except ValueError as error:
                raise CaptureError(f"layer {self._layer.path!r}: {error}") from error
            self._known[call] = [_on(like.device, part) for part in self._known[call]]
        self.found = True
        return self._known[call]

    def _fits(self, of: str, length: int) -> bool:
        is_open = open_segment(self._layout.pattern(of), self._layout.lengths) is not None
        return length >= self._lengths[of] if is_open else length == self._lengths[of]

    def _find(self, rows: int, heads: int, lengths: tuple[int, int], ends: Sequence[int] | None) -> list[ViewPart]:
        """Return one part for each view that has queries, and one for the queries of no view, if there are any.

        Args:
            rows: length of the first axis of the call, `A * heads`.
            heads: number of heads in that axis.
            lengths: L and M.
            ends: as for `of_call`.

        Raises:
            ValueError: the queries' views are in the batch part of the pattern, and the rows are not whole samples, or
                their texts have unequal lengths.
        """
        layout = self._layout
        if not self._views_in_batch:
            if ends is None or len(set(ends)) == 1:
                return self._of_rows(1, lengths, lengths if ends is None else (ends[0], ends[0]), None, heads)
            parts = []
            for end in sorted(set(ends)):
                chosen = torch.tensor([row for row, of_row in enumerate(ends) if of_row == end])
                parts += self._of_rows(1, lengths, (end, end), chosen, heads)
            return parts
        single = layout.shape("query", batch=1, token_grids=self._ordered_grids)[0]
        if rows % (single * heads):
            raise ValueError(
                f'the queries "{layout.query}" of one sample are {single * heads} rows of the kernel, and a call has '
                f"{rows}; a kernel that takes part of a sample cannot be cut"
            )
        if ends is not None and set(ends) != {lengths[0]}:
            raise ValueError(f'the queries "{layout.query}" follow on texts of unequal length, which cannot be cut')
        return self._of_rows(rows // (single * heads), lengths, lengths, None, heads)

    @property
    def _views_in_batch(self) -> bool:
        pattern = self._layout.pattern("query")
        return any(name in pattern.batch for name in pattern.views)

    def _of_rows(
        self, samples: int, lengths: tuple[int, int], ends: tuple[int, int], rows: Tensor | None, heads: int
    ) -> list[ViewPart]:
        """The parts of so many samples, or where rows of the attention batch are alike, of some of them (None: all)."""
        query = self._views("query", samples, lengths[0], ends[0])
        key = self._views("key", samples, lengths[1], ends[1])
        parts = []
        for view in [*query[query >= 0].unique().tolist(), -1]:
            here = query == view
            holding = here.any(dim=1).nonzero()[:, 0]
            if len(holding):
                first = int(holding[0])
                keys = (key[first] == view) | (key[first] < 0) if view >= 0 else key[first] == key[first]
                of_view = _with_heads(holding if self._views_in_batch else rows, heads)
                parts.append(ViewPart(of_view, here[first].nonzero()[:, 0], keys.nonzero()[:, 0]))
        return parts

    def _views(self, of: str, samples: int, length: int, end: int) -> Tensor:
        """The view of each token `[A, L]`, or of one row where all are alike; -1 for none, as for padding."""
        places = self._layout.places(of, batch=samples, token_grids=self._ordered_grids, tokens=end)[..., 1]
        places = torch.nn.functional.pad(places, (0, length - places.shape[1]), value=-1)
        return places if self._views_in_batch else places[:1]


def _in_attention_order(layout: TokenLayout, token_grids: TokenGrids) -> tuple[TokenLayout, TokenGrids]:
    """Return the layout with all views in the order of the attention, also those that no correspondence has."""
    grids = (*token_grids[layout.references_last :], *token_grids[: layout.references_last])
    if not layout.references_last:
        grids += grids[-1:] * layout.unsupervised_views
    return TokenLayout(layout.query, layout.key, **layout.lengths), grids  # type: ignore[arg-type]


def _with_heads(rows: Tensor | None, heads: int) -> Tensor | None:
    return None if rows is None else (rows[:, None] * heads + torch.arange(heads)).flatten()


def _on(device: torch.device, part: ViewPart) -> ViewPart:
    return ViewPart(None if part.rows is None else part.rows.to(device), part.queries.to(device), part.keys.to(device))
