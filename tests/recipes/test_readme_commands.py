"""The command lines of the README run as they stand there, with a few settings appended that make them short.

They run in a folder of their own, in which lie what they name: the recipes, `my.yaml` and an RGB-D sequence.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cameo.training.checkpoints.folder import list_checkpoints
from tests.helpers.sequences import write_sequence
from tests.helpers.training_runs import RECIPES, read_lines, run_in_process, scene_cache, write_settings

README = (RECIPES.parent / "README.md").read_text(encoding="utf-8")
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
}
DATA = ["num_scenes=4", "num_validation_scenes=2", "num_validation_samples=2"]
TRAINING = [*DATA, "max_train_steps=2", "num_validation_images=1", "num_inference_steps=2", "train_batch_size=1"]
# What makes the run of a recipe short.
SHORT = {
    "lora_finetune.py": TRAINING,
    "full_finetune.py": TRAINING,
    "precompute_correspondence.py": ["num_scenes=4", "max_train_steps=2", "train_batch_size=1"],
    "probe_layers.py": ["num_validation_scenes=2", "num_validation_samples=2", "timesteps=0.5"],
    "evaluate.py": ["num_validation_scenes=2", "num_samples=2", "num_sampled=1", "num_inference_steps=2", "lpips=null"],
}
# Weights that cannot be downloaded in a test give way to a preset, and its size.
WITHOUT_DOWNLOAD = ["pretrained_model_name_or_path=null", "preset=tiny", "resolution=32", "train_batch_size=1"]


def command_lines() -> list[str]:
    """Every line of the README's code blocks that starts a recipe, without its comment."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    shell = [block for language, block in blocks if language in ("", "bash")]
    lines = [line.split(" #")[0].strip() for block in shell for line in block.splitlines()]
    return [line for line in lines if "recipes/" in line and line.split()[0] in LAUNCHERS]


def shortened(line: str, number: int) -> list[str]:
    """Split a command line into its words, and append what makes it short."""
    words = shlex.split(line)
    recipe = next(Path(word).name for word in words if word.startswith("recipes/"))
    if "--compare" in words or "--list" in words:
        return words
    words += SHORT[recipe]
    if "path/to/sequence" in line:
        words += ["max_overlap=0.99"]  # its few views lie close together
    if "_sd21" in line:
        words += WITHOUT_DOWNLOAD
    if "preset=small resolution=128" in line:
        words += ["resolution=32"]
    # A folder takes one run; later lines name that of the first.
    return words + [f"output_dir=outputs/{number}"] * (
        number > 0 and recipe in ("lora_finetune.py", "full_finetune.py")
    )


def run_line(words: list[str], folder: Path) -> tuple[int, str]:
    """Run a command line in a folder; returns the exit code and what it printed."""
    if words[0] == "python":  # in a process that has imported torch already
        return run_in_process(words[1], words[2:], folder)
    done = subprocess.run(
        [*LAUNCHERS[words[0]], *words[1:]],
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
    lines = command_lines()
    assert len(lines) >= 15
    assert {line.split()[0] for line in lines} == LAUNCHERS.keys()
    assert {
        Path(word).name for line in lines for word in line.split() if word.startswith("recipes/") and "=" not in word
    } >= SHORT.keys()


def test_torchrun_makes_one_run_of_two_processes(folder: Path) -> None:
    line = next(line for line in command_lines() if line.startswith("torchrun"))
    code, output = run_line([*shlex.split(line), "max_train_steps=2", "num_validation_images=0"], folder)
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
    lines = [line for line in command_lines() if not line.startswith("torchrun")]
    for number, line in enumerate(lines):
        code, output = run_line(shortened(line, number), folder)
        assert code == 0, f"{line}\n{output}"


@pytest.mark.slow
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
    line = f"accelerate launch {request_of_launcher} recipes/lora_finetune.py config=my.yaml max_train_steps=2"
    code, output = run_line(shlex.split(line), folder)
    assert code != 0
    assert message in output
    assert not (folder / "outputs").exists()
