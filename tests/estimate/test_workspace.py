"""What the alignment loss is said to take inside, against what it takes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.common.measuring import peak_memory
from cameo import AlignmentHead, Correspondence, alignment_loss
from cameo.estimate.workspace import alignment_flops, alignment_workspace


@pytest.mark.parametrize("kind", ["mlp", "mean", "none"])
@pytest.mark.parametrize(("views", "side"), [(2, 8), (3, 16)])
def test_the_sweep_takes_about_what_was_said(kind: str, views: int, side: int) -> None:
    tokens, heads, width = side * side, 4, 32
    query, key = (torch.randn(1, heads, views, tokens, width, requires_grad=True) for _ in range(2))
    other = ~torch.eye(views, dtype=torch.bool)
    index = torch.randint(tokens, (1, views, views, tokens)).where(other[None, :, :, None], -1)
    match, head = Correspondence(index, ((side, side),) * views), AlignmentHead(heads, kind=kind)
    losses: list[torch.Tensor] = []

    def loss() -> None:
        losses.append(alignment_loss(query, key, match, head, implementation="chunked"))

    loss()
    taken = peak_memory(loss)
    said = alignment_workspace(query, index, list(head.weights()), kind, on_gpu=False)
    # Copies of the lists of matches are not in it: the largest factor seen is 1.09.
    assert 0.3 * said <= taken <= 1.15 * said


def test_each_pair_of_tokens_is_multiplied_three_times() -> None:
    samples, heads, views, tokens, width = 2, 4, 3, 16, 8
    query = torch.empty(samples, heads, views, tokens, width)
    pairs = samples * views * (views - 1) * tokens**2
    assert alignment_flops(query) == 3 * pairs * 2 * heads * width


def test_few_queries_take_their_share() -> None:
    samples, heads, views, tokens, width = 2, 4, 3, 16, 8
    query, index = torch.empty(samples, heads, views, tokens, width), torch.empty(samples, views, views, tokens)
    one = 3 * 2 * tokens * heads * width
    assert alignment_flops(query, max_queries=5) == 5 * one
    assert alignment_flops(query, "all_views", max_queries=5) == 5 * views * one
    assert alignment_flops(query, max_queries=10**6) == alignment_flops(query)
    sizes = [
        alignment_workspace(query, index, [], "none", max_queries=most, on_gpu=on_gpu)
        for on_gpu in (False, True)
        for most in (None, 5, 1)
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[3] > sizes[4] > sizes[5]
    assert min(sizes) >= 2 * 4 * query.numel()
