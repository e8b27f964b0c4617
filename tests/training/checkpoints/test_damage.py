"""A checkpoint that is damaged is never resumed from: the one before is, or the run ends with its name and a cure."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest

from cameo.errors import DataError
from cameo.training.checkpoints.folder import find_checkpoint, list_checkpoints
from cameo.training.checkpoints.verify import STATE_NAME, check_checkpoint, damage_of, read_state, write_state
from tests.helpers.checkpoint_damage import DAMAGES, FILES, flip, train
from tests.helpers.training_runs import fresh_accelerate, same_files, scene_cache

each_damage = pytest.mark.parametrize("damage", DAMAGES)
each_file = pytest.mark.parametrize("name", FILES)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves after two of four steps, and in `whole` what it leaves in the end."""
    folder = tmp_path_factory.mktemp("left")
    with pytest.MonkeyPatch.context() as patch, fresh_accelerate():
        patch.setenv("CAMEO_CACHE", scene_cache())
        train(folder / "half", 2)
        train(folder / "whole", 4)
    return folder


@pytest.fixture
def run(left: Path, tmp_path: Path) -> Path:
    return shutil.copytree(left / "half", tmp_path / "run")


def test_these_are_all_files_of_a_checkpoint(left: Path) -> None:
    assert sorted(path.name for path in (left / "half" / "checkpoint-2").iterdir()) == sorted(FILES)
    assert read_state(left / "half" / "checkpoint-2")["files"].keys() == {*FILES} - {STATE_NAME}


@each_damage
@each_file
def test_latest_takes_the_one_before_and_an_explicit_one_is_refused(name: str, damage: str, run: Path) -> None:
    assert find_checkpoint(run, "latest").name == "checkpoint-2"
    DAMAGES[damage](run / "checkpoint-2" / name)
    with pytest.warns(
        UserWarning, match=rf"checkpoint-2 is damaged and not used \({name}.*continues from checkpoint-1"
    ):
        assert find_checkpoint(run, "latest").name == "checkpoint-1"
    cure = r"in .*run: checkpoint-1$" if (name, damage) == (STATE_NAME, "gone") else r"resume_from_checkpoint=latest"
    with pytest.raises(DataError, match=rf"(?s)resume_from_checkpoint=checkpoint-2: .*{name}.*{cure}"):
        find_checkpoint(run, "checkpoint-2")
    # The one before may be named too: a damaged later one is none.
    assert find_checkpoint(run, "checkpoint-1").name == "checkpoint-1"
    DAMAGES[damage](run / "checkpoint-1" / name)
    with pytest.raises(
        DataError, match=rf"no undamaged checkpoint-N \(checkpoint-2: {name}.*checkpoint-1: {name}.*anew"
    ):
        find_checkpoint(run, "latest")


@pytest.mark.slow
@each_damage
@each_file
@pytest.mark.usefixtures("alone_on_shared_scenes")
def test_the_run_ends_as_if_nothing_had_happened(name: str, damage: str, run: Path, left: Path) -> None:
    DAMAGES[damage](run / "checkpoint-2" / name)
    with pytest.warns(UserWarning, match="checkpoint-2 is damaged and not used"):
        train(run, 4, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert (run / "metrics.jsonl").read_text() == (left / "whole" / "metrics.jsonl").read_text()
    for file in ("pytorch_lora_weights", "average", "optimizer", "random_states_0"):
        assert same_files(*(place / "checkpoint-4" / f"{file}.safetensors" for place in (run, left / "whole")))
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-4"]
    assert damage_of(run / "checkpoint-4") is None
    aside = ["checkpoint-2.aside-1"] if name == STATE_NAME else []  # nothing says that it was one of this run
    assert sorted(path.name for path in run.glob("*checkpoint*")) == sorted(["checkpoint-4", *aside])


@pytest.mark.usefixtures("alone_on_shared_scenes")
def test_a_damaged_checkpoint_that_is_named_is_refused_by_the_run(run: Path) -> None:
    flip(run / "checkpoint-2" / "optimizer.safetensors", 5000)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        DataError, match=r"checkpoint-2/optimizer.safetensors: its checksum is not .*Copy that checkpoint"
    ):
        train(run, 4, resume_from_checkpoint="checkpoint-2")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("alone_on_shared_scenes")
def test_what_is_in_the_way_of_a_checkpoint_gives_way(run: Path, left: Path) -> None:
    (run / "checkpoint-2" / STATE_NAME).unlink()
    (run / "checkpoint-3").write_text("a file")
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-4")
    (run / "checkpoint-4" / "optimizer.safetensors").unlink()  # a copy that was not finished
    with pytest.warns(UserWarning, match=r"no whole checkpoint; it is now checkpoint-\d.aside-1"):
        train(run, 4, resume_from_checkpoint="latest")
    assert [path.name for path in list_checkpoints(run)] == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert all(damage_of(path) is None for path in list_checkpoints(run))
    assert sorted(path.name for path in run.glob("*.aside-*")) == [f"checkpoint-{step}.aside-1" for step in (2, 3, 4)]
    assert (run / "checkpoint-3.aside-1").read_text() == "a file"
    assert (run / "metrics.jsonl").read_text() == (left / "whole" / "metrics.jsonl").read_text()


def test_every_bit_of_a_state_file_counts(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    write_state(tmp_path, {"step": 12, "settings": {"seed": 0, "learning_rate": 1e-5, "views": [1, 2]}})
    state, content = read_state(tmp_path), (tmp_path / STATE_NAME).read_bytes()
    refused = 0
    for bit in range(len(content) * 8):
        (tmp_path / STATE_NAME).write_bytes(content)
        flip(tmp_path / STATE_NAME, bit)
        if damage_of(tmp_path) is None:  # 1e-05 may become 1E-05, which is the same
            assert read_state(tmp_path) == state, bit
        else:
            refused += 1
    assert refused > 0.99 * len(content) * 8
    (tmp_path / STATE_NAME).write_bytes(content)
    assert check_checkpoint(tmp_path) == state


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "", "link", "pipe"])
def test_nothing_outside_a_checkpoint_is_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (tmp_path / "outside").write_text("secret")
    write_state(folder, {"step": 1, "settings": {}})
    (folder / "link").symlink_to(tmp_path / "outside")
    os.mkfifo(folder / "pipe")
    state = read_state(folder)
    state["files"][name] = {"bytes": 6, "crc32": "00000000"}
    del state["crc32"]
    content = json.dumps(state, sort_keys=True)
    state["crc32"] = f"{zlib.crc32(content.encode()):08x}"  # as somebody who means it would
    (folder / STATE_NAME).write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"outside the checkpoint|no plain file"):
        check_checkpoint(folder)
