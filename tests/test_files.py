"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cameo.files import move_into_place, only_writer, write_atomically


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is flushed to the disk and what is renamed, in order."""
    seen: list[tuple[str, str]] = []
    replace, fsync = Path.replace, os.fsync

    def noted_replace(path: Path, target: Path) -> Path:
        seen.append(("rename", target.name))
        return replace(path, target)

    def noted_fsync(descriptor: int) -> None:
        seen.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    monkeypatch.setattr(Path, "replace", noted_replace)
    monkeypatch.setattr(os, "fsync", noted_fsync)
    return seen


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells descriptors apart by /proc")


@needs_proc
def test_content_reaches_the_disk_before_the_name_and_the_name_after_it(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    write_atomically(tmp_path / "result.json", "{}")
    (first, temporary), *rest = events
    assert (first, temporary.startswith(".result.json.")) == ("flush", True)
    assert rest == [("rename", "result.json"), ("flush", tmp_path.name)]


@needs_proc
def test_every_file_of_a_folder_reaches_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, events: list[tuple[str, str]]
) -> None:
    (tmp_path / "part" / "pictures").mkdir(parents=True)
    for name in ("state.json", "pictures/01.png"):
        (tmp_path / "part" / name).write_text(name)
    move_into_place(tmp_path / "part", tmp_path / "checkpoint-1")
    before, after = events[: events.index(("rename", "checkpoint-1"))], events[-1]
    assert {name for _, name in before} == {"state.json", "01.png", "pictures", "part"}
    assert after == ("flush", tmp_path.name)
    assert (tmp_path / "checkpoint-1" / "pictures" / "01.png").read_text() == "pictures/01.png"


def test_a_failed_write_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "result.json").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "result.json", b"new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"result.json": "old"}


@pytest.mark.skipif(os.name == "nt", reason="the file of a lock is removed by filelock")
def test_a_lock_is_released_also_where_its_file_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system", str(path))

    def write_there() -> None:
        with only_writer(tmp_path / "scene", wait=False) as may_write:
            assert may_write

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(OSError, match="Read-only"):
            write_there()
    write_there()
