"""A folder of matches that are not those of the run, or that is damaged, is refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cameo.data.matches
import cameo.data.shards
import cameo.training.precompute
from cameo.data.batches import MatchedDataset
from cameo.data.matches import MatchReader
from cameo.data.shards import INDEX_NAME, shard_files
from cameo.errors import DataError
from cameo.training.data import build_dataset, supervised_grids, with_matches
from cameo.training.settings import TrainingConfig
from cameo.wrap import CameoModel
from tests.helpers.match_folders import TWO_GRIDS, config_for, contents, fill, model_for, no_matching
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import (
    scene_cache,
)

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")


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
            "no/folder: holds no matches; write them with cameo precompute",
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
    first.write_bytes(content.replace(b'"version":"2"', b'"version":"3"'))
    with pytest.raises(DataError, match=rf"{first.name}: damaged \(the checksum of its header differs\)"):
        MatchReader(folder)
    cameo.data.shards.Shard.write(
        first, {"views": np.zeros((1, 3), np.int64)}, {}, replace(cameo.data.shards.MATCHES, version=3)
    )
    with pytest.raises(DataError, match=rf"{first.name}: expected version 2 of the format, got 3; run .* into another"):
        MatchReader(folder)


def test_samples_that_do_not_say_where_they_are_from(filled: tuple[TrainingConfig, CameoModel]) -> None:
    config, model = filled
    dataset = build_dataset(config, "train")
    sample = {name: value for name, value in dataset[0].items() if name != "scene"}
    with pytest.raises(DataError, match=r"names no scene and scene_views.*leave precomputed_correspondence out"):
        with_matches([sample], model, config)[0]  # type: ignore[arg-type]


def test_a_folder_that_takes_no_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "matches").touch()
    monkeypatch.setattr(cameo.training.precompute, "match_batch", no_matching)
    with pytest.raises(DataError, match=r"matches: cannot write the matches .*choose a folder"):
        fill(config_for(tmp_path))
