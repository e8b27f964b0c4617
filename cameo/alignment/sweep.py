"""The alignment loss and its gradient in one sweep over the supervised queries.

The loss is a scalar, so its gradient is computed together with it, and the gradient is kept in place of the attention:
nothing is computed twice, and no tensor of tokens times tokens is ever held.

Axes: B samples, V views, K heads, N tokens per view, L = V * N tokens of a sample, D head dimension, G groups, R rows
of a group, M keys of a group, n of them in a range, C channels of the products: K, or 1 where the alignment head
joins the heads linearly (the head dimensions of all heads are then concatenated).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from cameo.alignment.heads import HeadWeights, RowsHead, make_rows_head, workspace_bytes
from cameo.alignment.rows import Rows, plan_rows

__all__ = ["LossAndGradients", "gradient_dtype", "sweep"]

# Whether this torch has a product of half-precision matrices that returns float32.
WIDE_PRODUCTS = any("out_dtype" in str(schema) for schema in torch._C._jit_get_schemas_for_operator("aten::bmm"))
# Number of keys that are converted to the dtype and shape of the products at once.
KEYS_AT_ONCE = 2048
# On a CPU: the number of query-key pairs whose products are held at once, so that they stay in its caches.
CPU_PRODUCTS = 131072


@dataclass(frozen=True)
class LossAndGradients:
    """The loss and, if requested, its gradients with respect to query, key and the head's weights in their order."""

    loss: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    weights: Sequence[Tensor] = ()


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the gradient of queries and keys of this dtype is kept.

    A gradient that is not yet multiplied by the loss scale of mixed precision would underflow in float16.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def multiplies_wide(device: torch.device) -> bool:
    """Whether half-precision matrices can be multiplied on this device with a product in float32."""
    return WIDE_PRODUCTS and device.type == "cuda"


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
    counts: Sequence[int] = (),
) -> LossAndGradients:
    """Compute the alignment loss of `query` and `key` `[B, K, V, N, D]`, and its gradient.

    Args:
        query, key: as in `cameo.alignment_loss`.
        index, weights: `[B, V, V, N]`, see `plan_rows`.
        head: weights of the alignment head.
        token_grids, normalize, softness: see `plan_rows`.
        scale: the factor of q.k in the layer.
        implementation: "chunked" or "triton".
        gelu: "exact", or "fast", which only "triton" offers.
        gradients: whether to compute the gradient.
        counts: see `plan_rows`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    learned = head.linear and head.output is not None
    # The weights of a linear head multiply the queries, and half precision would round them together.
    half = implementation == "triton" and dtype != query.dtype and not learned
    operands = query.dtype if half else dtype
    # A head with hidden layers takes logits as exact as its inputs; sums over all heads are kept more exactly.
    products_dtype = operands if head.hidden else dtype
    # The part of the scale that is a power of two multiplies the queries: the products then stay in the range of
    # float16, and no digit is lost. The rest of the scale multiplies the products.
    query_scale = 2.0 ** math.floor(math.log2(abs(scale))) if half and scale else 1.0
    # Divided by the largest weight during the sweep, or the gradients of many rows would underflow in float16.
    largest_weight = None
    if half and query.dtype == torch.float16 and weights.numel():
        largest_weight = weights.amax()
        largest_weight = torch.where(largest_weight > 0, largest_weight, 1)
    workspace = _workspace_beside_sums(query, dtype)
    rows_head = make_rows_head(
        head, query.shape[1], scale / query_scale, products_dtype, implementation, gelu, gradients, workspace
    )
    products = _Products(query, key, head, rows_head, operands, products_dtype, query_scale, implementation, gradients)
    plan = plan_rows(
        index,
        weights if largest_weight is None else weights / largest_weight,
        token_grids,
        normalize=normalize,
        softness=softness,
        pairs=min(rows_head.most_pairs, CPU_PRODUCTS) if query.device.type == "cpu" else rows_head.most_pairs,
        most_pairs=rows_head.most_pairs,
        # Queries, keys and the gradients of both take at most a sixteenth of the workspace each.
        most_tokens=max(1, workspace // 16 // (query.shape[1] * query.shape[-1] * dtype.itemsize)),
        numbered=implementation == "triton",
        counts=counts,
    )
    losses = [products.losses(rows) for rows in plan]
    loss = torch.cat(losses).sum().to(weights.dtype) if losses else weights.new_zeros(())
    if largest_weight is not None:
        loss *= largest_weight
    if not gradients:
        return LossAndGradients(loss)
    return LossAndGradients(loss, *products.gradients(largest_weight))


def _workspace_beside_sums(query: Tensor, sum_dtype: torch.dtype) -> int:
    """What is left of the workspace where the gradients of half precision are summed in float32; a quarter at least."""
    workspace = workspace_bytes(query.device)
    sums, gradients = (2 * query.numel() * itemsize for itemsize in (sum_dtype.itemsize, query.element_size()))
    return max(workspace // 4, workspace - max(0, sums - gradients * 5 // 4))


class _Products:
    """Multiplies queries by keys portion by portion, applies the head to the products, and sums the gradients."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        head: HeadWeights,
        rows_head: RowsHead,
        dtype: torch.dtype,
        products_dtype: torch.dtype,
        query_scale: float,
        implementation: str,
        gradients: bool,
    ) -> None:
        self.shape, self.dtype, self.sum_dtype = query.shape, dtype, torch.promote_types(dtype, torch.float32)
        self.query, self.key = query.flatten(2, 3), key.flatten(2, 3)
        self.linear, self.head = head.linear, rows_head
        # The queries are multiplied by this factor.
        self.query_scale = query_scale
        self.factor = torch.full((), query_scale, dtype=dtype, device=query.device)
        self.learned = head.linear and head.output is not None
        if self.learned:
            assert head.output is not None
            self.factor = (head.output * query_scale).repeat_interleave(query.shape[-1]).to(dtype)
            self.d_factor = torch.zeros(self.factor.shape, dtype=self.sum_dtype, device=query.device)
        self.with_gradients = gradients
        self._add_to_queries: Callable[..., None] | None = None
        if implementation == "triton":
            from cameo.alignment.triton_rows import add_to_queries

            self._add_to_queries = add_to_queries
        if gradients:
            self.d_query = torch.zeros(self.query.shape, dtype=self.sum_dtype, device=query.device)
            self.d_key = torch.zeros_like(self.d_query)
        self._workspace = torch.empty(0, dtype=products_dtype, device=query.device)
        # The keys that were converted last, and which they are: the next portion often takes the same ones.
        self._converted_keys: tuple[object, Tensor | None] = (None, None)

    def losses(self, rows: Rows) -> Tensor:
        """Return the loss of each row and, if requested, add the gradient of their sum to the gradients so far."""
        groups, count = rows.queries.shape
        unscaled = self._queries(rows)
        queries = unscaled if self.query_scale == 1 and not self.learned else unscaled * self.factor
        channels, pairs = self.head.channels + self.head.extra_channels, groups * count * rows.keys
        if not self._workspace.numel():
            self._workspace = self._workspace.new_empty(channels * rows.most_pairs)
        products = self._workspace[: channels * pairs].view(channels, groups * count, rows.keys)
        batched = products[: self.head.channels].view(-1, count, rows.keys)
        for columns, tokens in _key_slices(rows):
            keys = self._keys(rows, tokens)
            if batched.dtype == self.dtype:
                torch.bmm(queries, keys.transpose(1, 2), out=batched[:, :, columns])
            else:
                batched[:, :, columns] = self._product(queries, keys.transpose(1, 2))
        excluded = None if rows.excluded is None else rows.excluded.flatten(0, 1)
        losses = self.head(products, rows.targets.flatten(0, 1), rows.weights.flatten(0, 1), excluded)
        if self.with_gradients:
            self._add_gradients(rows, unscaled, queries, batched)
        return losses

    def gradients(self, factor: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the gradients of query and key `[B, K, V, N, D]`, see `gradient_dtype`, and of the head.

        This ends the sweep: workspace and sums are released.

        Args:
            factor: all gradients are multiplied by it.
        """
        self._converted_keys, self._workspace = (None, None), self._workspace.new_empty(0)
        weights = (
            [self.d_factor.view(self.shape[1], -1).sum(dim=1)] if self.learned else self.head.parameter_gradients()
        )
        if factor is not None:
            for tensor in (self.d_query, self.d_key, *weights):
                tensor.mul_(factor)
        dtype = gradient_dtype(self.query.dtype)
        d_query = self.d_query.view(self.shape).to(dtype)
        del self.d_query
        return d_query, self.d_key.view(self.shape).to(dtype), weights

    def _queries(self, rows: Rows) -> Tensor:
        """Queries of the rows, `[C * G, R, D]`."""
        if len(rows.samples) == 1:
            return self._as_channels(self.query[rows.samples[0]][:, None, rows.queries[0]])
        return self._as_channels(self.query.transpose(0, 1)[:, rows.sample_index, rows.queries])

    def _keys(self, rows: Rows, tokens: slice | None) -> Tensor:
        """Keys `[C * G, n, D]` of one slice, see `_key_slices`."""
        which = (rows.samples, rows.ranges, tokens)
        if self._converted_keys[0] != which:
            if tokens is None:
                keys = self.key.transpose(0, 1)[:, rows.sample_index, rows.key_index]
            else:
                keys = self.key[rows.samples[0]][:, None, tokens]
            self._converted_keys = (which, self._as_channels(keys))
        assert self._converted_keys[1] is not None
        return self._converted_keys[1]

    def _add_gradients(self, rows: Rows, unscaled: Tensor, queries: Tensor, d_products: Tensor) -> None:
        d_queries: Tensor | None = None
        for columns, tokens in _key_slices(rows):
            d_slice = d_products[:, :, columns].to(self.dtype)
            if d_queries is None:
                d_queries = self._product(d_slice, self._keys(rows, tokens))
            elif self.dtype == self.sum_dtype:
                d_queries.baddbmm_(d_slice, self._keys(rows, tokens))
            else:
                d_queries += self._product(d_slice, self._keys(rows, tokens))
            self._add_to_keys(rows, tokens, d_slice.transpose(1, 2), queries)
        assert d_queries is not None
        if self.learned:
            self.d_factor += (d_queries * unscaled).sum(dim=(0, 1)) * self.query_scale
        if self._add_to_queries is not None:
            assert rows.slots is not None
            count = rows.queries.numel()
            self._add_to_queries(
                d_queries.view(-1, count, d_queries.shape[-1]), rows.slots, rows.first, self.factor, self.d_query
            )
            return
        if queries is not unscaled:
            d_queries.mul_(self.factor)
        d_query = self._as_heads(d_queries, len(rows.samples))
        if len(rows.samples) == 1:
            self.d_query[rows.samples[0]].index_add_(1, rows.queries[0], d_query[:, 0])
            return
        # The same query may belong to several of the groups.
        assert rows.sample_index is not None
        place = (rows.sample_index, rows.queries)
        self.d_query.transpose(1, 2).index_put_(place, d_query.permute(1, 2, 0, 3), accumulate=True)

    def _add_to_keys(self, rows: Rows, tokens: slice | None, d_products: Tensor, queries: Tensor) -> None:
        if tokens is None:  # each of these keys belongs to one group only, so its gradient is complete
            d_key = self._as_heads(self._product(d_products, queries), len(rows.samples))
            self.d_key.transpose(0, 1)[:, rows.sample_index, rows.key_index] = d_key
        elif self.linear or self.dtype != self.sum_dtype:
            d_key = self._as_heads(self._product(d_products, queries), 1)[:, 0]
            self.d_key[rows.samples[0]][:, tokens].add_(d_key)  # with += torch would copy the sum onto itself
        else:
            self.d_key[rows.samples[0]][:, tokens].baddbmm_(d_products, queries)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Batched matrix product, summed and returned in `sum_dtype`."""
        if self.dtype != self.sum_dtype and multiplies_wide(left.device):
            return torch.bmm(left, right, out_dtype=self.sum_dtype)
        return torch.bmm(left.to(self.sum_dtype), right.to(self.sum_dtype))

    def _as_channels(self, per_head: Tensor) -> Tensor:
        """`[K, G, n, D]` as `[C * G, n, D]` in the dtype of the products."""
        channels = rearrange(per_head, "k g n d -> g n (k d)") if self.linear else per_head.flatten(0, 1)
        return channels.to(self.dtype)

    def _as_heads(self, channels: Tensor, groups: int) -> Tensor:
        """Undo `_as_channels`; the dtype stays."""
        if self.linear:
            return rearrange(channels, "g n (k d) -> k g n d", k=self.shape[1])
        return channels.unflatten(0, (-1, groups))


def _key_slices(rows: Rows) -> Iterator[tuple[slice, slice | None]]:
    """Cut the keys of the rows into slices: the columns of each, and its tokens in the sample.

    Several groups side by side are one slice, whose tokens are None, see `Rows.key_index`.
    """
    if len(rows.samples) > 1:
        yield slice(0, rows.keys), None
        return
    first = 0
    for start, stop in rows.ranges[0]:
        for token in range(start, stop, KEYS_AT_ONCE):
            count = min(KEYS_AT_ONCE, stop - token)
            yield slice(first, first + count), slice(token, token + count)
            first += count
