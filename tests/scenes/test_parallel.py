"""Rendering in several processes: the same scenes, errors that name their scene, and helpers that end."""

from __future__ import annotations

import io
import os
import pickle
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cameo.data import EmbeddedScenes, RoomRig
from cameo.errors import DataError
from cameo.scenes import parallel
from tests.helpers.rendering import Work

FIELDS = ("images", "depth", "intrinsics", "extrinsics")
SETTINGS = {"num_scenes": 4, "size": (8, 8), "content": "bare_rooms", "rig": RoomRig.fan(2), "progress": False}


def assert_same_scenes(first: EmbeddedScenes, second: EmbeddedScenes) -> None:
    files = sorted(path.name for path in first.folder.iterdir())
    assert sorted(path.name for path in second.folder.iterdir()) == files
    for scene in range(len(first)):
        one, other = first.views(scene), second.views(scene)
        assert one.key == other.key
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def test_a_helper_renders_what_this_process_would(tmp_path: Path) -> None:
    alone = EmbeddedScenes(cache_dir=tmp_path / "alone", processes=1, **SETTINGS)  # type: ignore[arg-type]
    other = EmbeddedScenes(cache_dir=tmp_path / "other", processes=1, **SETTINGS)  # type: ignore[arg-type]
    for path in other.folder.iterdir():
        path.unlink()
    given, answers = io.BytesIO(), io.BytesIO()
    for part in (other._render, 2, 0, 3, 1):
        pickle.dump(part, given)
    given.seek(0)
    parallel._help(given, answers)
    answers.seek(0)
    assert pickle.load(answers) == "ready"
    assert [pickle.load(answers) for _ in range(4)] == [(scene, None, False) for scene in (2, 0, 3, 1)]
    assert_same_scenes(alone, other)


def test_helpers_render_and_each_scene_is_counted_once(tmp_path: Path) -> None:
    work, counted = Work(tmp_path), []
    parallel.render_scenes(work.render, range(6), processes=2, done=lambda: counted.append(1))
    assert sorted(work.done_by()) == list(range(6))
    assert len({*work.done_by().values()} - {os.getpid()}) == 1
    assert len(counted) == 6


@pytest.mark.parametrize(
    ("helper", "error", "message"),
    [
        ("refuses", DataError, r"^scene \d+: no place$"),
        ("fails", RuntimeError, r"(?s)^scene \d+: cannot be rendered.*ZeroDivisionError"),
    ],
)
def test_an_error_in_a_helper_is_raised_here(tmp_path: Path, helper: str, error: type[Exception], message: str) -> None:
    work = Work(tmp_path, helper)
    with pytest.raises(error, match=message):
        parallel.render_scenes(work.render, range(50), processes=2, done=lambda: None)
    assert len(work.done_by()) < 50


def test_a_helper_that_ends_leaves_its_scene_to_the_others(tmp_path: Path) -> None:
    work, counted = Work(tmp_path, "ends"), []
    with pytest.warns(UserWarning, match="helped to render scenes ended with status 3; the others go on"):
        parallel.render_scenes(work.render, range(4), processes=2, done=lambda: counted.append(1))
    assert set(work.done_by().values()) == {os.getpid()}
    assert len(counted) == 4


def test_the_scene_of_a_helper_that_ended_comes_back_with_the_word_of_it() -> None:
    """Or another process might finish the scene, and with it the work, before the end of the helper is told."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    rendered: queue.SimpleQueue[parallel._Rendered | parallel._Ended] = queue.SimpleQueue()
    waiting.put(7)
    asked = io.BytesIO()
    helper = SimpleNamespace(stdin=asked, stdout=io.BytesIO(pickle.dumps("ready")), wait=lambda: 3)
    parallel._hand_over(helper, b"", waiting, rendered)  # type: ignore[arg-type]
    assert asked.closed
    assert waiting.empty()
    assert rendered.get_nowait() == parallel._Ended(3, 7)
    assert rendered.empty()


@pytest.mark.parametrize(("seconds", "scenes", "helpers"), [(0.1, 304, 3), (0.1, 64, 1), (0.1, 44, 0), (0.0, 304, 0)])
def test_helpers_are_started_only_where_they_save_time(
    seconds: float, scenes: int, helpers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    now = [7.0]

    def render(scene: int) -> None:
        now[0] += seconds if scene else 60.0  # the first one imports what it needs

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(parallel, "available_cores", lambda: 4)
    monkeypatch.setattr(parallel, "_start", lambda stack, count, *rest: started.append(count) or 0)
    parallel.render_scenes(render, range(scenes), processes=None, done=lambda: None)
    assert started == [helpers]


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    for threads, launched, cores in (("", "", 8), ("3", "", 3), ("16", "2", 4), ("1", "4", 1), ("many", "0", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", launched)
        assert parallel.available_cores() == cores


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a group of processes")
def test_ctrl_c_ends_helpers_as_well_and_says_nothing_of_them(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, signal, time\nfrom cameo.scenes.parallel import render_scenes\n"
        # A shell that started the tests in the background has had them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.helpers.rendering import Work\nwork = Work(pathlib.Path(sys.argv[1]))\n"
        "render_scenes(work.render, range(10**5), processes=3, done=lambda: time.sleep(0.01))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]  # no file that a helper could import again
    run = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    while not (tmp_path / "helped").exists() and run.poll() is None:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    _, told = run.communicate(timeout=300)
    assert b"KeyboardInterrupt" in told
    assert told.count(b"Traceback") == 1
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(run.pid, 0)
