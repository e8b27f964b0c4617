"""The steps that the recipes have in common: load the pipeline, add LoRA, wrap the denoiser, validate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cameo.backbone import get_backbone, resolve_layers, unwrap_peft
from cameo.config import CameoConfig
from cameo.data import MultiViewDataset
from cameo.evaluation.validation import validate
from cameo.memory import in_precision
from cameo.model import CameoModel, attach
from cameo.pipeline import MultiViewPipeline
from cameo.probing.denoising import ValidationSettings
from cameo.processes.accelerator import make_accelerator
from cameo.processes.launch import Launch
from cameo.processes.peers import watched_by_others
from cameo.renamed import old_functions
from cameo.training.checkpoints.agreement import gathered
from cameo.training.checkpoints.folder import find_checkpoint, how_to_go_on, list_checkpoints, refuse_used_folder
from cameo.training.checkpoints.machines import agreed_checkpoint
from cameo.training.data import data_format
from cameo.training.layer_choice import probe_for
from cameo.training.output_folder import WITHOUT_CAMEO, hold_folder, refuse_other_runs
from cameo.training.records import TrainingResult
from cameo.training.report import card_metrics, card_pictures, metrics_table, write_pictures
from cameo.training.settings import TrainingConfig
from cameo.training.trainer import HALF, Trainer
from cameo.wrap import wrap

__all__ = [
    "LoraRun",
    "add_lora",
    "base_name",
    "begin_run",
    "card_metrics",
    "card_pictures",
    "load_pipeline",
    "metrics_table",
    "planned_runs",
    "run_name",
    "train_lora",
    "validation_callback",
    "wrap_denoiser",
    "write_pictures",
]

if not TYPE_CHECKING:  # a type checker is to see the new names alone
    __getattr__ = old_functions(__name__)


@dataclass
class LoraRun:
    """A finished or interrupted LoRA training: the trained model, its pipeline, the trainer, and its result."""

    model: CameoModel
    pipeline: MultiViewPipeline
    trainer: Trainer
    result: TrainingResult

    @property
    def validations(self) -> list[dict[str, Any]]:
        """What was measured, each entry with its `step`; that of step 0 is the base before the training."""
        return self.result.validations


@contextmanager
def begin_run(config: TrainingConfig, *, demonstration: bool = False) -> Iterator[None]:
    """Check what was launched and keep other runs out of the output folder, before anything is computed or deleted.

    The demonstration, a recipe without arguments, can be repeated: it may replace the results of an earlier
    demonstration, in the folders of both runs of a comparison, and nothing else.

    Raises:
        DataError: if another run is writing to the folder, or the demonstration would replace another run.
        ValueError: if the launcher requests something that the run would not do.
    """
    Launch.from_environment().check(config)
    go_on = partial(how_to_go_on, config.output_dir)
    with watched_by_others(config.process_timeout, go_on), hold_folder(config.output_dir):
        if demonstration:
            config.overwrite_output_dir = True
            refuse_other_runs(planned_runs(config))
        yield


def load_pipeline(config: TrainingConfig, *, outline: bool = False) -> MultiViewPipeline:
    """Load the weights to start from, or build a preset with weights drawn from `seed`.

    Args:
        config: settings of the run.
        outline: whether to build the pipeline without the weights to start from, see `Backbone.outline`.

    Raises:
        ImportError: if the run is to use xformers on a GPU, and it is not installed.
    """
    adapter = get_backbone(config.backbone)
    if config.pretrained_model_name_or_path:
        load = adapter.outline if outline else adapter.load
        pipeline = load(config.pretrained_model_name_or_path, revision=config.revision, **config.preset_options)
    else:
        torch.manual_seed(config.seed)
        pipeline = adapter.build(config.preset or "tiny", **config.preset_options)
    if config.gradient_checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        if torch.cuda.is_available() and find_spec("xformers") is None:
            raise ImportError("enable_xformers_memory_efficient_attention=true: pip install cameo-diffusion[xformers]")
        pipeline.enable_xformers_memory_efficient_attention()
    return pipeline


def to_run_device(pipeline: MultiViewPipeline, config: TrainingConfig) -> None:
    """Move a pipeline to the device of this process, as the `Trainer` does later, so that layers are probed there."""
    if hasattr(pipeline, "to"):
        pipeline.to(make_accelerator(config).device)


def add_lora(denoiser: nn.Module, config: TrainingConfig) -> None:
    """Freeze the denoiser and put LoRA on its attention projections, in place.

    With fp16 or bf16 the frozen weights are kept in that precision; LoRA stays in float32.
    """
    from peft import LoraConfig, inject_adapter_in_model

    precision = HALF.get(config.mixed_precision)
    denoiser.requires_grad_(False)
    if precision is not None:
        in_precision(denoiser, precision)
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha or config.rank,
        lora_dropout=config.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=list(config.target_modules),
    )
    if hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(lora)  # type: ignore[operator]
    else:
        inject_adapter_in_model(lora, denoiser)


def wrap_denoiser(
    pipeline: MultiViewPipeline,
    config: TrainingConfig,
    dataset: MultiViewDataset | None = None,
    *,
    chosen: CameoConfig | None = None,
) -> CameoModel:
    """Wrap the pipeline's denoiser with the run's CAMEO settings, and record where its base weights came from.

    With `layer=auto` the layers are probed on the first samples of `dataset`, the training set, on the device of the
    denoiser (`to_run_device`), unless `chosen`, the configuration of an earlier run from the same base and data, names
    them. A resumed run takes the layer of its checkpoint: if its files have moved, or on another device, a close
    ranking might come out differently. It keeps the token layouts of its checkpoint as well.

    Raises:
        DataError: if there is no checkpoint to resume from.
        ValueError: for `layer=auto` without a data set.
    """
    layer: int | str | Sequence[int | str] | None = config.layer
    probe = None
    if layer != "auto":
        chosen = None
    elif config.resume_from_checkpoint:
        chosen = CameoConfig.load(agreed_checkpoint(config.output_dir, config.resume_from_checkpoint))
    if chosen is not None:
        layer = chosen.layers
    elif layer == "auto":
        if dataset is None:
            raise ValueError("layer=auto: needs dataset=, the training set on which the layers are probed; got None")
        probe = probe_for(pipeline, dataset, config)
    torch.manual_seed(config.seed)
    model = wrap(
        pipeline.denoiser,
        backbone=config.backbone,
        layer=layer,
        probe=probe,
        head=config.head,
        weight=config.loss_weight if config.supervision == "cameo" else 0.0,
        normalize=config.normalize,
        softness=config.softness,
        implementation=config.alignment_implementation,
        max_queries=config.max_queries,
        reduction=config.reduction,
        num_reference_views=config.num_reference_views,
        inflate=config.inflate,
        own_view=config.own_view,
    )
    if config.resume_from_checkpoint:
        model = _supervised_as_before(model, config)
    if chosen is not None:
        model.cameo_config.layer_choice = chosen.layer_choice
    model.cameo_config.base_model = base_name(config)
    model.cameo_config.base_revision = config.revision or get_backbone(config.backbone).revision(base_name(config))
    model.cameo_config.training = {
        "steps": config.max_train_steps,
        "batch size": config.train_batch_size * config.gradient_accumulation_steps,
        "views": config.num_views,
        "resolution": config.resolution,
        "learning rate": config.learning_rate,
        "data": config.hub_data_name or _kind_of_data(config),
        "seed": config.seed,
        "validation samples": config.num_validation_samples,
        **_supervision_facts(config),
    }
    return model


def _kind_of_data(config: TrainingConfig) -> str:
    """Say what the data are, without the name of a folder."""
    return f"{'folder of' if config.train_data_dir else 'embedded'} {data_format(config).replace('_', ' ')}"


def _supervised_as_before(model: CameoModel, config: TrainingConfig) -> CameoModel:
    """Let a resumed run supervise the matches that it did before, whatever the adapter says today."""
    name = str(config.resume_from_checkpoint)

    known = list_checkpoints(config.output_dir)
    is_there = any(path.name == name or name in ("latest", str(path)) for path in known)
    if not any(gathered(is_there)):
        return model  # the trainer says what is wrong
    saved = CameoConfig.load(agreed_checkpoint(config.output_dir, name))
    before = replace(model.cameo_config, layouts=saved.layouts)
    if (
        saved.layers != before.layers
        or resolve_layers(unwrap_peft(model.base_model), before) == model.supervised_layers
    ):
        return model
    torch.manual_seed(config.seed)
    options = {"implementation": config.alignment_implementation, "max_queries": config.max_queries}
    return attach(model.unwrap(), before, **options)


def _supervision_facts(config: TrainingConfig) -> dict[str, Any]:
    """What a model card has to state about a supervision other than CAMEO with matches from depth."""
    facts: dict[str, Any] = {}
    if config.supervision == "repa" and config.loss_weight:
        facts["supervision"] = f"REPA, weight {config.loss_weight}, features of {config.feature_model}"
    names = ("correspondence", "correspondence_control", "geometry_noise") if config.uses_matches else ()
    timing = ("weight_schedule", "alignment_until", "alignment_min_noise") if config.loss_weight else ()
    for name in (*names, *timing):
        if getattr(config, name) != getattr(TrainingConfig, name):
            facts[name.replace("_", " ")] = getattr(config, name)
    if config.uses_matches and config.correspondence == "matcher":
        facts["matcher"] = config.matcher
    if config.uses_features and not config.feature_pretrained:
        facts["feature weights"] = "random"
    return facts


def validation_callback(
    pipeline: MultiViewPipeline, dataset: MultiViewDataset, config: TrainingConfig
) -> Callable[[CameoModel, int], Mapping[str, Any]]:
    """Build the trainer's `on_validation`: it measures, and draws pictures into `output_dir/pictures/step-N`."""
    settings = ValidationSettings(num_samples=config.num_validation_samples, batch_size=config.train_batch_size)

    def on_validation(model: CameoModel, step: int) -> Mapping[str, Any]:
        metrics = validate(model, pipeline, dataset, settings)
        output = Path(config.output_dir)
        pictures = write_pictures(
            {f"step {step}": model}, pipeline, dataset, config, output / "pictures" / f"step-{step}"
        )
        return {**metrics, "pictures": [str(path.relative_to(output)) for path in pictures]}

    return on_validation


