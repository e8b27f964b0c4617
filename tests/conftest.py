"""Fixtures shared by the tests: a tiny backbone, hand-made batches, and folders with real data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.helpers.batches import make_batch

if TYPE_CHECKING:
    from tests.helpers.triton_interpreter import Interpreter

REPOSITORY = Path(__file__).parent.parent
# The suite is defined on the CPU; GPU checks are in benchmarks/gpu.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# One thread each: the models are tiny, and two test processes with two threads each would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def _data_folder() -> Path:
    return Path(os.environ.get("CAMEO_TEST_DATA", REPOSITORY / "data"))


def _found(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        pytest.skip(f"{name} is not at hand; set CAMEO_TEST_DATA to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Folder of a real data set, by name; skips where it is absent."""
    return lambda name: _found(_data_folder(), name)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """File of reference numbers, by name: from the repository, else from beside the real data."""
    assets = REPOSITORY / "tests" / "assets"
    return lambda name: assets / name if (assets / name).exists() else _found(_data_folder().parent / "golden", name)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    """Calls functions in a process in which Triton interprets its kernels on the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.helpers.triton_interpreter import interpreter

    with interpreter() as call:
        yield call


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two samples of three views, 64 px."""
    return make_batch()


@pytest.fixture
def small_runs_with_features(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training runs of their own, on shared scenes; REPA's projector is narrow, its network knowingly untrained."""
    from cameo.training import repa
    from tests.helpers.training_runs import fresh_accelerate, scene_cache

    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    monkeypatch.setattr(repa, "PROJECTOR_WIDTH", 64)
    with fresh_accelerate(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "test_vit has random weights")
        yield
