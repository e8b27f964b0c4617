"""Matches that are computed before the training: the same numbers as in the step, or a refusal that says why not."""

from __future__ import annotations

import os
import runpy
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cameo.data.matches
import cameo.data.shards
import cameo.training.precompute
from cameo.correspondence import Correspondence
from cameo.data import EmbeddedScenes, collate
from cameo.data.batches import MatchedDataset, layer_grids, match_batch
from cameo.data.matches import MatchReader, MatchWriter
from cameo.data.shards import INDEX_NAME, shard_files
from cameo.errors import DataError
from cameo.training.data import StepSampler, build_dataset, supervised_grids, training_batches, with_matches
from cameo.training.precompute import Share, precompute
from cameo.training.settings import TrainingConfig, continued_settings
from cameo.training.setup import load_pipeline, wrap_denoiser
from cameo.wrap import CameoModel
from tests.helpers.training_runs import (
    RECIPES,
    SETTINGS,
    fresh_accelerate,
    make_config,
    make_trainer,
    scene_cache,
    write_settings,
)
from tests.recipes.test_recipes import write_sequence

# Supervised layers of 8x8 and of 4x4 tokens.
TWO_GRIDS = {"layer": [0, 2], "preset_options": {**SETTINGS["preset_options"], "attention_levels": [True, True]}}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with fresh_accelerate():
        yield


def config_for(folder: Path, **changes: Any) -> TrainingConfig:
    return make_config(folder / "run", precomputed_correspondence=str(folder / "matches"), **changes)


def fill(config: TrainingConfig, **options: Any) -> Any:
    return precompute(config, progress=False, **options)


def model_for(config: TrainingConfig) -> CameoModel:
    return wrap_denoiser(load_pipeline(config), config)


def contents(folder: str | Path | None) -> dict[Any, list[int]]:
    """All records of a folder that lacks no shard, whichever shard they are in."""
    return records(folder, complete=True)


def records(folder: str | Path | None, *, complete: bool = False) -> dict[Any, list[int]]:
    reader, found = MatchReader(str(folder), complete=complete), {}
    for shard in reader.shards:
        for name in shard.tensors:
            if name.startswith("pairs/"):
                kind = name.removeprefix("pairs/")
                for pair, row in zip(shard.whole(name).tolist(), shard.whole(f"index/{kind}").tolist(), strict=True):
                    assert (kind, *pair) not in found
                    found[kind, *pair] = row
    return found


def no_matching(*_: object, **__: object) -> None:
    pytest.fail("matches are computed that should have been read")


# What training makes of them


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2},
        {"correspondence": "point_map", "reduction": "released", "num_views": 3},
        TWO_GRIDS,
    ],
    ids=["depth", "released", "layers"],
)
def test_training_is_bit_identical_wherever_the_matches_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    settings = {**settings, "max_train_steps": 2}
    config = config_for(tmp_path, **settings)
    assert fill(config, pairs="drawn").num_pairs
    ways = {
        "step": {},
        "worker": {"correspondence_in": "worker"},
        "folder": {"precomputed_correspondence": config.precomputed_correspondence},
    }
    found = {}
    for way, changes in ways.items():
        trainer = make_trainer(tmp_path / way, **settings, **changes)
        if way == "folder":
            monkeypatch.setattr("cameo.data.batches.match_batch", no_matching)
        history = trainer.train().history()
        assert all(entry["alignment_loss"] > 0 for entry in history)
        found[way] = history, [parameter.detach().clone() for parameter in trainer.trained]
    for way in ("worker", "folder"):
        assert found[way][0] == found["step"][0], way
        for ours, expected in zip(found[way][1], found["step"][1], strict=True):
            assert torch.equal(ours, expected), way


