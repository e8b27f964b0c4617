"""The released code runs on the kernel that a test asks for, also where xformers is installed; needs no checkout."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.upstream_imports import imports_from, without_xformers, xformers_by_sdpa

# As the released models look for it.
RELEASED = """
try:
    import xformers
    import xformers.ops
    FOUND = True
except ImportError:
    FOUND = False
"""
INSTALLED = """
def memory_efficient_attention(query, key, value, **options):
    raise NotImplementedError("no kernel for the CPU")
"""


def loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "xformers"]


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the released code, while an xformers is installed whose kernel needs a GPU."""
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "site" / "xformers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0.0.35"')
    (package / "ops.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(tmp_path / "site")
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "released_attention.py").write_text(RELEASED)
    yield folder
    for name in loaded():
        del sys.modules[name]


def test_an_installed_xformers_is_hidden(code: Path) -> None:
    with without_xformers(), imports_from(code):
        assert not importlib.import_module("released_attention").FOUND
    with imports_from(code):
        assert importlib.import_module("released_attention").FOUND


def test_an_installed_xformers_gives_way_to_the_stand_in(code: Path) -> None:
    query = torch.randn(2, 3, 4)
    with xformers_by_sdpa(), imports_from(code):
        assert importlib.import_module("released_attention").FOUND
        assert sys.modules["xformers.ops"].memory_efficient_attention(query, query, query).shape == query.shape
