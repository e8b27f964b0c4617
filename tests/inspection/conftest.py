"""A small room and a small object, rendered once."""

from __future__ import annotations

import pytest

from cameo.data import EmbeddedScenes, Views
from tests.helpers.training_runs import scene_cache


def _scene(content: str) -> Views:
    settings = {"num_scenes": 1, "views_per_scene": 6, "size": (48, 48), "progress": False, "content": content}
    return EmbeddedScenes(cache_dir=scene_cache(), **settings).views(0)


@pytest.fixture(scope="session")
def room() -> Views:
    return _scene("rooms")


@pytest.fixture(scope="session")
def thing() -> Views:
    return _scene("objects")