def test_a_run_may_go_on_with_matches_from_elsewhere(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    elsewhere = replace(config, precomputed_correspondence="matches", correspondence_in="worker")
    assert continued_settings(config) == continued_settings(elsewhere)


def test_training_without_cameo_reads_no_matches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loss_weight=0.0, precomputed_correspondence="no/such/folder", max_train_steps=1)
    assert trainer.train().step == 1
    with pytest.raises(ValueError, match=r"loss_weight=0 trains without CAMEO.*give the loss_weight"):
        fill(config_for(tmp_path, loss_weight=0.0))


# What is in the folder


def same(found: Correspondence, expected: Correspondence) -> None:
    assert found.token_grids == expected.token_grids
    assert torch.equal(found.index, expected.index)
    assert (found.index >= 0).any()


@pytest.mark.parametrize("kind", ["depth", "point_map"])
@pytest.mark.parametrize("pairs", ["all", "drawn"])
@pytest.mark.parametrize(
    "grids",
    [[((4, 4),) * 3, ((8, 8),) * 3], [((6, 5), (6, 5), (4, 4)), ((2, 2),) * 3]],
    ids=["two layers", "own grid of the references"],
)
def test_every_sample_of_a_run_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, pairs: str, grids: list[Any]
) -> None:
    config = config_for(tmp_path, num_views=3, num_reference_views=2, correspondence=kind, max_train_steps=10)
    monkeypatch.setattr(cameo.training.precompute, "supervised_grids", lambda model, config: grids)
    fill(config, pairs=pairs)
    reader, dataset = MatchReader(str(config.precomputed_correspondence)), build_dataset(config, "train")
    for index in range(20):  # ten steps of two samples
        sample = dataset[index]
        for token_grids in grids:
            match = reader.read(sample["scene"], sample["scene_views"], token_grids)
            assert match is not None
            same(match, match_batch(collate([sample]), token_grids, kind=kind))
    drawn = {(*dataset.choose(index),) and tuple(dataset.choose(index)[1]) for index in range(20)}
    assert len(drawn) > 10  # so that views are met in other company and another order than they were matched in
    every_pair = 4 * 30 * sum(len({(a[i], a[j]) for i in range(3) for j in range(3) if i != j}) for a in grids)
    assert len(contents(config.precomputed_correspondence)) == len(reader)
    assert len(reader) == every_pair if pairs == "all" else len(reader) < every_pair


def test_distances_are_those_of_the_points(tmp_path: Path) -> None:
    config = config_for(tmp_path, correspondence="point_map", reduction="released", num_views=3, max_train_steps=3)
    fill(config, pairs="all")
    reader, dataset = MatchReader(str(config.precomputed_correspondence)), build_dataset(config, "train")
    token_grids = supervised_grids(model_for(config), config)[0]
    for index in range(6):
        sample = dataset[index]
        match = reader.read(sample["scene"], sample["scene_views"], token_grids, distances=True)
        expected = match_batch(collate([sample]), token_grids, kind="point_map")
        assert match is not None
        assert torch.equal(match.distance, expected.distance)


def test_a_rig_whose_reference_has_a_grid_of_its_own(tmp_path: Path) -> None:
    config = config_for(
        tmp_path,
        backbone="zero123plus",
        preset_options={"image_size": 64, "reference_size": 96},
        camera_rig="zero123plus-v1.2",
        resolution=64,
        num_views=7,
        num_scenes=2,
    )
    assert fill(config).num_pairs == 2 * 42
    model, dataset = model_for(config), build_dataset(config, "train")
    matched = with_matches(dataset, model, config)
    assert isinstance(matched, MatchedDataset)
    for index in range(2):
        batch = collate([matched[index]])
        (match,) = batch["correspondences"]  # type: ignore[misc]
        assert batch["not_precomputed"] == [False]
        token_grids = layer_grids(model.supervised_layers[0], batch)
        assert len(set(token_grids)) == 2
        same(match, match_batch(batch, token_grids))


