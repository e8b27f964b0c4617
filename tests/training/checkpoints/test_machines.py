"""Machines with folders of their own: the newest undamaged checkpoint of any is the one that all resume from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cameo.errors import DataError
from cameo.training.checkpoints import machines
from cameo.training.checkpoints.folder import list_checkpoints, publish_checkpoint, staging_folder
from cameo.training.checkpoints.machines import agreed_checkpoint, remove_checkpoints
from cameo.training.checkpoints.verify import damage_of
from tests.helpers.checkpoint_damage import flip
from tests.helpers.process_groups import in_group

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def leave_checkpoints(folder: Path, *steps: int) -> Path:
    """Write checkpoints of a file each, and the figures of their steps."""
    for step in steps:
        staged = staging_folder(folder, step)
        staged.mkdir(parents=True)
        (staged / "weights.safetensors").write_bytes(bytes(range(step, step + 40)))
        (staged / "empty").touch()
        publish_checkpoint(staged, step, {"settings": {}})
        lines = [json.dumps({"step": taken, "loss": 1 / taken}) + "\n" for taken in range(1, step + 1)]
        (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def agreed(folder: Path, name: str = "latest") -> list[Any]:
    """What two machines with the folders 0 and 1 resume from; what is sent is cut into small portions."""

    def agree(rank: int) -> Path:
        machines.PORTION = 7
        return agreed_checkpoint(folder / str(rank), name)

    return in_group(2, agree)


@pytest.mark.parametrize("has_older", [False, True])
def test_the_machine_without_the_newest_gets_a_copy(tmp_path: Path, has_older: bool) -> None:
    source = leave_checkpoints(tmp_path / "1", 2, 4)
    if has_older:
        leave_checkpoints(tmp_path / "0", 2)
    assert agreed(tmp_path) == [tmp_path / "0" / "checkpoint-4", source / "checkpoint-4"]
    copy = tmp_path / "0" / "checkpoint-4"
    assert damage_of(copy) is None
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in (source / "checkpoint-4").iterdir()
    }
    assert (tmp_path / "0" / "metrics.jsonl").read_text() == (source / "metrics.jsonl").read_text()
    names = {"checkpoint-4", "metrics.jsonl"} | ({"checkpoint-2"} if has_older else set())
    assert {path.name for path in (tmp_path / "0").iterdir()} == names


def test_a_damaged_newest_one_gives_way_to_an_undamaged_one_elsewhere(tmp_path: Path) -> None:
    for rank in (0, 1):
        leave_checkpoints(tmp_path / str(rank), 2)
    leave_checkpoints(tmp_path / "0", 4)
    flip(tmp_path / "0" / "checkpoint-4" / "weights.safetensors", 9)
    assert agreed(tmp_path) == [tmp_path / "0" / "checkpoint-2", tmp_path / "1" / "checkpoint-2"]
    # The same step, undamaged on the other machine: the damaged one is replaced.
    leave_checkpoints(tmp_path / "1", 4)
    assert agreed(tmp_path) == [tmp_path / "0" / "checkpoint-4", tmp_path / "1" / "checkpoint-4"]
    assert damage_of(tmp_path / "0" / "checkpoint-4") is None


def test_of_a_shared_folder_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_checkpoints(tmp_path / "0", 2)
    (tmp_path / "1").symlink_to(tmp_path / "0")
    monkeypatch.setattr(machines, "_share", lambda *_, **__: pytest.fail("sends a checkpoint"))
    assert agreed(tmp_path) == [tmp_path / "0" / "checkpoint-2", tmp_path / "1" / "checkpoint-2"]


def test_all_processes_end_with_the_same_words(tmp_path: Path) -> None:
    def assert_refused(*texts: str, name: str = "latest") -> None:
        errors = agreed(tmp_path, name)
        assert [type(error) for error in errors] == [DataError, DataError]
        assert str(errors[0]) == str(errors[1])
        assert all(text in str(errors[0]) for text in texts)

    assert_refused(*(f"{tmp_path / rank} holds no complete checkpoint-N" for rank in "01"), "on another machine: ")
    leave_checkpoints(tmp_path / "0", 2)
    leave_checkpoints(tmp_path / "1", 2, 4)
    assert_refused(f"{tmp_path / '1'} holds later checkpoints (checkpoint-4)", name="checkpoint-2")
    assert [path.name for path in list_checkpoints(tmp_path / "0")] == ["checkpoint-2"]


def test_a_copy_that_cannot_be_written_is_told_to_all(tmp_path: Path) -> None:
    leave_checkpoints(tmp_path / "1", 2)
    (tmp_path / "0").write_text("a file where the output folder should be")
    errors = agreed(tmp_path)
    assert [type(error) for error in errors] == [DataError, DataError]
    for error in errors:
        assert str(error).startswith(f"output_dir={tmp_path / '0'}: a copy of checkpoint-2, which another machine has")


def test_a_copy_that_is_not_the_original_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_checkpoints(tmp_path / "1", 2)
    add = machines._Copy.add

    def change(copy: machines._Copy, name: str, portion: bytes) -> None:
        add(copy, name, portion[::-1] if name == "weights.safetensors" else portion)

    monkeypatch.setattr(machines._Copy, "add", change)
    errors = agreed(tmp_path)
    assert [type(error) for error in errors] == [DataError, DataError]
    assert "weights.safetensors: its checksum is not the one in" in str(errors[0])
    assert not list((tmp_path / "0").rglob("*checkpoint*"))


def test_checkpoints_are_removed_on_all_machines(tmp_path: Path) -> None:
    for rank in (0, 1):
        leave_checkpoints(tmp_path / str(rank), 2, 4)
    assert in_group(2, lambda rank: remove_checkpoints(tmp_path / str(rank))) == [None, None]
    assert not list(tmp_path.glob("*/checkpoint-*"))
