"""The output folder of a short run of the recipe, with the run without CAMEO beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.training_runs import RecipeProcess


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("private") / "my-run"
    settings = {"max_train_steps": 4, "validation_steps": 2, "compare_without_cameo": True, "target_modules": ["to_q"]}
    run = RecipeProcess("lora_finetune", output, **settings, hub_token="hf_secret")
    assert run.wait(180) == 0, run.output
    assert f"what changed, with curves, pictures and settings: open {output / 'report.html'} in a browser" in run.output
    return output
