"""Overlap of views, the samples drawn from it, and batches of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from cameo.correspondence import Correspondence
from cameo.data import (
    EmbeddedScenes,
    MultiViewDataset,
    RGBDSequence,
    SceneSource,
    Views,
    collate,
    view_overlap,
)
from cameo.errors import DataError, ShapeError


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedScenes:
    return EmbeddedScenes(num_scenes=6, cache_dir=tmp_path_factory.mktemp("cache"), progress=False)


class Wall:
    """Cameras side by side before a wall at depth 2 that each sees 2 m of: overlap falls linearly."""

    def __init__(self, positions: list[float], scenes: int = 1) -> None:
        self.positions, self.scenes = positions, scenes

    def __len__(self) -> int:
        return self.scenes

    def views(self, scene: int) -> Views:
        count = len(self.positions)
        extrinsics = torch.eye(4).repeat(count, 1, 1)
        extrinsics[:, 0, 3] = -torch.tensor(self.positions)
        intrinsics = torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).repeat(count, 1, 1)
        images = torch.full((count, 3, 32, 32), 100, dtype=torch.uint8)
        return Views(images, torch.full((count, 1, 32, 32), 2.0), intrinsics, extrinsics, f"wall{scene}")


class Altered:
    """A source whose views are changed by a function."""

    def __init__(self, source: SceneSource, change: Callable[[Views], Views]) -> None:
        self.source, self.change = source, change

    def __len__(self) -> int:
        return len(self.source)

    def views(self, scene: int) -> Views:
        return self.change(self.source.views(scene))


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


def test_overlap_of_a_wall() -> None:
    overlap = view_overlap(Wall([0.0, 0.5, 1.0, 5.0]).views(0))
    expected = torch.tensor([[1.0, 0.75, 0.5, 0], [0.75, 1.0, 0.75, 0], [0.5, 0.75, 1.0, 0], [0, 0, 0, 1.0]])
    torch.testing.assert_close(overlap, expected)


def test_overlap_counts_measured_points_only_and_sees_occlusion() -> None:
    views = Wall([0.0, 0.0]).views(0)
    views.depth[0, :, :, :16] = 0.0
    views.depth[1, :, :16] = 1.0  # something near hides the upper half of the wall in view 1
    overlap = view_overlap(views)
    # Of the measured right half of view 0 the lower half shows, and one row of points more at the depth edge,
    # where the 3x3 pixels hold both surfaces.
    assert overlap[0, 1] == 9 / 16
    # Of view 1 the hiding half is off the wall in front of view 0, and of the rest view 0 measured a half.
    assert overlap[1, 0] == pytest.approx(0.25, abs=0.04)
    views.depth[1] = 0.0
    assert view_overlap(views).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_overlap_agrees_with_correspondence(rooms: EmbeddedScenes) -> None:
    views = rooms.views(0)
    match = Correspondence.from_depth(views.depth[None], views.intrinsics[None], views.extrinsics[None], token_grid=16)
    difference = view_overlap(views) - match.matched[0].float().mean(-1).fill_diagonal_(1.0)
    # Measured against ray casts: the overlap is 0.03 high on average (3x3 depth range), the match 0.02 low.
    assert difference.mean().abs() < 0.1
    assert difference.abs().max() < 0.2


def test_neighbouring_room_views_overlap(rooms: EmbeddedScenes) -> None:
    pairs = torch.cat([view_overlap(rooms.views(scene)).diagonal(1) for scene in range(len(rooms))])
    assert ((pairs > 0.3) & (pairs < 0.95)).float().mean() > 0.9


def test_fifty_samples_are_within_bounds_and_well_formed(rooms: EmbeddedScenes) -> None:
    dataset = MultiViewDataset(rooms, num_views=3, min_overlap=0.4, max_overlap=0.8, length=50)
    for index in range(50):
        sample = dataset[index]
        assert sample["images"].shape == (3, 3, 64, 64)
        assert sample["images"].dtype == torch.float32
        assert 0.0 <= sample["images"].min() <= sample["images"].max() <= 1.0
        views = Views(*(sample[name] for name in ("images", "depth", "intrinsics", "extrinsics")), sample["key"])
        overlap = view_overlap(views)[1:, 0]
        assert ((overlap >= 0.4) & (overlap <= 0.8)).all()
        chosen = sample["key"].split("/")[1].split("-")
        assert len(set(chosen)) == 3


def test_samples_are_a_function_of_seed_and_index(rooms: EmbeddedScenes) -> None:
    first, again = MultiViewDataset(rooms, length=1000), MultiViewDataset(rooms, length=2000)
    keys = [first[index]["key"] for index in range(20)]
    assert [again[index]["key"] for index in reversed(range(20))] == keys[::-1]
    assert equal(first[7], again[7])
    other = MultiViewDataset(rooms, seed=1, length=1000)
    assert [other[index]["key"] for index in range(20)] != keys
    wall = Wall([0.0, 0.2, 0.4, 0.6, 0.8])
    by_seed = [[MultiViewDataset(wall, seed=seed, length=20)[i]["key"] for i in range(20)] for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]
    # Each pass goes through all scenes once, and passes differ.
    assert len({key.split("/")[0] for key in keys[:6]}) == len(rooms)
    assert keys[:6] != keys[6:12]


def test_reference_comes_first_and_views_are_those_of_the_source() -> None:
    wall = Wall([0.0, 0.5, 1.0])
    sample = MultiViewDataset(wall, num_views=3, num_reference_views=2, min_overlap=0.7)[0]
    # Only the camera in the middle overlaps both others by 0.7, so it must be the reference.
    assert sample["key"].startswith("wall0/1-")
    order = [int(view) for view in sample["key"].split("/")[1].split("-")]
    assert torch.equal(sample["extrinsics"], wall.views(0).extrinsics[order])
    assert sample["num_reference_views"] == 2
    torch.testing.assert_close(sample["images"], torch.full((3, 3, 32, 32), 100 / 255))


def test_scene_without_admissible_set_is_skipped() -> None:
    class Mixed(Wall):
        def views(self, scene: int) -> Views:
            return Wall([0.0, 0.5] if scene == 1 else [0.0, 9.0]).views(scene)

    dataset = MultiViewDataset(Mixed([0.0, 0.5], scenes=3), num_views=2, length=9)
    assert {dataset[index]["key"].split("/")[0] for index in range(9)} == {"wall1"}


def test_no_admissible_set_names_the_bounds_and_what_there_is() -> None:
    dataset = MultiViewDataset(Wall([0.0, 0.1, 1.9]), num_views=2)
    with pytest.raises(DataError, match=r"min_overlap=0.3 and max_overlap=0.9; overlap found: 0.0\d to 0.9\d"):
        dataset[0]
    with pytest.raises(DataError, match=r"none \(one view per scene\)"):
        MultiViewDataset(Wall([0.0]), num_views=2)[0]


def test_in_order_takes_all_views_as_they_come() -> None:
    wall = Wall([0.0, 0.5, 9.0], scenes=4)  # the last one overlaps nothing
    dataset = MultiViewDataset(wall, num_views=3, num_reference_views=2, selection="in_order")
    assert len(dataset) == 4
    samples = [dataset[index] for index in range(4)]
    assert sorted(sample["key"] for sample in samples) == [f"wall{scene}/0-1-2" for scene in range(4)]
    for sample in samples:
        assert torch.equal(sample["extrinsics"], wall.views(0).extrinsics)
        assert sample["num_reference_views"] == 2
    endless = [MultiViewDataset(wall, num_views=3, selection="in_order", length=50, seed=seed) for seed in (0, 0, 1)]
    keys = [[dataset[index]["key"] for index in range(12)] for dataset in endless]
    assert keys[0] == keys[1] != keys[2]
    assert len(set(keys[0][4:8])) == 4
    with pytest.raises(IndexError, match="expected 0 to 3, got 4"):
        dataset[4]


def test_in_order_needs_the_scenes_number_of_views() -> None:
    message = r"scene wall0: has 3 views, .*got num_views=2; use num_views=3, or selection='overlap'"
    with pytest.raises(DataError, match=message):
        MultiViewDataset(Wall([0.0, 0.5, 1.0]), num_views=2, selection="in_order")

    class Mixed(Wall):
        def views(self, scene: int) -> Views:
            return Wall([0.0, 0.5] if scene == 0 else [0.0, 0.5, 1.0]).views(scene)

    dataset = MultiViewDataset(Mixed([0.0], scenes=2), num_views=2, selection="in_order")
    with pytest.raises(DataError, match="scene wall1: has 3 views"):
        [dataset[index] for index in range(2)]
    with pytest.raises(ValueError, match="unknown selection 'order': did you mean 'in_order'"):
        MultiViewDataset(Wall([0.0]), num_views=1, selection="order")


def test_up_goes_with_the_sample_where_the_source_knows_it(rooms: EmbeddedScenes) -> None:
    plain = MultiViewDataset(Wall([0.0, 0.5]), num_views=2)[0]
    assert "up" not in plain
    assert "up" not in collate([plain, plain])
    up = torch.tensor([0.0, 0.6, 0.8])
    known = MultiViewDataset(Altered(Wall([0.0, 0.5]), lambda views: replace(views, up=up)), num_views=2)[0]
    batch = collate([known, known])
    assert torch.equal(batch["up"], up.expand(2, 3))  # type: ignore[arg-type]
    assert MultiViewDataset(rooms, num_views=2)[0]["up"].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"fields of wall0/.* differ: up; batch samples of sources"):
        collate([known, plain])


def test_missing_depth_becomes_zero() -> None:
    def damage(views: Views) -> Views:
        views.depth[:, :, 0], views.depth[:, :, 1] = float("nan"), -1.0
        return views

    depth = MultiViewDataset(Altered(Wall([0.0, 0.5]), damage), num_views=2)[0]["depth"]
    assert (depth[:, :, :2] == 0).all()
    assert (depth[:, :, 2:] == 2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: replace(v, images=v.images.float() / 0 * 0), r"sample wall0/\d-\d: images hold NaN"),
        (lambda v: replace(v, images=v.images.float()), r"sample wall0/\d-\d: images expected in \[0, 1\]"),
        (lambda v: replace(v, extrinsics=v.extrinsics * torch.tensor([1.0, 1, -1, 1])), r"sample wall0.*-1"),
    ],
)
def test_unusable_samples_are_named(change: Callable[[Views], Views], message: str) -> None:
    source = Altered(Wall([0.0, 0.5]), change)
    dataset = MultiViewDataset(source, num_views=2, length=1)
    dataset._overlaps[0] = torch.full((2, 2), 0.5)
    with pytest.raises(DataError, match=message):
        dataset[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_views": 0}, "num_views: expected at least 1"),
        ({"num_reference_views": 5}, "num_reference_views: expected 0 to num_views=4, got 5"),
        ({"min_overlap": 0.9, "max_overlap": 0.3}, "expected 0 <= min <= max <= 1"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"length": 0}, "length: expected at least 1 or None"),
    ],
)
def test_wrong_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiViewDataset(Wall([0.0, 0.5]), **options)  # type: ignore[arg-type]


def test_length_and_range() -> None:
    dataset = MultiViewDataset(Wall([0.0, 0.5], scenes=3), num_views=2)
    assert len(dataset) == 6
    assert len(list(dataset)) == 6
    with pytest.raises(IndexError, match="expected 0 to 5, got 6"):
        dataset[6]
    with pytest.raises(DataError, match="at least one scene"):
        MultiViewDataset(Wall([0.0], scenes=0))


def test_loader_with_workers_equals_the_loop(rooms: EmbeddedScenes) -> None:
    dataset = MultiViewDataset(rooms, num_views=3, length=4)
    (batch,) = DataLoader(dataset, batch_size=4, num_workers=1, collate_fn=collate)
    expected = collate([dataset[index] for index in range(4)])
    assert equal(batch, expected)
    assert batch["images"].shape == (4, 3, 3, 64, 64)
    assert batch["num_reference_views"] == 1
    assert len(batch["key"]) == 4


def test_collate_refuses_unequal_samples() -> None:
    wall = Wall([0.0, 0.3, 0.6])
    two, three = (MultiViewDataset(wall, num_views=views)[0] for views in (2, 3))
    with pytest.raises(ShapeError, match=r"images of wall0.*expected \[2, 3, 32, 32\], got \[3, 3, 32, 32\]"):
        collate([two, three])
    with pytest.raises(ValueError, match=r"num_reference_views must agree.*got 1 .* and 2"):
        collate([two, MultiViewDataset(wall, num_views=2, num_reference_views=2)[0]])
    with pytest.raises(ValueError, match="differ: point_map"):
        collate([two, {**two, "point_map": torch.zeros(2, 3, 32, 32)}])
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


def test_views_refuse_fields_that_do_not_fit() -> None:
    views = Wall([0.0, 0.5]).views(0)
    with pytest.raises(ShapeError, match=r"depth of 'wall0': expected \[2, 1, 32, 32\], got \[2, 32, 32\]"):
        replace(views, depth=views.depth[:, 0])
    with pytest.raises(ShapeError, match=r"images of 'wall0': expected \[F, 3, H, W\]"):
        replace(views, images=views.images[0])


def test_real_sequence_gives_samples(real_data: Callable[[str], Path]) -> None:
    sequence = RGBDSequence(real_data("rgbd_room"), size=(32, 32), stride=4, split="train")
    dataset = MultiViewDataset(sequence, num_views=4, length=100)
    samples = [dataset[index] for index in range(10)]
    assert len({sample["key"] for sample in samples}) == 10
