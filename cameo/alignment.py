"""The alignment loss: cross-entropy between a layer's attention and geometric correspondence.

Axes: B samples, V views, K heads, N tokens per view (the largest view; shorter ones are padded), D head
dimension, i query view, j key view, x query token. This is the readable reference in plain torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cameo.choices import GELUS, HEAD_KINDS, IMPLEMENTATIONS, NORMALISATIONS, REDUCTIONS
from cameo.errors import ShapeError, unknown_name
from cameo.kernels.operator import fused_alignment_loss
from cameo.kernels.rows import Window, check_matches
from cameo.kernels.triton_support import refusal as triton_refusal

if TYPE_CHECKING:
    from cameo.correspondence import Correspondence

__all__ = ["AlignmentHead", "alignment_loss", "supervision_weights"]


class AlignmentHead(nn.Module):
    """Joins the attention logits of K heads into the logits that are supervised; exists in training only.

    Example:
        >>> head = AlignmentHead(num_heads=8)
        >>> head(torch.randn(8, 10, 64)).shape          # 10 query tokens, 64 keys
        torch.Size([1, 10, 64])

    `kind="mlp"` is the paper's: Linear(K, expansion * K), exact GELU, Linear(expansion * K, 1) across the
    heads. `depth` counts the hidden layers; `depth=0` is one linear map. The last layer has no bias: it would
    shift all logits of a query alike, which the softmax ignores, so its gradient is always zero.
    `kind="mean"` averages the heads. `kind="none"` keeps every head and the loss is averaged over them.

    Args:
        num_heads: K, heads of the supervised layer.
        kind: "mlp", "mean" or "none".
        depth: hidden layers of the "mlp", 0 or more; the other kinds have no layers.
        expansion: hidden width of the "mlp" in multiples of K, 1 or more.

    Raises:
        ValueError: unknown kind, or a count out of range.

    Source: arXiv 2512.03045, section on the alignment loss.
    """

    def __init__(self, num_heads: int, kind: str = "mlp", depth: int = 1, expansion: int = 4) -> None:
        super().__init__()
        if kind not in HEAD_KINDS:
            raise unknown_name("head kind", kind, HEAD_KINDS)
        counts = (("num_heads", num_heads, 1), ("depth", depth, 0), ("expansion", expansion, 1))
        for name, value, least in counts:
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        self.num_heads, self.kind, self.depth, self.expansion = num_heads, kind, depth, expansion
        self.hidden = nn.ModuleList()
        self.output: nn.Linear | None = None
        if kind == "mlp":
            widths = [num_heads] + [expansion * num_heads] * depth
            self.hidden.extend(nn.Linear(*pair) for pair in itertools.pairwise(widths))
            self.output = nn.Linear(widths[-1], 1, bias=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Map scaled logits [K, ...] to [1, ...], for `kind="none"` to [K, ...]; computes in their dtype."""
        if logits.ndim == 0 or logits.shape[0] != self.num_heads:
            raise ShapeError(
                "logits",
                expected=f"[{self.num_heads}, ...] with the heads leading",
                got=logits.shape,
                cure="Use AlignmentHead(num_heads=...) with the heads of the supervised layer",
            )
        if self.kind == "none":
            return logits
        if self.output is None:
            return logits.mean(dim=0, keepdim=True)
        # The head axis stays leading, so the layers are plain matrix products without a permuted copy.
        features = logits.reshape(self.num_heads, -1)
        for layer in self.hidden:
            assert isinstance(layer, nn.Linear)
            weight, bias = layer.weight.to(logits.dtype), layer.bias.to(logits.dtype)
            features = F.gelu(torch.addmm(bias[:, None], weight, features))
        return (self.output.weight.to(logits.dtype) @ features).reshape(1, *logits.shape[1:])

    def weights(self) -> list[Tensor]:
        """Its parameters in order: weight and bias of each hidden layer, then the last weight; none without an MLP."""
        layers = [] if self.output is None else [*self.hidden, self.output]
        found = [parameter for layer in layers for parameter in (layer.weight, layer.bias) if parameter is not None]
        # Sharded parameters (FSDP) are gathered by the module that holds them or, if that did not run, here.
        return [_gather(weight) if _is_sharded(weight) else weight for weight in found]

    def extra_repr(self) -> str:
        """Show the settings in `print(model)`."""
        names = ("num_heads", "kind", "depth", "expansion")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def alignment_loss(
    query: Tensor,
    key: Tensor,
    correspondence: Correspondence,
    head: AlignmentHead,
    *,
    scale: float | None = None,
    pairs: str | Tensor = "all",
    normalise: str = "per_view",
    reduction: str = "mean",
    num_reference_views: int | None = None,
    softness: float = 0.0,
    implementation: str = "auto",
    gelu: str = "exact",
) -> Tensor:
    """Cross-entropy of the attention between views against the true matches; a scalar.

    Example:
        >>> from cameo import Correspondence
        >>> index = torch.full((1, 2, 2, 16), -1)
        >>> index[0, 0, 1], index[0, 1, 0] = torch.arange(16), torch.arange(16)
        >>> match = Correspondence(index=index, sizes=((4, 4), (4, 4)))
        >>> query = key = torch.zeros(1, 8, 2, 16, 32)
        >>> loss = alignment_loss(query, key, match, AlignmentHead(8))   # uniform attention: log(16)
        >>> round(loss.item(), 4)
        2.7726

    For every visible (b, i, j, x) this is, averaged,

        logits = head(scale * query[b, :, i, x] @ key[b, :, j].T)        # [1, N]
        loss = logsumexp(logits) - logits[index[b, i, j, x]]

    Half-precision inputs are multiplied and summed in float32, float64 stays float64, whatever autocast says.
    If nothing is visible the loss is exactly 0 and still has a graph to query, key and head.

    Args:
        query: [B, K, V, N, D], exactly what the attention kernel receives.
        key: [B, K, V, N, D]; tokens beyond a view's own grid are ignored.
        correspondence: matches on the same token grid.
        head: joins the K heads.
        scale: what the layer multiplies q.k by; None is D ** -0.5.
        pairs: "all", or bool [V, V] (query view, key view): which ordered pairs are supervised.
        normalise: "per_view": softmax over the keys of view j. "all_views": one softmax over the keys of all
            views but the query's own.
        reduction: "mean": sum(w * loss) / sum(w), with w = 1 unless the correspondence has a weight.
            "sum": sum(w * loss). "released": as the authors' released code, see `supervision_weights`.
        num_reference_views: needed by, and read only for, "released".
        softness: standard deviation, in tokens, of the Gaussian that spreads each match over the tokens around
            it; 0 is one token. See `cameo.kernels.rows.Window`.
        implementation: "reference": readable, holds all logits, can be differentiated twice. "chunked": loss and
            gradient in one sweep over the supervised queries, on any device, in a workspace of bounded size.
            "triton": the same with kernels for CUDA. "auto": "triton" where it can, else "chunked"; "reference" for
            a head with a forward of its own, a weight that requires a gradient, and inside of torch.func.
        gelu: "exact": to the rounding of the precision, in the kernels of "triton" within 6e-7. "fast": there within
            1.2e-6 by a shorter polynomial; the other implementations have the exact one only.

    Raises:
        ShapeError: shapes that do not fit each other, the head or the correspondence.
        ValueError: unknown option, match out of range, negative weight, or an implementation that cannot serve.

    Source: arXiv 2512.03045.
    """
    for name, value, known in (
        ("normalise", normalise, NORMALISATIONS),
        ("implementation", implementation, IMPLEMENTATIONS),
        ("gelu", gelu, GELUS),
    ):
        if value not in known:
            raise unknown_name(name, value, known)
    if reduction == "released" and normalise != "per_view":
        raise ValueError('reduction="released" is defined for normalise="per_view" only')
    if not 0 <= softness < math.inf:
        raise ValueError(f"softness: expected a finite number of tokens >= 0, got {softness}")
    _check_tensors(query, key, correspondence, head)
    if normalise == "per_view" and max(height * width for height, width in correspondence.sizes) == 1:
        raise ValueError(
            "a query reaches one token per view, so a softmax per view is constant and trains nothing; "
            'use normalise="all_views"'
        )
    chosen = _choose(implementation, query, head, correspondence)
    # One rounding of the inputs is all that half precision costs: everything below is float32 or float64.
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights = supervision_weights(
        correspondence,
        pairs=pairs,
        reduction=reduction,
        num_reference_views=num_reference_views,
        dtype=dtype,
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if chosen == "reference":
        return _reference(query, key, correspondence, weights, head, scale, normalise, softness)
    return fused_alignment_loss(
        query,
        key,
        correspondence.index,
        weights,
        [weight.to(dtype) for weight in head.weights()],
        kind=head.kind,
        sizes=correspondence.sizes,
        normalise=normalise,
        softness=float(softness),
        scale=float(scale),
        implementation=chosen,
        gelu=gelu,
    )


def supervision_weights(
    correspondence: Correspondence,
    *,
    pairs: str | Tensor = "all",
    reduction: str = "mean",
    num_reference_views: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weight [B, V, V, N] of each -log p[match] in the alignment loss, which is their weighted sum.

    Example:
        >>> from cameo import Correspondence
        >>> index = torch.full((1, 2, 2, 4), -1)
        >>> index[0, 0, 1, :2] = 3
        >>> supervision_weights(Correspondence(index=index, sizes=((2, 2), (2, 2))))[0, 0, 1].tolist()
        [0.5, 0.5, 0.0, 0.0]

    "released": of all other views of a query token only the one with the nearest 3D point carries a target,
    and only if that pair is visible, yet every visible pair counts in the mean. The queries of the first
    `num_reference_views` views and those of the rest are averaged apart and added; an empty part counts 0.

    Raises:
        ShapeError: `pairs`, `weight` or `distance` of another shape.
        ValueError: unknown reduction, negative or non-finite weight, or what "released" needs is missing.

    Source: arXiv 2512.03045 and the code released with it.
    """
    if reduction not in REDUCTIONS:
        raise unknown_name("reduction", reduction, REDUCTIONS)
    visible = correspondence.visible & _pair_mask(pairs, correspondence)[None, :, :, None]
    weights = visible.to(dtype)
    if correspondence.weight is not None:
        _check_like_index("correspondence.weight", correspondence.weight, correspondence)
        if not bool(((correspondence.weight >= 0) & correspondence.weight.isfinite()).all()):
            raise ValueError(
                f"correspondence.weight: expected finite values of at least 0, got a minimum of "
                f"{correspondence.weight.min().item():g}; clamp the weights"
            )
        # where, not a product: the weight of a pair that is not visible has no meaning.
        weights = torch.where(visible, correspondence.weight.to(dtype), 0)
    if reduction == "sum":
        return weights
    if reduction == "mean":
        return weights / _nonzero(weights.sum())
    count = _check_reference_views(num_reference_views, correspondence.num_views)
    nearest = _nearest_view(correspondence)
    reference, target = weights[:, :count], weights[:, count:]
    halves = [reference / _nonzero(reference.sum()), target / _nonzero(target.sum())]
    return torch.cat(halves, dim=1) * nearest


def _choose(implementation: str, query: Tensor, head: AlignmentHead, correspondence: Correspondence) -> str:
    """Resolve "auto", and refuse what cannot serve."""
    reason: str | None = None
    weight = correspondence.weight
    if type(head).forward is not AlignmentHead.forward:  # FSDP makes a class of its own with the same forward
        reason = f"it computes an AlignmentHead, and {type(head).__name__} may have a forward of its own"
    elif weight is not None and weight.requires_grad and torch.is_grad_enabled():
        reason = "it has no gradient for correspondence.weight, which requires one"
    elif torch._C._are_functorch_transforms_active():
        reason = "transforms of torch.func do not pass through it"
    if implementation == "reference" or (implementation == "auto" and reason is not None):
        if any(map(_is_sharded, head.parameters())):
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


def _reference(
    query: Tensor,
    key: Tensor,
    correspondence: Correspondence,
    weights: Tensor,
    head: AlignmentHead,
    scale: float,
    normalise: str,
    softness: float,
) -> Tensor:
    """The loss as one reads it, group by group; what the other implementations are compared with."""
    check_matches(correspondence.index, correspondence.sizes)
    dtype = weights.dtype
    groups = _groups_per_view if normalise == "per_view" else _groups_all_views
    window = Window(correspondence.sizes, softness, query.device)
    loss = None
    with torch.autocast(device_type=query.device.type, enabled=False):
        if normalise == "all_views" and set(correspondence.sizes) == {(1, 1)}:
            loss = _one_token_per_view(query.to(dtype) * scale, key.to(dtype), weights, head)
            return _zero_with_graph(query, key, head, dtype) if loss is None else loss
        for queries, keys, start, match, row in groups(query, key, correspondence, weights):
            view, token, weight = window.spread(*(column[:, None] for column in match))
            logits = head((queries.to(dtype) * scale) @ keys.to(dtype).transpose(-1, -2))
            log_sum = logits.logsumexp(dim=-1)[:, row, None]
            nll = (log_sum - logits[:, row[:, None], start[view] + token]).mean(dim=0)
            part = (weight * nll).sum()
            loss = part if loss is None else loss + part
    return _zero_with_graph(query, key, head, dtype) if loss is None else loss


def _is_sharded(weight: Tensor) -> bool:
    return hasattr(weight, "full_tensor")


def _gather(weight: Tensor) -> Tensor:
    """Whole tensor of a sharded parameter; its gradient becomes the mean over the processes, as FSDP's own."""
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    processes = weight.device_mesh.size()
    whole: Tensor = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / processes)
    return whole


Match = tuple[Tensor, Tensor, Tensor]
Group = tuple[Tensor, Tensor, Tensor, Match, Tensor]


def _groups_per_view(query: Tensor, key: Tensor, correspondence: Correspondence, weights: Tensor) -> Iterator[Group]:
    """Rows that share their keys: all supervised queries of a sample against one key view.

    Yields queries [K, R, D], keys [K, M, D], the first key of each view, and of each match its view, its token and
    its weight, and its query's row.
    """
    start = torch.zeros(len(correspondence.sizes), dtype=torch.int64, device=query.device)
    for b, j in torch.nonzero(weights.any(dim=3).any(dim=1)).tolist():
        height, width = correspondence.sizes[j]
        view, token = torch.nonzero(weights[b, :, j], as_tuple=True)
        row = torch.arange(len(view), device=query.device)
        target = correspondence.index[b, view, j, token]
        keys = key[b, :, j, : height * width]
        match = torch.full_like(view, j), target, weights[b, view, j, token]
        yield query[b][:, view, token], keys, start, match, row


def _groups_all_views(query: Tensor, key: Tensor, correspondence: Correspondence, weights: Tensor) -> Iterator[Group]:
    """The same for one softmax over all other views: the supervised queries of one view of a sample."""
    lengths = [height * width for height, width in correspondence.sizes]
    for b, i in torch.nonzero(weights.any(dim=3).any(dim=2)).tolist():
        others = [j for j in range(len(lengths)) if j != i]
        keys = torch.cat([key[b, :, j, : lengths[j]] for j in others], dim=1)
        start = torch.zeros(len(lengths), dtype=torch.int64)
        start[others] = torch.tensor([0] + [lengths[j] for j in others[:-1]]).cumsum(0)
        view, token = torch.nonzero(weights[b, i], as_tuple=True)
        tokens, row = torch.unique(token, return_inverse=True)
        match = view, correspondence.index[b, i, view, token], weights[b, i, view, token]
        yield query[b][:, i, tokens], keys, start.to(query.device), match, row


def _one_token_per_view(query: Tensor, key: Tensor, weights: Tensor, head: AlignmentHead) -> Tensor | None:
    """The loss over all views where each has one token, as in temporal attention; None without a match.

    There is one small softmax per cell of the token grid, so all cells with a match are computed in one batch.
    """
    cells = weights.flatten(1).any(dim=1).nonzero().flatten()
    if not len(cells):
        return None
    queries, keys = (tensor[cells, :, :, 0].transpose(0, 1) for tensor in (query, key))  # [K, cells, V, D]
    logits = head(queries @ keys.transpose(-1, -2))
    own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    log_sum = logits.masked_fill(own, -torch.inf).logsumexp(dim=-1, keepdim=True)
    weight = weights[cells, ..., 0]
    nll = (log_sum - logits).mean(dim=0).masked_fill(weight == 0, 0)
    return (weight * nll).sum()


def _zero_with_graph(query: Tensor, key: Tensor, head: AlignmentHead, dtype: torch.dtype) -> Tensor:
    # Sums of empty slices: 0 * query would be NaN where a query is infinite.
    sources = [query, key, *head.parameters()]
    return torch.stack([source.reshape(-1)[:0].to(dtype).sum() for source in sources]).sum()


def _nearest_view(correspondence: Correspondence) -> Tensor:
    """Bool [B, V, V, N]: view j has the 3D point nearest to token x among all views other than i."""
    if correspondence.distance is None:
        raise ValueError(
            'correspondence.distance: reduction="released" needs the 3D distances, got None. '
            "Build the correspondence with Correspondence.from_point_maps"
        )
    _check_like_index("correspondence.distance", correspondence.distance, correspondence)
    own = torch.eye(correspondence.num_views, dtype=torch.bool, device=correspondence.index.device)
    distance = correspondence.distance.masked_fill(rearrange(own, "i j -> 1 i j 1"), torch.inf)
    nearest = distance.argmin(dim=2, keepdim=True)
    return torch.zeros_like(distance, dtype=torch.bool).scatter(2, nearest, value=True)


def _nonzero(total: Tensor) -> Tensor:
    # An empty mean counts 0, so its divisor may be anything but 0.
    return torch.where(total > 0, total, 1)


def _pair_mask(pairs: str | Tensor, correspondence: Correspondence) -> Tensor:
    views, device = correspondence.num_views, correspondence.index.device
    if isinstance(pairs, str):
        if pairs != "all":
            raise unknown_name("pairs", pairs, ["all"])
        return torch.ones(views, views, dtype=torch.bool, device=device)
    if not isinstance(pairs, Tensor) or pairs.dtype != torch.bool or pairs.shape != (views, views):
        got = f"{pairs.dtype} {list(pairs.shape)}" if isinstance(pairs, Tensor) else type(pairs).__name__
        raise ShapeError("pairs", expected=f'"all" or a bool tensor [V, V] = [{views}, {views}]', got=got)
    return pairs.to(device)


def _check_reference_views(count: int | None, views: int) -> int:
    if not isinstance(count, int) or not 0 <= count <= views:
        raise ValueError(
            f'num_reference_views: reduction="released" needs a number of views, 0 to {views}, got {count!r}'
        )
    return count


def _check_like_index(argument: str, tensor: Tensor, correspondence: Correspondence) -> None:
    if tensor.shape != correspondence.index.shape:
        raise ShapeError(
            argument,
            expected=f"[B, V, V, N] = {list(correspondence.index.shape)} as its index",
            got=tensor.shape,
        )


def _check_tensors(query: Tensor, key: Tensor, correspondence: Correspondence, head: AlignmentHead) -> None:
    batch, views, _, tokens = correspondence.index.shape
    for name, tensor in (("query", query), ("key", key)):
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
        "N": (tokens, "Build the correspondence with size=model.token_grid(height, width)"),
    }
    got = dict(zip("BKVND", query.shape, strict=True))
    for axis, (length, cure) in expected.items():
        if got[axis] != length:
            text = f"{axis} = {length} as the correspondence has, in [B, K, V, N, D]"
            raise ShapeError("query", expected=text, got=query.shape, cure=cure)
