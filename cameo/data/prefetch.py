"""Batches on the device of the training, copied there while the step before still runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from cameo.correspondence import Correspondence
from cameo.data.batches import to_device

__all__ = ["on_device"]


def on_device(batches: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield batches on a device; on CUDA one batch ahead, through a stream of its own.

    The copy of a batch from pinned memory then runs beside the step before it. The step waits for the copy on the
    device, and never the host. On a CPU each batch is moved when it is asked for.

    Example:
        >>> batches = [{"images": torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8), "key": ["a"]}]
        >>> [(batch["images"].dtype, batch["key"]) for batch in on_device(batches, torch.device("cpu"))]
        [(torch.float32, ['a'])]

    Args:
        batches: collated samples, on the CPU.
        device: where they are to be.
    """
    if device.type != "cuda":
        for batch in batches:
            yield to_device(batch, device)
        return
    stream = torch.cuda.Stream(device)
    ready: dict[str, Any] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = to_device(batch, device)
        if ready is not None:
            yield ready
        # Here, and not before the yield: the step that has just been queued need not wait for this copy.
        torch.cuda.current_stream(device).wait_stream(stream)
        _record(moved, torch.cuda.current_stream(device))
        ready = moved
    if ready is not None:
        yield ready


def _record(value: Any, stream: Any) -> None:
    """Keep the memory of tensors that one stream has filled until `stream`, which uses them, is done with it."""
    if isinstance(value, Tensor):
        if value.device.type == "cuda":
            value.record_stream(stream)
    elif isinstance(value, Correspondence):
        if value.device.type == "cuda":
            for tensor in (value.index, value.match_weight, value.distance):
                if tensor is not None:
                    tensor.record_stream(stream)
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _record(item, stream)
