"""Matches that are computed before the training: the same numbers as in the step."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cameo.data.matches
import cameo.data.shards
import cameo.training.precompute
from cameo.data import collate
from cameo.data.batches import MatchedDataset, layer_grids, match_batch
from cameo.data.matches import MatchReader
from cameo.data.shards import shard_files
from cameo.training.data import StepSampler, build_dataset, supervised_grids, training_batches, with_matches
from cameo.training.settings import continued_settings
from tests.helpers.match_folders import TWO_GRIDS, config_for, contents, fill, model_for, no_matching, same
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import (
    make_config,
    make_trainer,
)

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")


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


def test_shards_are_bounded_and_read_alone(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    done = fill(config, shard_bytes=700)
    paths = shard_files(str(config.precomputed_correspondence))
    assert len(paths) > 3
    # The header and the checksums of the views come on top.
    assert all(path.stat().st_size < 700 + 1300 for path in paths), [path.stat().st_size for path in paths]
    assert sum(path.stat().st_size for path in paths) == done.num_bytes
    whole = replace(config, precomputed_correspondence=str(tmp_path / "whole"))
    fill(whole)
    assert len(shard_files(tmp_path / "whole")) == 1
    assert contents(tmp_path / "whole") == contents(config.precomputed_correspondence)


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
