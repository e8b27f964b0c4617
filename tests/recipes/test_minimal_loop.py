"""The recipe that is read from top to bottom trains, saves, loads, and contains the lines that the README shows."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import cameo
from tests.helpers.training_runs import scene_cache

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "minimal_loop.py"
README = (ROOT / "README.md").read_text(encoding="utf-8")
STEPS = 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Path]:
    """A shortened run: the alignment loss of each step, and the folder of the LoRA."""
    folder = tmp_path_factory.mktemp("minimal") / "lora"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMEO_CACHE", scene_cache())
        return runpy.run_path(str(RECIPE))["main"](folder, num_scenes=2, num_steps=STEPS), folder


def test_alignment_loss_falls(run: tuple[list[float], Path]) -> None:
    losses, _ = run
    assert len(losses) == STEPS
    # Measured: 3.41 -> 2.99. Without the alignment loss in the sum it stays above 3.3.
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.25


def test_saved_lora_loads_onto_the_named_base(run: tuple[list[float], Path]) -> None:
    _, folder = run
    loaded = cameo.from_pretrained(folder)
    assert loaded.cameo_config.base_model == "bundled:cat3d-transformer-tiny"
    trained = [value for name, value in loaded.base_model.named_parameters() if "lora_B" in name]
    assert trained
    assert all(torch.count_nonzero(value) for value in trained)


def test_lines_of_the_readme_stand_in_the_recipe() -> None:
    example = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    recipe = "".join(
        RECIPE.read_text(encoding="utf-8").split()
    )  # the recipe may break a line where the README does not
    lines = [line.split("  # ")[0].strip() for line in example.splitlines()]
    shared = [line for line in lines if "from_depth(" in line or "model.alignment_loss" in line]
    assert len(shared) == 2
    assert all("".join(line.split()) in recipe for line in shared)
    attach = "".join(next(line for line in lines if "cameo.wrap(" in line).split())
    assert attach.removesuffix(")") in recipe  # the recipe adds settings for its small model
    assert 0 < recipe.index(attach.removesuffix(")")) < recipe.index("torch.optim.AdamW(")
    assert "correspondence=match" in recipe


def test_recipe_is_short_and_uses_no_trainer() -> None:
    recipe = RECIPE.read_text(encoding="utf-8")
    assert len(recipe.splitlines()) <= 110
    assert "cameo.training" not in recipe


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("num_steps=3", 2)])
def test_help_explains_and_settings_are_refused(
    argument: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(RECIPE), argument])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPE), run_name="__main__")
    assert ended.value.code == code
    shown = capsys.readouterr()
    assert "python recipes/minimal_loop.py" in shown.out or "unrecognized arguments: num_steps=3" in shown.err
