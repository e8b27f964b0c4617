"""Curves as inline SVG: one line per run, thin for the steps and thick for their moving mean."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["COLORS", "Series", "line_chart", "moving_mean", "nice_ticks"]

# Colors of Okabe and Ito, which color-blind eyes tell apart, dark enough for lines on white; and dashes beside them.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#a3588a")
DASHES = ("6 3", "", "2 3", "9 3 2 3")
WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 10, 36
MOST_POINTS = 400  # of a line; more are averaged in groups, which no screen shows


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    - `points`: pairs of a step and a value; values that are not finite leave a gap.
    - `style`: number of its color and dash; runs keep theirs from chart to chart.
    - `smooth`: draw a moving mean over the thin line of the values.
    - `dots`: mark each value, for values that are few.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    smooth: bool = True
    dots: bool = False


@dataclass(frozen=True)
class _Frame:
    """The plane of a chart: the steps and values at its edges, and where they lie in the picture."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return round(LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(TOP + (self.high - value) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM), 1)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{self.x(step)} {self.y(value)}" for step, value in points)

    def axes(self, unit: str) -> Iterator[str]:
        for tick in nice_ticks(self.low, self.high):
            yield f'<path class="grid" d="M{LEFT} {self.y(tick)}H{WIDTH - RIGHT}"/>'
            yield _label(f"{tick:g}", "y", LEFT - 6, self.y(tick) + 4)
        for tick in nice_ticks(self.first, self.last):
            yield f'<path class="grid" d="M{self.x(tick)} {HEIGHT - BOTTOM}v4"/>'
            yield _label(f"{tick:g}", "x", self.x(tick), HEIGHT - BOTTOM + 17)
        yield _label("optimizer step", "x", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4)
        middle = (TOP + HEIGHT - BOTTOM) / 2
        yield f'<text class="x" transform="translate(11 {middle}) rotate(-90)">{html.escape(unit)}</text>'
        yield f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'


def line_chart(
    series: Sequence[Series], *, title: str, unit: str, level: tuple[str, float] | None = None, from_zero: bool = False
) -> str:
    """Draw lines over the steps as an SVG element with a title for screen readers.

    Example:
        >>> chart = line_chart([Series("with CAMEO", [(1, 0.5), (2, 0.25)])], title="denoising loss", unit="loss")
        >>> chart.startswith('<svg viewBox="0 0 420 230" role="img"'), "with CAMEO from 0.5 to 0.25" in chart
        (True, True)

    Args:
        series: the lines; those without a finite value are left out.
        title: what is drawn.
        unit: label of the vertical axis.
        level: name and value of a horizontal line, such as chance.
        from_zero: whether the vertical axis starts at 0.

    Raises:
        ValueError: if there is no finite value.
    """
    lines = [(one, points) for one in series if (points := [p for p in one.points if math.isfinite(p[1])])]
    if not lines:
        raise ValueError(f"series: expected a finite value to draw in {title!r}, got none")
    frame = _frame_of([points for _, points in lines], level, from_zero)
    parts = list(frame.axes(unit))
    if level:
        height = frame.y(level[1])
        parts.append(f'<path class="level" d="M{LEFT} {height}H{WIDTH - RIGHT}"/>')
        parts.append(_label(f"{level[0]} {level[1]:.2f}", "level", WIDTH - RIGHT - 4, round(height - 4, 1)))
    for one, points in lines:
        color, dash = COLORS[one.style % len(COLORS)], DASHES[one.style % len(DASHES)]
        if one.smooth:
            parts.append(f'<path class="raw" stroke="{color}" d="{frame.path(_thinned(points))}"/>')
        thick = _thinned(moving_mean(points) if one.smooth else points)
        parts.append(f'<path class="line" stroke="{color}" stroke-dasharray="{dash}" d="{frame.path(thick)}"/>')
        if one.dots:
            places = [(frame.x(step), frame.y(value)) for step, value in thick]
            parts += [f'<circle fill="{color}" cx="{x}" cy="{y}" r="3.5"/>' for x, y in places]
    told = "; ".join(f"{one.name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for one, points in lines)
    told += f"; {level[0]} at {level[1]:.4g}" if level else ""
    label = html.escape(f"{title} over the steps {frame.first:g} to {frame.last:g}: {told}")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    return "".join([head, f"<title>{label}</title>", *parts, "</svg>"])


def _frame_of(
    lines: Sequence[Sequence[tuple[float, float]]], level: tuple[str, float] | None, from_zero: bool
) -> _Frame:
    """Choose the edges of a chart, with a margin above and below what is drawn."""
    steps = [step for points in lines for step, _ in points]
    values = [value for points in lines for _, value in _thinned(points)]
    values += ([level[1]] if level else []) + ([0.0] if from_zero else [])
    low, high = min(values), max(values)
    # A range that is narrow against its values would need labels with many digits.
    margin = max(0.05 * (high - low), 0.001 * max(abs(low), abs(high))) or 1.0
    first, last = min(steps), max(max(steps), min(steps) + 1)
    return _Frame(first, last, low if from_zero and low == 0 else low - margin, high + margin)


def _label(text: str, kind: str, x: float, y: float) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{html.escape(text)}</text>'


def moving_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average each value with its neighbors, a twentieth of all values on either side at most; ends take fewer.

    Example:
        >>> moving_mean([(step, float(step == 10)) for step in range(20)])[9]
        (9, 0.3333333333333333)
    """
    reach = len(points) // 20
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    means = []
    for place, (step, _) in enumerate(points):
        near = min(reach, place, len(points) - 1 - place)
        means.append((step, (sums[place + near + 1] - sums[place - near]) / (2 * near + 1)))
    return means


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers within a range, at most so many.

    Example:
        >>> nice_ticks(0.13, 0.61)
        [0.2, 0.3, 0.4, 0.5, 0.6]
        >>> nice_ticks(0, 400)
        [0.0, 100.0, 200.0, 300.0, 400.0]
    """
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (size * factor) < most)
    ticks = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [float(f"{tick * step:.10g}") for tick in ticks]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbors in groups, where there are more points than a line shows."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]
