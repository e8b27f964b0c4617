"""Run the code of docs/tutorial.md from top to bottom in a temporary folder, and keep the pictures that it draws.

python docs/draw_tutorial.py
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from cameo.files import write_atomically

DOCS = Path(__file__).parent
PICTURES = ("check", "correspondence", "attention")


def blocks() -> list[str]:
    """Return the Python blocks of the tutorial in their order; the last one pushes to the Hub."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / "tutorial.md").read_text(encoding="utf-8"), re.S | re.M)


def main() -> None:
    """Run all blocks but the push, and copy the pictures to docs/images."""
    names: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for block in blocks()[:-1]:
            exec(block, names)
        for name in PICTURES:
            write_atomically(DOCS / "images" / f"tutorial_{name}.png", Path(f"{name}.png").read_bytes())
            print(f"docs/images/tutorial_{name}.png")
        os.chdir(DOCS)


if __name__ == "__main__":
    main()
