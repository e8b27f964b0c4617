"""Parse the einops-like patterns of `TokenLayout`, which say what the axes of an attention call are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["Pattern", "check_pair"]

Segment = tuple[str, ...]
GRAMMAR = 'write "<batch part> <token part>", for example "b (v h w)", "(b h) (v w)" or "b (t + v h w)"'
PART = r"(\([^()]*\)|[^\s()+]+)"
NAME = r"[a-z]([a-z0-9_]*[a-z0-9])?'*"
RESERVED = ("b", "u", "v", "h", "w")


class Pattern:
    """One parsed pattern.

    Example:
        >>> pattern = Pattern("b (t + r h c w + h' w')", {"t": 77, "r": 3, "c": 2})
        >>> pattern.batch, pattern.segments
        (('b',), (('t',), ('r', 'h', 'c', 'w'), ("h'", "w'")))
        >>> pattern.main, pattern.extra, pattern.views
        (('r', 'h', 'c', 'w'), (("h'", "w'"),), ('r', 'c'))

    Attributes:
        batch: axes of the batch part, slowest first.
        segments: axes of each segment of the token part.
        main: the segment that holds the views' common token grid.
        extra: segments that are one more view with its own grid.
        views: the view axes, slowest first: `v`, or tile axes.
        folded: the grid axes that stand in the batch part, `h` before `w`.

    Raises:
        ValueError: the pattern cannot be parsed; the message holds the pattern and the reason.
    """

    def __init__(self, text: str, lengths: Mapping[str, int | None]) -> None:
        self.text = text
        self.batch, self.segments = self._read()
        names = [*self.batch, *(name for segment in self.segments for name in segment)]
        self.names = set(names)
        for name in names:
            if names.count(name) > 1:
                raise self.error(f"axis {name} stands twice")
        if "b" not in self.batch:
            raise self.error("the batch part needs the axis b, the samples")
        self.extra = tuple(s for s in self.segments if any("'" in name for name in s))
        self._check_extra()
        self.main = self._find_main(lengths)
        grid_and_views = self.batch + self.main
        for name in ("h", "w"):
            if name not in grid_and_views:
                raise self.error(f"the token grid needs the axis {name}")
        self.views = tuple(name for name in grid_and_views if name not in ("b", "u", "h", "w"))
        self._check_views(lengths)
        self.folded = tuple(name for name in ("h", "w") if name in self.batch)

    def error(self, reason: str) -> ValueError:
        """Build the error for this pattern."""
        return ValueError(f'pattern "{self.text}": {reason}')

    def _read(self) -> tuple[Segment, tuple[Segment, ...]]:
        match = re.fullmatch(rf"\s*{PART}\s+{PART}\s*", self.text) if isinstance(self.text, str) else None
        if match is None:
            raise self.error(GRAMMAR)
        batch, tokens = ([tuple(s.split()) for s in part.strip("()").split("+")] for part in match.groups())
        for segment in batch + tokens:
            if not segment:
                raise self.error(f"an empty part or segment; {GRAMMAR}")
            for name in segment:
                if not re.fullmatch(NAME, name):
                    raise self.error(f"{name!r} is no axis name; use lower-case letters and digits")
        if len(batch) > 1 or any("'" in name for name in batch[0]):
            raise self.error("sums (+) and primed axes belong in the token part")
        return batch[0], tuple(tokens)

    def _find_main(self, lengths: Mapping[str, int | None]) -> Segment:
        plain = [s for s in self.segments if s not in self.extra]
        grids = [s for s in plain if len(s) > 1 or s[0] in RESERVED]
        if len(grids) != 1:
            shown = "no segment" if not grids else "more than one segment"
            raise self.error(f"{shown} holds the token grid of the views; exactly one must")
        for segment in plain:
            if segment != grids[0] and segment[0] not in lengths:
                name = segment[0]
                raise self.error(
                    f"tokens {name} belong to no view, so give their number: {name}=<tokens>, or {name}=None for what "
                    "is left over"
                )
        return grids[0]

    def _check_extra(self) -> None:
        for segment in self.extra:
            primes = "'" * segment[0].count("'")
            if sorted(segment) != ["h" + primes, "w" + primes]:
                raise self.error(f"segment {' '.join(segment)} must be one primed height and width, as h' w'")

    def _check_views(self, lengths: Mapping[str, int | None]) -> None:
        if not self.views:
            raise self.error("no view axis: write v, or tile axes with their lengths as keywords")
        tiles = [name for name in self.views if name != "v"]
        if "v" in self.views and tiles:
            raise self.error(f"v and {' '.join(tiles)} cannot both be the views; write v or tile axes")
        for name in tiles:
            if name not in lengths:
                raise self.error(f"axis {name} is not known; if it is a tile axis, give {name}=<tiles>")


def check_pair(query: Pattern, key: Pattern, *, within_views: bool = False) -> None:
    """Raise a ValueError unless both patterns can describe the queries and keys of one call.

    Example:
        >>> check_pair(Pattern("(b v) (h w)", {}), Pattern("(b u) (v h w)", {}))
        >>> check_pair(Pattern("(b v) (h w)", {}), Pattern("(b v) (h w)", {}), within_views=True)

    Args:
        query, key: the two patterns.
        within_views: whether the attention within each view is what is looked at, so that a query may see its own view
            only.
    """
    if "u" in query.names:
        raise query.error("u, the copies of the keys, belongs in the key pattern")
    if any("u" in segment for segment in key.segments):
        raise key.error("u, the copies of the keys, belongs in the batch part")
    separate = any(name in key.batch for name in key.views)
    if separate and not within_views:
        raise key.error(
            "with views in the batch part a query sees its own view only and has no other view to match; "
            'keys of all views stand in the token part, as key="(b u) (v h w)". Where every view carries the reference '
            "in its input channels, its own tokens show that too: own_view_shows=0"
        )
    if sorted(query.views) != sorted(key.views):
        views = f"{' '.join(key.views)}, those of the queries {' '.join(query.views)}"
        raise key.error(f'its view axes are {views} ("{query.text}"); name the same')
    # The keys' batch part has one u in the place of the queries' view axes, unless each view sees its own keys.
    wanted: list[str] = []
    for name in query.batch:
        wanted += [name] if separate or name not in query.views else ["u"] if "u" not in wanted else []
    if tuple(wanted) != key.batch:
        raise key.error(f'its batch part must be ({" ".join(wanted)}) to go with the queries "{query.text}"')
    for segment in query.segments:
        if segment != query.main and segment not in key.segments:
            raise key.error(f'segment {" ".join(segment)} of the queries "{query.text}" is missing')
    for side in (query, key):
        if side.extra and (side.folded or any(name in side.batch for name in side.views)):
            raise side.error("beside a view with its own grid, v, h and w must stand in the token part")
