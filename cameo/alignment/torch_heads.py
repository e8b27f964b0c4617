"""From the products of queries and keys to the losses of the rows, and back to the gradient of the products.

Plain torch on any device. Axes: K heads, C = K or 1 channels, R rows, M keys, P = R * M pairs, T targets of a row.
The functions overwrite their input with its gradient, so that no second tensor of that size is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["MlpHead", "softmax_rows"]

# Number of columns in each of the matrix products that `_add_product` sums.
BLOCK = 2048

_gelu = torch.ops.aten.gelu
_gelu_backward = torch.ops.aten.gelu_backward


def softmax_rows(
    logits: Tensor, scale: float, targets: Tensor, weights: Tensor, excluded: Tensor | None, gradients: bool
) -> Tensor:
    """Cross-entropy of each row against its targets, `[R]`, averaged over the channels.

    Args:
        logits: `[C, R, M]`; they are overwritten, if `gradients` with the gradient of the sum of the losses.
        scale: the softmax is taken of `scale * logits`.
        targets: int64 `[R, T]`, the column of each target.
        weights: `[R, T]`, the weight of each target; 0 = no target.
        excluded: int64 `[R, 2]`, half-open range of columns that a row does not see, or None.
        gradients: whether to overwrite the logits with the gradient.
    """
    if scale != 1:
        logits.mul_(scale)
    if excluded is not None:
        logits.masked_fill_(_in_range(excluded, logits.shape[-1]), -math.inf)
    log_p = logits.log_softmax(dim=-1)
    targets, weights = targets.expand(len(logits), -1, -1), weights.to(logits.dtype)
    terms = weights * log_p.gather(-1, targets)
    if excluded is not None:  # a target of weight 0 may point to an excluded column, where log_p is infinite
        terms.masked_fill_(weights == 0, 0)
    losses = terms.sum(dim=(0, -1)) * (-1 / len(logits))
    if gradients:
        weights = weights * (scale / len(logits))
        torch.exp(log_p, out=logits)
        logits.mul_(weights.sum(dim=-1, keepdim=True))
        logits.scatter_add_(-1, targets, -weights.expand(targets.shape))
    return losses


class MlpHead:
    """The multi-layer head over the K heads, computed for at most a given number of pairs at a time.

    Args:
        layers: weight `[m, K or m']` and bias `[m]` of each hidden layer.
        output: weight `[m]` of the last layer.
        scale: the factor of q.k in the layer.
        pairs: for how many pairs to hold the hidden units at once; at least one row is always computed at once.
        gradients: whether to compute gradients.
    """

    def __init__(
        self, layers: Sequence[tuple[Tensor, Tensor]], output: Tensor, *, scale: float, pairs: int, gradients: bool
    ) -> None:
        (weight, bias), *self._deeper = layers
        self._output, self._scale, self._pairs, self._gradients = output, scale, pairs, gradients
        self.channels = weight.shape[1]
        # The bias is the weight of one more input, which is 1: neither the bias nor its gradient needs another pass
        # over the hidden units.
        self._first = torch.cat([weight * scale, bias[:, None]], dim=1)
        self._widths = [len(weight) for weight, _ in layers]
        self._buffers: dict[str, Tensor] = {}
        if gradients:
            forward = [self._first[:, :-1], *(weight for weight, _ in self._deeper)]
            # The weights of the last layer scale the rows of the last hidden one. That layer's own gradients are scaled
            # once, in `parameter_gradients`, instead of once per pair.
            forward[-1] = forward[-1] * output[:, None]
            self._backward_weights = [weight.t().contiguous() for weight in forward]
            self._d_first = torch.zeros_like(self._first.t())
            self._d_deeper = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in self._deeper]
            self._d_output = torch.zeros_like(output)

    def __call__(self, products: Tensor, targets: Tensor, weights: Tensor, excluded: Tensor | None) -> Tensor:
        """Return the loss of each row, `[R]`.

        Args:
            products: `[K + 1, R, M]`: the products q.k, and a last channel that the head fills. The products are
                overwritten with their gradient if gradients are computed.
            targets, weights, excluded: as in `softmax_rows`.
        """
        rows, keys = products.shape[1:]
        products[-1] = 1
        if excluded is not None:
            products[:-1].masked_fill_(_in_range(excluded, keys), 0)
        flat = products.flatten(1)
        rows_at_once = max(1, self._pairs // keys)
        losses = []
        for start in range(0, rows, rows_at_once):
            part = slice(start, start + rows_at_once)
            portion = flat[:, start * keys : (start + rows_at_once) * keys]
            hidden = self._forward(portion)
            scores = torch.mv(hidden[-1][1].t(), self._output, out=self._buffer("scores", portion.shape[1]))
            logits = scores.view(1, -1, keys)
            excluded_part = None if excluded is None else excluded[part]
            losses.append(softmax_rows(logits, 1, targets[part], weights[part], excluded_part, self._gradients))
            if self._gradients:
                self._backward(portion, hidden, scores)
        return torch.cat(losses)

    def _forward(self, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return, for each layer, its hidden units before and after the GELU."""
        count = inputs.shape[1]
        hidden: list[tuple[Tensor, Tensor]] = []
        for layer, width in enumerate(self._widths):
            before = self._buffer(f"before {layer}", width, count)
            if layer == 0:
                torch.mm(self._first, inputs, out=before)
            else:
                weight, bias = self._deeper[layer - 1]
                torch.addmm(bias[:, None], weight, hidden[-1][1], out=before)
            hidden.append((before, _gelu.out(before, out=self._buffer(f"after {layer}", width, count))))
        return hidden

    def _backward(self, inputs: Tensor, hidden: list[tuple[Tensor, Tensor]], d_scores: Tensor) -> None:
        """Add to the gradients of the parameters; overwrite all rows of `inputs` but the last with their gradient."""
        before, after = hidden[-1]
        self._d_output += torch.mv(after, d_scores)
        delta = _gelu_backward.grad_input(d_scores.expand_as(before), before, grad_input=after)
        for layer in range(len(self._deeper), 0, -1):
            before, after = hidden[layer - 1]
            d_weight, d_bias = self._d_deeper[layer - 1]
            _add_product(d_weight, delta, after)
            d_bias += delta.sum(dim=1)
            torch.mm(self._backward_weights[layer], delta, out=after)
            delta = _gelu_backward.grad_input(after, before, grad_input=after)
        _add_product(self._d_first, inputs, delta)
        torch.mm(self._backward_weights[0], delta, out=inputs[:-1])

    def parameter_gradients(self) -> list[Tensor]:
        """Return the gradients: weight and bias of each hidden layer, then the weight of the last layer."""
        hidden = [(self._d_first[:-1].t() * self._scale, self._d_first[-1]), *self._d_deeper]
        weight, bias = hidden[-1]
        hidden[-1] = (weight * self._output[:, None], bias * self._output)
        return [*(tensor for layer in hidden for tensor in layer), self._d_output]

    def _buffer(self, name: str, *shape: int) -> Tensor:
        count = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name] = self._first.new_empty(count)
        return buffer[:count].view(shape)


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right.T` of two tensors with few rows and many columns, block by block: one product would be slow."""
    blocks = left.shape[1] // BLOCK
    if blocks > 1:
        first, second = (tensor[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)) for tensor in (left, right))
        sums += torch.bmm(first.transpose(0, 1), second.permute(1, 2, 0)).sum(dim=0)
        left, right = left[:, blocks * BLOCK :], right[:, blocks * BLOCK :]
    sums.addmm_(left, right.t())


def _in_range(ranges: Tensor, columns: int) -> Tensor:
    """Bool `[R, M]`: which columns lie in the range `[R, 2]` of their row."""
    column = torch.arange(columns, device=ranges.device)
    return (column >= ranges[:, :1]) & (column < ranges[:, 1:])
