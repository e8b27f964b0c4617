"""What stands in for kernels on the pretended device: those of Triton, and the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from benchmarks.step.pretend_device import PretendDevice

__all__ = ["Counted", "WithoutAttention"]


class Counted:
    """In place of a kernel of Triton: counts its launches, and calls its twin if there is one.

    Args:
        device: counts.
        name: of the kernel.
        twin: does on the device, uncounted, what the kernel would; None leaves what the kernel writes as it was.
    """

    def __init__(self, device: PretendDevice, name: str, twin: Callable[..., None] | None = None) -> None:
        self.device, self.name, self.twin = device, name, twin

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.device.launch(self.name)
            if self.twin is not None:
                with self.device.uncounted():
                    self.twin(*arguments, **options)

        return launch


class WithoutAttention(TorchFunctionMode):
    """A block in which an attention returns the query plus the key: it is not what is counted, and takes long."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return args[0] + args[1]
        return func(*args, **(kwargs or {}))