def test_a_long_sequence_has_only_what_is_drawn(tmp_path: Path) -> None:
    sequence = write_sequence(tmp_path / "office", frames=30)
    config = config_for(tmp_path, train_data_dir=str(sequence), max_overlap=0.99, max_train_steps=5, num_views=3)
    done = fill(config)  # 24 frames are more than few
    assert 20 < done.num_pairs <= 10 * 6
    matched = with_matches(build_dataset(config, "train"), model_for(config), config)
    assert not any(matched[index]["not_precomputed"] for index in range(10))
    assert any(matched[index]["not_precomputed"] for index in range(10, 30))
    longer = replace(config, max_train_steps=15)
    more = fill(longer)  # adds to the folder
    assert more.num_kept == done.num_pairs
    assert more.num_pairs > 0
    matched = with_matches(build_dataset(longer, "train"), model_for(longer), longer)
    assert not any(matched[index]["not_precomputed"] for index in range(30))
    assert fill(longer, pairs="all").num_pairs == 24 * 23 - more.num_kept - more.num_pairs
    assert len(contents(config.precomputed_correspondence)) == 24 * 23


@pytest.mark.parametrize(
    ("grid", "kind"),
    [((8, 16), torch.int8), ((12, 11), torch.int16), ((128, 256), torch.int16), ((200, 164), torch.int32)],
)
def test_integers_are_as_small_as_the_grid_allows(tmp_path: Path, grid: tuple[int, int], kind: torch.dtype) -> None:
    from safetensors.torch import load_file

    last = grid[0] * grid[1] - 1
    row = np.arange(last + 1) - 1
    with MatchWriter(tmp_path, {}) as writer:
        writer.add(7, 2, 0, (grid, grid), row[::-1])
        writer.add(7, 0, 2, (grid, grid), row)
    (path,) = shard_files(tmp_path)
    name = "x".join(map(str, grid))
    stored = load_file(path)[f"index/{name}-{name}"]
    assert stored.dtype == kind
    match = MatchReader(tmp_path).read(7, [0, 2], (grid, grid))
    assert match is not None
    assert match.index[0, 0, 1].tolist() == row.tolist()
    assert match.index[0, 1, 0].tolist() == row[::-1].tolist()


