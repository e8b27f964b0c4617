"""Operators on a pretended device under autocast, in a process of their own, since torch keeps a device for good.

    python -m tests.helpers.pretended_casts

prints as JSON the type of each result, and what is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step.pretend_device import NAME, PretendDevice

HALF, FULL = torch.bfloat16, torch.float32
# Applied to a square matrix in float32 and the same in bfloat16.
CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda full, half: full @ half,
    "linear": lambda full, half: F.linear(full, full, full[0]),
    "convolution": lambda full, half: F.conv2d(full[None, None], full[None, None]),
    "attention": lambda full, half: F.scaled_dot_product_attention(*(x[None, None] for x in (full, half, full))),
    "sum of types": lambda full, half: full + half,
    "activation": lambda full, half: F.gelu(half),
    "softmax": lambda full, half: half.softmax(-1),
    "softmax in a given type": lambda full, half: half.softmax(-1, dtype=HALF),
    "sum": lambda full, half: half.sum(),
    "mean": lambda full, half: half.mean(),
    "layer norm": lambda full, half: F.layer_norm(half, (4,), full[0], full[0]),
    "group norm": lambda full, half: F.group_norm(half, 2, full[0], full[0]),
    "loss": lambda full, half: F.mse_loss(half, half),
    "enlarged": lambda full, half: F.interpolate(half[None, None], scale_factor=2),
    "concatenated": lambda full, half: torch.cat([full, half]),
    "double": lambda full, half: full.double() @ full.double(),
}
# Of mixed types, and computed without autocast.
MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer norm": CASES["layer norm"],
    "group norm": CASES["group norm"],
    "matmul": lambda full, half: half @ full,
    "linear": lambda full, half: F.linear(full, half),
    "dot": lambda full, half: full[0].dot(half[0]),
}


def refusal(compute: Callable[[Tensor, Tensor], Tensor], full: Tensor, half: Tensor) -> str:
    """Message of the error that an operator raises, empty if it raises none."""
    try:
        compute(full, half)
    except RuntimeError as error:
        return str(error)
    return ""


def observed() -> dict[str, dict[str, str]]:
    """Types of results with autocast and with autocast switched off, and refusals of mixed types."""
    with PretendDevice():
        full = torch.eye(4).to(NAME)
        half = full.to(HALF)
        with torch.autocast(NAME, dtype=HALF):
            cast = {name: str(compute(full, half).dtype) for name, compute in CASES.items()}
            with torch.autocast(NAME, enabled=False):
                plain = {"matmul": str((full @ full).dtype)}
            unsafe = {"cross entropy": refusal(F.binary_cross_entropy, full, full)}
        mixed = {name: refusal(compute, full, half) for name, compute in MIXED.items()}
    return {"cast": cast, "plain": plain, "unsafe": unsafe, "mixed": mixed}


if __name__ == "__main__":
    print(json.dumps(observed()))
