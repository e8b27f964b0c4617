"""`max_queries=`: a random part of the rows, with the loss and the gradient of all of them on average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cameo.alignment import alignment_loss, supervision_weights
from cameo.alignment.supervision import sampled_weights
from tests.helpers.alignment_inputs import PADDED, gradients, make_head, make_inputs


def rows_of(weights: Tensor, normalize: str) -> Tensor:
    return weights != 0 if normalize == "per_view" else (weights != 0).any(dim=2)


@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
def test_so_many_rows_are_kept_and_whole_ones(normalize: str) -> None:
    _, _, match = make_inputs(token_grids=PADDED, weighted=True)
    weights = supervision_weights(match)
    count = int(rows_of(weights, normalize).sum())
    for most in (1, count // 2, count - 1):
        kept = sampled_weights(weights, normalize, most, torch.Generator().manual_seed(most))
        assert rows_of(kept, normalize).sum() == most
        factors = (kept / weights)[kept != 0]
        torch.testing.assert_close(factors, torch.full_like(factors, count / most))
        if normalize == "all_views":  # a softmax over several views is kept with all of its targets
            whole = rows_of(kept, normalize)[:, :, None].expand_as(weights)
            assert torch.equal(kept != 0, (weights != 0) & whole)
    for most in (count, weights.numel() - 1, weights.numel()):
        torch.testing.assert_close(sampled_weights(weights, normalize, most, None), weights)


def test_the_draw_is_that_of_the_generator() -> None:
    query, key, match = make_inputs()
    head = make_head()
    options = {"max_queries": 5, "implementation": "chunked"}

    def loss(seed: int) -> Tensor:
        return alignment_loss(query, key, match, head, generator=torch.Generator().manual_seed(seed), **options)

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)
    reference = alignment_loss(
        query, key, match, head, max_queries=5, generator=torch.Generator().manual_seed(0), implementation="reference"
    )
    torch.testing.assert_close(loss(0), reference)


def test_where_nothing_is_supervised_the_loss_stays_zero() -> None:
    query, key, match = make_inputs(visible=0.0)
    assert alignment_loss(query, key, match, make_head(), max_queries=1).item() == 0


@pytest.mark.parametrize("given", [0, -1, 1.5, "many"])
def test_what_is_no_number_of_rows_is_refused(given: object) -> None:
    query, key, match = make_inputs()
    with pytest.raises(ValueError, match="max_queries"):
        alignment_loss(query, key, match, make_head(), max_queries=given)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
def test_loss_and_gradient_are_unbiased_over_1000_draws(normalize: str) -> None:
    query, key, match = make_inputs(batch=1, token_grids=((2, 3),) * 3, weighted=True)
    head, generator = make_head(), torch.Generator().manual_seed(0)

    def flat(**options: object) -> Tensor:
        loss = alignment_loss(query, key, match, head, normalize=normalize, implementation="chunked", **options)
        return torch.cat([loss.detach()[None], *(part.flatten() for part in gradients(loss, query, key, head))])

    expected = flat()
    draws = torch.stack([flat(max_queries=4, generator=generator) for _ in range(1000)])
    error = draws.std(dim=0) / 1000**0.5
    varies = error > 1e-12
    score = ((draws.mean(dim=0) - expected) / error)[varies]
    torch.testing.assert_close(draws.mean(dim=0)[~varies], expected[~varies])
    assert abs(score[0]) < 3, "the loss is biased"
    # Of unbiased means the squares of these are 1 on average; the gradients of one token go together, so not exactly.
    assert score.square().mean() < 2
    along = draws[:, 1:] @ expected[1:] / expected[1:].norm() ** 2
    assert abs(along.mean() - 1) < 3 * along.std() / 1000**0.5, "the gradient is too long or too short"
