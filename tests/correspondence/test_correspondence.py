"""The correspondence itself: its parts, its checks, batches, devices and processes."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cameo.correspondence import Correspondence
from cameo.errors import ShapeError
from tests.helpers.matched_views import both_ways, two_views, wall


def test_one_view_and_no_depth_are_defined():
    intrinsics, extrinsics = two_views()
    alone = Correspondence.from_depth(wall()[:, :1], intrinsics[:, :1], extrinsics[:, :1], token_grid=4)
    assert alone.index.shape == (1, 1, 1, 16)
    assert not alone.matched.any()
    for value in (0.0, -1.0, math.nan, math.inf):
        empty = Correspondence.from_depth(wall(value), intrinsics, extrinsics, token_grid=4)
        assert not empty.matched.any()
        assert empty.distance.isinf().all()
    nothing = torch.full((1, 2, 3, 8, 8), math.nan)
    assert not Correspondence.from_point_maps(nothing, token_grid=4).matched.any()
    assert not Correspondence.from_point_maps(nothing[:, :1], token_grid=4).matched.any()


def test_batched_equals_loop(rooms):
    for number, together in enumerate(both_ways(rooms, 8)):
        alone = [both_ways({k: v[b : b + 1] for k, v in rooms.items()}, 8)[number] for b in range(2)]
        assert torch.equal(together.index, Correspondence.cat(alone).index)
        torch.testing.assert_close(together.distance, Correspondence.cat(alone).distance)
        assert torch.equal(together.select(1).index, alone[1].index)
        assert torch.equal(together.select(-1).distance, together.distance[1:])


def test_autocast_changes_nothing(rooms):
    rooms = {name: tensor.float() for name, tensor in rooms.items()}  # autocast does not change float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = both_ways(rooms, 8)
    for got, expected in zip(inside, both_ways(rooms, 8), strict=True):
        assert torch.equal(got.index, expected.index)
        assert torch.equal(got.distance, expected.distance)


def test_views_with_their_own_grids(rooms):
    token_grids = [(8, 8), (8, 8), (4, 6), (8, 8)]
    for mixed, even in zip(both_ways(rooms, token_grids), both_ways(rooms, 8), strict=True):
        assert mixed.token_grids == tuple(token_grids)
        assert mixed.index.shape == (2, 4, 4, 64)
        assert (mixed.index[:, 2, :, 24:] == -1).all()
        assert mixed.distance[:, 2, :, 24:].isinf().all()
        assert 0 <= mixed.index[:, :, 2].max() < 24
        others = [0, 1, 3]
        assert torch.equal(mixed.take_views(others).index, even.take_views(others).index)
    for small, mixed in zip(both_ways(rooms, (4, 6)), both_ways(rooms, token_grids), strict=True):
        assert mixed.take_views([2]).index.shape == (2, 1, 1, 24)
        assert small.token_grids == ((4, 6),) * 4


def test_take_views_reorders(rooms):
    match = both_ways(rooms, 4)[0]
    taken = match.take_views([3, 1])
    assert torch.equal(taken.index[:, 0, 1], match.index[:, 3, 1])
    assert torch.equal(taken.distance[:, 1, 0], match.distance[:, 1, 3])
    for views in ([], [0, 0], [4], [-1]):
        with pytest.raises(ValueError, match=r"different views of 0\.\.3"):
            match.take_views(views)


def test_cat_and_to():
    index = torch.tensor([[[-1], [0]], [[0], [-1]]])[None]
    plain = Correspondence(index, ((1, 1), (1, 1)))
    weighted = replace(plain, match_weight=torch.full(index.shape, 0.5))
    joined = Correspondence.cat([plain, weighted])
    assert joined.match_weight.flatten(1).mean(1).tolist() == [1.0, 0.5]
    assert joined.distance is None
    assert (joined.batch_size, joined.num_views, joined.device.type) == (2, 2, "cpu")
    assert joined.to("meta").match_weight.device.type == "meta"
    with pytest.raises(ValueError, match="at least one"):
        Correspondence.cat([])
    with pytest.raises(ValueError, match="some have distances"):
        Correspondence.cat([plain, replace(plain, distance=torch.zeros(index.shape))])
    with pytest.raises(ValueError, match="same token grids"):
        Correspondence.cat([plain, Correspondence(torch.full((1, 2, 2, 4), -1), ((2, 2), (1, 2)))])
    with pytest.raises(ValueError, match=r"sample: expected 0\.\.0, got 1"):
        plain.select(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.full((1, 2, 3, 4), -1)}, r"index: expected \[B, V, V, N\]"),
        ({"index": torch.full((1, 2, 2, 4), -1).int()}, "expected int64"),
        ({"index": torch.full((1, 2, 2, 5), -1)}, "with N of token_grids"),
        ({"index": torch.full((1, 2, 2, 4), -2)}, "outside the target view"),
        ({"index": torch.tensor([[0] * 4, [0] * 4, [-1] * 4, [-1] * 4]).view(1, 2, 2, 4)}, "with itself"),
        ({"index": torch.tensor([[-1] * 4, [2] * 4, [0] * 4, [-1] * 4]).view(1, 2, 2, 4)}, "outside"),
        ({"index": torch.tensor([[-1] * 4, [1] * 4, [0] * 4, [-1] * 4]).view(1, 2, 2, 4)}, "padding"),
        ({"token_grids": ((2, 2),)}, "one \\(h, w\\) per view, 2"),
        ({"token_grids": ((2, 0), (2, 2))}, "positive int"),
        ({"match_weight": torch.ones(1, 2, 2, 3)}, "match_weight: expected"),
        ({"match_weight": torch.full((1, 2, 2, 4), -1.0)}, "negative or NaN"),
        ({"match_weight": torch.full((1, 2, 2, 4), math.nan)}, "negative or NaN"),
        ({"distance": torch.ones(1, 2, 2, 3)}, "distance: expected"),
    ],
)
def test_inconsistent_correspondence_is_refused(changes, message):
    whole = Correspondence(torch.full((1, 2, 2, 4), -1), ((2, 2), (1, 2)))
    with pytest.raises(ValueError, match=message):
        replace(whole, **changes)


def test_wrong_arguments_are_named():
    intrinsics, extrinsics = two_views()
    broken = extrinsics.clone()
    broken[0, 1, :3, :3] = 0
    with pytest.raises(ShapeError, match=r"depth: expected \[B, V, 1, H, W\], got \[1, 2, 64, 64\]"):
        Correspondence.from_depth(wall()[:, :, 0], intrinsics, extrinsics, token_grid=4)
    with pytest.raises(ValueError, match=r"intrinsics: expected a tensor .* got NoneType"):
        Correspondence.from_depth(wall(), None, extrinsics, token_grid=4)
    with pytest.raises(ValueError, match="extrinsics: sample 0, view 1 has a rotation"):
        Correspondence.from_depth(wall(), intrinsics, broken, token_grid=4)
    with pytest.raises(ValueError, match="depth_tolerance: expected a share"):
        Correspondence.from_depth(wall(), intrinsics, extrinsics, token_grid=4, depth_tolerance=0)
    with pytest.raises(ValueError, match="token_grid: expected a positive int"):
        Correspondence.from_depth(wall(), intrinsics, extrinsics, token_grid=(4, 4, 4))
    with pytest.raises(ShapeError, match=r"token_grid: .*each of 2 views"):
        Correspondence.from_depth(wall(), intrinsics, extrinsics, token_grid=[(4, 4)])
    points = torch.zeros(1, 2, 3, 8, 8)
    with pytest.raises(ShapeError, match=r"points: expected \[B, V, 3, H, W\]"):
        Correspondence.from_point_maps(points[0], token_grid=4)
    with pytest.raises(ValueError, match="cycle_threshold: expected more than 0"):
        Correspondence.from_point_maps(points, token_grid=4, cycle_threshold=0)
    with pytest.raises(ValueError, match="max_distance: expected more than 0"):
        Correspondence.from_point_maps(points, token_grid=4, max_distance=-1.0)


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a GPU: reading values, shapes that depend on values, copies from the host."""

    waiting = (
        "_local_scalar_dense",
        "nonzero",
        "is_nonzero",
        "_linalg_check_errors",
        "equal",
        "masked_select",
        "unique",
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.waiting, f"{name} makes the host wait"
        kwargs = kwargs or {}
        places = {arg.device.type for arg in tree_leaves((args, kwargs)) if isinstance(arg, Tensor)}
        if places == {"cpu"} and (name != "_to_copy" or kwargs.get("device", places) in places):
            return func(*args, **kwargs)  # work of the host alone
        if "cpu" in places:
            assert name == "_to_copy", f"{name} reads a tensor of the host"
            assert kwargs["non_blocking"], "the host waits for a copy"
        return func(*args, **kwargs)


@pytest.mark.parametrize("token_grids", [4, [(4, 4), (2, 3)]])
def test_off_the_cpu_the_host_does_not_wait(token_grids):
    points = torch.empty(2, 2, 3, 16, 16, device="meta")
    depth = torch.empty(2, 2, 1, 16, 16, device="meta")
    intrinsics, extrinsics = (torch.empty(2, 2, n, n, device="meta") for n in (3, 4))
    with NoWaiting():
        nearest = Correspondence.from_point_maps(points, token_grid=token_grids, max_distance=1.0)
        projected = Correspondence.from_depth(depth, intrinsics, extrinsics, token_grid=token_grids, check_values=False)
    assert nearest.index.shape == projected.index.shape == (2, 2, 2, 16)
    with NoWaiting(), pytest.raises(AssertionError, match="nonzero makes the host wait"):
        Correspondence.from_depth(depth, intrinsics, extrinsics, token_grid=token_grids)


def test_unchecked_values_still_have_checked_shapes(rooms):
    got = Correspondence.from_depth(**rooms, token_grid=8, check_values=False)
    assert torch.equal(got.index, Correspondence.from_depth(**rooms, token_grid=8).index)
    with pytest.raises(ShapeError, match=r"depth: expected \[B, V, 1, H, W\]"):
        Correspondence.from_depth(**{**rooms, "depth": rooms["depth"][0]}, token_grid=8, check_values=False)
    with pytest.raises(ShapeError, match=r"extrinsics: expected \[2, 4, 4, 4\]"):
        Correspondence.from_depth(
            **{**rooms, "extrinsics": rooms["extrinsics"][:, :2]}, token_grid=8, check_values=False
        )
    with pytest.raises(ShapeError, match=r"intrinsics: .*B and V of depth"):
        Correspondence.from_depth(**{**rooms, "depth": rooms["depth"][:1]}, token_grid=8, check_values=False)


class Matched(torch.utils.data.Dataset):
    """Makes the correspondences in the process that loads the sample."""

    def __init__(self, rooms: dict[str, Tensor]) -> None:
        self.rooms = rooms

    def __len__(self) -> int:
        return 2

    def __getitem__(self, sample: int) -> tuple[Correspondence, ...]:
        return tuple(both_ways({name: tensor[sample, None] for name, tensor in self.rooms.items()}, 16))


def test_in_the_workers_of_a_loader(rooms):
    expected = both_ways(rooms, 16)  # also in this process, before it forks
    loader = torch.utils.data.DataLoader(Matched(rooms), batch_size=2, num_workers=1, collate_fn=collate)
    for got, whole in zip(next(iter(loader)), expected, strict=True):
        assert torch.equal(got.index, whole.index)
        torch.testing.assert_close(got.distance, whole.distance)


def collate(samples: list[tuple[Correspondence, ...]]) -> list[Correspondence]:
    return [Correspondence.cat(parts) for parts in zip(*samples, strict=True)]


def test_a_correspondence_survives_pickling(rooms):
    whole = both_ways(rooms, [(8, 8), (4, 6), (8, 8), (8, 8)])[0]
    again = pickle.loads(pickle.dumps(whole))
    assert (again.token_grids, again.match_weight) == (whole.token_grids, None)
    assert torch.equal(again.index, whole.index)
    assert torch.equal(again.distance, whole.distance)


def test_a_correspondence_can_be_empty():
    none = Correspondence(torch.empty(0, 2, 2, 4, dtype=torch.int64), ((2, 2), (2, 2)))
    assert none.batch_size == 0
    assert Correspondence.from_point_maps(torch.empty(0, 2, 3, 8, 8), token_grid=2).batch_size == 0
