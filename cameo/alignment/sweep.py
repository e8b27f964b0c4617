"""The alignment loss and its gradient in one sweep over the supervised queries.

The loss is a scalar, so its gradient is computed beside it and kept instead of the attention: nothing is computed
twice, and nothing of the size of tokens times tokens is ever held.

Axes: B samples, V views, K heads, N tokens per view, L = V * N tokens of a sample, D head dimension, G groups, R rows
of a group, M keys of a group, n of them in a range, C channels of the products: K, or 1 where the head joins the heads
linearly (then the head dimensions of all heads are one long one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from cameo.alignment.rows import Rows, plan_rows
from cameo.alignment.torch_heads import MlpHead, softmax_rows

__all__ = ["HeadWeights", "Swept", "gradient_dtype", "sweep"]

# Bytes of what is held beside inputs and gradients, where one row does not need more.
WORKSPACE_BYTES = 64 << 20
# Whether torch can multiply half precision on CUDA and give the result in float32.
WIDE_PRODUCTS = any("out_dtype" in str(schema) for schema in torch._C._jit_get_schemas_for_operator("aten::bmm"))
# Tokens whose keys are brought to the dtype and shape of the products at once.
PIECE = 2048
# On a CPU: pairs whose products are held at once, and those of them whose hidden units are, to stay in its caches.
CPU_PRODUCTS, CPU_HIDDEN = 131072, 16384


@dataclass(frozen=True)
class HeadWeights:
    """What the sweep needs of an `AlignmentHead`, in float32 or float64.

    - `kind`: "mlp", "mean" or "none".
    - `hidden`: weight `[m, K]` and bias `[m]` of each hidden layer of an "mlp", each layer's after the other's.
    - `output`: `[m]`, or `[K]` without hidden layers; None unless "mlp".
    """

    kind: str
    hidden: Sequence[Tensor] = ()
    output: Tensor | None = None

    @property
    def linear(self) -> bool:
        """Whether it joins the heads linearly, so that one product of all head dimensions does it."""
        return self.kind == "mean" or (self.kind == "mlp" and not self.hidden)


@dataclass(frozen=True)
class Swept:
    """The loss and, where it was asked for, its gradient by query, key, and the head's hidden and output weights."""

    loss: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    weights: Sequence[Tensor] = ()


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the gradient of queries and keys of this dtype is kept.

    Before it is multiplied by a scaler of the loss, half precision with its few exponents would lose it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


class RowsHead(Protocol):
    """Turns products `[C + spare, R, M]` of rows into losses `[R]`, and overwrites them with their gradient.

    `most_pairs`: how many pairs R * M the workspace has room for.
    """

    channels: int
    spare: int
    most_pairs: int

    def __call__(self, products: Tensor, targets: Tensor, weights: Tensor, own: Tensor | None) -> Tensor:
        """Losses of the rows; see `cameo.alignment.torch_heads.softmax_rows` for the arguments."""

    def parameter_gradients(self) -> list[Tensor]:
        """Gradients of the head's weights so far."""


