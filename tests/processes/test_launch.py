"""What `torchrun` and `accelerate launch` ask for is carried out or refused by name.

The variables are those that the launchers export for the command line above them (accelerate 1.15, torch 2.14).
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cameo.processes.accelerator import make_accelerator
from cameo.processes.launch import Launch
from cameo.training.settings import TrainingConfig
from tests.helpers.training_runs import RECIPES, fresh_accelerate, make_config

# accelerate launch
ACCELERATE = {
    "ACCELERATE_USE_CPU": "False",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
}
# torchrun --nproc_per_node 2
TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "34973",
}
# accelerate launch --num_processes 2, with --cpu or without a GPU
ONE_INSTEAD_OF_TWO = {**ACCELERATE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
# accelerate launch --multi_gpu --num_processes 2
MULTI_GPU = {**ACCELERATE, **TORCHRUN}
del MULTI_GPU["ACCELERATE_USE_CPU"]


@pytest.fixture
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "MASTER_")) or name in TORCHRUN:
            monkeypatch.delenv(name)
    with fresh_accelerate():
        yield


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**changes)


def check(environment: dict[str, str], **changes: Any) -> Launch:
    launch = Launch.from_environment(environment)
    launch.check(config(**changes))
    return launch


def test_without_a_launcher_there_is_one_process_on_the_usual_device() -> None:
    launch = check({})
    assert (launch.process, launch.num_processes, launch.is_main_process) == (0, 1, True)
    assert not launch.needs_cpu
    # Variables of a cluster alone are no launcher.
    assert check({"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}).num_processes == 1


def test_torchrun_without_a_gpu_means_processes_on_cpus() -> None:
    launch = check(TORCHRUN)
    assert (launch.process, launch.num_processes, launch.num_local_processes) == (1, 2, 2)
    assert not launch.is_main_process
    assert launch.needs_cpu
    assert not check({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}).needs_cpu


@pytest.mark.parametrize(("kind", "count"), [("cuda", 2), ("mps", 0)])
def test_torchrun_with_gpus_takes_them_where_they_can_work_together(
    monkeypatch: pytest.MonkeyPatch, kind: str, count: int
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert check(TORCHRUN).needs_cpu == (kind == "mps")
    assert check({**TORCHRUN, "ACCELERATE_USE_CPU": "true"}).needs_cpu
    assert check({**TORCHRUN, "ACCELERATE_TORCH_DEVICE": "cpu"}).needs_cpu
    assert check(MULTI_GPU).num_processes == 2
    if kind == "cuda":
        with pytest.raises(ValueError, match=r"3 processes were started on this machine, which has 2 GPUs; start one"):
            check({**TORCHRUN, "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"})


@pytest.mark.parametrize("on_cpu", ["True", "False"])
def test_several_processes_of_which_accelerate_starts_one_are_refused(on_cpu: str) -> None:
    with pytest.raises(ValueError, match=r"has started one: .*On CPUs use torchrun --nproc_per_node N SCRIPT in place"):
        Launch.from_environment({**ONE_INSTEAD_OF_TWO, "ACCELERATE_USE_CPU": on_cpu})
    # With --mpirun_hostfile accelerate starts both.
    ranks = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert Launch.from_environment({**ONE_INSTEAD_OF_TWO, "ACCELERATE_USE_CPU": on_cpu, **ranks}).process == 1


def test_processes_without_a_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2 asks for .*RANK does not say.*start them with torchrun"):
        Launch.from_environment({"WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match=r"process: expected 0 to 1, got 2 \(RANK, with WORLD_SIZE=2\)"):
        Launch.from_environment({"RANK": "2", "WORLD_SIZE": "2"})


def test_gpus_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--multi_gpu asks for 2 processes on GPUs, and this machine has no GPU; on"):
        check(MULTI_GPU)


def test_precision_of_the_launcher_must_be_that_of_the_settings() -> None:
    # "no" is set without a request too, so it yields.
    for precision in ("no", "bf16"):
        check(ACCELERATE, mixed_precision=precision)
    check({**ACCELERATE, "ACCELERATE_MIXED_PRECISION": "bf16"}, mixed_precision="bf16")
    for asked, given in (("bf16", "no"), ("fp16", "bf16"), ("fp8", "no")):
        message = (
            rf"ACCELERATE_MIXED_PRECISION={asked} \(--mixed_precision\), .*mixed_precision={given}. "
            rf"Give mixed_precision={asked} to the recipe"
        )
        with pytest.raises(ValueError, match=message):
            check({**ACCELERATE, "ACCELERATE_MIXED_PRECISION": asked}, mixed_precision=given)


def test_accumulation_and_clipping_of_the_launcher_must_be_those_of_the_settings() -> None:
    asked = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    check(asked, gradient_accumulation_steps=4, max_grad_norm=0.5)
    with pytest.raises(ValueError, match=r"ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 .*gradient_accumulation_steps=1"):
        check(asked, max_grad_norm=0.5)
    with pytest.raises(ValueError, match=r"ACCELERATE_GRADIENT_CLIPPING=0.5 .*max_grad_norm=1.0"):
        check(asked, gradient_accumulation_steps=4)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", r"DeepSpeed \(--use_deepspeed\)"),
        ("ACCELERATE_USE_FSDP", "true", r"sharding by FSDP \(--use_fsdp\)"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", r"Megatron-LM \(--use_megatron_lm\)"),
        (
            "ACCELERATE_USE_PARALLELISM_CONFIG",
            "true",
            r"tensor, context or sequence parallelism \(--use_parallelism_config\)",
        ),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", r"torch.compile with ACCELERATE_DYNAMO_BACKEND=INDUCTOR"),
    ],
)
def test_what_the_trainer_does_not_do_is_refused(variable: str, value: str, message: str) -> None:
    check({**ACCELERATE, variable: "false" if value == "true" else "NO"})
    with pytest.raises(ValueError, match=rf"the launcher asks for {message}.*does not support"):
        check({**ACCELERATE, variable: value})


@pytest.mark.parametrize(("recipe", "command"), [("evaluate", "evaluate"), ("probe_layers", "probe")])
def test_a_recipe_of_one_process_is_not_run_twice(recipe: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    main = runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"]
    with pytest.raises(
        ValueError, match=rf"cameo {command} runs as one process, and 2 were launched, .*start cameo {command} without"
    ):
        main(["backbone=cat3d"])


@pytest.mark.usefixtures("_clean_environment")
def test_the_accelerator_of_a_run_is_what_was_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    settings = make_config(tmp_path, gradient_accumulation_steps=4)
    accelerator = make_accelerator(settings)
    assert accelerator.gradient_accumulation_steps == 1  # the trainer alone divides by 4
    # Another number than came, as where accelerate knows no way to start processes on a device.
    with pytest.raises(ValueError, match=r"was to have 2 processes and mixed_precision=no; accelerate has made 1 and"):
        Launch.from_environment(TORCHRUN).check_came(accelerator, settings)
    with pytest.raises(ValueError, match=r"was to have 1 processes and mixed_precision=bf16; .* 1 and no of it"):
        Launch().check_came(accelerator, make_config(tmp_path, mixed_precision="bf16"))
    for name, value in ONE_INSTEAD_OF_TWO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="accelerate launch was asked for several processes and has started one"):
        make_accelerator(settings)
