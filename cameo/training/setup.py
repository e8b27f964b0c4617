"""The steps that the recipes have in common: load the pipeline, add LoRA, wrap, validate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cameo
from cameo.backbone import core_module, get_backbone
from cameo.data import MultiViewDataset, collate
from cameo.evaluation.pictures import attention_figure, comparison_figure, save_figure
from cameo.evaluation.validation import ValidationSettings, validate
from cameo.pipeline import MultiViewPipeline
from cameo.training.config import TrainingConfig
from cameo.training.trainer import Trainer, TrainingResult
from cameo.wrap import CameoModel

__all__ = [
    "LoraRun",
    "add_lora",
    "load_pipeline",
    "metrics_table",
    "train_lora",
    "validation_callback",
    "wrap_denoiser",
    "write_pictures",
]


@dataclass
class LoraRun:
    """A finished or interrupted LoRA training: the trained model, its pipeline, validations, and the trainer."""

    model: CameoModel
    pipeline: MultiViewPipeline
    validations: list[dict[str, Any]]
    trainer: Trainer
    result: TrainingResult


def load_pipeline(config: TrainingConfig) -> MultiViewPipeline:
    """Load the weights to start from, or build a preset with weights drawn from `seed`."""
    adapter = get_backbone(config.backbone)
    if config.pretrained_model_name_or_path:
        pipeline = adapter.load(config.pretrained_model_name_or_path, revision=config.revision, **config.preset_options)
    else:
        torch.manual_seed(config.seed)
        pipeline = adapter.build(config.preset or "tiny", **config.preset_options)
    if config.gradient_checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        pipeline.enable_xformers_memory_efficient_attention()
    return pipeline


def add_lora(denoiser: nn.Module, config: TrainingConfig) -> None:
    """Freeze the denoiser and put LoRA on its attention projections, in place.

    With fp16 or bf16 the frozen weights are kept in that precision; LoRA stays in float32.
    """
    from peft import LoraConfig, inject_adapter_in_model

    precision = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(config.mixed_precision)
    denoiser.requires_grad_(False)
    if precision is not None:
        denoiser.to(precision)
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


def wrap_denoiser(pipeline: MultiViewPipeline, config: TrainingConfig) -> CameoModel:
    """Wrap the pipeline's denoiser with the run's CAMEO settings and note where its base weights came from."""
    torch.manual_seed(config.seed)
    model = cameo.wrap(
        pipeline.denoiser,
        backbone=config.backbone,
        layer=config.layer,
        head=config.head,
        weight=config.weight,
        normalise=config.normalise,
        reduction=config.reduction,
        num_reference_views=config.num_reference_views,
    )
    model.cameo_config.base_model = config.pretrained_model_name_or_path or f"preset:{config.preset or 'tiny'}"
    model.cameo_config.base_revision = config.revision
    model.cameo_config.training = {
        "steps": config.max_train_steps,
        "batch size": config.train_batch_size * config.gradient_accumulation_steps,
        "views": config.num_views,
        "resolution": config.resolution,
        "learning rate": config.learning_rate,
        "data": Path(config.train_data_dir).name if config.train_data_dir else "embedded scenes",
        "seed": config.seed,
    }
    return model


def validation_callback(
    pipeline: MultiViewPipeline, dataset: MultiViewDataset, config: TrainingConfig, results: list[dict[str, Any]]
) -> Callable[[CameoModel, int], Mapping[str, float]]:
    """Build the trainer's `on_validation`: measures, keeps the result in `results`, returns the scalars to log."""

    def on_validation(model: CameoModel, step: int) -> Mapping[str, float]:
        settings = ValidationSettings(num_samples=config.num_validation_samples, batch_size=config.train_batch_size)
        metrics = validate(model, pipeline, dataset, settings)
        results.append({"step": step, **metrics})
        scalars = {name: metrics[name] for name in ("loss", "psnr_covisible", "psnr_all")}
        return scalars | {f"precision_{name}": value for name, value in metrics["precision"].items()}

    return on_validation


@torch.no_grad()
def write_pictures(
    models: Mapping[str, CameoModel],
    pipeline: MultiViewPipeline,
    dataset: MultiViewDataset,
    config: TrainingConfig,
    folder: str | Path,
) -> list[Path]:
    """Draw predictions at pure noise and attention maps of one or several models; returns the files.

    The models take turns in the pipeline: each picture uses the same samples and the same noise.
    """
    batch = collate([dataset[index] for index in range(config.num_validation_images)])
    device = next(next(iter(models.values())).parameters()).device
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    last = pipeline.num_train_timesteps - 1
    options = {"generator": torch.Generator().manual_seed(config.data_seed)}
    inputs = pipeline.training_inputs(batch, timesteps=torch.full((len(batch["images"]),), last), **options)
    predictions = {}
    kept = pipeline.denoiser
    for name, model in models.items():
        was_training = model.training
        model.eval()
        pipeline.denoiser = core_module(model.base_model)
        sampled = pipeline.sample(
            batch,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=torch.Generator().manual_seed(config.data_seed),
        )
        references = batch["images"][:, : config.num_reference_views]
        predictions[name] = torch.cat([references.to(sampled), sampled], dim=1)
        model.train(was_training)
    pipeline.denoiser = kept
    folder = Path(folder)
    written = [save_figure(comparison_figure(batch, predictions, samples=len(batch["images"])), folder / "views.png")]
    written.append(save_figure(attention_figure(models, pipeline, batch, inputs), folder / "attention.png"))
    return written


def train_lora(config: TrainingConfig, train: MultiViewDataset, held_out: MultiViewDataset) -> LoraRun:
    """Train one LoRA from the base weights; `validations` starts with the one before the first step."""
    pipeline = load_pipeline(config)
    add_lora(pipeline.denoiser, config)
    model = wrap_denoiser(pipeline, config)
    validations: list[dict[str, Any]] = []
    on_validation = validation_callback(pipeline, held_out, config, validations)
    trainer = Trainer(model, pipeline, train, config, on_validation=on_validation)
    if trainer.accelerator.is_main_process:
        on_validation(model, 0)
    return LoraRun(model, pipeline, validations, trainer, trainer.train())


def metrics_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Format validation results side by side as a Markdown table; the better value of the last two is not judged."""
    rows = [
        ("denoising loss, fixed noise", lambda m: f"{m['loss']:.4f}"),
        ("PSNR of predicted clean image at high noise, pixels the reference sees (dB)", lambda m: f"{m['psnr_covisible']:.2f}"),
        ("the same, all target pixels (dB)", lambda m: f"{m['psnr_all']:.2f}"),
        ("attention precision, mean of heads, exact token", lambda m: f"{m['precision']['mean@0']:.1%}"),
        ("attention precision, mean of heads, within 1 token", lambda m: f"{m['precision']['mean@1']:.1%}"),
        ("attention precision, best head, within 1 token", lambda m: f"{m['precision']['best_head@1']:.1%}"),
        ("attention precision, through the alignment head, within 1 token", lambda m: f"{m['precision']['through_head@1']:.1%}"),
    ]
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {title} | " + " | ".join(show(metrics) for metrics in columns.values()) + " |" for title, show in rows]
    return "\n".join(lines)
