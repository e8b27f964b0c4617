"""The answer to whether cameras, depth and images fit together, as text.

Axes: P pairs of views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cameo.inspection.readings import Reading
from cameo.inspection.registration import Registration
from cameo.inspection.scenes import InspectedScene
from cameo.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AGREES", "CANNOT_TELL", "NOT_REGISTERED", "WRONG", "DataCheck", "PairCheck"]

AGREES, WRONG, CANNOT_TELL = "agrees", "wrong", "cannot tell"
NOT_REGISTERED = "depth not registered"  # among the mistakes
EXIT_STATUS = {AGREES: 0, WRONG: 1, CANNOT_TELL: 3}
NEVER_SEEN = (
    "Never seen: a common factor of depth and positions; depth that is a few percent too large or small; a lens "
    "distortion of a pixel or two; what no compared view shows."
)


@dataclass(frozen=True)
class PairCheck:
    """What one pair of views says, with cameras and depth as they were given.

    - `key`, `views`: of the scene, and numbers of the two views in it.
    - `matched`: share of the tokens with depth that have a match, both ways; NaN without depth.
    - `in_front`: share of the compared points that lie in front of what the other view shows; NaN for none.
    - `color`, `random`: mean color difference (0 to 1) of matches, and of random tokens; NaN for none.
    - `epipolar`: median distance in tokens of tracked points from their epipolar lines; NaN without tracks.
    - `depth`, `baseline`: median depth of the two views and distance of their cameras, in world units.
    """

    key: str
    views: tuple[int, int]
    matched: float
    in_front: float
    color: float
    random: float
    epipolar: float
    depth: float
    baseline: float


@dataclass(frozen=True)
class DataCheck:
    """What `check_views` found out: whether cameras, depth and images fit together.

    Example:
        >>> from cameo.inspection.readings import AS_GIVEN
        >>> check = DataCheck("cannot tell", "the views hardly overlap", AS_GIVEN, pairs=())
        >>> print(check.verdict, check.exit_status, check.mistakes)
        cannot tell 3 ()

    Attributes:
        verdict: "agrees", "wrong" or "cannot tell".
        words: the verdict in a sentence, with what it looks like and the cure.
        reading: the reading of cameras and depth that explains the views best; the default one for "agrees".
        pairs: what each pair says, as given.
        mistakes: a short name for each mistake that was found; empty where none was, or none that is known.
        registration: how depth lies on the images; None without depth.
        token_error: the distance in tokens within which nine of ten parts of the images fit best by their colors, as
            given; NaN where that cannot be told.
        scenes: what was compared, for `figure`.
    """

    verdict: str
    words: str
    reading: Reading
    pairs: tuple[PairCheck, ...]
    mistakes: tuple[str, ...] = ()
    registration: Registration | None = None
    token_error: float = math.nan
    scenes: Sequence[InspectedScene] = field(default=(), repr=False, compare=False)

    @property
    def exit_status(self) -> int:
        """0 for "agrees", 1 for "wrong", 3 for "cannot tell"."""
        return EXIT_STATUS[self.verdict]

    def table(self, *, most: int = 16) -> str:
        """Return the figures of at most so many pairs, evenly chosen, as a Markdown table."""
        columns = {
            "scene": lambda pair: pair.key,
            "views": lambda pair: "{} and {}".format(*pair.views),
            "tokens matched": lambda pair: _percent(pair.matched),
            "points in front": lambda pair: _percent(pair.in_front),
            "color error": lambda pair: _number(pair.color),
            "of random tokens": lambda pair: _number(pair.random),
            "epipolar error (tokens)": lambda pair: _number(pair.epipolar),
            "median depth": lambda pair: _number(pair.depth),
            "cameras apart": lambda pair: _number(pair.baseline),
        }
        rows = [
            {name: value(pair) for name, value in columns.items()}
            for pair in self.pairs[:: max(1, -(-len(self.pairs) // most))]
        ]
        return markdown_table(list(columns), [list(row.values()) for row in rows])

    def figure(self, *, pairs: int = 2) -> Figure:
        """Draw matched points and warped views of a few pairs, as given and, where that is wrong, as it looks like."""
        from cameo.inspection.pictures import check_figure

        moved = self.registration if NOT_REGISTERED in self.mistakes else None
        return check_figure(f"{self.verdict}: {self.words}", self.scenes, self.reading, moved, pairs)

    def draw(self, path: str | Path, *, pairs: int = 2) -> Path:
        """Write the picture of `figure` to a PNG file; returns the path."""
        from cameo.inspection.pictures import write_figure

        return write_figure(self.figure(pairs=pairs), path)

    def __str__(self) -> str:
        """Return the table and the verdict."""
        words = self.words
        if self.verdict == AGREES and not math.isnan(self.token_error):
            # Offsets are compared in steps of half a token.
            words += f"; by their colors, nine of ten image parts fit to within {max(self.token_error, 0.5):.2g} tokens"
        return f"{self.table()}\n\n{self.verdict}: {words}\n{NEVER_SEEN}"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"
