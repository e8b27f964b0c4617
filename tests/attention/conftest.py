"""Fixtures of the tests of attention: an input, a stand-in for xformers, and the check that no watcher stays open."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.helpers.attention_kernels import install_xformers
from tests.helpers.captured_models import SAMPLES, TOKENS, WIDTH


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def xformers_ops(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    return install_xformers(monkeypatch)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    assert torch.overrides._get_current_function_mode_stack() == []
