"""Runs whose matches come from tracks, or from a matcher of images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cameo
import cameo.training.data
import cameo.training.precompute
import cameo.training.supervision
from cameo import Correspondence, Tracks
from cameo.data import collate
from cameo.data.batches import MatchedDataset, match_batch
from cameo.data.matches import MatchReader
from cameo.errors import DataError
from cameo.training.data import build_dataset, supervised_grids, with_matches
from cameo.training.settings import TrainingConfig
from tests.helpers.match_folders import TWO_GRIDS, config_for, contents, fill, model_for, no_matching
from tests.helpers.tracked_rooms import give_tracks
from tests.helpers.training_runs import make_config, make_trainer

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")


class SamePlace(nn.Module):
    """A matcher that pairs the pixels which lie at the same place, a few of each image, and counts its work."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []

    def forward(self, images: Tensor, intrinsics: Tensor, extrinsics: Tensor, *, pairs: Any = None) -> list[Tracks]:
        assert images.shape[:2] == intrinsics.shape[:2] == extrinsics.shape[:2]
        assert images.shape[-2:] == (32, 32)
        views = images.shape[1]
        wanted = [(i, j) for i in range(views) for j in range(i + 1, views)] if pairs is None else pairs
        self.asked += wanted
        xy = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) * 32
        return [Tracks.from_pairs(dict.fromkeys(wanted, (xy, xy)), views) for _ in images]


@pytest.fixture
def matcher(monkeypatch: pytest.MonkeyPatch) -> SamePlace:
    made = SamePlace()
    monkeypatch.setattr(cameo.training.supervision, "make_matcher", lambda config: made)
    return made


def equal(found: Correspondence | None, expected: Correspondence) -> None:
    assert found is not None
    assert found.matched.any()
    assert torch.equal(found.index, expected.index)
    assert found.match_weight is not None
    assert expected.match_weight is not None
    assert torch.equal(found.match_weight, expected.match_weight)


def test_a_run_with_tracks_trains_the_same_from_the_loader_and_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_tracks(monkeypatch)
    settings = {"correspondence": "tracks", "max_train_steps": 3, "num_views": 3}
    assert fill(config_for(tmp_path, **settings), pairs="drawn").num_pairs
    found = {}
    for way, changes in {"loader": {}, "folder": {"precomputed_correspondence": str(tmp_path / "matches")}}.items():
        trainer = make_trainer(tmp_path / way, **settings, **changes)
        before = [parameter.detach().clone() for parameter in trainer.model.alignment_heads.parameters()]
        if way == "folder":
            monkeypatch.setattr("cameo.data.batches.match_batch", no_matching)
        history = trainer.train().history()
        assert all(entry["alignment_loss"] > 0 for entry in history)
        after = list(trainer.model.alignment_heads.parameters())
        assert not all(map(torch.equal, before, after))  # the gradient of the loss reaches the heads
        found[way] = history, [parameter.detach().clone() for parameter in trainer.trained]
    assert found["folder"][0] == found["loader"][0]
    assert all(map(torch.equal, found["folder"][1], found["loader"][1]))


def test_the_gradient_of_a_match_is_in_proportion_to_its_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_tracks(monkeypatch)
    config = make_config(tmp_path, correspondence="tracks")
    model, dataset = model_for(config), build_dataset(config, "train")
    (token_grids,) = supervised_grids(model, config)
    match = match_batch(collate([dataset[0]]), token_grids, kind="tracks")
    assert match.match_weight is not None
    assert len(match.match_weight[match.matched].unique()) > 3
    query = torch.randn(1, 2, 2, 16, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    key = torch.randn(1, 2, 2, 16, 4, generator=torch.Generator().manual_seed(1))
    head = cameo.AlignmentHead(2, kind="mean")
    (weighted,) = torch.autograd.grad(cameo.alignment_loss(query, key, match, head), query)
    ones = replace(match, match_weight=None)
    (plain,) = torch.autograd.grad(cameo.alignment_loss(query, key, ones, head), query)
    ratio = (weighted.norm(dim=(1, -1)) / plain.norm(dim=(1, -1)))[0]  # [V, N]
    weight = torch.stack([match.match_weight[0, 0, 1], match.match_weight[0, 1, 0]])
    matched = weight > 0
    expected = weight * matched.sum() / weight.sum()
    torch.testing.assert_close(ratio[matched], expected[matched], rtol=1e-3, atol=0)


@pytest.mark.parametrize("pairs", ["all", "drawn"])
def test_tracks_of_every_sample_are_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: str) -> None:
    give_tracks(monkeypatch)
    config = config_for(tmp_path, correspondence="tracks", num_views=3, max_train_steps=3, **TWO_GRIDS)
    fill(config, pairs=pairs, shard_bytes=2000)
    reader, dataset = MatchReader(str(config.precomputed_correspondence)), build_dataset(config, "train")
    assert len(reader.shards) > 1
    for index in range(6):
        sample = dataset[index]
        for token_grids in supervised_grids(model_for(config), config):
            expected = match_batch(collate([sample]), token_grids, kind="tracks")
            equal(reader.read(sample["scene"], sample["scene_views"], token_grids), expected)


