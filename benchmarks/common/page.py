"""Pages whose tables are written from results files: what stands between their markers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.measuring import read_results
from cameo.files import write_atomically

__all__ = ["DEVICES", "PICTURES", "RESULTS", "ROOT", "TABLE", "Script", "fill", "filled"]

ROOT = Path(__file__).parents[2]
PICTURES, RESULTS = ROOT / "docs" / "images", ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Script:
    """A script that measures, and where it keeps its results.

    Example:
        >>> Script("benchmarks.step.measure", "training_step").command("cuda")
        'python -m benchmarks.step.measure --device cuda'

    Attributes:
        module: name under which Python runs the script from the root of the repository.
        results: name of its results files, without the device.
    """

    module: str
    results: str

    def found(self, device: str) -> dict[str, Any]:
        """Read what was measured on a device; empty where nothing was."""
        return read_results(RESULTS / f"{self.results}_{device}.json")

    def command(self, device: str) -> str:
        """Return the command that measures on a device."""
        return f"python -m {self.module} --device {device}"

    def section(self, found: Mapping[str, Any], table: str, device: str) -> str:
        """Return a table below its command, device and date, or the command that is still to be run."""
        if not found:
            return f"Not measured yet: `{self.command(device)}`.\n"
        places = dict.fromkeys(
            "{device}, {threads} threads, torch {torch}, {date}".format(**entry["environment"])
            for entry in found.values()
        )
        return f"`{self.command(device)}`: {'; '.join(places)}.\n\n{table}\n"


def filled(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Return a page with every table as the results files have it.

    Everything between `<!-- table: NAME -->` and `<!-- end -->` is written anew; the rest of the page stays.

    Raises:
        KeyError: the page asks for a table that is not in `tables`.
    """
    return TABLE.sub(lambda match: f"{match[1]}\n{tables[match[2]]()}\n{match[3]}", text)


def fill(page: Path, name: str, content: str) -> None:
    """Write one table of a page anew, in place and as a whole; the others stay.

    Raises:
        KeyError: the page has no table of this name.
    """
    text = page.read_text(encoding="utf-8")
    if name not in (found[2] for found in TABLE.finditer(text)):
        raise KeyError(
            f"{page}: has no table {name}: write `<!-- table: {name} -->` and `<!-- end -->` where it belongs"
        )
    replaced = TABLE.sub(lambda found: f"{found[1]}\n{content}\n{found[3]}" if found[2] == name else found[0], text)
    write_atomically(page, replaced)
