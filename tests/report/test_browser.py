"""The report in a browser: nothing is asked of the network, and it fits a desktop and a telephone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import launched


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_asks_nothing_of_the_network(browser: Any, finished_run: Path, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("request", lambda request: problems.append(request.url))
    address = (finished_run / "report.html").as_uri()
    tab.goto(address)
    tab.locator("summary").click()  # all settings
    assert tab.locator("details dt").last.is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.evaluate("[...document.images].map(image => image.naturalWidth > 300)") == [True, True]
    boxes = [chart.bounding_box() for chart in tab.locator(".charts svg").all()]
    assert len(boxes) == 6
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] > 120 for box in boxes)
    # Labels of the axes lie within their charts.
    outside = """chart => [...chart.querySelectorAll("text")].filter(text => {
        const [inner, outer] = [text.getBoundingClientRect(), chart.getBoundingClientRect()]
        return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1
    }).map(text => text.textContent)"""
    for chart in tab.locator(".charts svg").all():
        assert chart.evaluate(outside) == []
    assert [one for one in problems if not one.startswith(("data:", address))] == []
    tab.get_by_role("link", name="explore.html").click()
    tab.wait_for_selector("body[data-ready=yes]")
    tab.close()


def test_text_is_dark_on_light(browser: Any, finished_run: Path) -> None:
    """A contrast of at least 4.5 (WCAG AA) for every text, on its own background or the page's white."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto((finished_run / "report.html").as_uri())
    low = tab.evaluate(
        """() => {
        const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0)
        const under = node => {
            for (; node; node = node.parentElement) {
                const color = getComputedStyle(node).backgroundColor
                if (!color.endsWith(", 0)")) return color
            }
            return "rgb(255, 255, 255)"
        }
        const texts = [...document.querySelectorAll("body *")].filter(node =>
            [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim()))
        return texts.filter(node => {
            const style = getComputedStyle(node)
            const [front, back] = [light(node.closest("svg") ? style.fill : style.color), light(under(node))]
            return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05) < 4.5
        }).map(node => node.textContent)
    }"""
    )
    assert low == []
    tab.close()
