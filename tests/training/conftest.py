"""Fixtures of the tests that train."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cameo.data import EmbeddedScenes, Views
from tests.helpers.training_runs import fresh_accelerate, scene_cache


@pytest.fixture
def alone_on_shared_scenes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A single process without a launcher, whose rendered scenes are those of all tests."""
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with fresh_accelerate():
        yield


@pytest.fixture(scope="session")
def room() -> Views:
    """A small room, rendered once."""
    settings = {"num_scenes": 1, "views_per_scene": 6, "size": (48, 48), "progress": False, "content": "rooms"}
    return EmbeddedScenes(cache_dir=scene_cache(), **settings).views(0)
