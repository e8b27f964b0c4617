"""The command line of the recipes: help, mistakes, and parts of the package that are loaded on first use."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import cameo
from cameo import choices
from cameo.errors import DataError
from cameo.evaluation.settings import EvaluationSettings
from cameo.settings import Settings, run_recipe, setting, split_arguments
from cameo.settings.help import comments, components, help_text
from cameo.training.settings import TrainingConfig, load_config

ROOT = Path(__file__).parents[2]
RECIPES = ("lora_finetune", "full_finetune", "evaluate", "probe_layers", "precompute_correspondence")
TOKEN = "hf_topsecret"


@dataclass
class Options(Settings):
    """Options of a recipe."""

    # Results to compare. None by default.
    results: list[str] = setting(factory=list, positional=True)
    # Whether to compare. false by default.
    compare: bool = setting(False)
    # Folder of the result. null by default.
    output: str | None = setting(None, path=True)


# 1. Recipes

RUN = """
import contextlib, io, json, runpy, sys, warnings
recipe, mistake = sys.argv[1], json.loads(sys.argv[2])
answers = []
for arguments in (["--help"], ["--print-config", "loss_weight=0.5"], mistake):
    sys.argv, out, err, status = [recipe, *arguments], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(recipe, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps([answers, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_answers_at_once_and_tells_a_mistake_in_one_paragraph(recipe: str) -> None:
    mistake = [f"hub_token={TOKEN}", "max_train_steps=x"]
    script = str(ROOT / "recipes" / f"{recipe}.py")
    command = [sys.executable, "-W", "ignore", "-c", RUN, script, json.dumps(mistake)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (help_, printed, wrong), modules = json.loads(done.stdout)
    assert help_[0] == printed[0] == 0
    assert "learning_rate=0.0001  (a number)" in help_[1]
    assert "Factor of the alignment loss" in help_[1]
    assert yaml.safe_load(printed[1])["loss_weight"] == 0.5
    assert wrong == [2, "", f"{recipe}.py: max_train_steps: expected a whole number, got 'x'\n"]
    assert not {"torch", "numpy", "diffusers", "omegaconf"} & set(modules)


def raising(error: Exception) -> Any:
    def main(arguments: list[str]) -> None:
        raise error

    return main


def test_a_mistake_of_the_user_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def load(arguments: list[str]) -> None:
        load_config("absent.yaml", arguments)

    with pytest.raises(SystemExit) as caught:
        run_recipe(load, lambda _: [], [TrainingConfig], about="", arguments=[])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("absent.yaml: no such settings file\n")
    worker = DataError("Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                       "  File ...\ncameo.errors.DataError: frame 3:\n  no depth")  # fmt: skip
    with pytest.raises(SystemExit):
        run_recipe(raising(worker), lambda _: [], [TrainingConfig], about="", arguments=[])
    assert capsys.readouterr().err.endswith(": frame 3: no depth\n")


@pytest.mark.parametrize("fault", [lambda _: int("x"), lambda _: json.loads("{"), raising(RuntimeError("broken"))])
def test_a_fault_of_the_program_keeps_its_traceback(fault: Any) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        run_recipe(fault, lambda _: [], [TrainingConfig], about="", arguments=[])


# 2. Help


def test_every_setting_says_what_it_is() -> None:
    for kind in (TrainingConfig, EvaluationSettings):
        for component in components(kind):
            for name, comment in comments(component).items():
                assert re.match(r"[A-Z0-9].*\.$", comment), f"{component.__name__}.{name}: {comment!r}"
                assert len(comment) > 30, name


def test_help_lists_each_setting_once() -> None:
    text = help_text("About.", [Options, EvaluationSettings, TrainingConfig])
    for name in {*vars(TrainingConfig()), *vars(EvaluationSettings()), "output"}:
        assert len(re.findall(rf"^  {name}=", text, re.MULTILINE)) == 1, name
    assert "correspondence=depth  (depth, point_map, features, tracks, matcher)" in text
    assert max(map(len, text.splitlines())) <= 120


# 3. Parts that are loaded on first use


def test_import_loads_nothing_slow() -> None:
    code = (
        "import sys, cameo, cameo.data, cameo.training.settings as settings; settings.TrainingConfig; "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("package", ["cameo", "cameo.data"])
def test_a_package_loads_what_type_checkers_see(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    loaded = ast.literal_eval(block.orelse[0].value.args[1])  # type: ignore[attr-defined]
    assert loaded == seen
    assert set(module.__all__) == set(seen)
    assert set(module.__all__) <= set(dir(module))
    for name, place in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(str(place)), name)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_wrap_stays_the_function_when_its_module_is_imported_first() -> None:
    module = importlib.import_module("cameo.wrap")
    cameo.wrap = module  # type: ignore[assignment]  # as the import system does it
    assert cameo.wrap is module.wrap


def test_names_that_settings_choose_from_are_those_of_the_code() -> None:
    from cameo.data import RIGS
    from cameo.data.batches import KINDS
    from cameo.evaluation.metrics import TRUNKS

    assert tuple(RIGS) == choices.RIG_NAMES
    assert tuple(TRUNKS) == choices.LPIPS_TRUNKS
    correspondence = TrainingConfig.__dataclass_fields__["correspondence"]
    assert tuple(correspondence.metadata["choices"]) == KINDS


@pytest.mark.parametrize(("flag", "device"), [("--dry-run", None), ("--dry_run=cuda", "cuda"), ("--dry-run=", "")])
def test_a_dry_run_gets_the_settings_and_the_device(flag: str, device: str | None) -> None:
    asked: list[object] = []

    def fail(arguments: list[str]) -> None:
        raise AssertionError("a dry run trains nothing")

    options: dict[str, Any] = {"about": "", "dry_run": lambda arguments, device: asked.append((arguments, device))}
    run_recipe(fail, lambda arguments: [], [], arguments=["seed=1", flag, "rank=2"], **options)
    assert asked == [(["seed=1", "rank=2"], device)]


def test_a_recipe_without_a_dry_run_refuses_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_recipe(
            lambda arguments: None,
            lambda arguments: split_arguments(arguments, TrainingConfig),
            [TrainingConfig],
            about="",
            arguments=["--dry-run"],
        )
    assert "dry_run" in capsys.readouterr().err
