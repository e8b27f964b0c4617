"""Settings of a training run: a YAML file plus `key=value` overrides, names as in diffusers' training scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cameo.alignment import IMPLEMENTATIONS
from cameo.errors import DataError, unknown_name
from cameo.scenes.rigs import RIGS

__all__ = ["TrainingConfig", "continued_settings", "load_config", "save_config", "settings_file"]

EMBEDDED = ("scenes", "bare_rooms", "objects")
CHOICES = {
    "alignment_implementation": IMPLEMENTATIONS,
    "data_format": ("auto", *EMBEDDED, "meshes", "rgbd"),
    "supervision": ("cameo", "repa"),
    "correspondence": ("depth", "point_map", "features"),
    "correspondence_control": ("none", "other_scene", "random"),
    "weight_schedule": ("constant", "linear", "cosine"),
    "correspondence_in": ("step", "worker"),
    "timestep_sampling": ("uniform", "high_noise"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "lr_scheduler": (
        "constant",
        "constant_with_warmup",
        "cosine",
        "cosine_with_restarts",
        "linear",
        "polynomial",
    ),
}
# Smallest value of each number; None stays allowed where it is the default.
AT_LEAST = {
    1: (
        "resolution num_scenes num_validation_scenes views_per_scene rank lora_alpha "
        "max_train_steps train_batch_size gradient_accumulation_steps checkpointing_steps checkpoints_total_limit "
        "validation_steps num_validation_samples num_inference_steps alignment_until feature_size"
    ),
    2: "num_views",
    0: (
        "seed data_seed dataloader_num_workers weight softness lr_warmup_steps adam_weight_decay learning_rate "
        "adam_epsilon guidance_scale num_validation_images num_reference_views"
    ),
}
POSITIVE = "max_grad_norm cycle_threshold depth_scale"
SHARES = "condition_dropout lora_dropout adam_beta1 adam_beta2 ema_decay geometry_noise alignment_min_noise"
# What a resumed run may change: everything else would make it another run.
# fmt: off
CHANGEABLE = frozenset((
    "train_data_dir", "num_validation_scenes", "dataloader_num_workers", "compare_without_cameo", "max_train_steps",
    "gradient_checkpointing", "enable_xformers_memory_efficient_attention", "allow_tf32", "output_dir",
    "logging_dir", "report_to", "tracker_project_name", "checkpointing_steps", "checkpoints_total_limit",
    "resume_from_checkpoint", "overwrite_output_dir", "validation_steps", "num_validation_samples",
    "num_validation_images", "num_inference_steps", "guidance_scale", "push_to_hub", "hub_model_id", "hub_token",
    "hub_private", "hub_licence", "correspondence_in", "precomputed_correspondence", "feature_checkpoint",
    "alignment_implementation",
))
# fmt: on


@dataclass
class TrainingConfig:
    """All settings of `recipes/lora_finetune.py` and `recipes/full_finetune.py`.

    Model: `pretrained_model_name_or_path` (Hub id, folder, `bundled:NAME`) or `preset` for fresh weights, with
    `preset_options` overriding it.
    Data: `train_data_dir` is an RGB-D sequence or a folder of meshes (`data_format`: auto, scenes, bare_rooms, objects,
    meshes, rgbd); without it the embedded scenes are used: furnished rooms, empty ones with bold patterns
    (`data_format=bare_rooms`), or single objects with `data_format=objects` or `camera_rig`.
    The rig (`cameo.data.RIGS`) places the cameras around objects and meshes as a backbone expects them, and a sample is
    then all its views; an RGB-D sequence has cameras of its own. `intrinsics` (3x3, in pixels of the full colour image)
    and `depth_scale` (units per metre) are for sequences that do not say.
    CAMEO: `weight` 0 trains without alignment; `correspondence` is depth, point_map or features; `layer`, `head`,
    `normalise`, `reduction`, `softness` and `inflate` are those of `cameo.wrap`, `alignment_implementation` its
    `implementation`. Matches are computed in the training step, on its device, or
    with `correspondence_in=worker` by the data workers beside it; `precomputed_correspondence` is a folder that
    `recipes/precompute_correspondence.py` has filled, from which the data workers read them.
    For comparison: `supervision=repa` aligns the output of the same layer with frozen image features instead of its
    attention with matches (`cameo.training.repa`). `correspondence_control` replaces the matches by some that must not
    help: other_scene takes those of the next sample of the batch, random a token of the same view drawn anew.
    `geometry_noise` is the relative standard deviation of the noise on each pixel's depth, before matching.
    Features, for `supervision=repa` and `correspondence=features`: `feature_model` is a vision transformer of timm,
    `feature_checkpoint` a file with its weights, `feature_pretrained=false` draws random ones (a control), and
    `feature_size` is the side in pixels of the images that it sees (see
    `cameo.correspondence.features.FeatureExtractor`).
    When: `weight_schedule` lets `weight` decay to 0 at `max_train_steps`; from step `alignment_until` on nothing is
    aligned; samples below `alignment_min_noise`, a share of the last time step, are not aligned either.
    Optimisation: `timestep_sampling` is uniform, or high_noise (t = 1 - u**2); `mixed_precision` is no, fp16 (GPU
    only) or bf16.
    Output: `report_to` is a tracker of accelerate, or none; `resume_from_checkpoint` is a path or latest;
    `overwrite_output_dir` lets a new run remove the checkpoints of an earlier one. With a decaying `lr_scheduler`
    another `max_train_steps` bends the rest of its curve, as it does with a decaying `weight_schedule`.
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
    intrinsics: Any = None
    depth_scale: float | None = None
    camera_rig: str | None = None
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
    supervision: str = "cameo"
    layer: Any = None
    head: Any = "mlp"
    weight: float = 0.1
    weight_schedule: str = "constant"
    alignment_until: int | None = None
    alignment_min_noise: float = 0.0
    normalise: str | None = None
    inflate: bool = False
    reduction: str = "mean"
    softness: float = 0.0
    alignment_implementation: str = "auto"
    correspondence: str = "depth"
    cycle_threshold: float = 1.5
    correspondence_in: str = "step"
    precomputed_correspondence: str | None = None
    correspondence_control: str = "none"
    geometry_noise: float = 0.0
    feature_model: str = "vit_small_patch14_dinov2.lvd142m"
    feature_checkpoint: str | None = None
    feature_pretrained: bool = True
    feature_size: int | None = None
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
    overwrite_output_dir: bool = False
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
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        for low, names in AT_LEAST.items():
            for name in names.split():
                if getattr(self, name) is not None and not getattr(self, name) >= low:
                    raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in POSITIVE.split():
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)}")
        for name in SHARES.split():
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a share in [0, 1), got {getattr(self, name)}")
        if self.num_reference_views >= self.num_views:
            raise ValueError(
                f"num_reference_views={self.num_reference_views}: expected fewer than num_views={self.num_views}, "
                "so that a target view is left to predict"
            )
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                "lr_warmup_steps has no effect with lr_scheduler=constant; use lr_scheduler=constant_with_warmup"
            )
        if self.camera_rig is not None and self.camera_rig not in RIGS:
            raise unknown_name("camera_rig", self.camera_rig, RIGS)
        if self.camera_rig is not None and self.data_format in ("scenes", "bare_rooms", "rgbd"):
            raise ValueError(
                f"camera_rig={self.camera_rig}: stands around an object, so it needs data_format=objects, meshes or "
                f"auto, got {self.data_format}; give camera_rig=null"
            )
        if self.train_data_dir and self.data_format in EMBEDDED:
            raise ValueError(
                f"data_format={self.data_format} is embedded, so train_data_dir={self.train_data_dir} would not be "
                "read; give data_format=auto, or train_data_dir=null"
            )
        if self.compare_without_cameo and not self.weight:
            raise ValueError("compare_without_cameo=true needs weight > 0, or both runs would train without CAMEO")
        if self.pretrained_model_name_or_path and self.preset:
            raise ValueError(
                "pretrained_model_name_or_path and preset: give one, the weights to start from or a preset to build; "
                "preset=null drops that of a settings file"
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub=true needs hub_model_id=your-name/your-model")
        self._check_supervision()

    @property
    def uses_matches(self) -> bool:
        """Whether the run needs matches: CAMEO with a weight."""
        return self.supervision == "cameo" and self.weight > 0

    @property
    def uses_features(self) -> bool:
        """Whether the run needs image features: to align with, or to match."""
        return self.weight > 0 and (self.supervision == "repa" or self.correspondence == "features")

    def _check_supervision(self) -> None:
        """Refuse settings of the supervision that contradict each other."""
        outside = self.correspondence_in == "worker" or self.precomputed_correspondence is not None
        control = self.correspondence_control
        if self.supervision == "repa":
            for name in ("correspondence_control", "geometry_noise", "correspondence_in", "precomputed_correspondence"):
                if getattr(self, name) != getattr(TrainingConfig, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)}: is about matches, and supervision=repa uses none; "
                        "leave it out, or give supervision=cameo"
                    )
        if self.feature_checkpoint is not None and not self.feature_pretrained:
            raise ValueError(
                f"feature_pretrained=false: random weights, and feature_checkpoint={self.feature_checkpoint}; give one"
            )
        if control == "other_scene" and self.train_batch_size < 2:
            raise ValueError(
                "correspondence_control=other_scene: takes the matches of the next sample of the batch, and there is "
                f"none with train_batch_size={self.train_batch_size}; give train_batch_size=2 or more"
            )
        if self.geometry_noise and self.correspondence != "depth":
            raise ValueError(
                f"geometry_noise={self.geometry_noise}: is noise on the depth, which correspondence="
                f"{self.correspondence} does not match; give correspondence=depth, or geometry_noise=0"
            )
        if self.geometry_noise and outside:
            raise ValueError(
                f"geometry_noise={self.geometry_noise}: is drawn anew in each step, so the matches must be computed "
                "there; give correspondence_in=step and precomputed_correspondence=null"
            )
        if self.correspondence == "features" and outside:
            raise ValueError(
                "correspondence=features: the network that computes the features runs in the training step; give "
                "correspondence_in=step and precomputed_correspondence=null"
            )
        if self.correspondence == "features" and self.reduction == "released":
            raise ValueError(
                "correspondence=features: knows no distances in space, which reduction=released needs; give "
                "reduction=mean, or correspondence=depth"
            )


