from __future__ import annotations

import importlib.util
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cameo.correspondence.matching
import cameo.correspondence.nearest
import cameo.geometry
from cameo.correspondence import Correspondence
from cameo.errors import ShapeError

ASSETS = Path(__file__).parents[1] / "assets"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "correspondence" / "accuracy.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("correspondence_accuracy", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def check_golden(path: Path) -> None:
    stored = np.load(path)
    got = Correspondence.from_point_maps(
        torch.from_numpy(stored["point_map"]),
        token_grid=tuple(stored["size"].tolist()),
        cycle_threshold=float(stored["cycle_threshold"]),
    )
    visible = torch.from_numpy(stored["visible"])
    own = torch.eye(visible.shape[1], dtype=torch.bool)[..., None]
    expected = torch.where(visible & ~own, torch.from_numpy(stored["index"]), -1)
    assert torch.equal(got.index, expected)
    assert int(got.matched.sum()) == int(stored["num_pairs"])


def test_golden_three_views():
    check_golden(ASSETS / "room_3views.npz")


def test_golden_four_views(golden):
    check_golden(golden("room_4views.npz"))


def loop_match(tokens: Tensor, width: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Nearest neighbours and cycle check by plain loops over ``tokens [V, N, 3]``."""
    views, count, _ = tokens.shape

    def nearest(i: int, j: int, x: int) -> tuple[int, float]:
        best, least = -1, math.inf
        for y in range(count):
            apart = math.dist(tokens[i, x].tolist(), tokens[j, y].tolist())
            if apart < least:
                best, least = y, apart
        return best, least

    index = torch.full((views, views, count), -1)
    distance = torch.full((views, views, count), math.inf, dtype=tokens.dtype)
    for i in range(views):
        for j in range(views):
            for x in range(count):
                if i == j:
                    continue
                there, distance[i, j, x] = nearest(i, j, x)
                if there >= 0:
                    back, _ = nearest(j, i, there)
                    if math.hypot(back // width - x // width, back % width - x % width) < threshold:
                        index[i, j, x] = there
    return index, distance


@pytest.mark.parametrize("threshold", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("block", [1, 24 * 8, 1 << 21])
def test_point_maps_equal_plain_loops(monkeypatch, threshold, block):
    monkeypatch.setattr(cameo.correspondence.nearest, "TILE_BYTES", block)
    generator = torch.Generator().manual_seed(3)
    # Whole numbers, so that ties are frequent; image size = grid size, so that nothing is resampled.
    points = torch.randint(0, 3, (2, 3, 3, 3, 4), generator=generator).double()
    points[0, 1, 0, 1, 2] = math.nan
    points[1, 0, 2, 0, 0] = math.inf
    got = Correspondence.from_point_maps(points, token_grid=(3, 4), cycle_threshold=threshold)
    for b in range(2):
        tokens = points[b].flatten(-2).mT
        tokens = torch.where(tokens.isfinite().all(-1, keepdim=True), tokens, math.nan)
        index, distance = loop_match(tokens, 4, threshold)
        assert torch.equal(got.index[b], index)
        torch.testing.assert_close(got.distance[b], distance)


def test_far_from_the_origin_single_precision_is_exact():
    points = torch.rand(1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    points = (points * 64).round() / 64  # exact after the shift
    near = Correspondence.from_point_maps(points, token_grid=8)
    far = Correspondence.from_point_maps(points + 1024, token_grid=8)
    assert torch.equal(near.index, far.index)
    assert torch.equal(near.distance, far.distance)


def test_missing_points_do_not_leak_into_their_neighbours():
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    points = torch.stack([columns, rows, torch.ones(9, 9)]).expand(1, 2, 3, 9, 9).clone()
    whole = Correspondence.from_point_maps(points, token_grid=3)
    assert whole.index[0, 0, 1].tolist() == list(range(9))
    points[0, 1, 1, 0, 0] = math.nan  # nothing reads it: the centre of each token is a pixel centre
    assert torch.equal(Correspondence.from_point_maps(points, token_grid=3).index, whole.index)
    points[0, 1, 1, 4, 4] = math.nan  # the centre of the middle token
    holed = Correspondence.from_point_maps(points, token_grid=3)
    assert not (holed.index[0, 0, 1] == 4).any()
    assert holed.index[0, 1, 0, 4] == -1
    assert holed.distance[0, 1, 0, 4] == math.inf
    assert holed.distance[0, 0, 1, 4] == 3.0  # the nearest one that is measured
    # With an even number of pixels per token one missing pixel of four takes the token away.
    even = Correspondence.from_point_maps(points[..., :8, :8], token_grid=4)
    assert even.distance[0, 1, 0].isinf().nonzero().flatten().tolist() == [0, 10]


def test_max_distance_drops_far_matches_only():
    points = torch.tensor([[0.0, 5.0], [0.0, 6.0]])[None, :, None, None, :].repeat(1, 1, 3, 1, 1)
    assert Correspondence.from_point_maps(points, token_grid=(1, 2)).index[0, 0, 1].tolist() == [0, 1]
    near = Correspondence.from_point_maps(points, token_grid=(1, 2), max_distance=1.0)
    assert near.index[0, 0, 1].tolist() == [0, -1]
    torch.testing.assert_close(near.distance[0, 0, 1], torch.tensor([0.0, math.sqrt(3)]))


def test_cycle_threshold_is_strict():
    # Token 0 of view 0 meets the only point of view 1, whose own nearest is token 1, one column away.
    points = torch.tensor([[1.0, 0.0], [0.1, 9.0]])[None, :, None, None, :].repeat(1, 1, 3, 1, 1)
    points[0, 1, :, 0, 1] = math.nan
    assert Correspondence.from_point_maps(points, token_grid=(1, 2)).index[0, 0, 1].tolist() == [0, 0]
    strict = Correspondence.from_point_maps(points, token_grid=(1, 2), cycle_threshold=1.0)
    assert strict.index[0, 0, 1].tolist() == [-1, 0]


def two_views(right: float = 0.0, ahead: float = 0.0) -> tuple[Tensor, Tensor]:
    """Two cameras that look along +z; the second is moved."""
    intrinsics = torch.tensor([[64.0, 0, 32], [0, 64, 32], [0, 0, 1]]).repeat(1, 2, 1, 1)
    extrinsics = torch.eye(4).repeat(1, 2, 1, 1)
    extrinsics[0, 1, 0, 3], extrinsics[0, 1, 2, 3] = -right, -ahead
    return intrinsics, extrinsics


def wall(depth: float = 2.0) -> Tensor:
    return torch.full((1, 2, 1, 64, 64), depth)


def test_depth_hand_computed_shift_and_out_of_frame():
    # 0.5 units right at depth 2 with focal length 64 is 16 pixels, one token of four, to the left.
    match = Correspondence.from_depth(wall(), *two_views(right=0.5), token_grid=4)
    grid = torch.arange(16).view(4, 4)
    expected = torch.full((4, 4), -1)
    expected[:, 1:] = grid[:, :-1]
    assert torch.equal(match.index[0, 0, 1].view(4, 4), expected)
    expected = torch.full((4, 4), -1)
    expected[:, :-1] = grid[:, 1:]
    assert torch.equal(match.index[0, 1, 0].view(4, 4), expected)
    assert (match.index[0, [0, 1], [0, 1]] == -1).all()
    torch.testing.assert_close(match.distance[match.matched], torch.zeros(24))
    assert match.distance[0, 0, 1].view(4, 4)[:, 0].isinf().all()


def test_occluded_points_do_not_match_but_have_a_distance():
    depth = wall()
    depth[0, 1, :, :32] = 1.0
    match = Correspondence.from_depth(depth, *two_views(), token_grid=2)
    assert match.index[0, 0, 1].tolist() == [-1, -1, 2, 3]
    # Token 0 at (16, 16): what hides the point lies half way to the camera.
    point = torch.tensor([-0.5, -0.5, 2.0])
    torch.testing.assert_close(match.distance[0, 0, 1, 0], (point / 2).norm())


def test_points_behind_the_other_camera_do_not_match():
    match = Correspondence.from_depth(wall(), *two_views(ahead=3.0), token_grid=2)
    assert (match.index[0, 0, 1] == -1).all()
    assert match.distance[0, 0, 1].isinf().all()


def test_one_view_and_no_depth_are_defined():
    intrinsics, extrinsics = two_views()
    alone = Correspondence.from_depth(wall()[:, :1], intrinsics[:, :1], extrinsics[:, :1], token_grid=4)
    assert alone.index.shape == (1, 1, 1, 16)
    assert not alone.visible.any()
    for value in (0.0, -1.0, math.nan, math.inf):
        empty = Correspondence.from_depth(wall(value), intrinsics, extrinsics, token_grid=4)
        assert not empty.visible.any()
        assert empty.distance.isinf().all()
    nothing = torch.full((1, 2, 3, 8, 8), math.nan)
    assert not Correspondence.from_point_maps(nothing, token_grid=4).matched.any()
    assert not Correspondence.from_point_maps(nothing[:, :1], token_grid=4).matched.any()


def test_a_target_token_needs_a_measurement():
    # The hole is the centre of the target token; the points land beside it, where there is depth.
    depth = wall()
    depth[0, 1, 0, 7:9, 7:9] = 0
    match = Correspondence.from_depth(depth, *two_views(right=0.125), token_grid=4)
    assert match.index[0, 0, 1, 0] == -1
    assert match.distance[0, 0, 1, 0] == 0
    assert match.index[0, 0, 1, 1] == 1
    assert match.index[0, 1, 0, 0] == -1


def test_depth_edges_are_not_averaged():
    # The centres of the middle tokens lie on the edge between depth 1 and depth 4.
    depth = wall(4.0)
    depth[..., :32] = 1.0
    match = Correspondence.from_depth(depth, *two_views(), token_grid=1)
    assert match.index[0, 0, 1].tolist() == [0]
    assert match.distance[0, 0, 1].item() == 0


@pytest.mark.parametrize(("tolerance", "kept"), [(0.01, False), (0.04, True)])
def test_depth_tolerance(tolerance, kept):
    depth = wall()
    depth[0, 1] = 2.06
    match = Correspondence.from_depth(depth, *two_views(), token_grid=4, depth_tolerance=tolerance)
    assert match.matched[0, 0, 1].all() == kept
    assert match.matched[0, 0, 1].any() == kept


def test_a_distant_world_origin_costs_nothing(benchmark):
    room = benchmark.make_room(0)
    depth, intrinsics = room.depth(64).float(), room.intrinsics_at(64).float()
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = torch.tensor([1e5, -2e5, 3e5])
    here = Correspondence.from_depth(depth, intrinsics, room.extrinsics, token_grid=8)
    there = Correspondence.from_depth(depth, intrinsics, room.extrinsics @ shift, token_grid=8)
    assert torch.equal(here.index, there.index)
    assert here.visible.float().mean() > 0.2


def test_depth_reaches_its_goal_on_analytic_rooms(benchmark):
    matchers = {"depth": benchmark.by_depth(), "points": benchmark.by_points()}
    scores = benchmark.measure(matchers, 256, 32, range(2))
    assert scores["depth"].visible > 5000
    assert scores["depth"].recall >= 0.95
    assert scores["depth"].false <= 0.01
    assert scores["depth"].on_token >= 0.98
    # What the cycle check alone lets through is the reason why depth is offered.
    assert scores["points"].false > 0.05


@pytest.fixture(scope="module")
def rooms(benchmark) -> dict[str, Tensor]:
    built = [benchmark.make_room(seed) for seed in range(2)]
    return {
        "depth": torch.cat([room.depth(64) for room in built]),
        "intrinsics": torch.cat([room.intrinsics_at(64) for room in built]),
        "extrinsics": torch.cat([room.extrinsics for room in built]),
    }


def both_ways(rooms: dict[str, Tensor], size) -> list[Correspondence]:
    points = cameo.geometry.unproject(**rooms)
    return [
        Correspondence.from_depth(**rooms, token_grid=size),
        Correspondence.from_point_maps(points, token_grid=size),
    ]


def test_batched_equals_loop(rooms):
    for number, together in enumerate(both_ways(rooms, 8)):
        alone = [both_ways({k: v[b : b + 1] for k, v in rooms.items()}, 8)[number] for b in range(2)]
        assert torch.equal(together.index, Correspondence.cat(alone).index)
        torch.testing.assert_close(together.distance, Correspondence.cat(alone).distance)
        assert torch.equal(together.select(1).index, alone[1].index)
        assert torch.equal(together.select(-1).distance, together.distance[1:])


def test_autocast_changes_nothing(rooms):
    rooms = {name: tensor.float() for name, tensor in rooms.items()}  # autocast leaves float64 alone
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
    weighted = replace(plain, weight=torch.full(index.shape, 0.5))
    joined = Correspondence.cat([plain, weighted])
    assert joined.weight.flatten(1).mean(1).tolist() == [1.0, 0.5]
    assert joined.distance is None
    assert (joined.batch_size, joined.num_views, joined.device.type) == (2, 2, "cpu")
    assert joined.to("meta").weight.device.type == "meta"
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
        ({"weight": torch.ones(1, 2, 2, 3)}, "weight: expected"),
        ({"weight": torch.full((1, 2, 2, 4), -1.0)}, "negative or NaN"),
        ({"weight": torch.full((1, 2, 2, 4), math.nan)}, "negative or NaN"),
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


@pytest.mark.parametrize(
    ("image", "size"), [((64, 64), (32, 32)), ((37, 53), (8, 9)), ((3, 5), (4, 7)), ((9, 9), (3, 3)), ((6, 6), (6, 6))]
)
def test_points_are_resampled_as_interpolate_does(image, size):
    points = torch.randn(2, 2, 3, *image, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = cameo.correspondence.matching._token_points(points, (size, size))
    whole = torch.nn.functional.interpolate(points.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(got.flatten(0, 1), whole.flatten(2).mT, rtol=0, atol=1e-14)


class NoWaiting(TorchDispatchMode):
    """Fails where the host would wait for a GPU: values read, shapes that depend on them, copies from the host."""

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
        tensors = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), f"{name} reads a tensor of the host"
        return func(*args, **(kwargs or {}))


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
    """Correspondences made where a sample is loaded."""

    def __init__(self, rooms: dict[str, Tensor]) -> None:
        self.rooms = rooms

    def __len__(self) -> int:
        return 2

    def __getitem__(self, sample: int) -> tuple[Correspondence, ...]:
        return tuple(both_ways({name: tensor[sample, None] for name, tensor in self.rooms.items()}, 16))


def test_in_the_workers_of_a_loader(rooms):
    expected = both_ways(rooms, 16)  # in this process too, before it forks
    loader = torch.utils.data.DataLoader(Matched(rooms), batch_size=2, num_workers=1, collate_fn=collate)
    for got, whole in zip(next(iter(loader)), expected, strict=True):
        assert torch.equal(got.index, whole.index)
        torch.testing.assert_close(got.distance, whole.distance)


def collate(samples: list[tuple[Correspondence, ...]]) -> list[Correspondence]:
    return [Correspondence.cat(parts) for parts in zip(*samples, strict=True)]


def test_a_correspondence_survives_pickling(rooms):
    whole = both_ways(rooms, [(8, 8), (4, 6), (8, 8), (8, 8)])[0]
    again = pickle.loads(pickle.dumps(whole))
    assert (again.token_grids, again.weight) == (whole.token_grids, None)
    assert torch.equal(again.index, whole.index)
    assert torch.equal(again.distance, whole.distance)


def test_a_correspondence_can_be_empty():
    none = Correspondence(torch.empty(0, 2, 2, 4, dtype=torch.int64), ((2, 2), (2, 2)))
    assert none.batch_size == 0
    assert Correspondence.from_point_maps(torch.empty(0, 2, 3, 8, 8), token_grid=2).batch_size == 0
