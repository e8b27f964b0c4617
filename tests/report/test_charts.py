"""The lines of a chart lie where their values are."""

from __future__ import annotations

import math
import re

import pytest

from cameo.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, line_chart, moving_mean, nice_ticks


def paths(chart: str, kind: str) -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<path class="{kind}"[^>]* d="M([^"]*)"', chart)
    return [[tuple(map(float, point.split())) for point in path.split("L")] for path in found]  # type: ignore[misc]


def chart_of(*values: float, **options: object) -> str:
    return line_chart(
        [Series("one", list(enumerate(values)), smooth=False)],
        title="loss",
        unit="nats",
        **options,  # type: ignore[arg-type]
    )


def test_a_line_goes_through_its_values() -> None:
    (line,) = paths(chart_of(0.0, 10.0, 5.0), "line")
    assert [x for x, _ in line] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    (_, lowest), (_, highest), (_, middle) = line
    inside = HEIGHT - TOP - BOTTOM
    assert lowest == pytest.approx(HEIGHT - BOTTOM - inside / 22, abs=0.1)  # a margin of 5 % on both sides
    assert highest == pytest.approx(TOP + inside / 22, abs=0.1)
    assert middle == pytest.approx((lowest + highest) / 2, abs=0.1)


def test_the_level_lies_on_the_axis_of_the_values() -> None:
    chart = chart_of(2.0, 6.0, level=("chance", 4.0))
    (line,) = paths(chart, "line")
    height = float(re.findall(r'<path class="level" d="M\d+ ([\d.]+)H', chart)[0])
    assert height == pytest.approx((line[0][1] + line[1][1]) / 2, abs=0.11)
    assert ">chance 4.00</text>" in chart
    assert "one from 2 to 6; chance at 4" in chart


def test_many_steps_become_a_line_that_a_page_can_hold() -> None:
    values = [math.sin(step / 1000) for step in range(20_000)]
    chart = line_chart([Series("one", list(enumerate(values)))], title="loss", unit="nats")
    assert len(chart) < 20_000
    assert all(350 <= len(line) <= 400 for kind in ("raw", "line") for line in paths(chart, kind))


def test_values_that_are_not_finite_are_left_out() -> None:
    (line,) = paths(chart_of(1.0, math.nan, 2.0, math.inf), "line")
    assert len(line) == 2
    with pytest.raises(ValueError, match="expected a finite value to draw in 'loss'"):
        chart_of(math.nan)


@pytest.mark.parametrize("values", [(3.0,), (0.0, 0.0), (1e-9, 2e-9), (-5.0, 1e6)])
def test_any_range_has_ticks_inside_the_picture(values: tuple[float, ...]) -> None:
    chart = chart_of(*values)
    heights = [float(y) for y in re.findall(r'<path class="grid" d="M\d+ ([\d.]+)H', chart)]
    assert heights
    assert all(TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1 for y in heights)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.8, 0.81), (-3, 7), (1, 20_000)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert low <= ticks[0]
    assert ticks[-1] <= high


def test_a_moving_mean_keeps_what_is_constant_and_names_are_escaped() -> None:
    assert {value for _, value in moving_mean([(step, 2.0) for step in range(100)])} == {2.0}
    chart = line_chart([Series("<b>", [(0, 1.0), (1, 2.0)])], title="a & b", unit="<dB>")
    assert "<b>" not in chart
    assert "&lt;dB&gt;" in chart
