"""Load what shall be evaluated: a trained adapter, a pipeline, a checkpoint of a run, or a base as it is."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from omegaconf import OmegaConf

from cameo.backbone import get_backbone
from cameo.config import CONFIG_NAME, CameoConfig
from cameo.errors import DataError
from cameo.evaluation.settings import EvaluationSettings
from cameo.hub import from_pretrained, local_folder
from cameo.hub.weights import ADAPTER_FORMATS, HEAD_FILE, format_in
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline
from cameo.training.checkpoint import STATE_NAME
from cameo.training.config import TrainingConfig, load_config, settings_file
from cameo.training.data import build_dataset, match_settings
from cameo.training.setup import base_name, load_pipeline, wrap_denoiser

__all__ = ["Evaluated", "data_settings", "evaluation_settings", "load_evaluated", "split_settings"]

INDEX = "model_index.json"
RUN_SETTINGS = "config.yaml"
EVALUATION = tuple(entry.name for entry in fields(EvaluationSettings))
SAVED = ("layer", "head")  # what a saved model brings along
METRIC = ("scenes", "bare_rooms", "rgbd")
# What of a run's settings decides which samples it is validated on.
DATA = ("resolution", "data_format", "camera_rig", "views_per_scene", "intrinsics", "depth_scale")


@dataclass(frozen=True)
class Evaluated:
    """A model with all that its evaluation needs.

    Attributes:
        model: wraps the pipeline's denoiser, in eval mode.
        pipeline: with everything around the denoiser.
        config: settings of the run, from which the data is built.
        trained_head: whether the alignment heads were trained with these weights.
        facts: where the weights came from, for the result file.
    """

    model: CameoModel
    pipeline: MultiViewPipeline
    config: TrainingConfig
    trained_head: bool
    facts: dict[str, Any]


def split_settings(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split `key=value` arguments into those of `EvaluationSettings` and all others.

    Example:
        >>> split_settings(["num_sampled=4", "backbone=cat3d", "num_inference_steps=10"])
        ({'num_sampled': '4', 'num_inference_steps': '10'}, ['backbone=cat3d'])
    """
    evaluation, others = {}, []
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if name in EVALUATION and equals:
            evaluation[name] = value
        else:
            others.append(argument)
    return evaluation, others


def evaluation_settings(given: dict[str, str], config: TrainingConfig) -> EvaluationSettings:
    """Read the settings of the evaluation; `metric_depth` is on where the data is known to be in metres.

    Example:
        >>> settings = evaluation_settings({"num_sampled": "4", "lpips": "null"}, TrainingConfig())
        >>> settings.num_sampled, settings.lpips, settings.metric_depth
        (4, None, True)

    Raises:
        ValueError: for a value of the wrong type or out of range; names the setting.
    """
    values: dict[str, Any] = {"metric_depth": match_settings(config)["data_format"] in METRIC}
    types = get_type_hints(EvaluationSettings)
    for name, text in given.items():
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"{name}={text}"]))[name]
        expected = types[name]
        kinds = get_args(expected) if getattr(expected, "__origin__", None) is not tuple else (list, tuple)
        kinds = kinds or (expected,)
        if float in kinds and type(value) is int:
            value = float(value)
        if type(value) not in kinds:
            shown = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{name}: expected {shown}, got {text!r}")
        values[name] = value
    return EvaluationSettings(**values)


