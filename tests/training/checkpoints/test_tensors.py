"""States of optimizers and generators come back as they were, bit for bit, from files that hold no code."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cameo.errors import DataError
from cameo.training.checkpoints.random_states import random_states, set_random_states
from cameo.training.checkpoints.tensors import read_tensors, state_to_bytes, write_tensors

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "AdamW, amsgrad, tensor rate": lambda parameters: torch.optim.AdamW(
        parameters, lr=torch.tensor(1e-3), amsgrad=True, capturable=False, foreach=False
    ),
    "SGD, momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adagrad": torch.optim.Adagrad,
    "RAdam": torch.optim.RAdam,
    "Adafactor": torch.optim.Adafactor,
}


def same(first: Any, second: Any) -> bool:
    """Whether two nested states are equal in types and bits."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (math.isnan(first) and math.isnan(second))


def test_all_kinds_of_values(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = {
        "numbers": [1, -(2**70), 0.1, -0.0, math.inf, math.nan, True, None, "text \u00e9 \U0001f600"],
        "nested": ({}, [], (), {1: {"a": (1, [2])}, "a": 2, None: 3, 2.5: 4}, {"$tensor": "no tensor"}),
        "tensors": [torch.zeros(()), torch.zeros(0, 3), torch.arange(12).reshape(3, 4).T, shared, shared[2:4]],
        "types": {str(kind): torch.ones(2).to(kind) for kind in (torch.bfloat16, torch.uint8, torch.bool, torch.half)},
        "8 bits": {0: {"state1": torch.arange(256).to(torch.uint8), "absmax1": torch.ones(1), "qmap1": shared}},
    }
    write_tensors(state, tmp_path / "state.safetensors")
    found = read_tensors(tmp_path / "state.safetensors")
    assert same(found, state)
    assert math.copysign(1, found["numbers"][3]) == -1
    (tmp_path / "again.safetensors").write_bytes(state_to_bytes(state))
    assert same(read_tensors(tmp_path / "again.safetensors"), state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, range(3))
    write_tensors(optimizer.state_dict(), tmp_path / "optimizer.safetensors")
    again = nn.Linear(4, 3)
    again.load_state_dict(model.state_dict())
    restored = OPTIMIZERS[name](again.parameters())
    restored.load_state_dict(read_tensors(tmp_path / "optimizer.safetensors"))
    for one, its_optimizer in ((model, optimizer), (again, restored)):
        steps(one, its_optimizer, range(3, 6))
    assert same(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", len, object(), 1j])
def test_what_is_no_plain_value_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=rf"^groups\.0\.extra: {type(value).__name__} cannot be saved"):
        write_tensors({"groups": [{"extra": value}]}, tmp_path / "state.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\x10" + bytes(7) + b"[1, 2]" + bytes(10)])
def test_a_file_of_another_kind_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "optimizer.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"optimizer.safetensors: holds no state of a training"):
        read_tensors(tmp_path / "optimizer.safetensors")
    with pytest.raises(DataError, match=r"gone.safetensors: holds no state of a training"):
        read_tensors(tmp_path / "gone.safetensors")


def test_random_states(tmp_path: Path) -> None:
    def draw() -> tuple[float, ...]:
        return random.gauss(0, 1), np.random.normal(), torch.randn(()).item()  # noqa: NPY002

    draw()  # a second normal number is kept by the generators of Python and numpy
    (tmp_path / "states.safetensors").write_bytes(state_to_bytes(random_states(CPU)))
    expected = [draw() for _ in range(3)]
    saved = read_tensors(tmp_path / "states.safetensors")
    assert set_random_states(saved, CPU) == []
    assert [draw() for _ in range(3)] == expected
    saved["devices"] = [torch.zeros(16, dtype=torch.uint8)] * 2
    assert set_random_states(saved, CPU) == ["the checkpoint has the random states of 2 GPUs, and this process sees 0"]
    for broken in ({}, {**saved, "python": 3}, {**saved, "numpy": ("MT19937", [1], 0, 0, 0.0)}, {**saved, "torch": 1}):
        with pytest.raises(DataError, match="holds no states of random generators"):
            set_random_states(broken, CPU)
