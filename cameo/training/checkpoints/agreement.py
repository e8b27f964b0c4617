"""Decisions and data that all processes of a run share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import distributed

from cameo.errors import DataError

__all__ = ["decided_by_main", "gather_bytes", "gathered", "has_group"]

Decision = TypeVar("Decision")
Value = TypeVar("Value")


def has_group() -> bool:
    """Tell whether this process is one of several that can exchange something."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def decided_by_main(decide: Callable[[], Decision]) -> Decision:
    """Let the main process do or decide something, and return its result on every process, which all wait for it.

    A process alone, without a process group, decides for itself. All processes have to call this.

    Example:
        >>> decided_by_main(lambda: "checkpoint-2")
        'checkpoint-2'

    Args:
        decide: is called on the main process only; what it returns is sent to the others.

    Raises:
        DataError: on the other processes, with the same message, where `decide` raises a `ValueError`.
    """
    if not has_group():
        return decide()
    is_main = distributed.get_rank() == 0
    shared: list[object] = [None, None]
    problem: ValueError | None = None
    if is_main:
        try:
            shared[0] = decide()
        except ValueError as error:
            shared[1], problem = str(error), error
    broadcast_object_list(shared)
    if problem is not None:
        raise problem
    if shared[1] is not None:
        raise DataError(str(shared[1]))
    return shared[0]  # type: ignore[return-value]


def gathered(value: Value) -> list[Value]:
    """Return a value of every process, in their order; all processes have to call this.

    Example:
        >>> gathered("checkpoint-2")
        ['checkpoint-2']
    """
    if not has_group():
        return [value]
    values: list[Value] = [value] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def gather_bytes(content: bytes, accelerator: Accelerator) -> list[bytes]:
    """Return the bytes of every process, in their order; all processes have to call this.

    Example:
        >>> from accelerate import Accelerator
        >>> gather_bytes(b"state", Accelerator(cpu=True))
        [b'state']
    """
    if accelerator.num_processes == 1:
        return [content]
    lengths = accelerator.gather(torch.tensor([len(content)], device=accelerator.device)).tolist()
    padded = torch.frombuffer(bytearray(content.ljust(max(lengths), b"\0")), dtype=torch.uint8)
    rows = accelerator.gather(padded[None].to(accelerator.device)).cpu()
    return [row[:length].numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]
