"""Exact nearest neighbors between the tokens of all pairs of views, in plain torch.

Axes: B samples, V views, N tokens per view (row-major, padded), R rows (tokens whose neighbor is sought), S tokens per
block, G blocks per view, P unordered pairs of views. A token without a measurement has non-finite coordinates; it has
no neighbor and is the neighbor of no token. Ties go to the lower index. No tensor of size N x N is stored but tiles.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cameo.correspondence.neighbors.triton_support import device_refusal
from cameo.errors import unknown_name

__all__ = ["IMPLEMENTATIONS", "cycle_consistent", "match_tokens", "nearest_by_differences", "nearest_by_products"]

IMPLEMENTATIONS = ("auto", "differences", "products", "triton")

# Bytes of one tile of pairwise distances, bytes of the block minima that are settled together, most blocks of a view.
TILE_BYTES = 1 << 20
# Bytes of one tile on a device whose operators are launches: that of several pairs of views.
DEVICE_TILE_BYTES = 64 << 20
BLOCKS_BYTES = 1 << 20
MOST_BLOCKS = 64
# The lowest compute capability that Triton supports, that of Turing.
LEAST_CAPABILITY = (7, 5)
# Bound, in units of epsilon (|a| + d)^2, on the difference between the squared distances d^2 of a and its neighbor in
# the two forms below: 13 for the five products with their norms, 7 for centering and the rounding of the differences.
ROUNDING = 20


def match_tokens(
    tokens: Tensor, widths: tuple[int, ...], cycle_threshold: float, *, implementation: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Find the nearest token in each other view and keep the cycle-consistent ones.

    Example:
        >>> line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
        >>> index, distance = match_tokens(torch.stack([line, line.flip(0)])[None], (3, 3), 1.5)
        >>> index[0, 0, 1].tolist(), distance[0, 0, 1].tolist()
        ([2, 1, 0], [0.0, 0.0, 0.0])

    Args:
        tokens: ``[B, V, N, 3]`` float32 or float64 world coordinates; non-finite = no measurement or padding.
        widths: number of columns of each view's grid.
        cycle_threshold: a match is kept if the nearest neighbor of the nearest neighbor lies less than this many
            tokens from the start.
        implementation: "differences": coordinate differences, tile by tile, on any device; "products": matrix products
            whose near-ties are settled by differences, on the CPU; "triton": one kernel for all pairs, on CUDA;
            "auto": the fastest one for the device. They agree in every index.

    Returns:
        Index int64 (-1 for none) and distance (of the nearest token, kept or not; ``inf`` for none), both
        ``[B, V, V, N]``.

    Raises:
        ValueError: the implementation is unknown, or cannot serve this device.
    """
    if implementation not in IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "auto":
        implementation = _choose(tokens.device)
    if implementation == "triton":
        reason = triton_refusal(tokens.device)
        if reason is not None:
            raise ValueError(f'implementation: "triton" cannot serve this: {reason}. Use "auto" or "differences"')
        from cameo.correspondence.neighbors import triton_nearest

        return triton_nearest.match_tokens(tokens, widths, cycle_threshold)
    if implementation == "products" and tokens.device.type != "cpu":
        raise ValueError(
            f'implementation: "products" settles its near-ties on the CPU, got tokens on {tokens.device}. '
            'Use "auto" or "differences"'
        )
    nearest = nearest_by_products if implementation == "products" else nearest_by_differences
    index, distance = nearest(tokens)
    consistent = cycle_consistent(index, widths, cycle_threshold)
    return index.masked_fill_(~consistent, -1), distance


def _choose(device: torch.device) -> str:
    if device.type == "cpu":
        return "products"
    return "differences" if triton_refusal(device) else "triton"


