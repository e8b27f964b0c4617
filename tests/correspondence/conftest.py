"""Rooms with known surfaces, which the benchmark of accuracy makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "correspondence_accuracy.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("correspondence_accuracy", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def rooms(benchmark) -> dict[str, Tensor]:
    built = [benchmark.make_room(seed) for seed in range(2)]
    return {
        "depth": torch.cat([room.depth(64) for room in built]),
        "intrinsics": torch.cat([room.intrinsics_at(64) for room in built]),
        "extrinsics": torch.cat([room.extrinsics for room in built]),
    }
