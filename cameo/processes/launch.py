"""What a launcher requests (processes, device, precision), and a check that the run carries it out.

`torchrun` and `accelerate launch` pass their requests to a script through environment variables, and neither notices
when the script does something else. Here each request is either carried out or refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from cameo.training.settings import TrainingConfig

__all__ = ["Launch"]

# Variables that hold the number of this process and the number of all processes: of torchrun and accelerate, then MPI.
RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)
# What accelerate's launcher switches on with these variables, and the trainer does not support.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (--use_deepspeed)",
    "ACCELERATE_USE_FSDP": "sharding by FSDP (--use_fsdp)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (--use_megatron_lm)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism (--use_parallelism_config)",
}
# Variables with the meaning of a setting. accelerate's launcher always sets the precision, to "no" without a request.
SAME_AS_SETTING = {
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "max_grad_norm",
}
# Set by every form of `accelerate launch` that the trainer supports, and by nothing else.
MARK_OF_ACCELERATE = "ACCELERATE_DYNAMO_BACKEND"


@dataclass(frozen=True)
class Launch:
    """What the launcher of this process requests.

    Attributes:
        process: number of this process, from 0.
        num_processes: processes of the run, on all machines.
        num_local_processes: those on this machine.
        environment: the variables from which this was read.

    Example:
        >>> launch = Launch.from_environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
        >>> launch.process, launch.num_processes, launch.is_main_process
        (1, 2, False)
    """

    process: int = 0
    num_processes: int = 1
    num_local_processes: int = 1
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Launch:
        """Read the variables of `torchrun`, `accelerate launch` or MPI; without any of them there is one process.

        Raises:
            ValueError: if several processes were requested and this one was started alone.
        """
        environment = dict(os.environ if environment is None else environment)
        for rank, size in RANKS:
            if rank in environment and size in environment:
                process, number = int(environment[rank]), int(environment[size])
                if not 0 <= process < number:
                    raise ValueError(
                        f"process: expected 0 to {number - 1}, got {process} ({rank}, with {size}={number})"
                    )
                local = environment.get("LOCAL_WORLD_SIZE") or environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1
                return cls(process, number, int(local), environment)
        if int(environment.get("WORLD_SIZE") or 1) > 1:
            raise ValueError(
                f"WORLD_SIZE={environment['WORLD_SIZE']} asks for that many processes, but RANK does not say which of "
                "them this one is; start them with torchrun, which sets both, or unset WORLD_SIZE"
            )
        # For several processes without GPUs of their own, accelerate starts one, and exports the address of the group.
        if MARK_OF_ACCELERATE in environment and "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
            raise ValueError(
                "accelerate launch was asked for several processes and has started one: it starts several on CPUs "
                "through MPI only, and several on GPUs with --multi_gpu. On CPUs use torchrun --nproc_per_node N "
                "SCRIPT in place of accelerate launch --cpu --num_processes N SCRIPT. For a single process give "
                "--num_processes 1, and unset MASTER_ADDR and MASTER_PORT where your shell exports them"
            )
        return cls(environment=environment)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.process == 0

    @property
    def asks_for_cpu(self) -> bool:
        """Whether the launcher requests the CPU, even if there is a GPU."""
        device = self.environment.get("ACCELERATE_TORCH_DEVICE", "").partition(":")[0]
        return device == "cpu" or _is_on(self.environment.get("ACCELERATE_USE_CPU"))

    @property
    def needs_cpu(self) -> bool:
        """Whether accelerate has to be told to use the CPU; otherwise each of several processes would run alone."""
        if self.num_processes == 1:
            return self.asks_for_cpu
        # Several processes cannot share Apple's GPU.
        return self.asks_for_cpu or _accelerator_type() in (None, "mps")

    def check(self, config: TrainingConfig) -> None:
        """Refuse requests of the launcher that the trainer does not support.

        Raises:
            ValueError: naming the request, what the run would do instead, and the cure.
        """
        for name, meaning in UNSUPPORTED.items():
            if _is_on(self.environment.get(name)):
                raise ValueError(
                    f"the launcher asks for {meaning} with {name}, which the trainer does not support: it trains with "
                    "DistributedDataParallel. Launch without it, or choose another file with accelerate launch "
                    "--config_file"
                )
        backend = self.environment.get(MARK_OF_ACCELERATE, "no")
        if backend.lower() != "no":
            raise ValueError(
                f"the launcher asks for torch.compile with {MARK_OF_ACCELERATE}={backend} (--dynamo_backend), which "
                "the trainer does not support; launch with --dynamo_backend no"
            )
        self._check_settings(config)
        self._check_devices()

    def refuse_several_processes(self, recipe: str) -> None:
        """Raise `ValueError` if each of several processes would do the whole work of a recipe."""
        if self.num_processes > 1:
            raise ValueError(
                f"{recipe} runs as one process, and {self.num_processes} were launched, which would all write the same "
                f"files; start {recipe} without a launcher"
            )

    def _check_settings(self, config: TrainingConfig) -> None:
        """Refuse variables that disagree with a setting; a precision of "no" is no request, and the setting is used."""
        for name, setting in SAME_AS_SETTING.items():
            asked, given = self.environment.get(name), getattr(config, setting)
            if asked is None or (setting == "mixed_precision" and asked == "no"):
                continue
            if asked != given if isinstance(given, str) else float(asked) != given:
                raise ValueError(
                    f"the launcher asks for {name}={asked} (--{name.removeprefix('ACCELERATE_').lower()}), and the "
                    f"settings of the run say {setting}={given}. Give {setting}={asked} to the recipe, or launch "
                    "without the request (it may also stand in the file of accelerate config)"
                )

    def _check_devices(self) -> None:
        """Refuse processes for which this machine has no GPU, if the launcher requests one for each."""
        kind = _accelerator_type()
        if self.num_processes == 1 or self.asks_for_cpu:
            return
        # accelerate starts several processes with --multi_gpu alone; without it, its launcher sets ACCELERATE_USE_CPU.
        if kind is None and MARK_OF_ACCELERATE in self.environment and "ACCELERATE_USE_CPU" not in self.environment:
            raise ValueError(
                f"accelerate launch --multi_gpu asks for {self.num_processes} processes on GPUs, and this machine has "
                f"no GPU; on CPUs use torchrun --nproc_per_node {self.num_local_processes}"
            )
        if kind == "cuda" and self.num_local_processes > (count := torch.cuda.device_count()):
            raise ValueError(
                f"{self.num_local_processes} processes were started on this machine, which has {count} GPU"
                f"{'s' * (count > 1)}; start one process per GPU (torchrun --nproc_per_node {count}), or set "
                "ACCELERATE_USE_CPU=true to train on CPUs"
            )

    def check_came(self, accelerator: Accelerator, config: TrainingConfig) -> None:
        """Compare the request with the accelerator that came of it.

        Raises:
            ValueError: if there are fewer or more processes, another device, or another precision.
        """
        came = (accelerator.num_processes, accelerator.mixed_precision)
        asked = (self.num_processes, config.mixed_precision)
        if came != asked:
            raise ValueError(
                f"the run was to have {asked[0]} processes and mixed_precision={asked[1]}; accelerate has made "
                f"{came[0]} and {came[1]} of it on {accelerator.device}. Start several processes with torchrun"
            )
        if self.asks_for_cpu and accelerator.device.type != "cpu":
            raise ValueError(f"the launcher asks for the CPU, and accelerate has chosen {accelerator.device}")


def _accelerator_type() -> str | None:
    """Name the kind of GPU of this machine, or None."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return None if device is None else device.type


def _is_on(value: str | None) -> bool:
    """Read a switch in the way that accelerate does."""
    return (value or "").lower() in ("1", "true", "t", "yes", "y", "on")