def settings_file(recipe: str, folder: str | Path, overrides: Sequence[str]) -> Path:
    """Choose the settings file of a recipe for the `backbone=` among the overrides: `<recipe>_<backbone>_tiny.yaml`.

    Example:
        >>> settings_file("lora", "recipes/configs", ["backbone=cat3d"]).name
        'lora_cat3d_tiny.yaml'

    Raises:
        ValueError: if there is no such file and no `config=` among the overrides.
    """
    given = dict(override.lstrip("-").partition("=")[::2] for override in overrides)
    backbone = given.get("backbone", TrainingConfig.backbone)
    path = Path(folder) / f"{recipe}_{backbone}_tiny.yaml"
    if "config" not in given and not path.is_file():
        files = sorted(Path(folder).glob(f"{recipe}_*_tiny.yaml"))
        known = [file.name.removeprefix(f"{recipe}_").removesuffix("_tiny.yaml") for file in files]
        raise ValueError(
            f"{unknown_name('backbone with settings of its own', backbone, known)}. For another backbone write "
            "config=your.yaml"
        )
    return path


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a YAML file and apply `key=value` overrides; `config=other.yaml` among them replaces the file.

    Embedded data that the file names gives way to a `train_data_dir=` or `camera_rig=` among the overrides.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "run.yaml"
        >>> _ = file.write_text("preset: tiny\\nmax_train_steps: 10\\n")
        >>> load_config(file, ["learning_rate=1e-3"]).learning_rate
        0.001

    Raises:
        DataError: if the file does not exist or is not YAML.
        ValueError: for an unknown key, a value of the wrong type, or an override without `=`.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

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
    try:
        given, changed = OmegaConf.load(path), OmegaConf.from_dotlist(pairs)
    except YAMLError as error:
        raise DataError(f"{path} with {' '.join(pairs) or 'no overrides'}: not valid YAML ({error})") from error
    if not isinstance(given, DictConfig):
        raise DataError(f"{path}: expected lines of `key: value`, got a list")
    for name in [*given, *changed]:
        if name not in known:
            raise unknown_name("setting", name, known)
    other = changed.get("train_data_dir") or (changed.get("camera_rig") and given.get("data_format") != "objects")
    if given.get("data_format") in EMBEDDED and other:
        given.data_format = "auto"
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TrainingConfig), given, changed)
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path} with {' '.join(pairs) or 'no overrides'}: {error}") from error
    return TrainingConfig(**values)


def continued_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings that a resumed run must share with the run it continues."""
    return {name: value for name, value in vars(config).items() if name not in CHANGEABLE}


def save_config(config: TrainingConfig, path: str | Path) -> None:
    """Write the settings of a run beside its results; the Hub token is left out."""
    from omegaconf import OmegaConf

    from cameo.files import write_atomically

    values = {**vars(config), "hub_token": None}
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(values)))
