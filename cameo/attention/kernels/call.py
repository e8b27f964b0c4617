"""One call of an attention kernel: queries, keys, the scale of its logits, and which keys it hides.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["KernelCall", "join_samples", "join_slices", "kept_tokens"]

# A mask that is added to the logits hides a token with any value below, as diffusers' -10000 does in every precision.
HIDDEN_BELOW = -1e3


@dataclass(frozen=True)
class KernelCall:
    """What one call of a kernel attends with.

    Attributes:
        query: `[A, K, L, D]`, or `[A * K, L, D]` with the heads in the batch.
        key: likewise `[A, K', M, D]`; K' divides K.
        scale: the kernel's factor of q.k.
        mask: which keys a query sees, bool (or what is added to the logits, a large negative number for those that it
            does not see), of a shape that broadcasts to `[A, K, L, M]`; None where it sees all.
        query_lengths, key_lengths: how many of the tokens belong to each row `[A]`, the others being padding; None
            where all do.
        trains: whether the kernel has a backward.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None
    query_lengths: Tensor | None = None
    key_lengths: Tensor | None = None
    trains: bool = True


def kept_tokens(mask: Tensor) -> Tensor:
    """Return a mask as bool, True where the query sees the key.

    Example:
        >>> kept_tokens(torch.tensor([0.0, -torch.inf, torch.finfo(torch.float32).min]))
        tensor([ True, False, False])
    """
    return mask if mask.dtype == torch.bool else mask > HIDDEN_BELOW


def join_slices(calls: list[KernelCall]) -> list[KernelCall]:
    """Join calls whose queries and keys are consecutive slices of one tensor along the batch.

    Some models call the kernel with portions of the batch (SGM: 32768 rows per call; diffusers' attention slicing).

    Example:
        >>> query = torch.zeros(6, 4, 8)
        >>> parts = [KernelCall(query[:4], query[:4], 1.0), KernelCall(query[4:], query[4:], 1.0)]
        >>> [call.query.shape[0] for call in join_slices(parts)]
        [6]
    """
    if len(calls) < 2 or any(call.mask is not None or call.query_lengths is not None for call in calls):
        return calls
    for last, following in itertools.pairwise(calls):
        together = _continues(last.query, following.query) and _continues(last.key, following.key)
        if not together or last.scale != following.scale:
            return calls
    query, key = (torch.cat([getattr(call, name) for call in calls]) for name in ("query", "key"))
    return [KernelCall(query, key, calls[0].scale, trains=calls[0].trains)]


def join_samples(calls: list[KernelCall], heads: int | None = None) -> KernelCall | None:
    """Join calls that attend within one sample each, of which text may have another length; None if they are others.

    Some models take the samples of a batch one by one, each without its padding (Mochi).

    Example:
        >>> parts = [KernelCall(*(torch.zeros(1, 2, length, 8),) * 2, 1.0) for length in (12, 10)]
        >>> joined = join_samples(parts)
        >>> joined.query.shape, joined.key_lengths
        (torch.Size([2, 2, 12, 8]), tensor([12, 10]))

    Args:
        calls: of one module, in order.
        heads: K; with it, calls with the heads in the batch `[K, L, D]` are joined as well.
    """
    calls = [_of_one_sample(call, heads) for call in calls]
    first = calls[0]
    for call in calls:
        alike = call.scale == first.scale and call.query.ndim == call.key.ndim == 4
        if not alike or call.query.shape[0] != 1 or call.query_lengths is not None:
            return None
        if any(getattr(call, name).shape[1::2] != getattr(first, name).shape[1::2] for name in ("query", "key")):
            return None
        if (call.mask is None) != (first.mask is None):
            return None
    query, query_lengths = pad([call.query[0] for call in calls])
    key, key_lengths = pad([call.key[0] for call in calls])
    masks = [call.mask.expand(*call.mask.shape[:-1], call.key.shape[2]) for call in calls if call.mask is not None]
    mask = _pad_masks(masks, query.shape[2], key.shape[2])
    trains = all(call.trains for call in calls)
    return KernelCall(query, key, first.scale, mask, query_lengths, key_lengths, trains)


def _of_one_sample(call: KernelCall, heads: int | None) -> KernelCall:
    """Give a call with all heads of one sample in the batch an axis of samples."""
    if call.query.ndim != 3 or call.query.shape[0] != heads:
        return call
    mask = call.mask if call.mask is None or call.mask.ndim < 3 else call.mask[None]
    return replace(call, query=call.query[None], key=call.key[None], mask=mask)


def _pad_masks(masks: list[Tensor], queries: int, keys: int) -> Tensor | None:
    """Stack masks that broadcast to `[1, K, L_a, M_a]` to `[A, K or 1, L, M]`; what is padding is hidden."""
    padded = []
    for mask in masks:
        mask = mask[(None,) * (4 - mask.ndim)]
        missing = queries - mask.shape[2] if mask.shape[2] > 1 else 0
        hidden = False if mask.dtype == torch.bool else -torch.inf
        padded.append(torch.nn.functional.pad(mask, (0, keys - mask.shape[3], 0, missing), value=hidden))
    if not padded:
        return None
    heads, rows = (max(mask.shape[axis] for mask in padded) for axis in (1, 2))
    return torch.cat([mask.expand(-1, heads, rows, -1) for mask in padded])


def pad(samples: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack `[K, L_a, D]` of each sample to `[A, K, L, D]`, and return their lengths `[A]` where these differ.

    Example:
        >>> padded, lengths = pad([torch.ones(2, 3, 4), torch.ones(2, 1, 4)])
        >>> padded.shape, lengths
        (torch.Size([2, 2, 3, 4]), tensor([3, 1]))
    """
    lengths = [sample.shape[1] for sample in samples]
    longest = max(lengths)
    padded = [torch.nn.functional.pad(sample, (0, 0, 0, longest - sample.shape[1])) for sample in samples]
    different = torch.tensor(lengths, device=samples[0].device) if len(set(lengths)) > 1 else None
    return torch.stack(padded), different


def _continues(last: Tensor, following: Tensor) -> bool:
    return (
        last.shape[1:] == following.shape[1:]
        and last.stride() == following.stride()
        and last.untyped_storage().data_ptr() == following.untyped_storage().data_ptr()
        and int(following.storage_offset()) == last.storage_offset() + last.shape[0] * last.stride(0)
    )