def triton_refusal(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot serve tokens on this device, or None if they can.

    Example:
        >>> triton_refusal(torch.device("meta"))
        'the tensors are on meta; the Triton kernels need a CUDA device'
    """
    return device_refusal(device, LEAST_CAPABILITY, "Triton needs 7.5 (RTX 20) or later")


def nearest_by_differences(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return index and distance ``[B, V, V, N]`` of each token's nearest one in each other view; the readable form.

    The host does not wait for the device, since no shape depends on values.
    """
    batch, views, count, _ = tokens.shape
    index, distance = _nothing_found(tokens)
    bytes_at_once = TILE_BYTES if tokens.device.type == "cpu" else DEVICE_TILE_BYTES
    entries = max(1, bytes_at_once // tokens.element_size() // max(1, batch * count))
    pairs = max(1, entries // max(1, count))
    rows = max(1, entries // pairs)
    steps = [(view, other) for view in range(views) for other in range(view + 1, views, pairs)]
    for i, first in steps:
        others = slice(first, min(first + pairs, views))  # some of the later views at once
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            here = tokens[:, i, None, start:stop, None]
            x, y, z = ((here[..., c] - tokens[:, others, None, :, c]).square_() for c in range(3))
            squared = x.add_(y).add_(z)
            squared.masked_fill_(squared.isnan(), math.inf)
            apart, best = squared.min(dim=3)
            distance[:, i, others, start:stop] = apart
            index[:, i, others, start:stop] = best.masked_fill_(apart.isinf(), -1)
            apart, best = squared.min(dim=2)
            # Later tokens win only if they are closer, so that ties stay with the lower index.
            closer = apart < distance[:, others, i]
            index[:, others, i] = torch.where(closer, best + start, index[:, others, i])
            distance[:, others, i] = torch.where(closer, apart, distance[:, others, i])
    return index, distance.sqrt_()


def nearest_by_products(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same on the CPU with matrix products; equal to :func:`nearest_by_differences` in every bit.

    One product gives a tile of ``|a|^2 - 2ab + |b|^2``, of which only the minimum of each block of S tokens is kept, in
    both directions. Differences decide within the block that has the least minimum. Where the products' rounding
    leaves more than one block possible, or differences tie, differences with the whole view decide.
    """
    batch, views, count, _ = tokens.shape
    index, distance = _nothing_found(tokens)
    if not index.numel() or views == 1:
        return index, distance
    blocked = _Blocked(tokens)
    if not blocked.safe:
        return nearest_by_differences(tokens)
    i, j = torch.triu_indices(views, views, 1)
    sample = torch.arange(batch)[:, None] * views
    both = torch.stack([(sample + i).flatten(), (sample + j).flatten()])
    pairs = max(1, BLOCKS_BYTES // (2 * blocked.padded * blocked.blocks * tokens.element_size()))
    for part in both.split(pairs, dim=1):
        rows, keys = part.flatten(), part.flip(0).flatten()
        nearest, squared = blocked.settle(blocked.least_of_blocks(*part), rows, keys)
        index.view(batch * views, views, count)[rows, keys % views] = nearest[:, :count]
        distance.view(batch * views, views, count)[rows, keys % views] = squared[:, :count]
    return index, distance.sqrt_()


class _Blocked:
    """Tokens of all views of all samples, ``[B * V, N]``, arranged for products and cut into blocks of S.

    Attributes:
        length, blocks, padded: S, G, and N padded to S * G.
        safe: whether no squared distance can overflow.
    """

    def __init__(self, tokens: Tensor) -> None:
        count = tokens.shape[2]
        self.length = length = 1 << max(0, int(math.log2(count)) // 2 - 1, math.ceil(math.log2(count / MOST_BLOCKS)))
        self.blocks = blocks = -(-count // length)
        self.padded = length * blocks
        if self.padded > count:
            tokens = F.pad(tokens, (0, 0, 0, self.padded - count), value=math.nan)
        missing = ~tokens.isfinite().all(-1)
        # Relative to the median even points far from the world's origin have small squares, despite a few outliers.
        known = tokens.masked_fill(missing[..., None], math.nan)
        centre = known.flatten(1, 2).nanmedian(dim=1, keepdim=True).values[:, None]
        local = (known - centre).flatten(0, 1).nan_to_num_()
        missing = missing.flatten(0, 1)
        self.measured = ~missing
        self.norm = local.square().sum(-1)
        self.safe = bool((self.norm < torch.finfo(tokens.dtype).max / 64).all())
        norm = self.norm.masked_fill(missing, math.inf)[..., None]
        one = torch.ones_like(norm)
        self.rows = torch.cat([-2 * local, one, norm], dim=-1)
        # Column s * G + g is token g * S + s, so that the least of a block is taken over a leading axis.
        self.columns = rearrange(torch.cat([local, norm, one], dim=-1), "v (g s) c -> v c (s g)", s=length).contiguous()
        self.points = tokens.flatten(0, 1).masked_fill(missing[..., None], math.inf)
        self.keys = self.points.mT.contiguous()
        self.blocked_keys = rearrange(self.points, "v (g s) c -> (v g) (c s)", s=length).contiguous()
        self.entries = TILE_BYTES // tokens.element_size()

    def least_of_blocks(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the minimum of each block for each token, ``[2 * P, N, G]``: rows of ``first``, then of ``second``."""
        length, blocks, padded = self.length, self.blocks, self.padded
        least = self.rows.new_empty(2, len(first), padded, blocks)
        pairs = max(1, self.entries // (padded * padded))
        lines = padded if pairs > 1 else length * min(blocks, max(1, self.entries // (length * padded)))
        workspace = self.rows.new_empty(min(pairs, len(first)) * lines * padded)
        across = self.rows.new_empty(min(pairs, len(first)), blocks, padded)
        for start in range(0, len(first), pairs):
            chunk = slice(start, start + pairs)
            rows, columns = self.rows.index_select(0, first[chunk]), self.columns.index_select(0, second[chunk])
            count = len(rows)
            for top in range(0, padded, lines):
                height = min(lines, padded - top)
                tile = workspace[: count * height * padded].view(count, height, padded)
                torch.bmm(rows[:, top : top + height], columns, out=tile)
                torch.amin(tile.view(count, height, length, blocks), dim=2, out=least[0, chunk, top : top + height])
                torch.amin(
                    tile.view(count, height // length, length, padded),
                    dim=2,
                    out=across[:count, top // length : (top + height) // length],
                )
            least[1, chunk] = rearrange(across[:count], "p b (s g) -> p (g s) b", s=length)
        return least.flatten(0, 1)

    def settle(self, least: Tensor, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return index and squared distance ``[Q, N]`` of the tokens in ``keys [Q]`` nearest to those in ``rows``."""
        length, blocks, padded = self.length, self.blocks, self.padded
        query = self.points.index_select(0, rows).view(-1, 3)
        measured = self.measured.index_select(0, rows).flatten()
        norm = self.norm.index_select(0, rows).flatten()
        view = keys.repeat_interleave(padded)
        index = torch.empty_like(view)
        squared = torch.empty_like(norm)
        count_blocks, count_tokens = _counter(blocks, query), _counter(length, query)
        info = torch.finfo(query.dtype)
        rows_at_once = max(1, self.entries // (4 * length))
        for start in range(0, len(view), rows_at_once):
            part = slice(start, start + rows_at_once)
            block = least.view(-1, blocks)[part]
            nearest = block.amin(-1)
            magnitude = norm[part].sqrt() + nearest.clamp(min=0).sqrt_()
            rounding = magnitude.square_().mul_(2 * ROUNDING * info.eps).add_(64 * info.tiny)
            candidates, chosen = _count(block, nearest + rounding, count_blocks)
            has_neighbor = measured[part] & nearest.isfinite()
            clear = candidates == 1
            chosen.masked_fill_(~clear, 0)
            near = self.blocked_keys.index_select(0, view[part] * blocks + chosen).view(-1, 3, length)
            apart = _squared(near, query[part, :, None])
            smallest = apart.amin(-1)
            ties, place = _count(apart, smallest, count_tokens)
            index[part] = place.add_(chosen, alpha=length).masked_fill_(~has_neighbor, -1)
            squared[part] = smallest.masked_fill_(~has_neighbor, math.inf)
            self._decide(has_neighbor & ~(clear & (ties == 1)), query[part], view[part], index[part], squared[part])
        return index.view(-1, padded), squared.view(-1, padded)

    def _decide(self, undecided: Tensor, query: Tensor, view: Tensor, index: Tensor, squared: Tensor) -> None:
        """Write index and squared distance of the undecided rows, by differences with all tokens of the view."""
        for rows in undecided.nonzero().flatten().split(max(1, self.entries // (2 * self.padded))):
            keys = self.keys.index_select(0, view[rows])
            apart = _squared(keys, query[rows, :, None])
            squared[rows], index[rows] = apart.min(dim=-1)


def _nothing_found(tokens: Tensor) -> tuple[Tensor, Tensor]:
    batch, views, count, _ = tokens.shape
    shape = (batch, views, views, count)
    return tokens.new_full(shape, -1, dtype=torch.int64), tokens.new_full(shape, math.inf)


def _squared(points: Tensor, others: Tensor) -> Tensor:
    """Squared distance of ``points [R, 3, M]``, which are overwritten, and ``others [R, 3, 1]``.

    By differences: the expanded square |a|^2 - 2ab + |b|^2 cancels far from the origin.
    """
    x, y, z = points.sub_(others).square_().unbind(1)
    return x.add_(y).add_(z)


def _counter(length: int, like: Tensor) -> Tensor:
    return torch.stack([torch.ones(length), torch.arange(length)], dim=-1).to(like)


def _count(values: Tensor, bound: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of ``values [R, M]`` are at most ``bound [R]``, and, if it is one, its column.

    A matrix product with ones and column numbers takes a fraction of the time of a minimum with its index.
    """
    within = torch.le(values, bound[:, None], out=torch.empty_like(values))
    number, place = (within @ counter).unbind(-1)
    return number, place.long()


def cycle_consistent(index: Tensor, widths: tuple[int, ...], threshold: float) -> Tensor:
    """Tell which tokens have, as neighbor of their neighbor, one less than ``threshold`` tokens away from them.

    A token without a neighbor, or whose neighbor has none, is not consistent.
    """
    start = torch.arange(index.shape[-1], device=index.device)
    consistent = torch.zeros_like(index, dtype=torch.bool)
    for i, width in enumerate(widths):
        neighbor = index[:, i]
        end = torch.gather(index[:, :, i], -1, neighbor.clamp(min=0))
        row = end.div(width, rounding_mode="floor")
        rows, columns = row - start // width, end - row * width - start % width
        near = rows.square() + columns.square() < threshold**2
        consistent[:, i] = (neighbor >= 0) & (end >= 0) & near
    return consistent
