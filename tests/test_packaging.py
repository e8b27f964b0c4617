"""What an installed wheel holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
BESIDE = ("adapters", "recipes")  # folders that are installed below `cameo`


def folder_of(package: str) -> Path:
    """Folder of a package in the tree."""
    folder = package.replace(".", "/")
    return ROOT / (folder.removeprefix("cameo/") if folder.removeprefix("cameo/").startswith(BESIDE) else folder)


def test_every_package_is_listed() -> None:
    own = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "cameo").rglob("__init__.py")}
    beside = {
        ".".join(("cameo", *file.parent.relative_to(ROOT).parts))
        for folder in BESIDE
        for file in (ROOT / folder).rglob("*.py")
    }
    assert sorted(SETUPTOOLS["packages"]) == sorted(own | beside)


def test_every_file_of_a_package_that_is_no_code_is_listed() -> None:
    listed = {
        file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in folder_of(package).glob(pattern)
    }
    there = [file for name in ("cameo", *BESIDE) for file in (ROOT / name).rglob("*") if file.is_file()]
    assert [file for file in there if file.suffix not in (".py", ".pyc") and file not in listed] == []
