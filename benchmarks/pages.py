"""Write the tables of docs/performance.md and docs/results.md and draw their pictures, from the results files.

    python -m benchmarks.pages

Everything between `<!-- table: NAME -->` and `<!-- end -->` is written anew; the rest of a page is text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from benchmarks.alignment import gates, parts
from benchmarks.alignment import tables as alignment
from benchmarks.common.page import DEVICES, ROOT, filled
from benchmarks.convergence import tables as convergence
from benchmarks.correspondence import tables as correspondence
from benchmarks.step import measure as training_step
from benchmarks.step import tables as step
from cameo.files import write_atomically

__all__ = ["PAGES", "missed"]


def missed(device: str) -> str:
    """List what falls short of what was demanded, over everything that docs/performance.md shows."""
    rows = []
    for script, check in (
        (alignment.SCRIPT, partial(gates.check, device=device)),
        (alignment.PARTS, parts.check),
        (step.SCRIPT, training_step.check),
        (correspondence.SCRIPT, partial(correspondence.check, device=device)),
    ):
        if found := script.found(device):
            rows += check(found)
    if not rows:
        return alignment.SCRIPT.section({}, "", device)
    lines = [
        f"- {row['gate']}: demanded {row['demanded']}, measured {row['measured']:.3g}."
        for row in rows
        if row["state"] == "missed"
    ]
    lines += [f"- {row['gate']}: not measured." for row in rows if row["state"] == "not measured"]
    return "\n".join(lines or ["Nothing that was measured."]) + "\n"


PERFORMANCE = (
    alignment.TABLES
    | correspondence.TABLES
    | step.TABLES
    | {f"missed_{device}": partial(missed, device) for device in DEVICES}
)
PAGES: dict[Path, Mapping[str, Callable[[], str]]] = {
    ROOT / "docs" / "performance.md": PERFORMANCE,
    ROOT / "docs" / "results.md": convergence.TABLES,
}


def draw() -> Iterator[Path]:
    """Draw every picture that there are results for."""
    yield from filter(None, (alignment.draw(device) for device in DEVICES))
    for preset in convergence.PRESETS:
        yield from convergence.draw(preset)


def main() -> None:
    """Draw the pictures, then fill the pages."""
    for picture in draw():
        print(picture.relative_to(ROOT))
    for page, tables in PAGES.items():
        write_atomically(page, filled(page.read_text(encoding="utf-8"), tables))
        print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
