"""Hits agree with those of a plain loop, for planted and random attention and any size of blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cameo.alignment import AlignmentHead
from cameo.attention.layout import TokenLayout
from cameo.correspondence import Correspondence
from cameo.errors import ShapeError
from cameo.probing.hits import attention_maps, count_hits
from cameo.probing.truth import TrueMatches
from tests.helpers.matches import plain_hits, random_matches


def one_hot(target: Tensor, tokens: int) -> Tensor:
    """Logits `[B, 1, V, N, V, N]` that are highest at `target` `[B, V, V, N]`."""
    return torch.nn.functional.one_hot(target.clamp_min(0), tokens).float().permute(0, 1, 3, 2, 4)[:, None]


def hits_of(logits: Tensor, match: Correspondence, within: tuple[int, ...] = (0, 1)) -> tuple[dict[str, Tensor], int]:
    """Hits `[R, W]` of a layer with these logits `[B, K, V, N, V, N]`, and the number of matches."""
    true_matches, (views, tokens) = TrueMatches.plain(match), logits.shape[-2:]
    keys = torch.eye(views * tokens).view(views, tokens, -1).expand(*logits.shape[:2], -1, -1, -1)
    found = count_hits(logits.flatten(-2), keys, true_matches, None, 1.0, within)
    return {name: hits.sum((1, 2)) for name, hits in found.items()}, int(true_matches.pairs.sum())


def test_oracle_attention_hits_always_and_shifted_attention_as_geometry_says() -> None:
    match = random_matches(2, ((4, 4),) * 3)
    hits, pairs = hits_of(one_hot(match.index, 16), match)
    assert pairs == int((match.index >= 0).sum())
    assert hits["mean"].tolist() == [[pairs, pairs]]

    # One column to the right: never exact; within one token unless the shift wraps into the next row's first column.
    shifted = (match.index + 1) % 16
    hits, pairs = hits_of(one_hot(shifted, 16), match)
    columns = match.index[match.matched] % 4
    assert hits["mean"].tolist() == [[0, int((columns < 3).sum())]]

    # Two rows down: within two tokens unless the shift leaves the grid.
    lower = match.index + 8
    hits, _ = hits_of(one_hot(lower % 16, 16), match, within=(1, 2))
    rows = match.index[match.matched] // 4
    assert hits["mean"].tolist() == [[0, int((rows < 2).sum()) + int((rows >= 2).sum())]]  # wraps: two rows up


def test_random_attention_hits_at_chance() -> None:
    match = random_matches(40, ((4, 4),) * 3)
    attention = torch.rand(40, 2, 3, 16, 3, 16, generator=torch.Generator().manual_seed(1))
    hits, pairs = hits_of(attention, match)
    # Chance within one token: the share of tokens that are neighbors of the matched one, which has fewer at the edges.
    neighbours = 0
    for token in match.index[match.matched].tolist():
        row, column = divmod(token, 4)
        neighbours += sum(abs(row - r) <= 1 and abs(column - c) <= 1 for r in range(4) for c in range(4))
    expected = torch.tensor([1 / 16, neighbours / pairs / 16])
    # About 3600 matches: the standard error of a share is below 0.009.
    torch.testing.assert_close(hits["best_head"] / pairs, expected.expand(2, 2), rtol=0, atol=0.03)


def test_uniform_attention_is_no_more_than_its_first_token() -> None:
    match = random_matches(2, ((4, 4),) * 3)
    hits, pairs = hits_of(torch.full((2, 1, 3, 16, 3, 16), 1 / 16), match)
    targets = match.index[match.matched]
    assert hits["mean"].tolist() == [
        [int((targets == 0).sum()), int(torch.isin(targets, torch.tensor([0, 1, 4, 5])).sum())]
    ]
    assert hits["mean"][0, 0] / pairs < 0.15


def test_attention_maps_are_the_softmax_of_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, 2, 6, 5, generator=generator) for _ in range(2))
    token_grids = ((2, 3), (2, 2))  # the second view has four tokens and two of padding
    head = AlignmentHead(3)
    maps = attention_maps(query, key, token_grids, head, 0.7)
    count = (6, 4)
    for b, i, n, j in ((0, 0, 2, 1), (1, 1, 3, 0), (1, 0, 5, 0)):
        logits = torch.stack([key[b, k, j, : count[j]] @ query[b, k, i, n] * 0.7 for k in range(3)])
        heads = logits.softmax(-1)
        torch.testing.assert_close(maps["best_head"][b, :, i, n, j, : count[j]], heads)
        torch.testing.assert_close(maps["mean"][b, 0, i, n, j, : count[j]], heads.mean(0))
        torch.testing.assert_close(maps["through_head"][b, 0, i, n, j, : count[j]], head(logits)[0].softmax(-1))
        assert not maps["mean"][b, 0, i, n, j, count[j] :].any()
    assert "through_head" not in attention_maps(query, key, token_grids, None, 0.7)


def test_hits_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 2, 4, 9, 8, generator=generator) for _ in range(2))
    torch.manual_seed(0)
    match, head = random_matches(3, ((3, 3),) * 4), AlignmentHead(2)
    cells = replace(match, index=match.index[..., :1].clamp(max=0), token_grids=((1, 1),) * 4)
    counted = []
    for block in (1 << 24, 3000, 1):
        monkeypatch.setattr("cameo.probing.hits.BLOCK_ENTRIES", block)
        token = count_hits(query, key, TrueMatches.plain(match), head, 1.0, (0, 1))
        view = count_hits(query[..., :1, :], key[..., :1, :], TrueMatches.plain(cells), head, 1.0, (0, 1))
        counted.append([{name: hits.sum((1, 2)).tolist() for name, hits in part.items()} for part in (token, view)])
    assert counted[0] == counted[1] == counted[2]
    whole, _ = plain_hits(attention_maps(query, key, match.token_grids, head, 1.0), match)
    assert {name: value.tolist() for name, value in whole.items()} == counted[0][0]


@pytest.mark.parametrize("layout", ["b (v h w)", "(b h) (v w)", "(b w) (v h)"])
def test_uniform_attention_is_at_chance_and_the_oracle_always_right(layout: str) -> None:
    """Attention that is uniform up to noise: its hits are those of a random token, which `chance` expects."""
    token_layout, match = TokenLayout(layout), random_matches(60, ((4, 4),) * 2)
    true_matches = TrueMatches.of_layer(token_layout, match, torch.zeros(60, 2, 2, dtype=torch.long), 1)
    index = true_matches.match.index
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(index.shape[0], 8, 2, index.shape[-1], 3, generator=generator) for _ in range(2))
    hits = count_hits(query, key, true_matches, None, 1e-3, (0, 1, 2))["best_head"]
    pairs, chance = true_matches.pairs.sum(), true_matches.chance((0, 1, 2)).sum((0, 1))
    # About 1000 matches and eight heads: the standard error is below 0.02 even where the heads repeat each other.
    torch.testing.assert_close((hits.sum((1, 2)).mean(0) / pairs).double(), chance / pairs, rtol=0, atol=0.05)

    tokens = index.shape[-1]
    codes = nn.functional.one_hot(index.clamp_min(0), tokens) * true_matches.match.matched[..., None]
    query = codes.permute(0, 1, 3, 2, 4).flatten(3)[:, None].float() * 99
    key = torch.eye(2 * tokens).view(1, 1, 2, tokens, -1).expand(len(query), -1, -1, -1, -1)
    hits = count_hits(query, key, true_matches, None, 1.0, (0, 1))["mean"]
    assert torch.equal(hits[0, :, 0, 0], true_matches.pairs[:, 0].float())


def test_hits_by_sample_and_group_add_up_to_those_of_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    match = random_matches(3, ((2, 3), (3, 3), (3, 3)))
    query, key = (torch.randn(3, 2, 3, 9, 4, generator=generator) for _ in range(2))
    groups = torch.randint(4, (3, 3, 3), generator=generator)
    true_matches = TrueMatches(match, groups, 4)
    found = count_hits(query, key, true_matches, None, 1.0, (0, 1, 2))
    maps = attention_maps(query, key, match.token_grids, None, 1.0)
    for sample in range(3):
        for group in range(4):
            alone = match.index[sample : sample + 1].clone()
            alone[(groups[sample] != group)[None, :, :, None].expand_as(alone)] = -1
            part = {name: value[sample : sample + 1] for name, value in maps.items()}
            hits, pairs = plain_hits(part, replace(match, index=alone), (0, 1, 2))
            assert true_matches.pairs[sample, group] == pairs
            for name, value in hits.items():
                assert torch.equal(found[name][:, sample, group], value)


def test_matches_of_another_number_of_views_are_refused() -> None:
    true_matches = TrueMatches.plain(random_matches(1, ((2, 2),) * 3))
    with pytest.raises(
        ShapeError, match=r"true_matches.match.index: expected \[1, 2, 2, 4\] as the call, got \[1, 3, 3, 4\]"
    ):
        count_hits(torch.zeros(1, 1, 2, 4, 3), torch.zeros(1, 1, 2, 4, 3), true_matches, None, 1.0, (0,))
