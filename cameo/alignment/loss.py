"""The alignment loss: cross-entropy between a layer's attention and geometric correspondence.

Axes: B samples, V views, K heads, N tokens per view (the largest view; shorter ones are padded), D head
dimension, i query view, j key view, x query token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cameo.alignment.head import AlignmentHead, is_sharded
from cameo.alignment.operator import fused_alignment_loss
from cameo.alignment.reference import reference_loss
from cameo.alignment.supervision import check_options, count_rows, sampled_weights, supervision_weights
from cameo.correspondence.neighbors.triton_support import refusal as triton_refusal
from cameo.errors import ShapeError, as_integer
from cameo.memory import HostCopy
from cameo.renamed import old_keywords

if TYPE_CHECKING:
    from cameo.correspondence import Correspondence

__all__ = ["PlannedMatches", "alignment_loss", "plan_matches", "planned_loss"]


@old_keywords
def alignment_loss(
    query: Tensor,
    key: Tensor,
    correspondence: Correspondence,
    head: AlignmentHead,
    *,
    scale: float | None = None,
    pairs: str | Tensor = "all",
    normalize: str = "per_view",
    reduction: str = "mean",
    num_reference_views: int | None = None,
    visible: Tensor | None = None,
    softness: float = 0.0,
    implementation: str = "auto",
    gelu: str = "exact",
    max_queries: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Cross-entropy of the attention between views against the true matches; a scalar.

    Example:
        >>> from cameo import Correspondence
        >>> index = torch.full((1, 2, 2, 16), -1)
        >>> index[0, 0, 1], index[0, 1, 0] = torch.arange(16), torch.arange(16)
        >>> match = Correspondence(index=index, token_grids=((4, 4), (4, 4)))
        >>> query = key = torch.zeros(1, 8, 2, 16, 32)
        >>> loss = alignment_loss(query, key, match, AlignmentHead(8))   # uniform attention: log(16)
        >>> round(loss.item(), 4)
        2.7726

    For every matched (b, i, j, x) this is, averaged,

        logits = head(scale * query[b, :, i, x] @ key[b, :, j].T)        # [1, N]
        loss = logsumexp(logits) - logits[index[b, i, j, x]]

    Half-precision inputs are multiplied and summed in float32, float64 stays float64, whatever autocast says.
    If there is no match the loss is exactly 0 and still has a graph to query, key and head.

    Args:
        query: [B, K, V, N, D], exactly what the attention kernel receives.
        key: [B, K, V, N, D]; tokens beyond a view's own grid are ignored.
        correspondence: matches on the same token grid.
        head: joins the K heads.
        scale: the factor of q.k in the layer; None is D ** -0.5.
        pairs: "all", or bool [V, V] (query view, key view): which ordered pairs are supervised.
        normalize: "per_view": softmax over the keys of view j. "all_views": one softmax over the keys of all
            views but the query's own.
        reduction: "mean": sum(w * loss) / sum(w), with w = 1 unless the correspondence has a weight.
            "sum": sum(w * loss). "released": as the authors' released code, see `supervision_weights`.
        num_reference_views: number of reference views; required by "released", and read for it only.
        visible: bool [B, V, N, V, N] (query view, query, key view, key): which keys each query sees, where the layer
            masks its attention. The softmax leaves the others out, and a match with one of them is not supervised.
            None: all. Computed by "reference".
        softness: standard deviation, in tokens, of the Gaussian that spreads each match over the tokens around
            it; 0 is one token. See `cameo.alignment.supervision.Window`.
        implementation: "reference": readable, holds all logits, can be differentiated twice. "chunked": loss and
            gradient in one sweep over the supervised queries, on any device, in a workspace of bounded size.
            "triton": the same with kernels for CUDA. "auto": "triton" where it can serve, else "chunked"; "reference"
            for `visible`, a head with a forward of its own, a match weight that requires a gradient, and inside of
            torch.func.
        gelu: "exact": to the rounding of the dtype; within 6e-7 in the kernels of "triton". "fast": within 1.2e-6, by
            a shorter polynomial, in the kernels of "triton"; the other implementations always compute the exact one.
        max_queries: compute only so many rows (a query token with the keys that its softmax is over), at least 1, drawn
            at random in each call. The time is proportional to it; loss and gradient are those of all rows on average.
            None computes all.
        generator: of the random numbers for `max_queries`; None is torch's own on the CPU.

    Raises:
        ShapeError: the shapes do not fit each other, the head or the correspondence.
        ValueError: an option is unknown, a match is outside its view's token grid, a match weight is negative, or the
            implementation cannot serve.

    Source: arXiv 2512.03045.
    """
    plan = partial(
        plan_matches, pairs=pairs, normalize=normalize, reduction=reduction, num_reference_views=num_reference_views,
        max_queries=max_queries, generator=generator,
    )  # fmt: skip
    check_options(normalize=normalize, reduction=reduction, softness=softness, implementation=implementation, gelu=gelu)
    if num_reference_views is not None:
        as_integer("num_reference_views", num_reference_views, least=0)
    return planned_loss(
        query, key, correspondence, head, plan, scale=scale, normalize=normalize, visible=visible, softness=softness,
        implementation=implementation, gelu=gelu,
    )  # fmt: skip


