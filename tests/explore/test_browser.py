"""The page in a browser: what a click shows is what the library says, and nothing is asked of the network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.browser import launched
from tests.helpers.explored import Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture
def tab(browser: Any, page: Page) -> Iterator[Any]:
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    tab.problems = []
    tab.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.on("console", lambda message: tab.problems.append(message.text))
    tab.on("request", lambda request: tab.problems.append(request.url))
    tab.goto(page.path.as_uri())
    tab.wait_for_selector("body[data-ready=yes]")
    yield tab
    problems = [one for one in tab.problems if not one.startswith(("data:", page.path.as_uri()))]
    tab.close()
    assert problems == []


def canvas(tab: Any, model: int, view: int) -> Any:
    return tab.locator("section").nth(model).locator("canvas").nth(view)


def wait_for(tab: Any, *parts: str) -> None:
    """Wait until the page is drawn with this state, which it then has in its address."""
    for _ in range(500):
        if all(part in tab.evaluate("location.hash").strip("#").split("&") for part in parts):
            return
        tab.wait_for_timeout(20)
    raise AssertionError(f"expected {parts} in the address, got {tab.evaluate('location.hash')}")


def click(tab: Any, view: int, token: int, grid: tuple[int, int]) -> None:
    box = canvas(tab, 1, view).bounding_box()
    row, column = divmod(token, grid[1])
    position = {"x": (column + 0.5) * box["width"] / grid[1], "y": (row + 0.5) * box["height"] / grid[0]}
    canvas(tab, 1, view).click(position=position)
    wait_for(tab, f"view={view}", f"token={token}")


def expected_words(page: Page, query_view: int, token: int, readout: str) -> list[str]:
    """What the line of the second model says of each other view, at the last noise level and in the first scene."""
    words = []
    for one in page.maps(1.0):
        if one.sample != 0 or one.query_view != query_view:
            continue
        shares = one.readouts[readout][token]
        best, width = int(shares.argmax()), one.key_grid[1]
        text = f"most at row {best // width + 1}, column {best % width + 1} ({100 * shares[best]:.1f} %)"
        target = int(one.target[token])
        if target < 0:
            text += ", no true match there"
        else:
            off = max(abs(best // width - target // width), abs(best % width - target % width))
            text += ", the true match" if off == 0 else f", {off} token{'s' if off > 1 else ''} from the true match"
        words.append(text)
    assert len(words) == 2
    return words


@pytest.mark.parametrize(("view", "token"), [(1, 9), (0, 0), (2, 15)])
def test_a_click_shows_where_the_token_looks(tab: Any, page: Page, view: int, token: int) -> None:
    grid = page.maps(1.0)[0].query_grid
    click(tab, view, token, grid)
    row, column = divmod(token, grid[1])
    told = tab.locator("#told p")
    assert told.nth(0).inner_text().startswith(f"Token at row {row + 1}, column {column + 1} of view {view + 1}")
    for words in expected_words(page, view, token, "mean"):
        assert words in told.nth(2).inner_text()


def test_arrow_keys_and_choices(tab: Any, page: Page) -> None:
    grid = page.maps(1.0)[0].query_grid
    click(tab, 1, 5, grid)
    canvas(tab, 0, 1).focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowDown")
    token = 5 + 1 + grid[1]
    wait_for(tab, f"token={token}")
    tab.select_option("#readout", label="head 1")
    wait_for(tab, f"readout={2 + 1}")  # the mean, through the alignment head, head 0
    for words in expected_words(page, 1, token, "head 1"):
        assert words in tab.locator("#told").inner_text()
    assert (
        canvas(tab, 0, 1)
        .get_attribute("aria-label")
        .endswith(f"selected token at row {token // grid[1] + 1}, column {token % grid[1] + 1}")
    )


def test_every_question_draws_something_else(tab: Any, page: Page) -> None:
    click(tab, 1, 5, page.maps(1.0)[0].query_grid)
    pictures = set()
    for question in ("looks", "seen", "errors"):
        tab.select_option("#question", question)
        wait_for(tab, f"question={question}")
        pictures.add(canvas(tab, 1, 0).screenshot())
    tab.select_option("#pictures", "predictions")
    wait_for(tab, "pictures=predictions")
    pictures.add(canvas(tab, 1, 1).screenshot())
    assert len(pictures) == 4


def test_hits_of_the_scene_are_counted(tab: Any, page: Page) -> None:
    hits = matches = 0
    for one in page.maps(1.0):
        if one.sample == 0:
            best, width = one.readouts["mean"].argmax(-1), one.key_grid[1]
            off = ((best // width - one.target // width).abs()).maximum((best % width - one.target % width).abs())
            hits += int(((off <= 1) & (one.target >= 0)).sum())
            matches += int((one.target >= 0).sum())
    text = tab.locator("section").nth(1).locator("p").first.inner_text()
    assert text == f"{100 * hits / matches:.1f} % of {matches} matches of this scene found within one token"


def test_an_address_opens_where_one_was(browser: Any, page: Page) -> None:
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.goto(page.path.as_uri() + "#sample=1&view=2&token=6&question=seen&level=99")
    tab.wait_for_selector("body[data-ready=yes]")
    assert "row 2, column 3 of view 3" in tab.locator("#told p").first.inner_text()
    assert tab.locator("#question").input_value() == "seen"
    assert tab.locator("#level").input_value() == "1"  # there is no level 99
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # fits a telephone
    tab.close()
