"""A run with torch_compile= trains, saves and resumes what a run without it does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from cameo.attention.compiled.in_place import compile_in_place
from cameo.training import trainer as trainer_module
from cameo.training.settings import TrainingConfig
from tests.helpers.training_runs import make_trainer, same_files

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")
STEPS = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_steps": 100}


@pytest.mark.parametrize("torch_compile", [pytest.param("default", marks=pytest.mark.slow), "regional"])
def test_saved_files_and_a_resumed_run_are_those_without_compilation(
    torch_compile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    counters.clear()
    # What inductor makes may sum in another order; this runs the graphs as they are.
    monkeypatch.setattr(trainer_module, "compile_in_place", partial(compile_in_place, backend="eager"))
    make_trainer(tmp_path / "off", **STEPS).train()
    make_trainer(tmp_path / "compiled", **STEPS, torch_compile=torch_compile).train()
    assert counters["stats"]["unique_graphs"] >= 1
    files = [path.relative_to(tmp_path / "off") for path in (tmp_path / "off").glob("checkpoint-2/*.safetensors")]
    assert files
    for file in files:
        assert same_files(tmp_path / "off" / file, tmp_path / "compiled" / file)
    resumed = {**STEPS, "max_train_steps": 3, "resume_from_checkpoint": "latest"}
    make_trainer(tmp_path / "off", **resumed, torch_compile=torch_compile).train()
    make_trainer(tmp_path / "compiled", **resumed).train()
    for file in files:
        last = Path("checkpoint-3") / file.name
        assert same_files(tmp_path / "off" / last, tmp_path / "compiled" / last)


def test_repa_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="torch_compile=default: supervision=repa reads hidden tokens by hooks"):
        TrainingConfig(supervision="repa", torch_compile="default")
    TrainingConfig(supervision="repa", torch_compile="default", loss_weight=0)


def test_a_model_without_repeated_blocks_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a Linear does not list its repeated blocks; give torch_compile=default"):
        compile_in_place(model, model, "regional")
