"""The command lines of the README and of the pages on recipes run as they stand, with settings that make them short.

They run in a folder of their own, in which lie what they name: the recipes, `my.yaml` and an RGB-D sequence.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cameo.training.checkpoints.folder import list_checkpoints
from tests.helpers.pages import CommandLine, command_lines, parsed, text_of
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import RECIPES, read_lines, run_in_process, scene_cache, write_settings

PAGES = ("README.md", "docs/recipes.md", "docs/backbones.md", "docs/guides/several_processes.md")
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
}
DATA = ["num_scenes=4", "num_validation_scenes=2", "num_validation_samples=2"]
TRAINING = [*DATA, "max_train_steps=2", "num_validation_images=1", "num_inference_steps=2", "train_batch_size=1"]
# What makes the run of a recipe short.
SHORT = {
    "lora": TRAINING,
    "full": TRAINING,
    "precompute": ["num_scenes=4", "max_train_steps=2", "train_batch_size=1"],
    "probe": ["num_validation_scenes=2", "num_validation_samples=2", "timesteps=0.5"],
    "evaluate": ["num_validation_scenes=2", "num_samples=2", "num_sampled=1", "num_inference_steps=2", "lpips=null"],
}
# Weights that cannot be downloaded in a test give way to a preset, and its size.
WITHOUT_DOWNLOAD = ["pretrained_model_name_or_path=null", "preset=tiny", "resolution=32", "train_batch_size=1"]


LINES = [line for page in PAGES for line in command_lines(text_of(page))]


def shortened(line: CommandLine, number: int) -> list[str]:
    """Return the arguments of a command line, with those that make it short."""
    arguments = list(line.arguments)
    if "--compare" in arguments or "--list" in arguments:
        return arguments
    arguments += SHORT[line.command]
    if "path/to/sequence" in line.line:
        arguments += ["max_overlap=0.99"]  # its few views lie close together
    if "_sd21" in line.line:
        arguments += WITHOUT_DOWNLOAD
    if "preset=small resolution=128" in line.line:
        arguments += ["resolution=32"]
    # A folder takes one run; later lines name that of the first.
    return arguments + [f"output_dir=outputs/{number}"] * (number > 0 and line.command in ("lora", "full"))


def run_line(line: CommandLine, arguments: list[str], folder: Path) -> tuple[int, str]:
    """Run a command line in a folder with other arguments; returns the exit code and what it printed."""
    if line.launcher not in LAUNCHERS:  # in a process that has imported torch already
        return run_in_process(f"recipes/{line.module.__name__.rpartition('.')[2]}.py", arguments, folder)
    words = shlex.split(line.line)
    done = subprocess.run(
        [*LAUNCHERS[line.launcher], *words[1 : len(words) - len(line.arguments)], *arguments],
        cwd=folder,
        env={**os.environ, "CAMEO_CACHE": scene_cache()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes").symlink_to(RECIPES)
    write_settings(tmp_path / "my.yaml", Path("outputs/my"))
    write_sequence(tmp_path / "path" / "to" / "sequence", frames=30)
    return tmp_path


def test_every_recipe_and_launcher_is_shown() -> None:
    assert len(LINES) >= 15
    assert {line.launcher for line in LINES} == {"cameo", "python", *LAUNCHERS}
    assert {line.command for line in LINES} == SHORT.keys()


def test_torchrun_makes_one_run_of_two_processes(folder: Path) -> None:
    line = next(line for line in LINES if line.launcher == "torchrun" and line.command == "lora")
    code, output = run_line(line, [*line.arguments, "max_train_steps=2", "num_validation_images=0"], folder)
    assert code == 0, output
    assert output.count("on 2 processes (cpu)") == 1
    assert output.count("adapter in outputs/my/adapter") == 1
    assert [entry["step"] for entry in read_lines(folder / "outputs/my/metrics.jsonl")] == [1, 2]
    (last,) = list_checkpoints(folder / "outputs/my")
    assert sorted(path.name for path in last.glob("random_states_*")) == [
        "random_states_0.safetensors",
        "random_states_1.safetensors",
    ]


@pytest.mark.slow
def test_all_command_lines_run(folder: Path) -> None:
    lines = [line for line in LINES if line.launcher != "torchrun"]
    for number, line in enumerate(lines):
        code, output = run_line(line, shortened(line, number), folder)
        assert code == 0, f"{line.line}\n{output}"


@pytest.mark.long
@pytest.mark.parametrize(
    ("request_of_launcher", "message"),
    [
        ("--cpu --num_processes 2", "accelerate launch was asked for several processes and has started one"),
        ("--cpu --mixed_precision bf16", "(--mixed_precision), and the settings of the run say mixed_precision=no"),
    ],
)
def test_accelerate_launch_is_refused_what_it_would_not_get(
    folder: Path, request_of_launcher: str, message: str
) -> None:
    line = parsed(f"accelerate launch {request_of_launcher} recipes/lora_finetune.py config=my.yaml max_train_steps=2")
    assert line is not None
    code, output = run_line(line, line.arguments, folder)
    assert code != 0
    assert message in output
    assert not (folder / "outputs").exists()
