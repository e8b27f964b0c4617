"""Random inputs of the alignment loss, and the loss written out densely."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cameo.alignment import AlignmentHead
from cameo.correspondence import Correspondence

Inputs = tuple[Tensor, Tensor, Correspondence]
# Token grids of four views, the smaller ones of which are padded.
PADDED = ((2, 3), (2, 3), (3, 4), (1, 2))


def relative_error(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    return ((got.reshape(-1) - expected.reshape(-1)).abs().max() / expected.abs().max()).item()


def make_inputs(
    batch: int = 2,
    heads: int = 3,
    token_grids: tuple[tuple[int, int], ...] = ((2, 3),) * 3,
    dim: int = 4,
    *,
    visible: float = 0.6,
    weighted: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Random queries, keys and matches; every token has a distance, as from point maps."""
    generator = torch.Generator().manual_seed(seed)
    views, tokens = len(token_grids), max(h * w for h, w in token_grids)
    index = torch.full((batch, views, views, tokens), -1)
    for i, (query_height, query_width) in enumerate(token_grids):
        for j, (height, width) in enumerate(token_grids):
            if i != j:
                shape = (batch, query_height * query_width)
                match = torch.randint(0, height * width, shape, generator=generator)
                hidden = torch.rand(shape, generator=generator) > visible
                index[:, i, j, : shape[1]] = match.masked_fill(hidden, -1)
    weight = torch.rand(index.shape, generator=generator, dtype=torch.float64) if weighted else None
    distance = torch.rand(index.shape, generator=generator, dtype=torch.float64)
    shape = (batch, heads, views, tokens, dim)
    query, key = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return query.requires_grad_(), key.requires_grad_(), Correspondence(index, token_grids, weight, distance)


def make_head(heads: int = 3, **settings: Any) -> AlignmentHead:
    torch.manual_seed(7)
    return AlignmentHead(heads, **settings).double()


def explicit_head(head: AlignmentHead, logits: Tensor) -> Tensor:
    """[K, ...] -> [1 or K, ...] from the definition, with the heads moved to the last axis."""
    if head.kind == "none":
        return logits
    if head.kind == "mean":
        return logits.sum(0, keepdim=True) / logits.shape[0]
    x = logits.movedim(0, -1)
    for layer in head.hidden:
        x = torch.einsum("...k,mk->...m", x, layer.weight) + layer.bias
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    return torch.einsum("...m,om->...o", x, head.output.weight).movedim(-1, 0)


def dense_loss(
    query: Tensor,
    key: Tensor,
    match: Correspondence,
    head: AlignmentHead,
    scale: float,
    normalize: str = "per_view",
    pairs: Tensor | None = None,
) -> Tensor:
    """Mean loss from the full [K, B, V, N, V, N] logits and dense one-hot targets."""
    batch, _, views, tokens, _ = query.shape
    logits = explicit_head(head, scale * torch.einsum("bkixd,bkjyd->kbixjy", query, key))
    lengths = torch.tensor([h * w for h, w in match.token_grids])
    real = (torch.arange(tokens) < lengths[:, None]).expand(views, 1, views, tokens).transpose(0, 1)[0]
    other = ~torch.eye(views, dtype=torch.bool)
    if normalize == "per_view":
        log_p = logits.masked_fill(~real[:, None], -torch.inf).log_softmax(-1)
    else:
        keys = other[:, None, :, None] & real[0]
        log_p = logits.masked_fill(~keys, -torch.inf).flatten(-2).log_softmax(-1).unflatten(-1, (views, tokens))
    wanted = match.matched if pairs is None else match.matched & pairs[None, :, :, None]
    target = F.one_hot(match.index.clamp(min=0), tokens) * wanted[..., None]
    weight = torch.ones(match.index.shape) if match.match_weight is None else match.match_weight
    weight = weight.double() * wanted
    nll = -(log_p.masked_fill(log_p == -torch.inf, 0).mean(0) * target.permute(0, 1, 3, 2, 4)).sum(-1)
    assert nll.shape == (batch, views, tokens, views)
    return (weight.transpose(2, 3) * nll).sum() / weight.sum()


def dense_from_logits(logits: Tensor, match: Correspondence, head: AlignmentHead) -> Tensor:
    log_p = head(logits).log_softmax(-1)  # [1 or K, B, i, x, j, y]
    target = match.index.clamp(min=0).permute(0, 1, 3, 2)[None, ..., None].expand(len(log_p), -1, -1, -1, -1, -1)
    nll = -log_p.gather(-1, target)[..., 0].mean(0).permute(0, 1, 3, 2)
    return nll[match.matched].mean()


def gradients(loss: Tensor, query: Tensor, key: Tensor, head: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [query, key, *head.parameters()])
