"""Where tensors begin in memory, which decides the last bits of a matrix product on a CPU.

PyTorch allocates at multiples of 64 bytes. A tensor of a memory-mapped file begins wherever the file's header ends, and
the CPU's libraries then sum its products in another order.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn

__all__ = ["ALIGNMENT", "align", "align_module", "placed_like"]

ALIGNMENT = 64  # bytes


def align(tensors: Iterable[Tensor]) -> None:
    """Move those tensors that do not begin at a multiple of 64 bytes, in place; tensors that share memory still do.

    Example:
        >>> tensor = torch.zeros(8)[1:]
        >>> align([tensor])
        >>> tensor.data_ptr() % ALIGNMENT
        0

    Args:
        tensors: of any device; on others than the CPU nothing moves.
    """
    moved: dict[tuple[object, ...], Tensor] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in moved:
                moved[place] = tensor.data.clone()
            tensor.data = moved[place]


def align_module(module: nn.Module) -> None:
    """Move the parameters and buffers of a module that was read from files, in place, see `align`.

    After that a loaded model gives the output of the one that was saved, bit for bit.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> layer.bias.data = torch.zeros(4)[1:]
        >>> align_module(layer)
        >>> layer.bias.data_ptr() % ALIGNMENT
        0
    """
    align(chain(module.parameters(), module.buffers()))


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return `tensor`, copied if need be so that it begins as many bytes after a multiple of 64 as `other`.

    Example:
        >>> other = torch.zeros(4)[1:]
        >>> placed_like(torch.zeros(3), other).data_ptr() % ALIGNMENT
        4

    Args:
        tensor: what is placed; on other devices than the CPU it is returned as it is.
        other: what it is placed like, of the same dtype.
    """
    if tensor.device.type != "cpu" or (tensor.data_ptr() - other.data_ptr()) % ALIGNMENT == 0:
        return tensor
    buffer = torch.empty(tensor.numel() * tensor.element_size() + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -buffer.data_ptr() % ALIGNMENT + other.data_ptr() % ALIGNMENT
    room = buffer[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
    strides = torch.empty_like(tensor, device="meta").stride()
    return room.as_strided(tensor.shape, strides).copy_(tensor)