def test_tracks_that_changed_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_tracks(monkeypatch)
    config = config_for(tmp_path, correspondence="tracks")
    fill(config)
    monkeypatch.setattr("tests.helpers.tracked_rooms.EVERY", 4)
    matched = with_matches(build_dataset(config, "train"), model_for(config), config)
    with pytest.raises(DataError, match="has other tracks than its matches were computed from"):
        matched[0]


def test_data_without_tracks_say_so(tmp_path: Path) -> None:
    config = config_for(tmp_path, correspondence="tracks")
    with pytest.raises(DataError, match=r"has no tracks, so .* Use a source whose views have tracks"):
        fill(config)
    loaded = with_matches(
        build_dataset(config, "train"), model_for(config), replace(config, precomputed_correspondence=None)
    )
    assert isinstance(loaded, MatchedDataset)
    with pytest.raises(DataError, match=r"has no tracks, so .*or correspondence=matcher"):
        loaded[0]


def test_a_matcher_in_the_step(tmp_path: Path, matcher: SamePlace) -> None:
    trainer = make_trainer(tmp_path, correspondence="matcher", max_train_steps=2, num_views=3)
    history = trainer.train().history()
    assert all(entry["alignment_loss"] > 0 for entry in history)
    assert matcher.asked == [(0, 1), (0, 2), (1, 2)] * 2
    assert trainer.model.cameo_config.training["matcher"] == "xfeat"


def test_a_matcher_that_has_filled_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matcher: SamePlace
) -> None:
    settings = {"correspondence": "matcher", "max_train_steps": 2, "num_views": 3}
    config = config_for(tmp_path, **settings)
    done = fill(config)
    assert done.num_pairs == 4 * 30  # of 4 scenes, all ordered pairs of 6 views
    assert len(matcher.asked) == 4 * 15  # each pair of images once
    monkeypatch.setattr(cameo.training.supervision, "make_matcher", no_matching)
    trainer = make_trainer(tmp_path / "run", precomputed_correspondence=str(tmp_path / "matches"), **settings)
    assert all(entry["alignment_loss"] > 0 for entry in trainer.train().history())


def test_images_are_matched_once_for_all_grids(tmp_path: Path, matcher: SamePlace) -> None:
    config = config_for(tmp_path, correspondence="matcher", **TWO_GRIDS)
    fill(config)
    once = len(matcher.asked)
    assert once == 2 * 4 * 15  # a group for each layer, whose views all have one grid
    reader, dataset = MatchReader(str(config.precomputed_correspondence)), build_dataset(config, "train")
    sample = dataset[0]
    for token_grids in supervised_grids(model_for(config), config):
        tracks = SamePlace()(sample["images"][None], sample["intrinsics"][None], sample["extrinsics"][None])
        expected = match_batch({**collate([sample]), "pixel_matches": tracks}, token_grids, kind="matcher")
        equal(reader.read(sample["scene"], sample["scene_views"], token_grids), expected)


def test_a_view_that_stands_at_two_grids_is_matched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matcher: SamePlace
) -> None:
    grids = [((6, 6), (4, 4))]  # the reference has a grid of its own
    monkeypatch.setattr(cameo.training.precompute, "supervised_grids", lambda model, config: grids)
    config = config_for(tmp_path, correspondence="matcher")
    assert fill(config).num_pairs == 2 * 4 * 30
    assert len(matcher.asked) == 4 * 15


def test_pairs_that_a_matcher_has_not_matched_are_an_error(tmp_path: Path, matcher: SamePlace) -> None:
    config = config_for(tmp_path, correspondence="matcher", max_train_steps=1)
    fill(config, pairs="drawn")
    matched = with_matches(build_dataset(config, "train"), model_for(config), config)
    assert isinstance(matched, MatchedDataset)
    for index in range(2):
        assert not matched[index]["not_precomputed"]
    with pytest.raises(DataError, match=r"not all in the folder .*matches.*Run cameo precompute"):
        [matched[index] for index in range(2, 16)]


def test_a_folder_of_another_matcher_is_refused(tmp_path: Path, matcher: SamePlace) -> None:
    config = config_for(tmp_path, correspondence="matcher")
    fill(config)
    assert contents(config.precomputed_correspondence)
    for name, value in (("matcher", "some/other"), ("matcher_threshold", 0.5), ("max_epipolar_error", None)):
        with pytest.raises(DataError, match=rf"was made with other settings: expected {name}={value}, got {name}="):
            fill(replace(config, **{name: value}))
    with pytest.raises(DataError, match="expected correspondence=depth, got correspondence=matcher"):
        fill(replace(config, correspondence="depth", max_train_steps=7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"correspondence": "matcher", "correspondence_in": "worker"}, r"correspondence=matcher: the matcher runs in"),
        ({"correspondence": "matcher", "reduction": "released"}, "correspondence=matcher: gives no distances in space"),
        ({"correspondence": "tracks", "reduction": "released"}, "correspondence=tracks: gives no distances in space"),
        ({"correspondence": "tracks", "geometry_noise": 0.1}, "geometry_noise=0.1: is noise on the depth"),
        ({"matcher_size": 16}, "matcher_size: expected .*32"),
        ({"matcher_threshold": 1.0}, "matcher_threshold: expected"),
        ({"max_epipolar_error": 0.0}, "max_epipolar_error: expected"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)
