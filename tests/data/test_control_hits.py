"""How often matches of another sample are right by accident, against a loop over tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cameo.correspondence.controls import matches_of_next_sample, near_tokens, within_tokens
from cameo.data import EmbeddedScenes, MultiViewDataset, RoomRig, collate
from cameo.data.batches import match_batch
from cameo.data.control_hits import control_hits
from cameo.errors import ShapeError
from tests.helpers.matches import random_matches

GRIDS = ((3, 2), (4, 5), (4, 4))


def near(token: int, other: int, width: int) -> bool:
    return max(abs(token // width - other // width), abs(token % width - other % width)) <= 1


def test_within_tokens_is_that_of_a_loop() -> None:
    match = random_matches(4, GRIDS)
    control = matches_of_next_sample(match)
    found, share = within_tokens(control, match, 1), near_tokens(match, 1)
    for place in torch.cartesian_prod(*(torch.arange(side) for side in match.index.shape)).tolist():
        true, other = int(match.index[tuple(place)]), int(control.index[tuple(place)])
        height, width = GRIDS[place[2]]
        assert bool(found[tuple(place)]) == (true >= 0 and other >= 0 and near(true, other, width))
        reached = sum(near(true, token, width) for token in range(height * width)) if true >= 0 else 0
        assert share[tuple(place)] == pytest.approx(reached / (height * width))


def test_a_control_of_other_samples_is_refused() -> None:
    with pytest.raises(ShapeError, match="control: expected"):
        within_tokens(random_matches(1, GRIDS), random_matches(2, GRIDS), 1)
    with pytest.raises(ShapeError, match="control: expected"):
        within_tokens(random_matches(1, ((2, 3), (3, 2))), random_matches(1, ((3, 2), (2, 3))), 1)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> MultiViewDataset:
    settings = {"num_scenes": 8, "size": (32, 32), "content": "bare_rooms", "progress": False}
    folder = tmp_path_factory.mktemp("cache")
    scenes = EmbeddedScenes(rig=RoomRig.fan(3), cache_dir=folder, **settings)  # type: ignore[arg-type]
    return MultiViewDataset(scenes, num_views=3, selection="in_order", length=1000)


def test_hits_are_those_of_the_batches_of_a_training(rooms: MultiViewDataset) -> None:
    found = control_hits(rooms, 8, batch_size=4, num_samples=11)
    right = both = in_reference = both_in_reference = matched = 0
    overlaps: list[float] = []
    for batch in (range(4), range(4, 8)):  # the other three are no batch
        index = match_batch(collate([rooms[number] for number in batch]), 8).index
        for sample in range(4):
            for i, j in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)):
                pairs = zip(index[sample, i, j].tolist(), index[(sample + 1) % 4, i, j].tolist(), strict=True)
                hits = [near(true, other, 8) for true, other in pairs if true >= 0 and other >= 0]
                right, both = right + sum(hits), both + len(hits)
                if j == 0:
                    in_reference, both_in_reference = in_reference + sum(hits), both_in_reference + len(hits)
                    matched += int((index[sample, i, j] >= 0).sum())
    for number in range(8):
        overlaps += rooms.overlap(rooms.choose(number)[0])[1:, 0].tolist()
    assert found.num_samples == 8
    assert found.control == pytest.approx(right / both)
    assert found.control_in_reference == pytest.approx(in_reference / both_in_reference)
    assert found.matched == pytest.approx(matched / (8 * 2 * 64))
    assert found.overlap[1] == pytest.approx(torch.tensor(overlaps).quantile(0.5).item())
    assert found == control_hits(rooms, 8, batch_size=4, num_samples=11)


def test_fixed_poses_make_the_control_right_and_poses_that_vary_do_not(rooms: MultiViewDataset, tmp_path: Path) -> None:
    rig = RoomRig.fan(3, azimuths=(0, 0, 0), elevations=(0, 0, 0), jitter=(60, 25), separation=25, distance=(0.5, 2.5))
    varied = EmbeddedScenes(
        num_scenes=8, size=(32, 32), content="bare_rooms", rig=rig, cache_dir=tmp_path, progress=False
    )
    dataset = MultiViewDataset(varied, num_views=3, selection="in_order", length=1000)
    fixed, free = (control_hits(data, 8, batch_size=8, num_samples=8) for data in (rooms, dataset))
    assert fixed.control > 0.7
    assert free.control < 0.5
    assert 0.11 < free.chance < 0.14  # 9 of 64 tokens, fewer at the border


def test_a_batch_without_a_next_sample_is_refused(rooms: MultiViewDataset) -> None:
    for options in ({"batch_size": 1}, {"batch_size": 8, "num_samples": 7}):
        with pytest.raises(ValueError, match="batch_size: expected 2 to num_samples="):
            control_hits(rooms, 8, **options)
