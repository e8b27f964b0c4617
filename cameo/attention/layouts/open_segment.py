"""Tokens of no view whose number a layout leaves open, such as text: taken out of a call before it is split.

Axes: A rows of the attention batch, K heads, L tokens of the call, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cameo.attention.layouts.axes import first_position, num_positions
from cameo.attention.layouts.pattern import Pattern, Segment

__all__ = ["check_open", "lengths_of_rows", "open_length", "open_segment", "without_open_segment"]


def check_open(query: Pattern, key: Pattern, lengths: Mapping[str, int | None]) -> None:
    """Raise a ValueError if more than one length is open, or one that is not the number of tokens of a segment."""
    names = [name for name, length in lengths.items() if length is None]
    sides = [(segment, side.main) for side in (query, key) for segment in side.segments]
    texts = [segment[0] for segment, main in sides if len(segment) == 1 and segment != main]
    if len(names) > 1 or any(name not in texts for name in names):
        raise query.error(
            f"{', '.join(f'{name}=None' for name in names)}: only one length may be open, that of a segment of tokens "
            "that belong to no view"
        )


def open_segment(pattern: Pattern, lengths: Mapping[str, int | None]) -> Segment | None:
    """Return the segment whose number of tokens is open, or None.

    Example:
        >>> open_segment(Pattern("b (t + v h w)", {"t": None}), {"t": None})
        ('t',)
    """
    return next((segment for segment in pattern.segments if lengths.get(segment[0], 1) is None), None)


def open_length(
    pattern: Pattern, given: Mapping[str, int | None], lengths: dict[str, int], tokens: int | None
) -> dict[str, int]:
    """Return the length of the open segment in a call of so many tokens, by its name; nothing where none is open.

    Example:
        >>> lengths = {"t": 0, "v": 2, "h": 2, "w": 3}
        >>> open_length(Pattern("b (t + v h w)", {"t": None}), {"t": None}, lengths, 17)
        {'t': 5}

    Raises:
        ValueError: the number of tokens is not given, or is too small.
    """
    if (segment := open_segment(pattern, given)) is None:
        return {}
    others = sum(num_positions(other, lengths) for other in pattern.segments)
    if tokens is None and segment == pattern.segments[-1]:
        return {}
    if tokens is None or tokens < others:
        raise ValueError(
            f"tokens: the number of tokens {segment[0]} is open, so give that of the whole call, at least {others}, "
            f"got {tokens}"
        )
    return {segment[0]: tokens - others}


def without_open_segment(
    tensor: Tensor, pattern: Pattern, segment: Segment, lengths: dict[str, int], rows: Tensor | None
) -> Tensor:
    """Remove the tokens of the open segment from `[A, K, L, D]`: what is left over beside the other segments.

    Args:
        tensor: as the kernel received it.
        pattern: its pattern.
        segment: the open segment.
        lengths: length of every axis, 0 for the open one.
        rows: `[A]`, how many of the L tokens of each row belong to it, the others being padding at the end; None for
            all. The open segment has another length in each row where these differ.
    """
    others = sum(num_positions(other, lengths) for other in pattern.segments)
    if tensor.shape[2] < others or tensor.ndim != 4:
        return tensor  # which `check_shape` refuses
    before = first_position(segment, pattern, lengths)
    after = others - before
    if after == 0:
        return tensor[:, :, :others]
    ends = None if rows is None else rows.tolist()
    if ends is None or len(set(ends)) == 1:
        end = tensor.shape[2] if ends is None else ends[0]
        kept = tensor[:, :, end - after : end]
        return kept if before == 0 else torch.cat([tensor[:, :, :before], kept], dim=2)
    if min(ends) < others:
        return tensor
    of_rows = [
        torch.cat([row[:, :before], row[:, end - after : end]], dim=1) for row, end in zip(tensor, ends, strict=True)
    ]
    return torch.stack(of_rows)


def lengths_of_rows(kept: Tensor) -> Tensor | None:
    """Return how many tokens each row has, if a mask hides nothing but padding at their end; else None.

    Example:
        >>> lengths_of_rows(torch.tensor([[True, True, False], [True, True, True]]))
        tensor([2, 3])
        >>> lengths_of_rows(torch.tensor([[True, False, True]])) is None
        True

    Args:
        kept: bool `[A, M]`, True for the keys that are seen.
    """
    count = kept.sum(dim=1)
    is_prefix = kept == (torch.arange(kept.shape[1], device=kept.device) < count[:, None])
    return count if bool(is_prefix.all()) else None