@dataclass(frozen=True)
class PlannedMatches:
    """Matches with what is known of their loss before the queries and keys are.

    Attributes:
        correspondence: the matches.
        weights: their weights in the loss, `[B, V, V, N]`.
        counts: what `count_rows` counts, on its way to the host; None: counted when the loss is computed.
    """

    correspondence: Correspondence
    weights: Tensor
    counts: HostCopy | None = None

    def counted(self, normalize: str) -> PlannedMatches:
        """Begin to count the rows, so that the host need not wait for a device that is busy by then."""
        found = count_rows(self.correspondence.index, self.weights, self.correspondence.token_grids, normalize)
        return dataclasses.replace(self, counts=HostCopy(found))


def plan_matches(
    correspondence: Correspondence,
    dtype: torch.dtype,
    *,
    pairs: str | Tensor = "all",
    normalize: str = "per_view",
    reduction: str = "mean",
    num_reference_views: int | None = None,
    max_queries: int | None = None,
    generator: torch.Generator | None = None,
    totals: Tensor | None = None,
) -> PlannedMatches:
    """Weigh the matches in `dtype`, float32 or float64; the other arguments are those of `alignment_loss`."""
    weights = supervision_weights(
        correspondence,
        pairs=pairs,
        reduction=reduction,
        num_reference_views=num_reference_views,
        totals=totals,
        dtype=dtype,
    )
    if max_queries is not None:
        max_queries = as_integer("max_queries", max_queries, least=1)
        weights = sampled_weights(weights, normalize, max_queries, generator)
    return PlannedMatches(correspondence, weights)


