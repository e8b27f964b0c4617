"""The alignment head as the sweep applies it: from the products of some rows to their losses, and back.

Axes: K heads, C channels of the products: K, or 1 where the head joins the heads linearly; R rows, M keys, m hidden
units.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cameo.alignment.torch_heads import MlpHead, softmax_rows

__all__ = ["HeadWeights", "RowsHead", "make_rows_head", "workspace_bytes"]

# Bytes of the memory that the sweep takes besides inputs and gradients, unless a single row needs more. On a device
# whose operators are launches, few large portions are faster: a share of its memory, within bounds.
WORKSPACE_BYTES = 64 << 20
MOST_WORKSPACE_BYTES = 192 << 20
WORKSPACE_SHARE = 1 / 128
# On a CPU: the number of query-key pairs whose hidden units are held at once, so that they stay in its caches.
CPU_HIDDEN = 16384


def workspace_bytes(device: torch.device) -> int:
    """Bytes that the sweep may take on a device besides inputs, gradients and a quarter of these.

    Example:
        >>> workspace_bytes(torch.device("cpu")) >> 20
        64
    """
    if device.type == "cpu":
        return WORKSPACE_BYTES
    return max(WORKSPACE_BYTES, min(MOST_WORKSPACE_BYTES, int(WORKSPACE_SHARE * device_bytes(device))))


@functools.cache
def device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device; 0 of another, which is not asked."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


@dataclass(frozen=True)
class HeadWeights:
    """The weights of an `AlignmentHead`, in float32 or float64.

    - `kind`: "mlp", "mean" or "none".
    - `hidden`: weight `[m, K]` and bias `[m]` of each hidden layer of an "mlp", layer by layer.
    - `output`: `[m]`, or `[K]` without hidden layers; None unless the kind is "mlp".
    """

    kind: str
    hidden: Sequence[Tensor] = ()
    output: Tensor | None = None

    @property
    def linear(self) -> bool:
        """Whether the head joins the attention heads linearly: then one product over all head dimensions is enough."""
        return self.kind == "mean" or (self.kind == "mlp" and not self.hidden)


class RowsHead(Protocol):
    """Turns products `[C + extra_channels, R, M]` of rows into losses `[R]`, and overwrites them with their gradient.

    - `channels`: C.
    - `extra_channels`: channels that the head needs for itself, after those of the products.
    - `most_pairs`: number of pairs R * M that fit into the workspace.
    """

    channels: int
    extra_channels: int
    most_pairs: int

    def __call__(self, products: Tensor, targets: Tensor, weights: Tensor, excluded: Tensor | None) -> Tensor:
        """Return the losses of the rows; the arguments are those of `cameo.alignment.torch_heads.softmax_rows`."""

    def parameter_gradients(self) -> list[Tensor]:
        """Return the gradients of the head's weights, summed over all rows so far."""


def make_rows_head(
    head: HeadWeights,
    heads: int,
    scale: float,
    dtype: torch.dtype,
    implementation: str,
    gelu: str,
    gradients: bool,
    workspace: int = WORKSPACE_BYTES,
) -> RowsHead:
    """Build the head for products in `dtype`, as the arguments of `cameo.alignment.sweep.sweep` say.

    Args:
        head: its weights.
        heads: K.
        scale: what the products are multiplied by.
        dtype: of the products.
        implementation: "chunked" or "triton".
        gelu: "exact", or "fast" with "triton".
        gradients: whether to overwrite the products with their gradient.
        workspace: bytes that a portion may take.
    """
    if head.linear or head.kind == "none":
        function = softmax_rows
        if implementation == "triton":
            from cameo.alignment.triton_heads import softmax_rows as function
        channels = 1 if head.linear else heads
        return _Softmax(
            function, channels, scale / heads if head.kind == "mean" else scale, gradients, dtype, workspace
        )
    if implementation == "triton":
        return _TritonMlp(head, scale, gelu, gradients, dtype, workspace)
    return _Mlp(head, scale, gradients, dtype, workspace)


class _Softmax:
    """Heads of which only the softmax remains once the products are computed."""

    extra_channels = 0

    def __init__(
        self,
        function: Callable[..., Tensor],
        channels: int,
        scale: float,
        gradients: bool,
        dtype: torch.dtype,
        workspace: int,
    ) -> None:
        self.function, self.channels, self.scale, self.with_gradients = function, channels, scale, gradients
        self.most_pairs = workspace // (4 * channels * dtype.itemsize)

    def __call__(self, products: Tensor, targets: Tensor, weights: Tensor, excluded: Tensor | None) -> Tensor:
        return self.function(products, self.scale, targets, weights, excluded, self.with_gradients)

    def parameter_gradients(self) -> list[Tensor]:
        return []


class _Mlp(MlpHead):
    """The head with hidden layers, in portions that suit the device."""

    extra_channels = 1

    def __init__(self, head: HeadWeights, scale: float, gradients: bool, dtype: torch.dtype, workspace: int) -> None:
        assert head.output is not None
        layers = list(zip(head.hidden[::2], head.hidden[1::2], strict=True))
        bytes_per_pair = 2 * sum(len(bias) for _, bias in layers) * dtype.itemsize
        pairs = workspace // 3 // bytes_per_pair
        if head.output.device.type == "cpu":
            pairs = min(pairs, CPU_HIDDEN)
        super().__init__(layers, head.output, scale=scale, pairs=pairs, gradients=gradients)
        self.most_pairs = workspace // 3 // ((self.channels + self.extra_channels) * dtype.itemsize)


class _TritonMlp:
    """The head with one hidden layer, in kernels for CUDA."""

    extra_channels = 0

    def __init__(
        self, head: HeadWeights, scale: float, gelu: str, gradients: bool, dtype: torch.dtype, workspace: int
    ) -> None:
        from cameo.alignment.triton_heads import PartialSums, mlp_rows, pack_weights

        assert head.output is not None
        self.function, self.scale, self.gelu = mlp_rows, scale, gelu
        self.weight_in, self.bias, self.weight_out = (weight.contiguous() for weight in (*head.hidden, head.output))
        self.weight_gradients: tuple[Tensor, Tensor, Tensor] | None = None
        self.channels = head.hidden[0].shape[1]
        self.sums: PartialSums | None = None
        if gradients:
            zeros = torch.zeros_like
            self.weight_gradients = zeros(self.weight_in), zeros(self.bias), zeros(self.weight_out)
            self.sums = PartialSums(self.channels, len(self.bias), self.bias.device)
        self.packed = pack_weights(self.weight_in, self.bias, self.weight_out, scale)
        # Besides its products each pair has a score in float32; a third of the workspace remains for sums and tokens.
        self.most_pairs = workspace // 3 * 2 // (self.channels * dtype.itemsize + 4)

    def __call__(self, products: Tensor, targets: Tensor, weights: Tensor, excluded: Tensor | None) -> Tensor:
        head = self.weight_in, self.bias, self.weight_out, self.scale
        return self.function(
            products,
            *head,
            targets,
            weights,
            excluded,
            self.weight_gradients,
            self.gelu,
            packed=self.packed,
            partial=self.sums,
        )

    def parameter_gradients(self) -> list[Tensor]:
        if self.sums is None or self.weight_gradients is None:
            return []
        self.sums.add_to(self.weight_gradients, self.weight_out, self.scale)
        return list(self.weight_gradients)
