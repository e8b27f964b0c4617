"""Where tensors begin in memory, which determines the last bits of a product on a CPU; copies to and from a device.

PyTorch allocates at multiples of 64 bytes. A tensor of a memory-mapped file begins wherever the file's header ends, and
the CPU's libraries then sum its products in another order.

A copy that is asked for while a device computes lets the host wait for all of it. Those here do not: small tensors go
to the device in the background, and what comes back is read later, when it has long arrived.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ALIGNMENT", "HostCopy", "align", "align_module", "in_precision", "placed_like", "sent_to"]

ALIGNMENT = 64  # bytes


def align(tensors: Iterable[Tensor]) -> None:
    """Move tensors that do not begin at a multiple of 64 bytes, in place; those that share memory go on sharing it.

    Example:
        >>> tensor = torch.zeros(8)[1:]
        >>> align([tensor])
        >>> tensor.data_ptr() % ALIGNMENT
        0

    Args:
        tensors: on any device; only those on the CPU are moved.
    """
    moved: dict[tuple[object, ...], Tensor] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if identity not in moved:
                moved[identity] = tensor.data.clone()
            tensor.data = moved[identity]


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


def in_precision(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the floating-point parameters and buffers of a module, in place, and return it.

    What a model of diffusers keeps in float32 when it is loaded in half precision stays as it is: `to` would convert
    that too, and warns of it on every model, also those that keep nothing.

    Example:
        >>> in_precision(nn.Linear(3, 3), torch.bfloat16).weight.dtype
        torch.bfloat16
    """
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    kept = {kept} if isinstance(kept, str) else set(kept)
    named = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    left = {id(tensor) for name, tensor in named if not kept.isdisjoint(name.split("."))}
    return module._apply(
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() and id(tensor) not in left else tensor
    )


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return `tensor`, copied if need be so that it begins as many bytes after a multiple of 64 as `other`.

    Example:
        >>> other = torch.zeros(4)[1:]
        >>> placed_like(torch.zeros(3), other).data_ptr() % ALIGNMENT
        4

    Args:
        tensor: the tensor to place; on other devices than the CPU it is returned as it is.
        other: a tensor of the same dtype, whose place in memory is imitated.
    """
    if tensor.device.type != "cpu" or (tensor.data_ptr() - other.data_ptr()) % ALIGNMENT == 0:
        return tensor
    buffer = torch.empty(tensor.numel() * tensor.element_size() + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -buffer.data_ptr() % ALIGNMENT + other.data_ptr() % ALIGNMENT
    storage = buffer[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype)
    strides = torch.empty_like(tensor, device="meta").stride()
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


def sent_to(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a tensor of the CPU on a device; the host does not wait until the device has it.

    Example:
        >>> sent_to(torch.device("cpu"), torch.arange(3)).tolist()
        [0, 1, 2]
    """
    # The driver copies pageable memory before the call returns, so the tensor may be freed; Metal's does not.
    return tensor.to(device, non_blocking=device.type != "mps")


class HostCopy:
    """A copy of a tensor on the CPU that is begun now and read later.

    Example:
        >>> HostCopy(torch.arange(3)).tolist()
        [0, 1, 2]

    Args:
        tensor: on any device; a CUDA device copies it in the background, to pinned memory.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._copy = tensor.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))
        else:
            self._copy = tensor.cpu()

    def tolist(self) -> list[Any]:
        """Return the values, once they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()
