"""The loss within each view, where its own tokens stand for those of the reference, against the dense loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cameo import AlignmentHead, Correspondence, TokenLayout
from cameo.alignment import alignment_loss

SAMPLES, HEADS, VIEWS, GRID, CHANNELS = 2, 3, 4, (3, 4), 5
TOKENS = GRID[0] * GRID[1]
# Place of a view of the correspondence among the frames of the attention.
ORDERS = {
    "reference first": (TokenLayout("(b v) (h w)", own_view_shows=0), [0, 1, 2, 3]),
    "reference last": (TokenLayout("(b v) (h w)", own_view_shows=0, references_last=1), [3, 0, 1, 2]),
    "reference absent": (TokenLayout("(b v) (h w)", own_view_shows=0, references_absent=1), [None, 0, 1, 2]),
}


def matches() -> Correspondence:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(-1, TOKENS, (SAMPLES, VIEWS, VIEWS, TOKENS), generator=generator)
    index[:, range(VIEWS), range(VIEWS)] = -1
    index[1, 2] = -1  # a frame of which no token has a match
    return Correspondence(index, (GRID,) * VIEWS)


def call(order: list[int | None]) -> tuple[Tensor, Tensor]:
    frames = sum(place is not None for place in order)
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, SAMPLES * frames, HEADS, TOKENS, CHANNELS, dtype=torch.float64, generator=generator)
    return query.requires_grad_(), key.requires_grad_()


def dense_loss(query: Tensor, key: Tensor, match: Correspondence, order: list[int | None], head: AlignmentHead) -> Any:
    """Softmax of q_i k_i^T over the frame's own tokens, and the cross-entropy at the match in the reference."""
    frames, nlls = sum(place is not None for place in order), []
    for sample in range(SAMPLES):
        for view in range(1, VIEWS):
            row = sample * frames + order[view]
            attention = head(query[row] @ key[row].mT * CHANNELS**-0.5).softmax(-1)
            for token, target in enumerate(match.index[sample, view, 0].tolist()):
                if target >= 0:
                    nlls.append(-attention[:, token, target].log().mean())
    return torch.stack(nlls).mean()


@pytest.mark.parametrize("kind", ["mlp", "mean", "none"])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("normalize", ["per_view", "all_views"])
@pytest.mark.parametrize("name", ORDERS)
def test_loss_and_gradients_are_those_of_the_dense_loss(
    name: str, normalize: str, implementation: str, kind: str
) -> None:
    layout, order = ORDERS[name]
    torch.manual_seed(0)
    head = AlignmentHead(HEADS, kind=kind).double()
    match = matches()
    query, key = call(order)
    split = {"batch": SAMPLES, "token_grids": match.token_grids}
    loss = alignment_loss(
        layout.split_query(query, **split),
        layout.split_key(key, **split),
        layout.localize(match),
        head,
        normalize=normalize,
        implementation=implementation,
    )
    inputs = [query, key, *head.parameters()]
    found = torch.autograd.grad(loss, inputs)
    expected_loss = dense_loss(query, key, match, order, head)
    expected = torch.autograd.grad(expected_loss, inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_single_match_reaches_its_query_and_the_keys_of_its_own_frame(implementation: str) -> None:
    layout, order = ORDERS["reference last"]
    index = torch.full((SAMPLES, VIEWS, VIEWS, TOKENS), -1)
    index[1, 2, 0, 7] = 3
    match = Correspondence(index, (GRID,) * VIEWS)
    query, key = call(order)
    split = {"batch": SAMPLES, "token_grids": match.token_grids}
    queries, keys = layout.split_query(query, **split), layout.split_key(key, **split)
    head = AlignmentHead(HEADS, kind="mean")
    alignment_loss(queries, keys, layout.localize(match), head, implementation=implementation).backward()
    row = 1 * VIEWS + 1
    reached = query.grad.ne(0).any(-1).any(1)
    assert reached.nonzero().tolist() == [[row, 7]]
    assert key.grad.ne(0).any(-1).any(1).nonzero().tolist() == [[row, token] for token in range(TOKENS)]
    # The key at the matched place is pulled towards the query, the others are pushed away from it.
    towards = -torch.einsum("knc,kc->n", key.grad[row], query.detach()[row, :, 7])
    assert (towards > 0).nonzero().flatten().tolist() == [3]


def test_matches_with_other_views_are_not_supervised() -> None:
    """From the reference, and between targets: none of them is in the tokens of one frame."""
    index = matches().index
    index[:, 1:, 0] = -1
    local = ORDERS["reference last"][0].localize(Correspondence(index, (GRID,) * VIEWS))
    assert not local.matched.any()
