"""Other ways to compute the alignment loss: the dense form of the released path, checkpointed chunks, linear heads.

Axes: B samples, V views, K heads, N tokens per view, D head dimension.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.alignment.cases import Case, Setting
from cameo import AlignmentHead

__all__ = ["checkpointed_loss", "dense_bytes", "dense_loss", "head_function", "linear_peers", "released_dense_loss"]

CHUNK_ROWS = {"cpu": 64, "cuda": 1024}
EPSILON = 1e-8  # what the released code adds to a probability before its logarithm


def dense_loss(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    nearest: Tensor,
    head: Callable[[Tensor], Tensor],
    references: int,
) -> Tensor:
    """The released loss with all its tensors: every logit of the layer, and the head on a copy with K last.

    Args:
        query, key: `[B, K, V, N, D]`.
        index: `[B, V, V, N]` token of the match, -1 where not visible.
        nearest: bool `[B, V, V, N]`: the view that carries the target of a query token.
        head: maps `[..., K]` to `[...]`.
        references: views whose queries are averaged apart from the rest.
    """
    views, tokens, dimension = query.shape[2:]
    logits = (query.flatten(2, 3) @ key.flatten(2, 3).mT) * dimension**-0.5
    logits = logits.unflatten(3, (views, tokens)).unflatten(2, (views, tokens))  # [B, K, V, N, V, N]
    loss = query.new_zeros((), dtype=torch.promote_types(query.dtype, torch.float32))
    for part in (range(references), range(references, views)):
        others = [[j for j in range(views) if j != i] for i in part]
        rows = torch.stack([logits[:, :, i][:, :, :, js] for i, js in zip(part, others, strict=True)], dim=2)
        rows = rearrange(rows, "b k v x j y -> b v x j y k").to(loss.dtype).contiguous()
        probability = head(rows).softmax(dim=-1)
        token = torch.stack([index[:, i, js] for i, js in zip(part, others, strict=True)], dim=1).mT
        carries = torch.stack([nearest[:, i, js] for i, js in zip(part, others, strict=True)], dim=1).mT
        target = torch.zeros_like(probability).scatter_(-1, token.clamp(min=0)[..., None], 1) * carries[..., None]
        nll = -(target * (probability + EPSILON).log()).sum(dim=-1)
        seen = (token >= 0).to(loss.dtype)
        loss = loss + (nll * seen).sum() / seen.sum().clamp(min=1)
    return loss


def head_function(head: AlignmentHead) -> Callable[[Tensor], Tensor]:
    """The head on `[..., K]`, heads last, as the released code applies it."""

    def apply(features: Tensor) -> Tensor:
        if head.output is None:
            return features.mean(dim=-1)
        for layer in head.hidden:
            features = F.gelu(layer(features))
        return head.output(features).squeeze(-1)

    return apply


def released_dense_loss(case: Case, compiled: bool = False) -> Callable[[], Tensor]:
    """Bind `dense_loss` to a case; targets are looked up once, outside of what is timed."""
    index, nearest = case.visible.index, case.weights("released") > 0
    function = torch.compile(dense_loss, dynamic=False) if compiled else dense_loss
    head = head_function(case.head)

    def run() -> Tensor:
        with torch.autocast(case.query.device.type, enabled=False):
            return function(case.query, case.key, index, nearest, head, case.references)

    return run


def dense_bytes(setting: Setting, hidden: int) -> int:
    """About what the dense form holds: the logits, and per pair the head's input, two hidden copies and a few more."""
    itemsize = torch.finfo(getattr(torch, setting.dtype)).bits // 8
    logits = setting.batch * setting.heads * (setting.views * setting.tokens**2) ** 2 * itemsize
    return logits + setting.pairs * max(4, itemsize) * (setting.heads + 2 * hidden + 6)


def checkpointed_loss(case: Case, selection: str) -> Callable[[], Tensor]:
    """Rows with a target in chunks that share their keys, each recomputed in the backward pass."""
    groups = list(_groups(case, selection))

    def chunk(queries: Tensor, keys: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        logits = case.head((queries * case.setting.dimension**-0.5).to(weight) @ keys.to(weight).mT)
        return (weight * F.cross_entropy(logits[0], target, reduction="none")).sum()

    def run() -> Tensor:
        loss = case.query.new_zeros((), dtype=groups[0][4].dtype)
        for b, j, row, target, weight in groups:
            keys, queries = case.key[b, :, j], case.query[b].flatten(1, 2)[:, row]
            for part in torch.arange(len(row)).split(CHUNK_ROWS[case.query.device.type]):
                rows = slice(int(part[0]), int(part[-1]) + 1)
                arguments = (queries[:, rows], keys, target[rows], weight[rows])
                loss = loss + checkpoint(chunk, *arguments, use_reentrant=False)
        return loss

    return run


def _groups(case: Case, selection: str) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """Sample, key view, and of each supervised row the query token among all views, the target and the weight."""
    dtype = torch.promote_types(case.query.dtype, torch.float32)
    weights, index = case.weights(selection, dtype), case.match(selection).index
    tokens = weights.shape[-1]
    for b, j in torch.nonzero(weights.any(dim=3).any(dim=1)).tolist():
        view, token = torch.nonzero(weights[b, :, j], as_tuple=True)
        yield b, j, view * tokens + token, index[b, view, j, token], weights[b, view, j, token]


def linear_peers(case: Case) -> dict[str, Callable[[str], Callable[[], Tensor]]]:
    """Linear cross-entropy libraries that are installed, for a head that averages and a CUDA device, by name.

    The mean over heads of q.k is one product of vectors of size K * D, so each key view is a vocabulary of N words.
    Joining the heads into such vectors is part of what is timed. Not for "released", whose rows differ in weight.
    """
    if case.setting.head != "mean" or case.query.device.type != "cuda":
        return {}
    found: dict[str, Callable[[str], Callable[[], Tensor]]] = {}
    if importlib.util.find_spec("cut_cross_entropy"):
        found["cut cross-entropy, exact"] = lambda selection: _linear(case, selection, _cut_cross_entropy)
    if importlib.util.find_spec("liger_kernel"):
        found["liger"] = lambda selection: _linear(case, selection, _liger)
    return found


def _linear(
    case: Case, selection: str, cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    groups = list(_groups(case, selection))
    # These libraries take no weight per row; outside of the released mode all rows weigh the same.
    factor = case.setting.dimension**-0.5 / case.setting.heads

    def run() -> Tensor:
        queries = rearrange(case.query * factor, "b k v n d -> b (v n) (k d)")
        keys = rearrange(case.key, "b k v n d -> b v n (k d)")
        loss = case.query.new_zeros((), dtype=torch.float32)
        for b, j, row, target, weight in groups:
            loss = loss + weight[0] * cross_entropy(queries[b, row], keys[b, j], target).float()
        return loss

    return run


def _cut_cross_entropy(queries: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(queries, keys, target, reduction="sum", filter_eps=None)


def _liger(queries: Tensor, keys: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum")(keys, queries, target)
