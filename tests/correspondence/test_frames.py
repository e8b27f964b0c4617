"""Which frames a latent frame stands for, and how matches between frames become matches between latent frames."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from cameo import Correspondence
from cameo.correspondence import latent_frames, merge_views


@pytest.mark.parametrize(
    ("frames", "factor", "latents", "last"),
    [
        (49, 4, 13, (45, 46, 47, 48)),
        (81, 4, 21, (77, 78, 79, 80)),
        (19, 6, 4, (13, 14, 15, 16, 17, 18)),
        (1, 8, 1, (0,)),
    ],
)
def test_the_first_frame_is_alone(frames: int, factor: int, latents: int, last: tuple[int, ...]) -> None:
    found = latent_frames(frames, factor)
    assert len(found) == latents
    assert found[0] == (0,)
    assert found[-1] == last
    assert [frame for group in found for frame in group] == list(range(frames))


def test_without_a_frame_alone() -> None:
    assert latent_frames(6, 3, first_alone=False) == ((0, 1, 2), (3, 4, 5))
    assert latent_frames(3, 1) == ((0,), (1,), (2,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 48, "factor": 4}, "expected a multiple of 4 and 1 more, as 45 or 49, got 48"),
        ({"num_frames": 7, "factor": 4, "first_alone": False}, "expected a multiple of 4, as 4 or 8, got 7"),
        ({"num_frames": 3, "factor": 4, "first_alone": False}, "expected a multiple of 4, as 4, got 3"),
        ({"num_frames": 0, "factor": 4}, "num_frames: expected an integer of at least 1, got 0"),
        ({"num_frames": 5, "factor": 4.0}, r"factor: expected an integer of at least 1, got 4\.0"),
    ],
)
def test_frames_that_are_no_latent_frames(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latent_frames(**arguments)  # type: ignore[arg-type]


def random_matches(views: int, tokens: int = 4, seed: int = 0) -> Correspondence:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, 2, (2, views, views, tokens), generator=generator)
    index[:, range(views), range(views)] = -1
    distance = torch.rand(index.shape, generator=generator)
    return Correspondence(index, ((2, tokens // 2),) * views, distance=distance)


def test_votes_are_counted_over_all_pairs() -> None:
    match, groups = random_matches(9), latent_frames(9, 4)
    merged = merge_views(match, groups)
    assert merged.token_grids == ((2, 2),) * 3
    for b, i, j, x in torch.cartesian_prod(*map(torch.arange, merged.index.shape)).tolist():
        pairs = [(f, g) for f in groups[i] for g in groups[j]]
        votes = Counter(int(match.index[b, f, g, x]) for f, g in pairs)
        del votes[-1]
        found = int(merged.index[b, i, j, x])
        if i == j or not votes:
            assert found == -1
        else:
            assert votes[found] == max(votes.values())
        assert merged.distance[b, i, j, x] == min(match.distance[b, f, g, x] for f, g in pairs)


def test_the_middle_pair_decides_between_equal_votes() -> None:
    index = torch.full((1, 4, 4, 4), -1)
    index[0, 0, 1:, 3] = torch.tensor([0, 1, 2])  # three frames, three answers: that of the middle one is taken
    index[0, 0, 1:, 2] = torch.tensor([3, -1, 2])  # both as far from the middle: the earlier one
    merged = merge_views(Correspondence(index, ((2, 2),) * 4), latent_frames(4, 3))
    assert merged.index[0, 0, 1].tolist() == [-1, -1, 3, 1]
    assert merged.index[0, 1, 0].tolist() == [-1] * 4


def test_weights_are_votes_and_their_mean_is_kept() -> None:
    index, weight = torch.full((1, 4, 4, 4), -1), torch.zeros(1, 4, 4, 4)
    index[0, 0, 1:, 0], weight[0, 0, 1:, 0] = torch.tensor([1, 2, 1]), torch.tensor([0.25, 1.0, 0.5])
    index[0, 0, 1:, 1], weight[0, 0, 1:, 1] = torch.tensor([1, 2, 1]), torch.tensor([0.75, 1.0, 0.5])
    merged = merge_views(Correspondence(index, ((2, 2),) * 4, weight), latent_frames(4, 3))
    assert merged.index[0, 0, 1].tolist() == [2, 1, -1, -1]
    assert merged.match_weight[0, 0, 1].tolist() == [1.0, 0.625, 0, 0]


def test_a_match_needs_a_share_of_the_votes() -> None:
    index = torch.full((1, 4, 4, 4), -1)
    index[0, 0, 1:, 0], index[0, 0, 1:, 1] = torch.tensor([1, 1, -1]), torch.tensor([1, -1, -1])
    match, groups = Correspondence(index, ((2, 2),) * 4), latent_frames(4, 3)
    assert merge_views(match, groups, least_share=0.5).index[0, 0, 1].tolist() == [1, -1, -1, -1]
    assert merge_views(match, groups, least_share=0.7).index[0, 0, 1].tolist() == [-1] * 4


def test_groups_of_one_view_take_views_of_their_own_grids() -> None:
    match = Correspondence(torch.full((1, 3, 3, 4), -1), ((1, 2), (2, 2), (1, 2)))
    match.index[0, 0, 2, :2] = torch.tensor([1, 0])
    merged = merge_views(match, [[2], [0]])
    assert merged.token_grids == ((1, 2), (1, 2))
    assert torch.equal(merged.index, match.take_views([2, 0]).index)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        ([], {}, "expected groups of one view at least"),
        ([[0], []], {}, "expected groups of one view at least"),
        ([[0, 1], [1]], {}, "each view in one group"),
        ([[0], [3]], {}, r"expected views of 0\.\.2, got \[0, 3\]"),
        ([[0, 1], [2]], {}, r"views of one token grid in each, got \[\(1, 2\), \(2, 2\)\] in \[0, 1\]"),
        ([[0], [2]], {"least_share": 1.5}, "least_share: expected a share in"),
    ],
)
def test_groups_that_do_not_fit(groups: list[list[int]], options: dict[str, float], message: str) -> None:
    match = Correspondence(torch.full((1, 3, 3, 4), -1), ((1, 2), (2, 2), (1, 2)))
    with pytest.raises(ValueError, match=message):
        merge_views(match, groups, **options)
