"""Modules under their earlier names are the modules of today."""

from __future__ import annotations

import importlib
import sys

import pytest

from cameo.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_name_gives_the_new_module_and_says_so(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    new = MOVED[old]
    with pytest.warns(FutureWarning, match=new if isinstance(new, str) else new[0]):
        module = importlib.import_module(old)
    if isinstance(new, str):
        assert module is importlib.import_module(new)
