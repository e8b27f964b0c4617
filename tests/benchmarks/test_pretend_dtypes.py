"""The pretended device casts under autocast as CUDA does, and refuses the mixed types that CUDA refuses."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks.step import pretend_device, pretend_dtypes
from tests.helpers.pretended_casts import FULL, HALF
from tests.helpers.pretended_steps import run_apart

pytestmark = pytest.mark.skipif(not pretend_device.available(), reason="devices made in Python need torch 2.10")


@pytest.fixture(scope="module")
def observed() -> dict[str, dict[str, str]]:
    """What a process of its own has seen."""
    found: dict[str, dict[str, str]] = json.loads(run_apart("tests.helpers.pretended_casts"))
    return found


def test_the_cast_list_has_what_torch_casts_on_cuda() -> None:
    names = (name.removeprefix("aten::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::"))
    cast = {name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA")}
    cast = {
        name for name in cast if "imname" not in name and "names" not in name
    }  # of named tensors, as torch 2.10 has them
    assert len(cast) > 50
    assert cast <= pretend_dtypes.CAST | pretend_dtypes.NOT_CAST


def test_operators_are_cast_under_autocast_alone(observed: dict[str, dict[str, str]]) -> None:
    assert observed["cast"] == {
        "matmul": str(HALF),
        "linear": str(HALF),
        "convolution": str(HALF),
        "attention": str(HALF),
        "sum of types": str(FULL),
        "activation": str(HALF),
        "softmax": str(FULL),
        "softmax in a given type": str(HALF),
        "sum": str(FULL),
        "mean": str(HALF),
        "layer norm": str(FULL),
        "group norm": str(FULL),
        "loss": str(FULL),
        "enlarged": str(FULL),
        "concatenated": str(FULL),
        "double": str(torch.float64),
    }
    assert observed["plain"] == {"matmul": str(FULL)}


def test_mixed_types_are_refused_that_a_cpu_would_compute(observed: dict[str, dict[str, str]]) -> None:
    full = torch.ones(4, 4)
    assert F.layer_norm(full.to(HALF), (4,), full[0], full[0]).dtype == HALF
    for name, message in observed["mixed"].items():
        norm = "mixes ['torch.bfloat16', 'torch.float32'], which CUDA refuses"
        assert (norm if name.endswith("norm") else "dtype") in message, (name, message)
    assert "with_logits" in observed["unsafe"]["cross entropy"]