def run_name(config: TrainingConfig) -> str:
    """Name a run in tables and pictures by what supervises it.

    Example:
        >>> run_name(TrainingConfig()), run_name(TrainingConfig(supervision="repa"))
        ('with CAMEO', 'with REPA')
        >>> run_name(TrainingConfig(supervision="repa", loss_weight=0))
        'without CAMEO'
    """
    return f"with {config.supervision.upper()}" if config.loss_weight else "without CAMEO"


def planned_runs(config: TrainingConfig) -> dict[str, TrainingConfig]:
    """Return the settings of each run of a recipe, by name: one run, or two with `compare_without_cameo`.

    The run without CAMEO comes first and is written to `output_dir/without_cameo`. With `resume_from_checkpoint=latest`
    a run that has no checkpoint yet starts from its first step.

    Raises:
        DataError: if there is nothing to resume from, or an output folder holds checkpoints of an earlier comparison.
        ValueError: if a comparison is to resume from a single checkpoint.
    """
    if not config.compare_without_cameo:
        return {run_name(config): config}
    without_cameo = replace(config, loss_weight=0.0, compare_without_cameo=False)
    without_cameo.output_dir = str(Path(config.output_dir) / WITHOUT_CAMEO)
    planned = {run_name(run): run for run in (without_cameo, config)}
    if config.resume_from_checkpoint is None:
        if not config.overwrite_output_dir:
            for run in planned.values():  # before the first run starts, and not only when it has finished
                refuse_used_folder(run.output_dir)
        return planned
    if config.resume_from_checkpoint != "latest":
        raise ValueError("resume_from_checkpoint: with compare_without_cameo=true there are two runs; expected latest")
    if Launch.from_environment().num_processes > 1:
        make_accelerator(config)  # so that the machines can tell each other what they have
    has_checkpoint = {name: any(gathered(bool(list_checkpoints(run.output_dir)))) for name, run in planned.items()}
    if not any(has_checkpoint.values()):
        find_checkpoint(config.output_dir, "latest")  # raises
    return {
        name: run if has_checkpoint[name] else replace(run, resume_from_checkpoint=None)
        for name, run in planned.items()
    }


def base_name(config: TrainingConfig) -> str:
    """Name the weights that a run starts from, as `CameoConfig.base_model` keeps it."""
    return config.pretrained_model_name_or_path or f"preset:{config.preset or 'tiny'}"


def train_lora(
    config: TrainingConfig,
    training_set: MultiViewDataset,
    validation_set: MultiViewDataset,
    *,
    chosen: CameoConfig | None = None,
) -> LoraRun:
    """Train one LoRA from the base weights; `chosen`: see `wrap_denoiser`."""
    pipeline = load_pipeline(config)
    add_lora(pipeline.denoiser, config)
    to_run_device(pipeline, config)
    model = wrap_denoiser(pipeline, config, training_set, chosen=chosen)
    on_validation = validation_callback(pipeline, validation_set, config)
    trainer = Trainer(model, pipeline, training_set, config, on_validation=on_validation)
    return LoraRun(model, pipeline, trainer, trainer.train())
