"""Which checkpoints are removed, and which are never."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cameo.errors import DataError
from cameo.training.checkpoints import folder as checkpoints
from cameo.training.checkpoints.verify import STATE_NAME, damage_of


def publish(run: Path, step: int) -> Path:
    staged = checkpoints.staging_folder(run, step)
    staged.mkdir(parents=True)
    (staged / "weights.safetensors").write_bytes(b"weights")
    return checkpoints.publish_checkpoint(staged, step, {"settings": {}})


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


@pytest.mark.parametrize("limit", [1, 2])
def test_the_last_undamaged_checkpoint_stays_until_the_next_one_is_undamaged(limit: int, tmp_path: Path) -> None:
    for step in (1, 2):
        publish(tmp_path, step)
    (publish(tmp_path, 3) / "weights.safetensors").write_bytes(b"weight!")  # what a bad disk makes of it
    with pytest.warns(UserWarning, match=r"checkpoint-3 is damaged as soon as it is written \(weights.safetensors: "):
        checkpoints.prune_checkpoints(tmp_path, limit, newest=3)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    publish(tmp_path, 4)
    checkpoints.prune_checkpoints(tmp_path, limit, newest=4)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)][-limit:]


def test_damaged_later_ones_do_not_push_out_the_one_that_was_written_now(tmp_path: Path) -> None:
    """A run that went back to step 5, since checkpoints 8 and 9 were damaged, is stopped at step 6."""
    for step in (5, 8, 9):
        publish(tmp_path, step)
    for step in (8, 9):
        (tmp_path / f"checkpoint-{step}" / "weights.safetensors").unlink()
    publish(tmp_path, 6)
    checkpoints.prune_checkpoints(tmp_path, 1, newest=6)
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8", "checkpoint-9"]
    with pytest.warns(UserWarning, match="checkpoint-[89] is damaged and not used"):
        assert checkpoints.find_checkpoint(tmp_path, "latest").name == "checkpoint-6"


def test_folders_of_others_stay(tmp_path: Path) -> None:
    """transformers' Trainer has checkpoints of the same name, with a state file of the same name."""
    publish(tmp_path, 3)
    state = {"global_step": 500, "log_history": []}
    states = {"checkpoint-500": state, "checkpoint-7": {"step": 8, "settings": {}}, "checkpoint-9": {"step": 9}}
    for name, content in states.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE_NAME).write_text(json.dumps(content))
    (tmp_path / "checkpoint-11").symlink_to(tmp_path / "checkpoint-3")
    before = names(tmp_path)
    checkpoints.prune_checkpoints(tmp_path, 0)
    assert names(tmp_path) == [name for name in before if name != "checkpoint-3"]


def test_a_damaged_checkpoint_is_replaced_and_what_is_none_is_kept_aside(tmp_path: Path) -> None:
    (publish(tmp_path, 1) / "weights.safetensors").unlink()
    assert damage_of(publish(tmp_path, 1)) is None
    assert names(tmp_path) == ["checkpoint-1"]
    for number in (1, 2):
        (tmp_path / "checkpoint-1" / STATE_NAME).unlink()
        with pytest.warns(UserWarning, match=rf"no whole checkpoint; it is now checkpoint-1.aside-{number}"):
            assert damage_of(publish(tmp_path, 1)) is None
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-1.aside-1", "checkpoint-1.aside-2"]
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-1"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, 1)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "move_into_place", fail)
    with pytest.raises(OSError, match="No space left"):
        publish(tmp_path, 1)
    assert damage_of(tmp_path / "checkpoint-1") is None


def test_a_folder_name_that_is_no_step(tmp_path: Path) -> None:
    shutil.copytree(publish(tmp_path, 1), tmp_path / "elsewhere")
    assert checkpoints.find_checkpoint(tmp_path / "new", str(tmp_path / "elsewhere")).name == "elsewhere"
    with pytest.raises(DataError, match=r"checkpoint-5: not a complete .*no trainer_state.json\); in .*: checkpoint-1"):
        checkpoints.find_checkpoint(tmp_path, "checkpoint-5")
