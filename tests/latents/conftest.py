"""Fixtures of the tests of latents."""

from __future__ import annotations

import pytest

from tests.helpers.training_runs import scene_cache


@pytest.fixture(autouse=True)
def _shared_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rendered scenes are those of all tests."""
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
