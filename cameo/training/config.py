"""Settings of a training run: a YAML file plus `key=value` overrides, names as in diffusers' training scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cameo.errors import DataError, unknown_name

__all__ = ["TrainingConfig", "load_config", "save_config"]


@dataclass
class TrainingConfig:
    """All settings of `recipes/lora_finetune.py` and `recipes/full_finetune.py`.

    Model: `pretrained_model_name_or_path` (Hub id, folder, `bundled:cat3d-tiny`) or `preset` for fresh weights, with
    `preset_options` overriding it. Data: `train_data_dir` is an RGB-D sequence or a folder of meshes
    (`data_format`: auto, scenes, meshes, rgbd); without it the embedded scenes are used. CAMEO: `weight` 0 trains
    without alignment; `correspondence` is depth or point_map. `timestep_sampling`: uniform, or high_noise
    (t = 1 - u**2). `mixed_precision`: no, fp16, bf16. `resume_from_checkpoint`: a path or latest.
    """

    # model
    backbone: str = "cat3d"
    pretrained_model_name_or_path: str | None = None
    revision: str | None = None
    preset: str | None = None
    preset_options: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    enable_xformers_memory_efficient_attention: bool = False
    # data
    train_data_dir: str | None = None
    data_format: str = "auto"
    resolution: int = 64
    num_views: int = 3
    num_reference_views: int = 1
    min_overlap: float = 0.3
    max_overlap: float = 0.9
    num_scenes: int = 256
    num_validation_scenes: int = 16
    views_per_scene: int = 8
    data_seed: int = 0
    dataloader_num_workers: int = 0
    # CAMEO
    layer: Any = None
    head: Any = "mlp"
    weight: float = 0.1
    normalise: str = "per_view"
    reduction: str = "mean"
    correspondence: str = "depth"
    cycle_threshold: float = 1.5
    # LoRA
    rank: int = 4
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    compare_without_cameo: bool = False
    # optimisation
    seed: int = 0
    max_train_steps: int = 1000
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    allow_tf32: bool = False
    timestep_sampling: str = "uniform"
    condition_dropout: float = 0.1
    use_ema: bool = False
    ema_decay: float = 0.9995
    # output
    output_dir: str = "outputs/run"
    logging_dir: str = "logs"
    report_to: str = "tensorboard"
    tracker_project_name: str = "cameo"
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    validation_steps: int = 500
    num_validation_samples: int = 32
    num_validation_images: int = 3
    num_inference_steps: int = 25
    guidance_scale: float = 1.0
    # Hub
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None
    hub_private: bool | None = None
    hub_licence: str | None = None

    def __post_init__(self) -> None:
        choices = {
            "data_format": ("auto", "scenes", "meshes", "rgbd"),
            "correspondence": ("depth", "point_map"),
            "timestep_sampling": ("uniform", "high_noise"),
            "mixed_precision": ("no", "fp16", "bf16"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        positive = ("resolution", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "rank")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.weight < 0:
            raise ValueError(f"weight: expected a factor >= 0, got {self.weight}")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout: expected a probability in [0, 1), got {self.condition_dropout}")
        if self.pretrained_model_name_or_path and self.preset:
            raise ValueError(
                "pretrained_model_name_or_path and preset: give one, the weights to start from or a preset to build"
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub=true needs hub_model_id=your-name/your-model")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a YAML file and apply `key=value` overrides; `config=other.yaml` among them replaces the file.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "run.yaml"
        >>> _ = file.write_text("preset: tiny\\nmax_train_steps: 10\\n")
        >>> load_config(file, ["learning_rate=1e-3"]).learning_rate
        0.001

    Raises:
        DataError: if the file does not exist.
        ValueError: for an unknown key, a value of the wrong type, or an override without `=`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    pairs = []
    for override in overrides:
        name, equals, value = override.lstrip("-").partition("=")
        if not equals:
            raise ValueError(f"override {override!r}: expected key=value, for example max_train_steps=100")
        if name == "config":
            path = value
        else:
            pairs.append(f"{name}={value}")
    if not Path(path).is_file():
        raise DataError(f"{path}: no such settings file")
    known = [entry.name for entry in fields(TrainingConfig)]
    given = OmegaConf.load(path)
    changed = OmegaConf.from_dotlist(pairs)
    for name in [*given, *changed]:
        if name not in known:
            raise unknown_name("setting", name, known)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainingConfig), given, changed)
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path} with {' '.join(pairs) or 'no overrides'}: {error}") from error
    return TrainingConfig(**values)


def save_config(config: TrainingConfig, path: str | Path) -> None:
    """Write the settings of a run beside its results; the Hub token is left out."""
    from omegaconf import OmegaConf

    from cameo.config import write_atomically

    values = {**vars(config), "hub_token": None}
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(values)))

