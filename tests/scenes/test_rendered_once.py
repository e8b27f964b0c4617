"""Processes that share a scene cache divide the rendering: no scene is rendered twice, and all find all of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cameo.data import EmbeddedScenes, Views

SETTINGS: dict[str, Any] = {"num_scenes": 6, "size": (8, 8), "content": "bare_rooms", "views_per_scene": 2}
FORKED = multiprocessing.get_context("fork") if sys.platform != "win32" else None
pytestmark = pytest.mark.skipif(FORKED is None, reason="forks")


def render_and_note(folder: Path, other: Any, seconds: float) -> None:
    """Open the scenes, and note which are rendered here, at the same time as the other process, and which are found."""
    render, met = EmbeddedScenes._render, []

    def noted(self: EmbeddedScenes, scene: int) -> Views:
        if not met:
            met.append(other.wait(60))  # both are rendering now
        (folder / f"rendered-{scene}-{os.getpid()}").touch()
        time.sleep(seconds)
        return render(self, scene)

    EmbeddedScenes._render = noted  # type: ignore[method-assign]
    scenes = EmbeddedScenes(cache_dir=folder / "cache", progress=False, processes=1, **SETTINGS)
    (folder / f"found-{os.getpid()}").write_text(str(len(list(scenes.folder.glob("*.safetensors")))))


def test_two_processes_render_each_scene_once(tmp_path: Path) -> None:
    assert FORKED is not None
    other = FORKED.Barrier(2)
    pair = [FORKED.Process(target=render_and_note, args=(tmp_path, other, seconds)) for seconds in (0, 0.5)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
    assert [process.exitcode for process in pair] == [0, 0]
    rendered = [path.name.split("-")[1:] for path in tmp_path.glob("rendered-*")]
    assert sorted(int(scene) for scene, _ in rendered) == list(range(6))
    assert len({process for _, process in rendered}) == 2
    # The fast one has waited for what the slow one was rendering.
    assert [path.read_text() for path in tmp_path.glob("found-*")] == ["6", "6"]
    assert not list((tmp_path / "cache").rglob("*.lock"))


def test_a_scene_of_a_killed_process_is_rendered_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FORKED is not None

    def kill(self: EmbeddedScenes, scene: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def render() -> EmbeddedScenes:
        return EmbeddedScenes(cache_dir=tmp_path, progress=False, processes=1, **SETTINGS)

    with monkeypatch.context() as patched:
        patched.setattr(EmbeddedScenes, "_render", kill)
        killed = FORKED.Process(target=render)
        killed.start()
        killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.lock"))) == 1
    assert len(list(render().folder.glob("*.safetensors"))) == 6
