"""The fused alignment loss as an operator of torch, a single step for autograd, `torch.compile`, DDP and FSDP.

Its gradient is computed together with the loss and kept, so that the backward pass only multiplies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cameo.alignment.heads import HeadWeights
from cameo.alignment.supervision import check_counts, count_rows
from cameo.alignment.sweep import gradient_dtype, sweep

__all__ = ["fused_alignment_loss"]

# Place of the argument that asks for gradients among those of the operator.
GRADIENTS = 12


@torch.library.custom_op("cameo::alignment_loss", mutates_args=())
def _alignment_loss(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    weights: Tensor,
    head: Sequence[Tensor],
    kind: str,
    token_grids: Sequence[int],
    normalize: str,
    softness: float,
    scale: float,
    implementation: str,
    gelu: str,
    gradients: bool,
    counts: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return the loss and its gradients with respect to query, key and the head's weights, empty unless requested.

    No argument has a default: torch 2.10 leaves out one that has its default, and then finds a gradient too many.
    """
    grids = list(zip(token_grids[::2], token_grids[1::2], strict=True))
    counts = list(counts) or count_rows(index, weights, grids, normalize).tolist()
    check_counts(counts, index, grids)
    output = head[-1].reshape(-1) if head else None
    with torch.autocast(query.device.type, enabled=False):
        result = sweep(
            query,
            key,
            index,
            weights,
            HeadWeights(kind, head[:-1], output),
            token_grids=grids,
            normalize=normalize,
            softness=softness,
            scale=scale,
            implementation=implementation,
            gelu=gelu,
            counts=counts,
            gradients=gradients,
        )
    if result.query is None or result.key is None:
        return result.loss, query.new_empty(0), query.new_empty(0), [weight.new_empty(0) for weight in head]
    # Contiguous, as the fake kernel below promises, whatever they are views of: compiled code relies on it.
    d_head = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in head]
    for target, gradient in zip(d_head, result.weights, strict=True):
        target.copy_(gradient.view(target.shape))
    return result.loss, result.query, result.key, d_head


@_alignment_loss.register_fake
def _(
    query: Tensor, key: Tensor, index: Tensor, weights: Tensor, head: Sequence[Tensor], *options: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    loss = query.new_empty((), dtype=torch.promote_types(query.dtype, torch.float32))
    if not options[GRADIENTS - 5]:
        return loss, query.new_empty(0), query.new_empty(0), [weight.new_empty(0) for weight in head]
    dtype = gradient_dtype(query.dtype)
    d_query, d_key = query.new_empty(query.shape, dtype=dtype), query.new_empty(key.shape, dtype=dtype)
    return loss, d_query, d_key, [weight.new_empty(weight.shape) for weight in head]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, list[Tensor]]) -> None:
    _, d_query, d_key, d_head = output
    ctx.mark_non_differentiable(d_query, d_key, *d_head)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_query, d_key, *d_head)
    ctx.input_dtype, ctx.computed = inputs[0].dtype, inputs[GRADIENTS]
    # An empty list is a list of no tensors to torch, and has an empty list of gradients.
    ctx.others = tuple([] if value == [] else None for value in inputs[5:])


def _multiply(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "alignment_loss: a gradient of its gradient (create_graph=True) is computed by "
            'implementation="reference" only'
        )
    gradients = ctx.saved_tensors
    if d_loss is None:
        return (None, None, None, None, [None] * (len(gradients) - 2), *ctx.others)
    if not ctx.computed:
        raise RuntimeError("alignment_loss: computed without its gradient; call it outside of torch.no_grad()")
    # The saved gradients are multiplied in place, unless they are proxies of a graph being traced, or the graph is kept
    # for another backward pass.
    traced = any(type(gradient) is not Tensor for gradient in gradients)
    kept = traced or torch._C._autograd._get_current_graph_task_keep_graph()
    dtypes = [ctx.input_dtype, ctx.input_dtype, *(gradient.dtype for gradient in gradients[2:])]
    # With one dimension, since torch would first round a factor of no dimension to the dtype of the gradient.
    factor = d_loss.reshape(1)
    if kept:
        d_query, d_key, *d_head = [
            (gradient * factor).to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True)
        ]
    else:
        d_query, d_key = [
            torch.mul(gradient, factor, out=_in_dtype(gradient, dtype))
            for gradient, dtype in zip(gradients[:2], dtypes, strict=False)
        ]
        d_head = list(gradients[2:])
        if d_head:
            torch._foreach_mul_(d_head, d_loss)  # small ones: one launch for all
    return (d_query, d_key, None, None, d_head, *ctx.others)


def _in_dtype(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient itself if it has this dtype, else an empty tensor like it."""
    return gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)


_alignment_loss.register_autograd(_multiply, setup_context=_keep)


def fused_alignment_loss(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    weights: Tensor,
    head: Sequence[Tensor],
    *,
    kind: str,
    token_grids: Sequence[tuple[int, int]],
    normalize: str,
    softness: float,
    scale: float,
    implementation: str,
    gelu: str,
    counts: Sequence[int] = (),
) -> Tensor:
    """Compute the alignment loss; the arguments are those of `cameo.alignment_loss` after its checks.

    Args:
        weights: `[B, V, V, N]`, as `cameo.alignment.supervision_weights` returns them.
        head: weights of the head in order: weight and bias of each hidden layer, then the last weight.
        kind: kind of the head.
        token_grids: token grid `(h, w)` of each view.
        implementation: "chunked" or "triton".
        gelu: "exact", or "fast" for an approximation where the implementation has one.
        counts: what `cameo.alignment.supervision.count_rows` has found; empty: it is called here.
    """
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, *head))
    flat = [side for size in token_grids for side in size]
    options = (kind, flat, normalize, softness, scale, implementation, gelu, gradients, list(counts))
    return _alignment_loss(query, key, index, weights, list(head), *options)[0]