def planned_loss(
    query: Tensor,
    key: Tensor,
    correspondence: Correspondence,
    head: AlignmentHead,
    plan: PlannedMatches | Callable[[Correspondence, torch.dtype], PlannedMatches],
    *,
    scale: float | None,
    normalize: str,
    visible: Tensor | None,
    softness: float,
    implementation: str,
    gelu: str,
) -> Tensor:
    """Compute `alignment_loss`, with what was planned for these very matches, or with what is to plan them."""
    if scale is not None and not (isinstance(scale, Real) and math.isfinite(scale)):
        raise ValueError(f"scale: expected a finite factor of q.k or None, got {scale}")
    _check_tensors(query, key, correspondence, head)
    if normalize == "per_view" and max(height * width for height, width in correspondence.token_grids) == 1:
        raise ValueError(
            "a query reaches one token per view, so a softmax per view is constant and trains nothing; "
            'use normalize="all_views"'
        )
    if visible is not None:
        correspondence = _check_visible(visible, correspondence)
    chosen = _choose(implementation, query, head, correspondence, masked=visible is not None)
    # Half precision costs one rounding of the inputs only: everything below is float32 or float64.
    dtype = torch.promote_types(query.dtype, torch.float32)
    planned = plan if isinstance(plan, PlannedMatches) else plan(correspondence, dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "reference":
        return reference_loss(query, key, correspondence, planned.weights, head, scale, normalize, softness, visible)
    return fused_alignment_loss(
        query,
        key,
        correspondence.index,
        planned.weights,
        [weight.to(dtype) for weight in head.weights()],
        kind=head.kind,
        token_grids=correspondence.token_grids,
        normalize=normalize,
        softness=float(softness),
        scale=float(scale),
        implementation=chosen,
        gelu=gelu,
        counts=() if planned.counts is None else planned.counts.tolist(),
    )


def _check_visible(visible: Tensor, correspondence: Correspondence) -> Correspondence:
    """Check its shape, and remove the matches with keys that are not seen."""
    batch, views, _, tokens = correspondence.index.shape
    expected = (batch, views, tokens, views, tokens)
    if visible.shape != expected or visible.dtype != torch.bool:
        raise ShapeError("visible", expected=f"bool {list(expected)}", got=f"{visible.dtype} {list(visible.shape)}")
    index = correspondence.index
    seen = visible.transpose(2, 3).gather(4, index.clamp(min=0)[..., None])[..., 0]
    return dataclasses.replace(correspondence, index=index.where(seen, -1))


def _choose(
    implementation: str, query: Tensor, head: AlignmentHead, correspondence: Correspondence, *, masked: bool
) -> str:
    """Resolve "auto", and refuse an implementation that cannot serve."""
    reason = "it compares a query with whole views, and visible= hides tokens" if masked else None
    weight = correspondence.match_weight
    if type(head).forward is not AlignmentHead.forward:  # FSDP makes another class, with the same forward
        reason = f"it computes an AlignmentHead, and {type(head).__name__} may have a forward of its own"
    elif weight is not None and weight.requires_grad and torch.is_grad_enabled():
        reason = "it has no gradient for correspondence.match_weight, which requires one"
    elif torch._C._are_functorch_transforms_active():
        reason = "transforms of torch.func do not pass through it"
    if implementation == "reference" or (implementation == "auto" and reason is not None):
        if any(map(is_sharded, head.parameters())):
            raise ValueError(
                "head: is sharded on its own, and the reference calls it as often as there are groups of queries with "
                "a match, so processes with different matches would wait for each other; leave it to the "
                'fully_shard() of the whole model, or use implementation="auto" with an AlignmentHead'
            )
        return "reference"
    if reason is None and implementation != "chunked":
        reason = triton_refusal(query.device, query.dtype, head.num_heads, len(head.hidden))
        if implementation == "auto":
            return "triton" if reason is None and query.is_cuda else "chunked"
    if reason is None:
        return implementation
    raise ValueError(f'implementation={implementation!r} cannot serve: {reason}. Use implementation="auto"')


def _check_tensors(query: Tensor, key: Tensor, correspondence: Correspondence, head: AlignmentHead) -> None:
    batch, views, _, tokens = correspondence.index.shape
    for name, tensor in (("query", query), ("key", key)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor [B, K, V, N, D], got {type(tensor).__name__}")
        if tensor.ndim != 5:
            cure = "TokenLayout.split_query and split_key bring kernel tensors to this form"
            raise ShapeError(name, expected="[B, K, V, N, D]", got=tensor.shape, cure=cure)
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.device != correspondence.index.device:
            raise ValueError(
                f"{name} is on {tensor.device} and the correspondence on {correspondence.index.device}; "
                f"use correspondence.to({str(tensor.device)!r})"
            )
    if query.shape != key.shape or query.dtype != key.dtype:
        same = f"the query's {list(query.shape)} of {query.dtype}"
        raise ShapeError("key", expected=same, got=f"{list(key.shape)} of {key.dtype}")
    if query.shape[1] != head.num_heads:
        raise ShapeError(
            "query",
            expected=f"K = {head.num_heads} heads, as the AlignmentHead",
            got=query.shape,
            cure=f"Use AlignmentHead(num_heads={query.shape[1]})",
        )
    expected = {
        "B": (
            batch,
            "Classifier-free guidance doubles the batch: repeat the correspondence or train without",
        ),
        "V": (views, "Use Correspondence.take_views to keep the views that the layer sees"),
        "N": (tokens, "Build the correspondence with token_grid=model.token_grid(height, width)"),
    }
    got = dict(zip("BKVND", query.shape, strict=True))
    for axis, (length, cure) in expected.items():
        if got[axis] != length:
            text = f"{axis} = {length} as the correspondence has, in [B, K, V, N, D]"
            raise ShapeError("query", expected=text, got=query.shape, cure=cure)