def sweep(
    query: Tensor,
    key: Tensor,
    index: Tensor,
    weights: Tensor,
    head: HeadWeights,
    *,
    token_grids: Sequence[tuple[int, int]],
    normalize: str,
    softness: float,
    scale: float,
    implementation: str,
    gelu: str,
    gradients: bool,
) -> Swept:
    """Compute the alignment loss of `query` and `key` `[B, K, V, N, D]`, and its gradient.

    Args:
        query, key: as in `cameo.alignment_loss`.
        index, weights: `[B, V, V, N]`, see `plan_rows`.
        head: of the supervised layer.
        token_grids, normalize, softness: see `plan_rows`.
        scale: what the layer multiplies q.k by.
        implementation: "chunked" or "triton".
        gelu: "exact", or "fast", which "triton" has.
        gradients: whether to compute the gradient.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    learned = head.linear and head.output is not None
    # The factors of a linear head that is learned would be rounded to half precision with the queries.
    narrow = implementation == "triton" and dtype != query.dtype and not learned
    operands = query.dtype if narrow else dtype
    # The head with hidden layers takes logits as exact as its inputs; sums of all heads deserve more.
    products_dtype = operands if head.hidden else dtype
    # A power of two, so that the products stay in the range of float16 and keep their digits.
    step = 2.0 ** math.floor(math.log2(abs(scale))) if narrow and scale else 1.0
    # The largest weight is 1 on the way, or gradients of many rows would fall below the range of float16.
    unit = torch.where(weights.amax() > 0, weights.amax(), 1) if narrow and weights.numel() else None
    rows_head = _rows_head(head, query.shape[1], scale / step, products_dtype, implementation, gelu, gradients)
    products = _Products(query, key, head, rows_head, operands, products_dtype, step, gradients)
    loss = torch.zeros((), dtype=weights.dtype, device=query.device)
    plan = plan_rows(
        index,
        weights if unit is None else weights / unit,
        token_grids,
        normalize=normalize,
        softness=softness,
        pairs=min(rows_head.most_pairs, CPU_PRODUCTS) if query.device.type == "cpu" else rows_head.most_pairs,
        most_pairs=rows_head.most_pairs,
        # Queries, keys and the gradients of both are brought together in up to as many bytes each.
        most_tokens=max(1, WORKSPACE_BYTES // 8 // (query.shape[1] * query.shape[-1] * dtype.itemsize)),
    )
    for rows in plan:
        loss += products.losses(rows).sum()
    if unit is not None:
        loss *= unit
    if not gradients:
        return Swept(loss)
    return Swept(loss, *products.gradients(unit))


def _rows_head(
    head: HeadWeights,
    heads: int,
    scale: float,
    dtype: torch.dtype,
    implementation: str,
    gelu: str,
    gradients: bool,
) -> RowsHead:
    if head.linear or head.kind == "none":
        function = softmax_rows
        if implementation == "triton":
            from cameo.alignment.triton_heads import softmax_rows as function
        channels = 1 if head.linear else heads
        return _Softmax(function, channels, scale / heads if head.kind == "mean" else scale, gradients, dtype)
    if implementation == "triton":
        return _TritonMlp(head, scale, gelu, gradients, dtype)
    return _Mlp(head, scale, gradients, dtype)


class _Softmax:
    """Heads that need no more than a softmax of the products."""

    spare = 0

    def __init__(
        self, function: Callable[..., Tensor], channels: int, scale: float, gradients: bool, dtype: torch.dtype
    ) -> None:
        self.function, self.channels, self.scale, self.written = function, channels, scale, gradients
        self.most_pairs = WORKSPACE_BYTES // (4 * channels * dtype.itemsize)

    def __call__(self, products: Tensor, targets: Tensor, weights: Tensor, own: Tensor | None) -> Tensor:
        return self.function(products, self.scale, targets, weights, own, self.written)

    def parameter_gradients(self) -> list[Tensor]:
        return []


class _Mlp(MlpHead):
    """The head with hidden layers, in portions that suit the device."""

    spare = 1

    def __init__(self, head: HeadWeights, scale: float, gradients: bool, dtype: torch.dtype) -> None:
        assert head.output is not None
        layers = list(zip(head.hidden[::2], head.hidden[1::2], strict=True))
        hidden_bytes = 2 * sum(len(bias) for _, bias in layers) * dtype.itemsize
        hidden = WORKSPACE_BYTES // 3 // hidden_bytes
        if head.output.device.type == "cpu":
            hidden = min(hidden, CPU_HIDDEN)
        super().__init__(layers, head.output, scale=scale, pairs=hidden, gradients=gradients)
        self.most_pairs = WORKSPACE_BYTES // 3 // ((self.channels + self.spare) * dtype.itemsize)


class _TritonMlp:
    """The head with one hidden layer in kernels for CUDA."""

    spare = 0

    def __init__(self, head: HeadWeights, scale: float, gelu: str, gradients: bool, dtype: torch.dtype) -> None:
        from cameo.alignment.triton_heads import mlp_rows

        assert head.output is not None
        self.function, self.scale, self.gelu = mlp_rows, scale, gelu
        self.weight_in, self.bias, self.weight_out = (weight.contiguous() for weight in (*head.hidden, head.output))
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None
        if gradients:
            zeros = torch.zeros_like
            self.sums = zeros(self.weight_in), zeros(self.bias), zeros(self.weight_out)
        self.channels = head.hidden[0].shape[1]
        # Beside its products each pair has a score in float32; a quarter is left for sums and the keys.
        self.most_pairs = WORKSPACE_BYTES // 4 * 3 // (self.channels * dtype.itemsize + 4)

    def __call__(self, products: Tensor, targets: Tensor, weights: Tensor, own: Tensor | None) -> Tensor:
        head = self.weight_in, self.bias, self.weight_out, self.scale
        return self.function(products, *head, targets, weights, own, self.sums, self.gelu)

    def parameter_gradients(self) -> list[Tensor]:
        return list(self.sums or ())


class _Products:
    """Multiplies queries with keys portion by portion, lets the head at them, and gathers the gradients."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        head: HeadWeights,
        rows_head: RowsHead,
        dtype: torch.dtype,
        products_dtype: torch.dtype,
        step: float,
        gradients: bool,
    ) -> None:
        self.shape, self.dtype, self.sum_dtype = query.shape, dtype, torch.promote_types(dtype, torch.float32)
        self.query, self.key = query.flatten(2, 3), key.flatten(2, 3)
        self.linear, self.head = head.linear, rows_head
        # What the queries are multiplied by.
        self.step, self.factor = step, torch.full((), step, dtype=dtype, device=query.device)
        self.learned = head.linear and head.output is not None
        if self.learned:
            assert head.output is not None
            self.factor = (head.output * step).repeat_interleave(query.shape[-1]).to(dtype)
            self.d_factor = torch.zeros(self.factor.shape, dtype=self.sum_dtype, device=query.device)
        self.written = gradients
        if gradients:
            self.d_query = torch.zeros(self.query.shape, dtype=self.sum_dtype, device=query.device)
            self.d_key = torch.zeros_like(self.d_query)
        self._workspace = torch.empty(0, dtype=products_dtype, device=query.device)
        self._held: tuple[object, Tensor | None] = (None, None)

    def losses(self, rows: Rows) -> Tensor:
        """Loss of each row; where it was asked for, their gradient is added to that so far."""
        groups, count = rows.queries.shape
        plain = self._queries(rows)
        queries = plain if self.step == 1 and not self.learned else plain * self.factor
        products = self._buffer(self.head.channels + self.head.spare, groups * count, rows.keys)
        batched = products[: self.head.channels].view(-1, count, rows.keys)
        for columns, tokens in _pieces(rows):
            keys = self._keys(rows, tokens)
            if keys.shape[1] == rows.keys and batched.dtype == self.dtype:
                torch.bmm(queries, keys.transpose(1, 2), out=batched)
            else:
                batched[:, :, columns] = self._product(queries, keys.transpose(1, 2))
        own = None if rows.own is None else rows.own.flatten(0, 1)
        losses = self.head(products, rows.targets.flatten(0, 1), rows.weights.flatten(0, 1), own)
        if self.written:
            self._add_gradients(rows, plain, queries, batched)
        return losses

    def gradients(self, unit: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of query and key `[B, K, V, N, D]`, see `gradient_dtype`, and of the head; ends the sweep.

        Args:
            unit: what they are multiplied by.
        """
        self._held, self._workspace = (None, None), self._workspace.new_empty(0)
        weights = (
            [self.d_factor.view(self.shape[1], -1).sum(dim=1)] if self.learned else self.head.parameter_gradients()
        )
        if unit is not None:
            for tensor in (self.d_query, self.d_key, *weights):
                tensor.mul_(unit)
        dtype = gradient_dtype(self.query.dtype)
        d_query = self.d_query.view(self.shape).to(dtype)
        del self.d_query
        return d_query, self.d_key.view(self.shape).to(dtype), weights

    def _queries(self, rows: Rows) -> Tensor:
        """The rows' queries, `[C * G, R, D]`."""
        if len(rows.samples) == 1:
            return self._as_channels(self.query[rows.samples[0]][:, None, rows.queries[0]])
        taken = self.query.transpose(0, 1)[:, _column(rows.samples, self.query), rows.queries]
        # Rows that only fill up must not bring in what is no number.
        filling = (rows.weights == 0).all(dim=-1)
        return self._as_channels(taken.masked_fill(filling[None, ..., None], 0))

    def _keys(self, rows: Rows, tokens: slice | None) -> Tensor:
        """Keys `[C * G, n, D]` of a piece."""
        piece = (rows.samples, rows.ranges, tokens)
        if self._held[0] != piece:
            if tokens is None:
                taken = self.key.transpose(0, 1)[:, _column(rows.samples, self.key), _keys_side_by_side(rows, self.key)]
            else:
                taken = self.key[rows.samples[0]][:, None, tokens]
            self._held = (piece, self._as_channels(taken))
        assert self._held[1] is not None
        return self._held[1]

    def _add_gradients(self, rows: Rows, plain: Tensor, queries: Tensor, d_products: Tensor) -> None:
        d_queries = torch.zeros(queries.shape, dtype=self.sum_dtype, device=queries.device)
        for columns, tokens in _pieces(rows):
            d_part = d_products[:, :, columns].to(self.dtype)
            if self.dtype == self.sum_dtype:
                d_queries.baddbmm_(d_part, self._keys(rows, tokens))
            else:
                d_queries += self._product(d_part, self._keys(rows, tokens))
            self._add_to_keys(rows, tokens, d_part.transpose(1, 2), queries)
        if self.learned:
            self.d_factor += (d_queries * plain).sum(dim=(0, 1)) * self.step
        if queries is not plain:
            d_queries.mul_(self.factor)
        d_query = self._as_heads(d_queries, len(rows.samples))
        if len(rows.samples) == 1:
            self.d_query[rows.samples[0]].index_add_(1, rows.queries[0], d_query[:, 0])
            return
        # A query may stand in several of the groups.
        head = torch.arange(len(d_query), device=d_query.device)[:, None, None]
        place = (_column(rows.samples, d_query), head, rows.queries)
        self.d_query.index_put_(place, d_query, accumulate=True)

    def _add_to_keys(self, rows: Rows, tokens: slice | None, d_products: Tensor, queries: Tensor) -> None:
        if tokens is None:  # each of these keys belongs to one group, and is met once
            d_key = self._as_heads(self._product(d_products, queries), len(rows.samples))
            place = (_column(rows.samples, d_key), _keys_side_by_side(rows, d_key))
            self.d_key.transpose(0, 1)[:, *place] = d_key
        elif self.linear or self.dtype != self.sum_dtype:
            self.d_key[rows.samples[0]][:, tokens] += self._as_heads(self._product(d_products, queries), 1)[:, 0]
        else:
            self.d_key[rows.samples[0]][:, tokens].baddbmm_(d_products, queries)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Batched product, summed and given in `sum_dtype`."""
        if left.is_cuda and self.dtype != self.sum_dtype and WIDE_PRODUCTS:
            return torch.bmm(left, right, out_dtype=self.sum_dtype)
        return torch.bmm(left.to(self.sum_dtype), right.to(self.sum_dtype))

    def _as_channels(self, taken: Tensor) -> Tensor:
        """`[K, G, n, D]` as `[C * G, n, D]` in the dtype of the products."""
        taken = rearrange(taken, "k g n d -> g n (k d)") if self.linear else taken.flatten(0, 1)
        return taken.to(self.dtype)

    def _as_heads(self, taken: Tensor, groups: int) -> Tensor:
        """Undo `_as_channels`, but for the dtype."""
        if self.linear:
            return rearrange(taken, "g n (k d) -> k g n d", k=self.shape[1])
        return taken.unflatten(0, (-1, groups))

    def _buffer(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        if self._workspace.numel() < count:
            self._workspace = self._workspace.new_empty(count)
        return self._workspace[:count].view(shape)


def _pieces(rows: Rows) -> Iterator[tuple[slice, slice | None]]:
    """Columns and tokens of the sample of each piece of the keys; several groups are one piece, without tokens."""
    if len(rows.samples) > 1:
        yield slice(0, rows.keys), None
        return
    first = 0
    for start, stop in rows.ranges[0]:
        for token in range(start, stop, PIECE):
            count = min(PIECE, stop - token)
            yield slice(first, first + count), slice(token, token + count)
            first += count


def _keys_side_by_side(rows: Rows, like: Tensor) -> Tensor:
    """Token of the sample of each key of several groups, `[G, M]`."""
    starts = torch.tensor([[start for start, _ in ranges] for ranges in rows.ranges], device=like.device)
    lengths = [stop - start for start, stop in rows.ranges[0]]
    steps = [torch.arange(length, device=like.device) for length in lengths]
    return torch.cat([starts[:, place, None] + step for place, step in enumerate(steps)], dim=1)


def _column(samples: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(samples, device=like.device)[:, None]
