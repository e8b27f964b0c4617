"""Parse the einops-like patterns of `TokenLayout`, which say what the axes of an attention call are made of."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["RESERVED", "Pattern", "Segment", "check_pair", "read_pair"]

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

    Args:
        text: the pattern.
        lengths: lengths of the axes that have names of their own.
        groups: the view axes that keep views apart, see `read_pair`.

    Attributes:
        batch: axes of the batch part, slowest first.
        segments: axes of each segment of the token part.
        main: the segment that holds the views' common token grid.
        extra: segments that are one more view with its own grid.
        groups: as given.
        views: the other view axes, slowest first: `v`, or named axes such as tiles.
        folded: the grid axes that stand in the batch part, `h` before `w`.

    Raises:
        ValueError: the pattern cannot be parsed; the message holds the pattern and the reason.
    """

    def __init__(self, text: str, lengths: Mapping[str, int | None], groups: Segment = ()) -> None:
        self.text, self.groups = text, groups
        self.batch, self.segments = _read(text)
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
        self.views = tuple(name for name in grid_and_views if name not in ("b", "u", "h", "w", *groups))
        self._check_views(lengths)
        self.folded = tuple(name for name in ("h", "w") if name in self.batch)

    def error(self, reason: str) -> ValueError:
        """Build the error for this pattern."""
        return _error(self.text, reason)

    def _find_main(self, lengths: Mapping[str, int | None]) -> Segment:
        plain = [s for s in self.segments if s not in self.extra]
        grids = [s for s in plain if len(s) > 1 or s[0] in RESERVED]
        if not grids and len(plain) == 1 and {"h", "w"} <= set(self.batch):
            grids = plain  # the views alone, under a name of their own
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
        for name in self.groups:
            if name != "v" and name not in lengths:
                raise self.error(f"axis {name} is not known; it keeps views apart, so give {name}=<their number>")


def read_pair(
    query: str, key: str, lengths: Mapping[str, int | None], *, within_views: bool = False, reference_keys: int = 0
) -> tuple[Pattern, Pattern]:
    """Read the patterns of the queries and keys of one call.

    View axes that stand in the batch part of both, beside others in the token part, keep views apart: no query sees a
    key of another frame in `(b f) (v h w)`.

    Example:
        >>> read_pair("(b f) (v h w)", "(b f) (v h w)", {"f": 8})[0].groups
        ('f',)

    Args:
        query, key: the two patterns.
        lengths: lengths of the axes that have names of their own.
        within_views, reference_keys: as for `check_pair`.

    Raises:
        ValueError: one cannot be parsed, or they do not go together.
    """
    groups = _groups(query, key)
    sides = Pattern(query, lengths, groups), Pattern(key, lengths, groups)
    check_pair(*sides, within_views=within_views, reference_keys=reference_keys)
    return sides


def _groups(query: str, key: str) -> Segment:
    """Find the view axes that stand in the batch part of both, if there are others in the token part."""
    (of_queries, _), (of_keys, segments) = _read(query), _read(key)
    shared = tuple(name for name in of_queries if name in of_keys and name not in ("b", "u", "h", "w"))
    alone = len(segments) == 1 and {"h", "w"} <= set(of_keys)
    inside = {name for names in segments if alone or len(names) > 1 or names[0] in RESERVED for name in names}
    return shared if any(name not in ("h", "w") and "'" not in name for name in inside) else ()


def _read(text: object) -> tuple[Segment, tuple[Segment, ...]]:
    """Return the axes of the batch part, and of each segment of the token part."""
    match = re.fullmatch(rf"\s*{PART}\s+{PART}\s*", text) if isinstance(text, str) else None
    if match is None:
        raise _error(text, GRAMMAR)
    batch, tokens = ([tuple(s.split()) for s in part.strip("()").split("+")] for part in match.groups())
    for segment in batch + tokens:
        if not segment:
            raise _error(text, f"an empty part or segment; {GRAMMAR}")
        for name in segment:
            if not re.fullmatch(NAME, name):
                raise _error(text, f"{name!r} is no axis name; use lower-case letters and digits")
    if len(batch) > 1 or any("'" in name for name in batch[0]):
        raise _error(text, "sums (+) and primed axes belong in the token part")
    return batch[0], tuple(tokens)


def _error(text: object, reason: str) -> ValueError:
    return ValueError(f'pattern "{text}": {reason}')


def check_pair(query: Pattern, key: Pattern, *, within_views: bool = False, reference_keys: int = 0) -> None:
    """Raise a ValueError unless both patterns can describe the queries and keys of one call.

    Example:
        >>> check_pair(Pattern("(b v) (h w)", {}), Pattern("(b u) (v h w)", {}))
        >>> check_pair(Pattern("(b v) (h w)", {}), Pattern("(b v) (h w)", {}), within_views=True)

    Args:
        query, key: the two patterns.
        within_views: whether the attention within each view is what is looked at, so that a query may see its own view
            only.
        reference_keys: of how many views alone there are keys; 0: of all.
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
    if reference_keys and (key.views != ("v",) or key.groups or query.extra or key.extra):
        raise key.error(
            f"reference_keys={reference_keys} needs v, the reference views, as its only view axis, and no h' w': their "
            "token grid is read from token_grids"
        )
    if "v" in key.groups and len(key.groups) > 1:
        raise key.error(f"{' '.join(key.groups)} cannot all keep views apart: either v does, or named axes do")
    if not reference_keys and sorted(query.views) != sorted(key.views):
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
        if side.extra and (side.folded or side.groups or any(name in side.batch for name in side.views)):
            raise side.error("beside a view with its own grid, v, h and w must stand in the token part")
