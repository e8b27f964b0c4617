"""Models of runs that do not train: one to evaluate, from any checkpoint, and one without weights for a dry run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from cameo.backbone import get_backbone
from cameo.choices import POSED_FORMATS
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.errors import DataError
from cameo.estimate.building import OutlinedRun, quiet_loading
from cameo.hub import from_pretrained, local_folder
from cameo.hub.weights import ADAPTER_FORMATS, HEAD_FILE, format_in
from cameo.model import CameoModel
from cameo.pipeline import LatentEncoder, MultiViewPipeline
from cameo.settings import split_arguments
from cameo.training.checkpoints.verify import STATE_NAME
from cameo.training.data import build_dataset, match_settings, noisy_inputs
from cameo.training.report import device_name
from cameo.training.run_settings import RUN_SETTINGS, evaluation_settings, run_settings
from cameo.training.settings import TrainingConfig
from cameo.training.setup import add_lora, base_name, load_pipeline, wrap_denoiser
from cameo.training.trainer import HALF

__all__ = ["EvaluatedModel", "data_settings", "evaluation_settings", "load_evaluated", "outlined_run"]

PIPELINE_INDEX = "model_index.json"
# Settings that a saved model brings along, and that cannot be given with it.
KEPT_IN_CHECKPOINT = ("layer", "head")
# Settings of a run that decide which samples it is validated on.
DATA_SETTINGS = ("resolution", "data_format", "camera_rig", "views_per_scene", "intrinsics", "depth_scale")


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with everything that its evaluation needs.

    Attributes:
        model: wraps the pipeline's denoiser, in eval mode.
        pipeline: the denoiser with its VAE, encoders and noise schedule.
        config: settings of the run, from which the validation set is built.
        trained_head: whether the alignment heads were trained with these weights.
        facts: where the weights came from, for the result file.
    """

    model: CameoModel
    pipeline: MultiViewPipeline
    config: TrainingConfig
    trained_head: bool
    facts: dict[str, Any]


def outlined_run(config: TrainingConfig, *, full: bool) -> OutlinedRun:
    """Build the pipeline and the model of a run without weights, for `cameo.estimate`.

    Example:
        >>> run = outlined_run(TrainingConfig(preset="tiny"), full=True)
        >>> next(run.model.parameters()).device.type
        'meta'

    Args:
        config: settings of the run. With `layer=auto`, which would probe the weights, the default layer is taken.
        full: whether all weights are trained, or a LoRA.

    Raises:
        DataError: for weights on the Hub whose architecture is not known.
        ValueError: for a backbone that does not say how it is built without weights, and for settings that do not fit.
    """
    layer = None if config.layer == "auto" else config.layer
    kernel: dict[str, Any] = {"enable_xformers_memory_efficient_attention": False, "alignment_implementation": "auto"}
    config = replace(config, layer=layer, resume_from_checkpoint=None, **kernel)
    try:
        with init_empty_weights(), quiet_loading():
            pipeline = load_pipeline(config, outline=True)
            if full:
                pipeline.denoiser.requires_grad_(True)
            else:
                add_lora(pipeline.denoiser, config)
            model = wrap_denoiser(pipeline, config)
    except NotImplementedError as error:
        raise ValueError(f"{error}, so a dry run cannot build it; give it the method `outline`, or a preset") from error
    if not config.uses_matches:
        model.alignment_heads.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if isinstance(pipeline, LatentEncoder):
        pipeline.encoder_precision = HALF.get(config.mixed_precision)
    return OutlinedRun(pipeline, model, lambda batch, number: noisy_inputs(pipeline, batch, config, number))


