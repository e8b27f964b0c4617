"""Matches of point maps: nearest neighbors that are cycle-consistent."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import cameo.correspondence.matching
import cameo.correspondence.neighbors.nearest
import cameo.geometry
from cameo.correspondence import Correspondence

ASSETS = Path(__file__).parents[1] / "assets"


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
    """Nearest neighbors and cycle check by plain loops over ``tokens [V, N, 3]``."""
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
    monkeypatch.setattr(cameo.correspondence.neighbors.nearest, "TILE_BYTES", block)
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


def test_missing_points_do_not_leak_into_their_neighbors():
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    points = torch.stack([columns, rows, torch.ones(9, 9)]).expand(1, 2, 3, 9, 9).clone()
    whole = Correspondence.from_point_maps(points, token_grid=3)
    assert whole.index[0, 0, 1].tolist() == list(range(9))
    points[0, 1, 1, 0, 0] = math.nan  # no token reads it, since the center of each token is a pixel center
    assert torch.equal(Correspondence.from_point_maps(points, token_grid=3).index, whole.index)
    points[0, 1, 1, 4, 4] = math.nan  # the center of the middle token
    holed = Correspondence.from_point_maps(points, token_grid=3)
    assert not (holed.index[0, 0, 1] == 4).any()
    assert holed.index[0, 1, 0, 4] == -1
    assert holed.distance[0, 1, 0, 4] == math.inf
    assert holed.distance[0, 0, 1, 4] == 3.0  # the nearest one that is measured
    # With an even number of pixels per token one missing pixel of four is enough for a token without a measurement.
    even = Correspondence.from_point_maps(points[..., :8, :8], token_grid=4)
    assert even.distance[0, 1, 0].isinf().nonzero().flatten().tolist() == [0, 10]


def test_max_distance_drops_far_matches_only():
    points = torch.tensor([[0.0, 5.0], [0.0, 6.0]])[None, :, None, None, :].repeat(1, 1, 3, 1, 1)
    assert Correspondence.from_point_maps(points, token_grid=(1, 2)).index[0, 0, 1].tolist() == [0, 1]
    near = Correspondence.from_point_maps(points, token_grid=(1, 2), max_distance=1.0)
    assert near.index[0, 0, 1].tolist() == [0, -1]
    torch.testing.assert_close(near.distance[0, 0, 1], torch.tensor([0.0, math.sqrt(3)]))


def test_cycle_threshold_is_strict():
    # Token 0 of view 0 meets the only point of view 1, whose nearest neighbor is token 1, one column away.
    points = torch.tensor([[1.0, 0.0], [0.1, 9.0]])[None, :, None, None, :].repeat(1, 1, 3, 1, 1)
    points[0, 1, :, 0, 1] = math.nan
    assert Correspondence.from_point_maps(points, token_grid=(1, 2)).index[0, 0, 1].tolist() == [0, 0]
    strict = Correspondence.from_point_maps(points, token_grid=(1, 2), cycle_threshold=1.0)
    assert strict.index[0, 0, 1].tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("image", "size"), [((64, 64), (32, 32)), ((37, 53), (8, 9)), ((3, 5), (4, 7)), ((9, 9), (3, 3)), ((6, 6), (6, 6))]
)
def test_points_are_resampled_as_interpolate_does(image, size):
    points = torch.randn(2, 2, 3, *image, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = cameo.correspondence.matching._token_points(points, (size, size))
    whole = torch.nn.functional.interpolate(points.flatten(0, 1), size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(got.flatten(0, 1), whole.flatten(2).mT, rtol=0, atol=1e-14)
