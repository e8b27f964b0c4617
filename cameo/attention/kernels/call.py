"""One call of an attention kernel: queries, keys, the scale of its logits, and which keys it hides.

Axes: A rows of the attention batch, K heads, L query tokens, M key tokens, D head dimension.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

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


def join_samples(calls: list[KernelCall]) -> KernelCall | None:
    """Join calls that attend within one sample each, of which text may have another length; None if they are others.

    Some models take the samples of a batch one by one, each without its padding (Mochi).

    Example:
        >>> parts = [KernelCall(*(torch.zeros(1, 2, length, 8),) * 2, 1.0) for length in (12, 10)]
        >>> joined = join_samples(parts)
        >>> joined.query.shape, joined.key_lengths
        (torch.Size([2, 2, 12, 8]), tensor([12, 10]))
    """
    first = calls[0]
    for call in calls:
        alike = call.scale == first.scale and call.mask is None and call.query.ndim == call.key.ndim == 4
        if not alike or call.query.shape[0] != 1 or call.query_lengths is not None:
            return None
        if any(getattr(call, name).shape[1::2] != getattr(first, name).shape[1::2] for name in ("query", "key")):
            return None
    query, query_lengths = pad([call.query[0] for call in calls])
    key, key_lengths = pad([call.key[0] for call in calls])
    trains = all(call.trains for call in calls)
    return KernelCall(query, key, first.scale, None, query_lengths, key_lengths, trains)


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
