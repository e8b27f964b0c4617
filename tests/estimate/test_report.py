"""`--dry-run` on the command line: of both recipes, with the default settings of all backbones, and of mistakes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from cameo.backbone import Backbone, register_backbone
from cameo.estimate import report, savings
from cameo.estimate.savings import changes_of
from cameo.recipes import full_finetune, lora_finetune
from cameo.training.runs import outlined_run
from cameo.training.settings import TrainingConfig

OUTLINE = partial(outlined_run, full=True)
RECIPES = {"lora": lora_finetune.run, "full": full_finetune.run}


@pytest.fixture
def no_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savings, "changes_of", lambda config, has_vae: {})


@pytest.mark.usefixtures("no_changes")
@pytest.mark.parametrize(
    "backbone", ["cat3d", *(pytest.param(name, marks=pytest.mark.long) for name in ("mvdream", "sv3d", "zero123plus"))]
)
@pytest.mark.parametrize("run", RECIPES.values(), ids=RECIPES)
def test_every_recipe_has_a_dry_run(
    run: Callable[[list[str]], None],
    backbone: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run([f"backbone={backbone}", "--dry-run"])
    shown = capsys.readouterr().out
    assert shown.startswith("Expected peak 0.")
    assert f" {backbone}, " in shown.splitlines()[0]
    for part in ("| trained of them |", "| optimizer state |", "| backward |", "saves GB"):
        assert part in shown
    assert not list(tmp_path.iterdir())


def test_each_setting_is_changed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["preset=tiny", "pretrained_model_name_or_path=null", "target_modules=[to_q]", "train_batch_size=2"]
    lora_finetune.run([*size, "compare_without_cameo=false", "--dry-run=cuda"])
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| with one setting changed"))
    rows = [line.strip("| ").split(" | ") for line in lines[start + 2 : start + 5]]
    assert [row[0] for row in rows] == ["gradient_checkpointing=true", "mixed_precision=bf16", "train_batch_size=1"]
    peak = float(lines[0].split()[2])
    for _, other, saved, _ in rows:
        assert float(other) + float(saved) == pytest.approx(peak, rel=0.01)
        assert float(saved) > 0
    assert "no GPU was asked" in lines[-2]


def test_the_changes_of_a_model_with_a_vae() -> None:
    config = TrainingConfig(gradient_checkpointing=True, mixed_precision="bf16", train_batch_size=1, use_ema=True)
    assert changes_of(config, has_vae=True) == {
        "gradient_checkpointing": False,
        "mixed_precision": "no",
        "train_batch_size": 2,
        "cache_latents": True,
        "use_ema": False,
    }


def test_a_comparison_keeps_the_model_of_its_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savings, "changes_of", lambda config, has_vae: {})
    config = TrainingConfig(preset="tiny", resolution=32, train_batch_size=1, num_views=2, loss_weight=0.1)
    alone = list(report.report_lines(config, OUTLINE, "cpu"))
    config.compare_without_cameo = True
    both = list(report.report_lines(config, OUTLINE, "cpu"))
    assert not any("the run without CAMEO before it" in line for line in alone)
    assert any("the run without CAMEO before it" in line for line in both)
    assert float(both[0].split()[2]) > float(alone[0].split()[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run=tpu"], "--dry-run=tpu: expected cpu or cuda"),
        (["--dry-run=cpu", "mixed_precision=fp16"], "mixed_precision=fp16 needs a GPU"),
        (["--dry-run", "pretrained_model_name_or_path=me/mine"], "hf download me/mine"),
        (["--dry-run", "num_vews=3"], "num_vews"),
    ],
)
def test_a_mistake_is_one_paragraph(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        lora_finetune.run(arguments)
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_a_backbone_that_cannot_be_outlined_is_named() -> None:
    @register_backbone("loads_only")
    class LoadsOnly(Backbone):
        pass

    config = TrainingConfig(backbone="loads_only", pretrained_model_name_or_path="me/mine")
    with pytest.raises(ValueError, match=r"'loads_only' does not say .* give it the method `outline`"):
        next(report.report_lines(config, OUTLINE, "cpu"))