def data_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return what decides the validation samples of a run; equal in results that can be compared."""
    known = match_settings(config)
    embedded = known["data_format"] != "rgbd"
    return {
        "source": Path(config.train_data_dir).name if config.train_data_dir else "embedded",
        **{name: known[name] for name in DATA},
        "data_seed": config.data_seed,
        "num_scenes": config.num_validation_scenes if embedded else None,
        "overlap": None if known["camera_rig"] else [config.min_overlap, config.max_overlap],
    }


def load_evaluated(
    arguments: Sequence[str], configs: str | Path, *, checkpoint: str | None = None, revision: str | None = None
) -> Evaluated:
    """Load a model and its pipeline from command-line settings, on the GPU where there is one.

    Without `checkpoint` it is the base that the settings name, wrapped as a training would start from it. With it, the
    settings of the run are those of `config=`, else of the `config.yaml` in the checkpoint's folder or the one above.
    Where there is none the backbone's settings file stands in for the data, and `cameo_config.json` names the base.
    The supervised layers and heads are those of `cameo_config.json`; with `layer=auto` too nothing is probed again.

    Args:
        arguments: `key=value` settings of `TrainingConfig`; they win over those of the run.
        configs: folder of the settings files.
        checkpoint: folder of a saved adapter or pipeline, a `checkpoint-N`, or the id of a Hub repository.
        revision: of the Hub repository.

    Raises:
        DataError: if the checkpoint holds nothing that can be loaded, or a base that is not saved anywhere.
        ValueError: for unknown settings, those of a layer or head that the checkpoint has already, or weights that do
            not fit.
    """
    folder = None if checkpoint is None else local_folder(checkpoint, revision)
    config, of_run = _settings(folder, arguments, Path(configs))
    if folder is None:
        pipeline = load_pipeline(config)
        model, trained_head = _wrapped(pipeline, config), False
    elif (folder / CONFIG_NAME).is_file():
        for name in (argument.lstrip("-").partition("=")[0] for argument in arguments):
            if name in SAVED:
                raise ValueError(
                    f"{name}: checkpoint={checkpoint} has its own in {CONFIG_NAME}; leave it out. attention_layers=all "
                    "measures every layer"
                )
        cameo_config = CameoConfig.load(folder)
        if cameo_config.backbone != config.backbone:
            raise ValueError(
                f"checkpoint={checkpoint}: is of backbone {cameo_config.backbone!r}, got backbone={config.backbone}"
            )
        pipeline = _base_pipeline(folder, cameo_config, config, of_run)
        model = from_pretrained(folder, base_model=pipeline.denoiser)
        trained_head = (folder / HEAD_FILE).is_file() and cameo_config.weight > 0
    elif (folder / INDEX).is_file():
        pipeline = get_backbone(config.backbone).load(str(folder))
        model, trained_head = _wrapped(pipeline, config), False
    else:
        raise DataError(
            f"checkpoint={checkpoint}: holds neither {CONFIG_NAME} nor {INDEX}; expected a saved adapter or model, a "
            "checkpoint-N, or a pipeline in diffusers layout"
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
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__,
    }
    return Evaluated(model, pipeline, config, trained_head, facts)


def _settings(folder: Path | None, arguments: Sequence[str], configs: Path) -> tuple[TrainingConfig, bool]:
    """Settings of the run, and whether they are its own."""
    given = {argument.lstrip("-").partition("=")[0] for argument in arguments}
    overrides = list(arguments)
    if "pretrained_model_name_or_path" in given and "preset" not in given:
        overrides.insert(0, "preset=null")  # that of the settings file
    if folder is not None and "config" not in given:
        for place in (folder, folder.absolute().parent):
            if (place / RUN_SETTINGS).is_file():
                config = load_config(place / RUN_SETTINGS, overrides)
                if config.use_ema and (folder / STATE_NAME).is_file():
                    warnings.warn(
                        f"{folder}: its weights are those of the last step, not the averaged ones of use_ema=true; "
                        "evaluate what the finished run saved to measure these",
                        stacklevel=3,
                    )
                return config, True
        if (folder / CONFIG_NAME).is_file() and "backbone" not in given:
            overrides.append(f"backbone={CameoConfig.load(folder).backbone}")
    return load_config(settings_file("lora", configs, overrides), overrides), "config" in given


def _wrapped(pipeline: MultiViewPipeline, config: TrainingConfig) -> CameoModel:
    """Wrap a denoiser as a training of these settings would, with fresh heads."""
    return wrap_denoiser(pipeline, config, build_dataset(config, "train") if config.layer == "auto" else None)


def _base_pipeline(folder: Path, cameo_config: CameoConfig, config: TrainingConfig, of_run: bool) -> MultiViewPipeline:
    """Build the pipeline into whose denoiser the saved weights go."""
    backbone = get_backbone(config.backbone)
    pipeline: MultiViewPipeline
    if (folder / INDEX).is_file():
        pipeline = backbone.load(str(folder))
        return pipeline
    base, preset = cameo_config.base_model, (cameo_config.base_model or "").partition("preset:")[2]
    is_adapter = format_in(folder) in ADAPTER_FORMATS
    if of_run:
        given = base_name(config)
        if is_adapter and given != base:
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
