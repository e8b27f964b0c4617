"""What an installed wheel holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_listed() -> None:
    own = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "cameo").rglob("__init__.py")}
    adapters = {".".join(("cameo", *file.parent.relative_to(ROOT).parts)) for file in (ROOT / "adapters").rglob("*.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(own | adapters)


def test_every_file_of_a_package_that_is_no_code_is_listed() -> None:
    listed = {
        file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in (ROOT / package.replace(".", "/").replace("cameo/adapters", "adapters")).glob(pattern)
    }
    there = [file for name in ("cameo", "adapters") for file in (ROOT / name).rglob("*") if file.is_file()]
    assert [file for file in there if file.suffix not in (".py", ".pyc") and file not in listed] == []
