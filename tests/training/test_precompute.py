"""Filling a folder of matches: interrupted, divided among processes, repeated."""

from __future__ import annotations

import os
import runpy
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import cameo.data.matches
import cameo.data.shards
import cameo.training.precompute
from cameo.data import EmbeddedScenes
from cameo.data.shards import INDEX_NAME, shard_files
from cameo.errors import DataError
from cameo.training.data import StepSampler, build_dataset, with_matches
from cameo.training.precompute import Share, precompute
from cameo.training.settings import TrainingConfig
from tests.helpers.match_folders import config_for, contents, fill, model_for, no_matching, records
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import (
    RECIPES,
    write_settings,
)

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")


def _stall_in_the_third_shard(config: TrainingConfig) -> None:
    write, count = cameo.data.shards.write_atomically, 0

    def stalling(path: Path, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == 3:
            path.with_name(f".{path.name}.stalled.tmp").write_bytes(content[: len(content) // 2])
            time.sleep(600)
        write(path, content)

    cameo.data.shards.write_atomically = stalling  # type: ignore[assignment]
    precompute(config, shard_bytes=700, progress=False)


def test_what_was_finished_before_a_kill_is_kept(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    folder = tmp_path / "matches"
    process = get_context("fork").Process(target=_stall_in_the_third_shard, args=(config,))
    process.start()
    end = time.monotonic() + 60
    while not list(folder.glob(".*.stalled.tmp")):
        assert process.exitcode is None
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in shard_files(folder)}
    assert len(left) == 2
    assert not (folder / INDEX_NAME).exists()
    kept = len(contents(folder))

    done = fill(config, shard_bytes=700)
    assert (done.num_kept, done.waiting) == (kept, [])
    assert {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in shard_files(folder)
    }.items() >= left.items()
    assert not list(folder.glob(".*"))
    whole = replace(config, precomputed_correspondence=str(tmp_path / "whole"))
    fill(whole)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path)
    fill(config)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "matches").iterdir()}
    monkeypatch.setattr(cameo.training.precompute, "build_dataset", no_matching)
    again = fill(config)
    assert (again.num_pairs, again.num_kept) == (0, None)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "matches").iterdir()} == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("data", ["scenes", "sequence"])
def test_processes_in_turn_do_what_one_does(tmp_path: Path, order: tuple[int, ...], data: str) -> None:
    settings: dict[str, Any] = {"max_train_steps": 4}
    if data == "sequence":
        settings |= {"train_data_dir": str(write_sequence(tmp_path / "office")), "max_overlap": 0.99}
    config = config_for(tmp_path, **settings)
    whole = replace(config, precomputed_correspondence=str(tmp_path / "whole"))
    alone = fill(whole, pairs="drawn")
    waiting, written = [], []
    for process in order:
        done = fill(config, pairs="drawn", share=Share(process, 3))
        waiting.append(done.waiting)
        written.append(done.num_pairs)
    assert waiting == [[p for p in range(3) if p not in order[: k + 1]] for k in range(3)]
    assert sum(written) == alone.num_pairs
    assert min(written) > 0
    assert contents(config.precomputed_correspondence) == contents(tmp_path / "whole")
    assert fill(config, pairs="drawn").num_kept is None


def test_the_share_of_a_process_is_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Share.from_environment() == Share(0, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert Share.from_environment() == Share(1, 2)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Share.from_environment() == Share(2, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ValueError, match="process: expected 0 to 3, got 4"):
        Share.from_environment()


def test_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe: Callable[[list[str]], None] = runpy.run_path(str(RECIPES / "precompute_correspondence.py"))["main"]
    folder = tmp_path / "matches"
    file = write_settings(tmp_path / "run.yaml", tmp_path / "run", max_train_steps=4)
    arguments = [f"config={file}", f"precomputed_correspondence={folder}"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    recipe([*arguments, "pairs=all"])
    assert "60 pairs of views written" in capsys.readouterr().out.replace(",", "")
    monkeypatch.setenv("RANK", "0")
    recipe([*arguments, "--pairs=all"])
    shown = capsys.readouterr().out
    assert "60 pairs of views written" in shown
    assert "still to be done" not in shown
    recipe([*arguments, "pairs=all", "shard_megabytes=1"])
    assert capsys.readouterr().out == f"{folder}: everything is there, nothing was done\n"
    recipe([*arguments, "pairs=drawn"])  # another plan, of which all is there
    assert ": 0 pairs of views written" in capsys.readouterr().out
    for wrong, message in {
        "pairs=few": "unknown pairs 'few'.*Known: all, auto, drawn",
        "training_processes=0": "training_processes: expected at least 1, got 0",
        "shard_megabytes=big": "shard_megabytes: expected a whole number, got 'big'",
        "pears=all": "unknown setting 'pears'",
    }.items():
        with pytest.raises(ValueError, match=message):
            recipe([*arguments, wrong])
    with pytest.raises(ValueError, match="precomputed_correspondence: expected the folder to write to"):
        recipe(arguments[:1])


def test_more_processes_that_train_draw_more(tmp_path: Path) -> None:
    config = config_for(tmp_path, max_train_steps=1, num_scenes=1)
    assert fill(config, pairs="drawn", training_processes=4).num_pairs > 4
    matched = with_matches(build_dataset(config, "train"), model_for(config), config)
    sampler = StepSampler(start=0, stop=1, batch_size=2, process=3, num_processes=4)
    assert not any(matched[index]["not_precomputed"] for index in next(iter(sampler)))


def test_shards_that_are_gone_are_computed_again(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    longer = replace(config, max_train_steps=config.max_train_steps + 1)
    fill(config, shard_bytes=700)
    folder, (_, second, *_) = tmp_path / "matches", shard_files(tmp_path / "matches")
    before = contents(folder)
    os.truncate(second, second.stat().st_size - 40)
    with pytest.raises(DataError, match=rf"{second.name}: damaged .*; remove the file and run .* again"):
        fill(config)
    lost = len(before)
    second.unlink()
    lost -= len(records(folder))
    assert lost > 0
    assert fill(longer).num_pairs == lost
    assert contents(folder) == before
    # The plan that was finished before the loss is looked at again.
    second = shard_files(folder)[1]
    second.unlink()
    done = fill(longer)
    assert done.num_pairs > 0
    assert fill(config).num_kept == len(before)
    assert contents(folder) == before


def test_scene_without_admissible_set_passes_its_samples_on(tmp_path: Path) -> None:
    config = config_for(tmp_path, num_views=4, min_overlap=0.7, max_train_steps=6)
    dataset = build_dataset(config, "train")
    nominal = [int(dataset.scene_order(index // 4)[index % 4]) for index in range(12)]
    taken = [dataset.choose(index)[0] for index in range(12)]
    assert nominal != taken
    fill(config, pairs="drawn", share=Share(0, 2))
    fill(config, pairs="drawn", share=Share(1, 2))
    matched = with_matches(dataset, model_for(config), config)
    assert not any(matched[index]["not_precomputed"] for index in range(12))


def test_scenes_are_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tmp_path)
    loaded: list[int] = []
    views = EmbeddedScenes.views
    monkeypatch.setattr(EmbeddedScenes, "views", lambda self, scene: loaded.append(scene) or views(self, scene))
    fill(config, pairs="drawn")
    assert sorted(loaded) == [0, 1, 2, 3]