def test_shards_are_bounded_and_read_alone(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    done = fill(config, shard_bytes=700)
    paths = shard_files(str(config.precomputed_correspondence))
    assert len(paths) > 3
    # The header and the checksums of the views come on top.
    assert all(path.stat().st_size < 700 + 1000 for path in paths)
    assert sum(path.stat().st_size for path in paths) == done.num_bytes
    whole = replace(config, precomputed_correspondence=str(tmp_path / "whole"))
    fill(whole)
    assert len(shard_files(tmp_path / "whole")) == 1
    assert contents(tmp_path / "whole") == contents(config.precomputed_correspondence)


# Interrupted, divided, repeated


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


# Refused, or computed instead


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainingConfig, CameoModel]:
    """A folder of matches from point maps, without distances, and the model of that run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMEO_CACHE", scene_cache())
        config = config_for(tmp_path_factory.mktemp("filled"), correspondence="point_map", layer=2)
        fill(config)
        return config, model_for(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correspondence": "depth"}, "expected correspondence=depth, got correspondence=point_map"),
        ({"cycle_threshold": 2.0}, r"expected cycle_threshold=2.0, got cycle_threshold=1.5"),
        ({"reduction": "released"}, "expected distances=True, got distances=False"),
        ({"resolution": 64}, "expected resolution=64, got resolution=32"),
        ({"data_seed": 1}, "expected data_seed=1, got data_seed=0"),
        ({"views_per_scene": 8}, "expected views_per_scene=8, got views_per_scene=6"),
        ({"data_format": "objects"}, "expected data_format=objects, got data_format=scenes"),
        (
            {"precomputed_correspondence": "no/folder"},
            "no/folder: holds no matches; write them with recipes/precompute_",
        ),
    ],
)
def test_a_folder_of_other_matches_is_refused_by_name(
    filled: tuple[TrainingConfig, CameoModel], changes: dict[str, Any], message: str
) -> None:
    config, model = filled
    other = replace(config, **changes)
    with pytest.raises(DataError, match=message):
        with_matches(build_dataset(config, "train"), model, other)
    if "precomputed_correspondence" not in changes:
        with pytest.raises(DataError, match=rf"{message}.*Restore the setting, or run .* into another folder"):
            fill(other)


def test_a_folder_without_the_grid_of_a_layer_is_refused_and_takes_it_up(tmp_path: Path) -> None:
    other = config_for(tmp_path, **TWO_GRIDS)
    config = replace(other, layer=2)
    fill(config)
    model, dataset = model_for(other), build_dataset(other, "train")
    assert len(supervised_grids(model, other)) == 2
    with pytest.raises(DataError, match=r"expected matches between the token grids .*got .*Restore layer="):
        with_matches(dataset, model, other)
    fill(other)
    matched = with_matches(dataset, model, other)
    assert not matched[0]["not_precomputed"]


def test_other_depth_or_cameras_are_refused(filled: tuple[TrainingConfig, CameoModel], tmp_path: Path) -> None:
    config, model = filled

    class Altered:
        def __init__(self, source: Any, **changes: Callable) -> None:
            self.source, self.changes = source, changes

        def __len__(self) -> int:
            return len(self.source)

        def views(self, scene: int) -> Any:
            views = self.source.views(scene)
            return replace(views, **{name: change(getattr(views, name)) for name, change in self.changes.items()})

    def drawn(**changes: Callable) -> MatchedDataset:
        dataset = build_dataset(config, "train")
        dataset.source = Altered(dataset.source, **changes)
        return with_matches(dataset, model, config)  # type: ignore[return-value]

    assert not drawn(images=lambda images: 255 - images)[0]["not_precomputed"]
    for name in ("depth", "intrinsics", "extrinsics"):
        matched = drawn(**{name: lambda values: values * (1 + 1e-6)} if name != "extrinsics" else {name: moved})
        with pytest.raises(
            DataError, match=r"view \d of scene \d \(sample train-.* has other depth or cameras .*Restore"
        ):
            matched[0]


def moved(extrinsics: torch.Tensor) -> torch.Tensor:
    shift = torch.zeros(4, 4)
    shift[0, 3] = 1e-3
    return extrinsics + shift


def test_the_recipe_does_not_mix_data(tmp_path: Path) -> None:
    sequence = write_sequence(tmp_path / "office")
    config = config_for(tmp_path, train_data_dir=str(sequence), max_overlap=0.99)
    fill(config, pairs="drawn")
    pose = np.eye(4)
    pose[1, 3] = 0.01
    for frame in range(10):
        np.savetxt(
            sequence / f"frame-{frame:06d}.pose.txt", np.loadtxt(sequence / f"frame-{frame:06d}.pose.txt") @ pose
        )
    with pytest.raises(DataError, match="has other depth or cameras than its matches were computed from"):
        fill(config, pairs="all")


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


def test_damage_is_named(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    fill(config, shard_bytes=700)
    folder, (first, second, *_) = tmp_path / "matches", shard_files(tmp_path / "matches")
    token_grids, reader = supervised_grids(model_for(config), config)[0], MatchReader(folder)
    content = first.read_bytes()
    scene, *views = reader.shards[0].whole(f"pairs/{'-'.join(f'{h}x{w}' for h, w in token_grids)}")[0].tolist()
    assert reader.read(scene, views, token_grids) is not None
    second.unlink()
    with pytest.raises(DataError, match=rf"{second.name} is gone or has another size .*run .* again"):
        MatchReader(folder)
    (folder / INDEX_NAME).unlink()
    os.truncate(first, len(content) - 40)
    with pytest.raises(DataError, match=rf"{first.name}: damaged \(expected \d+ bytes, got \d+\); remove the file"):
        MatchReader(folder)
    os.truncate(first, 900)  # under a reader's hands
    with pytest.raises(DataError, match=rf"{first.name}: damaged \(ends within row"):
        reader.read(scene, views, token_grids)
    for wrong in (b"", b"\xff" * 100):
        first.write_bytes(wrong)
        with pytest.raises(DataError, match=rf"{first.name}: damaged \(a header of"):
            MatchReader(folder)
    first.unlink()
    done = fill(config)
    assert done.num_pairs > 0
    assert done.num_kept > 0
    assert len(contents(folder)) == 4 * 30
    first.write_bytes(content.replace(b'"version":"1"', b'"version":"2"'))
    with pytest.raises(DataError, match=rf"{first.name}: expected version 1 of the format, got 2"):
        MatchReader(folder)


def test_samples_that_do_not_say_where_they_are_from(filled: tuple[TrainingConfig, CameoModel]) -> None:
    config, model = filled
    dataset = build_dataset(config, "train")
    sample = {name: value for name, value in dataset[0].items() if name != "scene"}
    with pytest.raises(DataError, match=r"names no scene and scene_views.*leave precomputed_correspondence out"):
        with_matches([sample], model, config)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_pairs_that_are_missing_are_computed_and_counted(tmp_path: Path, workers: int) -> None:
    config = config_for(tmp_path, max_train_steps=2)
    fill(config, pairs="drawn")
    config = replace(config, dataloader_num_workers=workers)
    model, dataset = model_for(config), build_dataset(config, "train")
    matched = with_matches(dataset, model, config)
    (token_grids,) = supervised_grids(model, config)
    missing = [index for index in range(16) if matched[index]["not_precomputed"]]
    assert missing
    assert min(missing) >= 4
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with training_batches(matched, StepSampler(start=0, stop=8, batch_size=2), config) as batches:
            for step, batch in batches:
                assert "not_precomputed" not in batch
                (match,) = batch["correspondences"]
                same(match, match_batch(collate([dataset[2 * step], dataset[2 * step + 1]]), token_grids))
    told = [str(one.message) for one in caught if "precomputed_correspondence" in str(one.message)]
    assert f"{len(missing)} of 16 samples have pairs of views that are not in the folder" in told[-1]
    assert len(told) == (1 if len(missing) == 1 else 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with training_batches(matched, StepSampler(start=0, stop=2, batch_size=2), config) as batches:
            assert len(list(batches)) == 2


def test_what_waits_for_long_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MatchWriter(tmp_path, {}) as writer:
        writer.add(0, 0, 1, ((1, 2), (1, 2)), np.array([0, -1]))
        writer.add(0, 1, 0, ((1, 2), (1, 2)), np.array([0, -1]))
        assert not shard_files(tmp_path)
        monkeypatch.setattr(cameo.data.matches, "SHARD_SECONDS", -1)
        writer.add(0, 0, 2, ((1, 2), (1, 2)), np.array([0, -1]))
        assert len(MatchReader(tmp_path)) == 2


def test_a_folder_that_takes_no_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "matches").touch()
    monkeypatch.setattr(cameo.training.precompute, "match_batch", no_matching)
    with pytest.raises(DataError, match=r"matches: cannot write the matches .*choose a folder"):
        fill(config_for(tmp_path))


def test_writer_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    grids, row = ((1, 2), (1, 2)), np.array([0, -1])
    with MatchWriter(tmp_path, {}) as writer:
        with pytest.raises(ValueError, match="scene: expected less than 8,388,608, got 8,388,608"):
            writer.add(2**23, 0, 1, grids, row)
        with pytest.raises(ValueError, match="view: expected less than 1,048,576"):
            writer.add(0, 0, 2**20, grids, row)
    (tmp_path / "file").touch()
    writer = MatchWriter(tmp_path / "full", {})
    writer.add(0, 0, 1, grids, row)
    writer.folder = tmp_path / "file"
    with pytest.raises(DataError, match=r"file/.*cannot write the matches .*choose a folder"):
        writer.flush()


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
