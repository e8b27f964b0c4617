"""Matches of points that were seen in several views, and of the pixels that a matcher has paired."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from cameo import Correspondence, Tracks
from cameo.errors import ShapeError
from cameo.geometry import cell_centres, project, unproject
from cameo.scenes.embedded import EmbeddedScenes

ROW = ((1, 6), (1, 6))


def in_a_row(*pairs: tuple[float, float], threshold: float = 1.5) -> Correspondence:
    """Match tracks of two views of 6 x 1 pixels with a token each; places are in tokens, a whole number is a center."""
    both = torch.tensor(pairs).reshape(-1, 2) + 0.5
    xy = torch.stack([both, torch.full_like(both, 0.5)], dim=-1)
    return Correspondence.from_matches(
        [{(0, 1): (xy[:, 0], xy[:, 1])}], num_views=2, image_size=(1, 6), token_grid=ROW, cycle_threshold=threshold
    )


def test_tokens_and_weights_by_hand() -> None:
    # Tokens are 2 pixels wide and 4 high. (3, 2) is the center of token 1; (6.5, 7) lies in token 7, whose center is
    # (7, 6), a quarter of a token to the left of it and a quarter below.
    tracks = Tracks(torch.tensor([4, 4]), torch.tensor([0, 1]), torch.tensor([[3.0, 2.0], [6.5, 7.0]]), num_views=2)
    match = Correspondence.from_tracks([tracks], image_size=(8, 8), token_grid=(2, 4))
    assert match.matched.sum() == 2
    assert match.index[0, 0, 1].tolist() == [-1, 7, -1, -1, -1, -1, -1, -1]
    assert match.index[0, 1, 0].tolist() == [-1] * 7 + [1]
    assert match.match_weight is not None
    assert match.match_weight[0, 0, 1].tolist() == [0, 0.75 * 0.75, 0, 0, 0, 0, 0, 0]
    assert match.match_weight[0, 1, 0, 7] == 0.75 * 0.75
    assert match.distance is None


def test_a_track_counts_least_between_two_corners() -> None:
    corner = torch.tensor([[4.0, 4.0]])  # where four tokens meet; it belongs to the one below and to the right
    match = Correspondence.from_matches([{(0, 1): (corner, corner)}], num_views=2, image_size=(8, 8), token_grid=2)
    assert match.index[0, 0, 1].tolist() == [-1, -1, -1, 3]
    assert match.match_weight is not None
    assert match.match_weight[0, 0, 1, 3] == 1 / 16


def test_of_several_tracks_the_nearest_weighs_the_match() -> None:
    match = in_a_row((0, 3.25), (0.25, 3), (0.5 - 1 / 16, 3))
    assert match.index[0, 0, 1].tolist() == [3, -1, -1, -1, -1, -1]
    assert match.match_weight is not None
    assert match.match_weight[0, 0, 1, 0] == 0.75


@pytest.mark.parametrize(
    ("leads_to", "matched"),
    [
        ((1, 1, 5), 1),  # two of three
        ((1, 5), -1),  # as much for one as for the other
        ((1, 1, 5, 5), -1),
        ((1, 3, 5), -1),  # none has half of the weight
        ((2, 2.75), 2),  # neighbors agree, and the first is nearer to its center
        ((2.25, 3), 3),
        ((1.4, 2.4, 5), 1),  # two neighbors of 0.6 each against a single one of 1
        ((1.4, 2.4, 5, 5), 5),
        ((0, 1, 2), 1),  # a surface that fills three tokens
        ((0, 0, 2, 2, 1), 1),
    ],
)
def test_tracks_that_disagree(leads_to: tuple[float, ...], matched: int) -> None:
    match = in_a_row(*((4, place) for place in leads_to))
    assert match.index[0, 0, 1, 4] == matched
    assert match.index[0, 0, 1].max() == matched


def test_the_way_back_must_end_near_the_start() -> None:
    tracks = ((0, 2), (5, 2), (5, 2))  # token 2 leads back to token 5
    assert in_a_row(*tracks).index[0, 0, 1].tolist() == [-1, -1, -1, -1, -1, 2]
    assert in_a_row(*tracks, threshold=5.5).index[0, 0, 1].tolist() == [2, -1, -1, -1, -1, 2]
    # Token 2 leads nowhere: there is no way back.
    assert not in_a_row((0, 2), (5, 2), threshold=math.inf).matched.any()
    # Nor where a missing way back could be taken for the last token of the row above.
    first, second = torch.tensor([[0.5, 0.5], [0.5, 3.5]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    match = Correspondence.from_matches(
        [{(0, 1): (first, second)}], num_views=2, image_size=(4, 1), token_grid=(4, 1), cycle_threshold=1.5
    )
    assert not match.matched.any()


def loop(tracks: list[Tracks], image_size: tuple[int, int], grids: list[tuple[int, int]], threshold: float) -> Tensor:
    """The same by plain loops, `[B, V, V, N]`."""
    count = max(h * w for h, w in grids)
    index = torch.full((len(tracks), len(grids), len(grids), count), -1)
    for sample, one in enumerate(tracks):
        votes: dict[tuple[int, int, int], dict[int, float]] = defaultdict(lambda: defaultdict(float))
        seen = []
        for point, view, (x, y) in zip(one.point.tolist(), one.view.tolist(), one.xy.tolist(), strict=True):
            (height, width), (rows, columns) = image_size, grids[view]
            if 0 <= x < width and 0 <= y < height:
                u, v = x * columns / width, y * rows / height
                near = (1 - abs(u - int(u) - 0.5)) * (1 - abs(v - int(v) - 0.5))
                seen.append((point, view, int(v) * columns + int(u), near))
        for point, i, a, near in seen:
            for other, j, b, near_too in seen:
                if point == other and i != j:
                    votes[i, j, a][b] += near * near_too
        for (i, j, a), found in votes.items():
            columns = grids[j][1]

            def agree(b: int, found: dict[int, float] = found, columns: int = columns) -> float:
                return sum(
                    weight
                    for c, weight in found.items()
                    if max(abs(c // columns - b // columns), abs(c % columns - b % columns)) <= 1
                )

            best = max(sorted(found), key=lambda b: (round(agree(b), 6), round(found[b], 6)))
            if agree(best) > sum(found.values()) / 2 + 1e-6:
                index[sample, i, j, a] = best
        forth = index[sample].clone()
        for (i, j, a), _ in votes.items():
            b = int(forth[i, j, a])
            end = int(forth[j, i, b]) if b >= 0 else -1
            columns = grids[i][1]
            if end < 0 or math.hypot(end // columns - a // columns, end % columns - a % columns) >= threshold:
                index[sample, i, j, a] = -1
    return index


@pytest.mark.parametrize("grids", [[(3, 4)] * 3, [(4, 4), (2, 3), (3, 2)]], ids=["one grid", "a grid per view"])
def test_a_batch_equals_plain_loops(grids: list[tuple[int, int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    tracks = []
    for count in (60, 0, 25):
        point = torch.randint(20, (count,), generator=generator)
        view = torch.randint(3, (count,), generator=generator)
        where = torch.rand(20, 2, generator=generator)[point] * torch.tensor([40.0, 30.0]) - 2  # some are outside
        apart = torch.randn(count, 2, generator=generator) * 4
        tracks.append(Tracks(point, view, where + apart, num_views=3))
    for threshold in (1.5, 3.0):
        match = Correspondence.from_tracks(tracks, image_size=(24, 36), token_grid=grids, cycle_threshold=threshold)
        expected = loop(tracks, (24, 36), grids, threshold)
        assert torch.equal(match.index, expected)
        assert match.matched[0].sum() > 20
        assert not match.matched[1].any()
        assert match.match_weight is not None
        assert torch.equal(match.match_weight > 0, match.matched)
    for sample in range(3):
        alone = Correspondence.from_tracks(tracks[sample : sample + 1], image_size=(24, 36), token_grid=grids)
        batch = Correspondence.from_tracks(tracks, image_size=(24, 36), token_grid=grids).select(sample)
        assert torch.equal(alone.index, batch.index)


def test_the_order_of_the_sightings_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    point, view = torch.randint(50, (400,), generator=generator), torch.randint(3, (400,), generator=generator)
    xy = torch.rand(400, 2, generator=generator) * 16
    found = []
    for order in (torch.arange(400), torch.randperm(400, generator=generator)):
        tracks = Tracks(point[order], view[order], xy[order], num_views=3)
        found.append(Correspondence.from_tracks([tracks], image_size=(16, 16), token_grid=4, cycle_threshold=9.0))
    assert torch.equal(found[0].index, found[1].index)
    assert torch.equal(found[0].match_weight, found[1].match_weight)
    assert found[0].matched.any()


def test_exact_pixel_pairs_give_the_matches_of_depth() -> None:
    # Tokens of 9 pixels, whose centers are centers of pixels.
    views = EmbeddedScenes(split="validation", num_scenes=1, views_per_scene=4, size=(72, 72), seed=0).views(0)
    cameras = views.intrinsics[None], views.extrinsics[None]
    truth = Correspondence.from_depth(views.depth[None], *cameras, token_grid=8)
    points = unproject(views.depth[None], *cameras)[0, :, :, 4::9, 4::9].flatten(2).mT  # [V, N, 3], of token centers
    centers = cell_centres((8, 8), (72, 72), dtype=torch.float32, device="cpu").flatten(0, 1)
    back = truth.index[0].transpose(0, 1).gather(-1, truth.index[0].clamp(min=0))
    mutual = truth.matched[0] & (back == torch.arange(64))  # one pair for each token, so that none disagree
    assert mutual.sum() > 50
    pairs = {}
    for i, j in mutual.any(dim=-1).nonzero().tolist():
        here = mutual[i, j]
        there, _ = project(points[None, i, None, here], *(camera[:, j : j + 1] for camera in cameras))
        pairs[i, j] = (centers[here], there[0, 0])
    found = Correspondence.from_matches([pairs], num_views=4, image_size=(72, 72), token_grid=8)
    assert torch.equal(found.index, truth.index.masked_fill(~mutual, -1))


def test_a_match_is_of_the_views_that_show_it() -> None:
    xy = torch.tensor([[1.0, 1.0], [3.0, 1.0], [1.0, 3.0]])
    tracks = Tracks(torch.tensor([9, 9, 9]), torch.tensor([0, 2, 1]), xy, num_views=4)
    index = Correspondence.from_tracks([tracks], image_size=(4, 4), token_grid=2).index[0]
    assert (index[0, 1, 0], index[0, 2, 0], index[1, 2, 2], index[2, 1, 1]) == (2, 1, 1, 2)
    assert (index[3] < 0).all()
    assert (index[:, 3] < 0).all()
    taken = tracks.of_views([2, 0])
    assert (taken.num_views, taken.view.tolist()) == (2, [1, 0])
    index = Correspondence.from_tracks([taken], image_size=(4, 4), token_grid=2).index[0]
    assert (index[0, 1, 1], index[1, 0, 0]) == (0, 1)


def test_sightings_outside_the_image_are_none() -> None:
    for outside in ([-0.01, 1.0], [4.0, 1.0], [1.0, 4.0], [1.0, -1e9]):
        pairs = {(0, 1): (torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([outside, [3.0, 3.0]]))}
        match = Correspondence.from_matches([pairs], num_views=2, image_size=(4, 4), token_grid=2)
        assert match.index[0, 0, 1].tolist() == [-1, -1, -1, 3]


def test_no_track_is_no_match() -> None:
    empty = Tracks(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0, 2), num_views=3)
    assert not Correspondence.from_tracks([empty], image_size=(4, 4), token_grid=2).matched.any()
    assert not Correspondence.from_matches([{}], num_views=3, image_size=(4, 4), token_grid=2).matched.any()
    nothing = {(0, 1): (torch.empty(0, 2), torch.empty(0, 2))}
    assert not Correspondence.from_matches([nothing], num_views=3, image_size=(4, 4), token_grid=2).matched.any()
    single = Tracks(torch.tensor([1]), torch.tensor([0]), torch.ones(1, 2), num_views=3)  # seen once
    assert not Correspondence.from_tracks([single], image_size=(4, 4), token_grid=2).matched.any()


def test_tracks_that_cannot_be() -> None:
    point, view, xy = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.ones(2, 2)
    with pytest.raises(TypeError, match="point: expected a tensor, got list"):
        Tracks([0, 0], view, xy, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"view: expected int64, got torch\.float32"):
        Tracks(point, view.float(), xy, 2)
    with pytest.raises(ValueError, match=r"xy: expected floats, got torch\.int64"):
        Tracks(point, view, xy.long(), 2)
    with pytest.raises(ShapeError, match=r"xy: expected \[2, 2\], got \[2, 3\]"):
        Tracks(point, view, torch.ones(2, 3), 2)
    with pytest.raises(ValueError, match="view: expected numbers from 0 to 0, got 0 to 1"):
        Tracks(point, view, xy, 1)
    with pytest.raises(ValueError, match="num_views: expected at least 1, got 0"):
        Tracks(point[:0], view[:0], xy[:0], 0)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="xy: expected finite pixel coordinates"):
            Tracks(point, view, torch.tensor([[1.0, 1.0], [bad, 1.0]]), 2)


def test_bad_arguments_are_named() -> None:
    tracks = Tracks(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.ones(2, 2), 2)
    of_three = Tracks(torch.tensor([0]), torch.tensor([2]), torch.ones(1, 2), 3)

    def build(tracks: object, image_size: object = (4, 4), **options: object) -> Correspondence:
        return Correspondence.from_tracks(tracks, image_size=image_size, **{"token_grid": 2, **options})  # type: ignore[arg-type]

    for wrong, error, message in (
        (tracks, TypeError, r"tracks: expected a list .* Cure: \[tracks\] for one sample"),
        ([tracks, None], TypeError, "tracks: expected a list"),
        ([], ValueError, "tracks: expected those of at least one sample"),
        ([tracks, of_three], ShapeError, r"tracks: expected the same num_views in all samples, got \[2, 3\]"),
    ):
        with pytest.raises(error, match=message):
            build(wrong)
    with pytest.raises(ValueError, match="cycle_threshold: expected more than 0 tokens, got 0"):
        build([tracks], cycle_threshold=0)
    with pytest.raises(ValueError, match="image_size: expected a positive int or"):
        build([tracks], image_size=(4, 0))
    with pytest.raises(ShapeError, match=r"token_grid: expected .* one .* for each of 2 views"):
        build([tracks], token_grid=[(2, 2)])


def test_bad_matches_are_named() -> None:
    def build(views: tuple[int, int], first: Tensor, second: Tensor) -> Correspondence:
        return Correspondence.from_matches([{views: (first, second)}], num_views=2, image_size=(4, 4), token_grid=2)

    xy = torch.ones(3, 2)
    for views in ((0, 0), (0, 2), (-1, 0)):
        with pytest.raises(ValueError, match=r"matches: expected two different views from 0 to 1, got \("):
            build(views, xy, xy)
    with pytest.raises(
        ShapeError, match=r"matches of views \(0, 1\): expected \[M, 2\] twice, got \[3, 2\] and \[2, 2\]"
    ):
        build((0, 1), xy, xy[:2])
    with pytest.raises(ShapeError, match=r"matches of views \(0, 1\): expected \[M, 2\] twice"):
        build((0, 1), xy[:, :1], xy[:, :1])
    bad = xy.clone()
    bad[1, 0] = math.nan
    with pytest.raises(ValueError, match=r"matches of views \(0, 1\): expected finite .* in view 1. Cure"):
        build((0, 1), xy, bad)