def data_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings that decide the validation samples of a run; comparable results have equal ones."""
    known = match_settings(config)
    embedded = known["data_format"] not in POSED_FORMATS
    return {
        "source": Path(config.train_data_dir).name if config.train_data_dir else "embedded",
        **{name: known[name] for name in DATA_SETTINGS},
        "data_seed": config.data_seed,
        "num_scenes": config.num_validation_scenes if embedded else None,
        "overlap": None if known["camera_rig"] else [config.min_overlap, config.max_overlap],
    }


def load_evaluated(
    arguments: Sequence[str] | Mapping[str, Any],
    configs: str | Path,
    *,
    checkpoint: str | None = None,
    revision: str | None = None,
) -> EvaluatedModel:
    """Load a model and its pipeline from command-line settings, on the GPU where there is one.

    Without `checkpoint` the model is the base that the settings name, wrapped as a training would start from it. With
    `checkpoint` the settings are those of the file `config=`, or else of the `config.yaml` in the checkpoint's folder
    or in the folder above. Where neither exists, the settings file of the backbone decides the data, and
    `cameo_config.json` names the base. The supervised layers and heads are those of `cameo_config.json`; with
    `layer=auto` nothing is probed again either.

    Args:
        arguments: `key=value` settings of `TrainingConfig`, or what `cameo.settings.split_arguments` made of them; they
            win over those of the run.
        configs: folder of the settings files.
        checkpoint: folder of a saved adapter or pipeline, a `checkpoint-N`, or the id of a Hub repository.
        revision: of the Hub repository.

    Raises:
        DataError: if the checkpoint holds nothing that can be loaded, or a base that is not saved anywhere.
        ValueError: for unknown settings, those of a layer or head that the checkpoint has already, or weights that do
            not fit.
    """
    folder = None if checkpoint is None else local_folder(checkpoint, revision)
    given = dict(arguments) if isinstance(arguments, Mapping) else split_arguments(arguments, TrainingConfig)[0]
    config, are_of_run = run_settings(given, configs, folder)
    if folder is not None and config.use_ema and are_of_run and (folder / STATE_NAME).is_file():
        warnings.warn(
            f"{folder}: its weights are those of the last step, not the averaged ones of use_ema=true; evaluate what "
            "the finished run saved to measure these",
            stacklevel=2,
        )
    if folder is None:
        pipeline = load_pipeline(config)
        model, trained_head = _wrapped(pipeline, config), False
    elif (folder / CONFIG_NAME).is_file():
        pipeline, model, trained_head = _load_checkpoint(folder, str(checkpoint), config, given, are_of_run)
    elif (folder / PIPELINE_INDEX).is_file():
        pipeline = get_backbone(config.backbone).load(str(folder))
        model, trained_head = _wrapped(pipeline, config), False
    else:
        raise DataError(
            f"checkpoint={checkpoint}: holds neither {CONFIG_NAME} nor {PIPELINE_INDEX}; expected a saved adapter or "
            "model, a checkpoint-N, or a pipeline in diffusers layout"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if hasattr(pipeline, "to"):
        pipeline.to(device)
    model.to(device).eval()
    trained_head = trained_head or not any(True for _ in model.alignment_heads.parameters())
    facts = {
        "backbone": config.backbone,
        "checkpoint": checkpoint,
        "base": model.cameo_config.base_model,
        "layers": list(model.cameo_config.layers),
        "weight": model.cameo_config.weight if checkpoint else None,
        "training": model.cameo_config.training if checkpoint else {},
        "device": device_name(device),
        "torch": torch.__version__,
    }
    return EvaluatedModel(model, pipeline, config, trained_head, facts)


def _wrapped(pipeline: MultiViewPipeline, config: TrainingConfig) -> CameoModel:
    """Wrap a denoiser as a training of these settings would, with fresh heads."""
    return wrap_denoiser(pipeline, config, build_dataset(config, "train") if config.layer == "auto" else None)


def _load_checkpoint(
    folder: Path, checkpoint: str, config: TrainingConfig, given: Mapping[str, Any], are_of_run: bool
) -> tuple[MultiViewPipeline, CameoModel, bool]:
    """Load saved weights into the pipeline of their base; also returns whether their head was trained."""
    for name in given:
        if name in KEPT_IN_CHECKPOINT:
            raise ValueError(
                f"{name}: checkpoint={checkpoint} has its own in {CONFIG_NAME}; leave it out. attention_layers=all "
                "measures every layer"
            )
    cameo_config = CameoConfig.load(folder)
    if cameo_config.backbone != config.backbone:
        raise ValueError(
            f"checkpoint={checkpoint}: is of backbone {cameo_config.backbone!r}, got backbone={config.backbone}"
        )
    pipeline = _base_pipeline(folder, cameo_config, config, are_of_run)
    model = from_pretrained(folder, base_model=pipeline.denoiser)
    return pipeline, model, (folder / HEAD_FILE).is_file() and cameo_config.weight > 0


def _base_pipeline(
    folder: Path, cameo_config: CameoConfig, config: TrainingConfig, are_of_run: bool
) -> MultiViewPipeline:
    """Build the pipeline into whose denoiser the saved weights go."""
    backbone = get_backbone(config.backbone)
    pipeline: MultiViewPipeline
    if (folder / PIPELINE_INDEX).is_file():
        pipeline = backbone.load(str(folder))
        return pipeline
    base, preset = cameo_config.base_model, (cameo_config.base_model or "").partition("preset:")[2]
    is_adapter = format_in(folder) in ADAPTER_FORMATS
    if are_of_run:
        given = base_name(config)
        if is_adapter and base is not None and given != base:
            warnings.warn(f"{folder}: was trained on {base}, and is put on {given} as the settings say", stacklevel=3)
        return load_pipeline(config)
    if preset and is_adapter:
        raise DataError(
            f"{folder}: an adapter on fresh weights ({base}), which are not saved here. Evaluate it in the folder of "
            f"its run, whose {RUN_SETTINGS} says how they were drawn, or pass that file as config="
        )
    if preset:
        return load_pipeline(replace(config, preset=preset, pretrained_model_name_or_path=None))
    if base is None:
        raise DataError(f"{folder}: its {CONFIG_NAME} names no base; pass pretrained_model_name_or_path= and config=")
    return load_pipeline(
        replace(config, preset=None, pretrained_model_name_or_path=base, revision=cameo_config.base_revision)
    )
