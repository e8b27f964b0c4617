"""Whether the Triton kernels can serve a call, and what lets them; importable where Triton is not installed."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "DTYPES",
    "INSTALL_TRITON",
    "MAX_HEADS",
    "allow_products_over_eight",
    "device_refusal",
    "interpreted",
    "refusal",
]

INSTALL_TRITON = "pip install triton (the CUDA builds of torch for Linux bring it along)"
MAX_HEADS = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TF32_CAPABILITY = (8, 0)


def refusal(device: torch.device, dtype: torch.dtype, num_heads: int, depth: int) -> str | None:
    """Return why the Triton kernels cannot serve such a call, or None if they can.

    Example:
        >>> refusal(torch.device("meta"), torch.float32, num_heads=8, depth=1)
        'the tensors are on meta; the Triton kernels need a CUDA device'

    Args:
        device: device of query and key.
        dtype: dtype of the logits: float32, bfloat16 or float16.
        num_heads: K, number of attention heads that the alignment head joins, 1 to 32.
        depth: number of hidden layers of the alignment head, 0 or 1.
    """
    if dtype not in DTYPES:
        return f"the logits are {dtype}; the Triton kernels accumulate in float32 and take float32, bfloat16 or float16"
    if num_heads > MAX_HEADS:
        return f"{num_heads} heads; the Triton kernels take at most {MAX_HEADS}"
    if depth > 1:
        return f"the alignment head has depth={depth}; the Triton kernels take one hidden layer at most"
    return device_refusal(device, _TF32_CAPABILITY, "they multiply in TF32 and need 8.0 (A100, RTX 30) or later")


def device_refusal(device: torch.device, least_capability: tuple[int, int], need: str) -> str | None:
    """Return why Triton kernels cannot run on this device, or None if they can.

    Args:
        device: device of the tensors.
        least_capability: lowest compute capability that the kernels support.
        need: clause for a device below it: what the kernels need, and why.
    """
    on_interpreter = device.type == "cpu" and interpreted()
    if device.type != "cuda" and not on_interpreter:
        return f"the tensors are on {device.type}; the Triton kernels need a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: {INSTALL_TRITON}"
    if on_interpreter:
        return None
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the Triton kernels are written for NVIDIA GPUs"
    capability = _capability(device)
    if capability < least_capability:
        return (
            f"{device} has compute capability {capability[0]}.{capability[1]}, too low for the Triton kernels: {need}"
        )
    return None


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU: TRITON_INTERPRET=1 in the environment."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def allow_products_over_eight() -> None:
    """Let Triton 3.6 and 3.7, those of torch 2.10 to 2.13, compile float32 products over 8 numbers, as 3.8 does.

    Their code generator has the instruction, mma.m16n8k8 in TF32; a check before it asks for 16 of every type but int8.
    """
    try:
        from triton.backends.nvidia import compiler

        smallest_of = compiler.min_dot_size
    except (ImportError, AttributeError):  # of another maker, or a Triton without this check
        return

    def min_dot_size(target: Any) -> Callable[[Any, Any], tuple[int, int, int]]:
        smallest = smallest_of(target)

        def smallest_here(left: Any, right: Any) -> tuple[int, int, int]:
            rows, columns, inner = smallest(left, right)
            return rows, columns, min(inner, 8) if left.scalar.primitive_bitwidth == 32 else inner

        return smallest_here

    compiler.min_dot_size = min_dot_size


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
