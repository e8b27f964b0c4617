"""Runs of the recipes on a very small model: in this process, or in processes that a test may kill."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import cameo.adapters.cat3d.pipeline  # noqa: F401  (the server below is to have imported it)
from cameo.training.data import build_dataset
from cameo.training.records import Records
from cameo.training.settings import TrainingConfig
from cameo.training.setup import add_lora, load_pipeline, wrap_denoiser
from cameo.training.trainer import Trainer

FEATURES: dict[str, Any] = {"feature_model": "test_vit", "feature_pretrained": False, "feature_size": 32}
REPA: dict[str, Any] = {"supervision": "repa", **FEATURES}
RECIPES = Path(__file__).parents[2] / "recipes"
SETTINGS: dict[str, Any] = {
    "preset": "tiny",
    "preset_options": {"image_size": 32, "block_out_channels": [32, 32], "heads": 2, "norm_num_groups": 8},
    "resolution": 32,
    "num_scenes": 4,
    "num_validation_scenes": 2,
    "views_per_scene": 6,
    "num_views": 2,
    "train_batch_size": 2,
    "learning_rate": 1e-2,
    "loss_weight": 0.1,  # these models are small and get a few steps
    "num_validation_samples": 2,
    "num_validation_images": 1,
    "num_inference_steps": 2,
    "report_to": "none",
}
# Two steps of a recipe on the settings that ship with it.
SHORT: dict[str, Any] = {
    "max_train_steps": 2,
    "num_scenes": 3,
    "num_validation_scenes": 2,
    "train_batch_size": 1,
    "num_validation_samples": 1,
    "num_validation_images": 0,
    "num_inference_steps": 2,
    "resolution": 32,
    "report_to": "none",
    "checkpointing_steps": 1000,
    "compare_without_cameo": "false",
}


@functools.cache
def scene_cache() -> str:
    """Folder in which the few scenes are rendered once for all tests."""
    folder = tempfile.mkdtemp(prefix="cameo-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Let accelerate forget the settings of this process, of which the precision is one, before and after.

    One thread: the models are so small that a second one only costs, and much where others use the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _forget_accelerate()
    try:
        yield
    finally:
        _forget_accelerate()
        torch.set_num_threads(threads)


def _forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def write_settings(path: Path, output_dir: Path, **changes: Any) -> Path:
    """Write a settings file that replaces the recipe's own."""
    path.write_text(json.dumps({**SETTINGS, **changes, "output_dir": str(output_dir)}))
    return path


def make_config(output_dir: Path, **changes: Any) -> TrainingConfig:
    return TrainingConfig(**{**SETTINGS, "output_dir": str(output_dir), "max_train_steps": 6, **changes})


def make_trainer(output_dir: Path, *, on_validation: Callable | None = None, **changes: Any) -> Trainer:
    """A LoRA trainer on the small model."""
    config = make_config(output_dir, **changes)
    pipeline = load_pipeline(config)
    add_lora(pipeline.denoiser, config)
    dataset = build_dataset(config, "train")
    model = wrap_denoiser(pipeline, config, dataset)
    return Trainer(model, pipeline, dataset, config, on_validation=on_validation)


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def same_files(first: Path, second: Path) -> bool:
    """Whether two safetensors files hold the same numbers, bit for bit."""
    from safetensors.torch import load_file

    left, right = load_file(first), load_file(second)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class RecipeProcess:
    """A recipe as a process of its own, forked from a server that has imported everything already.

    With `signal_at=(step, number)` the run and its data workers get a signal right after that step was recorded, as
    from a terminal or scheduler. With `stall` it stops for good in the middle of a file below a folder of that name.
    """

    def __init__(
        self,
        recipe: str,
        output_dir: Path,
        *,
        signal_at: tuple[int, int] | None = None,
        stall: str | None = None,
        environment: Mapping[str, str] | None = None,
        **changes: Any,
    ) -> None:
        environment = {"CAMEO_CACHE": scene_cache(), **(environment or {})}
        folder = Path(tempfile.mkdtemp(dir=scene_cache()))
        self.log, self.output_dir = folder / "output.log", output_dir
        arguments = [f"config={write_settings(folder / 'run.yaml', output_dir, **changes)}"]
        script = str(RECIPES / f"{recipe}.py")
        self.process = _server().Process(
            target=_run_recipe, args=(script, arguments, str(self.log), environment, signal_at, stall)
        )
        self.process.start()

    def reach(self, condition: Callable[[], bool], *, timeout: float = 60) -> None:
        """Wait until a condition holds while the process runs."""
        end = time.monotonic() + timeout
        while not condition():
            if self.process.exitcode is not None or time.monotonic() > end:
                pytest.fail(f"not reached; exit code {self.process.exitcode}; output:\n{self.output}")
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send a signal to the run and its data workers, as a terminal or scheduler does."""
        os.killpg(self.process.pid, number)

    def wait(self, timeout: float = 60) -> int:
        """Exit code; negative for a signal."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            pytest.fail(f"still running after {timeout} s; output:\n{self.output}")
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def run_in_process(script: str, arguments: list[str], folder: Path, *, timeout: float = 300) -> tuple[int, str]:
    """Run a script in a folder, in a process of its own; returns the exit code and what it printed."""
    log = Path(tempfile.mkdtemp(dir=scene_cache())) / "output.log"
    process = _server().Process(target=_run_in_folder, args=(script, arguments, str(log), str(folder)))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"{script} {' '.join(arguments)}: still running after {timeout} s; output:\n{log.read_text()}")
    return process.exitcode, log.read_text()


def _run_in_folder(script: str, arguments: list[str], log: str, folder: str) -> None:
    os.chdir(folder)
    _run_recipe(script, arguments, log, {"CAMEO_CACHE": scene_cache()}, None, None)


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.training_runs"])
    kept = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # the server must not own threads, and its runs share the cores
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("OMP_NUM_THREADS") if kept is None else os.environ.update(OMP_NUM_THREADS=kept)
    return context


def _run_recipe(
    script: str,
    arguments: list[str],
    log: str,
    environment: dict[str, str],
    signal_at: tuple[int, int] | None,
    stall: str | None,
) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # data workers: a server of their own would start cold
    if signal_at:
        _signal_at(*signal_at)
    if stall:
        _stall_in(stall)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _signal_at(step: int, number: int) -> None:
    append = Records.append

    def append_and_signal(records: Records, entry: Mapping[str, Any]) -> None:
        append(records, entry)
        if records.path.name == "metrics.jsonl" and entry["step"] == step:
            os.killpg(os.getpgrp(), number)

    Records.append = append_and_signal  # type: ignore[method-assign]


def _stall_in(folder: str) -> None:
    """Stop for good in the middle of a safetensors file below `folder`, so that a kill surely hits the write."""
    import safetensors.torch

    save = safetensors.torch.save_file

    def half_save(tensors: dict[str, torch.Tensor], path: str, **options: Any) -> None:
        save(tensors, path, **options)
        if folder in path:
            os.truncate(path, Path(path).stat().st_size // 2)
            Path(path).with_suffix(".half").touch()
            time.sleep(600)

    safetensors.torch.save_file = half_save
