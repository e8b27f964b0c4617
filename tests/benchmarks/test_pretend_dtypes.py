"""The pretended device casts under autocast as CUDA does, and refuses the mixed types that CUDA refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step import pretend_device, pretend_dtypes
from benchmarks.step.pretend_device import NAME, PretendDevice

pytestmark = pytest.mark.skipif(not pretend_device.available(), reason="devices made in Python need torch 2.10")

HALF, FULL = torch.bfloat16, torch.float32
# Applied to a square matrix in float32 and the same in bfloat16, and the type of the result under autocast.
CASES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], torch.dtype]] = {
    "matmul": (lambda full, half: full @ half, HALF),
    "linear": (lambda full, half: F.linear(full, full, full[0]), HALF),
    "convolution": (lambda full, half: F.conv2d(full[None, None], full[None, None]), HALF),
    "attention": (
        lambda full, half: F.scaled_dot_product_attention(*(x[None, None] for x in (full, half, full))),
        HALF,
    ),
    "sum of types": (lambda full, half: full + half, FULL),
    "activation": (lambda full, half: F.gelu(half), HALF),
    "softmax": (lambda full, half: half.softmax(-1), FULL),
    "softmax in a given type": (lambda full, half: half.softmax(-1, dtype=HALF), HALF),
    "sum": (lambda full, half: half.sum(), FULL),
    "mean": (lambda full, half: half.mean(), HALF),
    "layer norm": (lambda full, half: F.layer_norm(half, (4,), full[0], full[0]), FULL),
    "group norm": (lambda full, half: F.group_norm(half, 2, full[0], full[0]), FULL),
    "loss": (lambda full, half: F.mse_loss(half, half), FULL),
    "enlarged": (lambda full, half: F.interpolate(half[None, None], scale_factor=2), FULL),
    "concatenated": (lambda full, half: torch.cat([full, half]), FULL),
    "double": (lambda full, half: full.double() @ full.double(), torch.float64),
}


def test_the_cast_list_has_what_torch_casts_on_cuda() -> None:
    names = (name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    cast = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")}
    assert len(cast) > 50
    assert cast <= pretend_dtypes.CAST | pretend_dtypes.NOT_CAST


@pytest.mark.parametrize("name", CASES)
def test_operators_are_cast_under_autocast_alone(name: str) -> None:
    compute, expected = CASES[name]
    with PretendDevice() as device:
        full = torch.eye(4).to(NAME)
        half = full.to(HALF)
        with torch.autocast(device.name, dtype=HALF):
            assert compute(full, half).dtype == expected
            with torch.autocast(device.name, enabled=False):
                assert (full @ full).dtype == FULL


def test_mixed_types_are_refused_that_a_cpu_would_compute() -> None:
    full = torch.ones(4, 4)
    assert F.layer_norm(full.to(HALF), (4,), full[0], full[0]).dtype == HALF
    with PretendDevice():
        full = full.to(NAME)
        half = full.to(HALF)
        for compute in (
            lambda: F.layer_norm(half, (4,), full[0], full[0]),
            lambda: F.group_norm(half, 2, full[0], full[0]),
        ):
            with pytest.raises(RuntimeError, match=r"mixes \['torch.bfloat16', 'torch.float32'\], which CUDA refuses"):
                compute()
        for compute in (lambda: half @ full, lambda: F.linear(full, half), lambda: full[0].dot(half[0])):
            with pytest.raises(RuntimeError, match="dtype"):
                compute()
        with torch.autocast(NAME, dtype=HALF), pytest.raises(RuntimeError, match="with_logits"):
            F.binary_cross_entropy(full, full)
