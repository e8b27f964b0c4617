"""The training loop that all recipes share: accelerate around any backbone's pipeline, with or without CAMEO."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm.auto import tqdm

from cameo.config import write_atomically
from cameo.data import MultiViewDataset
from cameo.errors import DataError
from cameo.pipeline import MultiViewPipeline
from cameo.training import checkpoint
from cameo.training.config import TrainingConfig, save_config
from cameo.training.correspondences import match_batch
from cameo.training.data import StepSampler, training_loader
from cameo.training.stopping import StopSignal
from cameo.wrap import CameoModel

__all__ = ["Trainer", "TrainingResult", "noisy_inputs", "read_metrics"]

logger = logging.getLogger(__name__)
METRICS_NAME = "metrics.jsonl"
EMA_NAME = "ema.safetensors"
# Settings that fix the data order; a resumed run with others would not continue the same run.
ORDER = ("seed", "train_batch_size", "gradient_accumulation_steps", "num_views", "num_reference_views", "resolution")


@dataclass
class TrainingResult:
    """What a run leaves behind.

    Attributes:
        step: optimizer steps done.
        metrics: path of `metrics.jsonl`: per step `step, loss, alignment_loss, supervised, learning_rate`.
        stopped_by: name of the signal that ended the run early, or None.
    """

    step: int
    metrics: Path
    stopped_by: str | None = None

    def history(self) -> list[dict[str, float]]:
        """Read the entries of all steps."""
        return read_metrics(self.metrics)


class Trainer:
    """Train the parameters of a `CameoModel` that require a gradient.

    Args:
        model: wraps `pipeline.denoiser`, with LoRA or fully trainable.
        pipeline: turns batches into the denoiser's inputs and target.
        dataset: endless training set, a pure function of seed and index.
        config: all settings; written to `output_dir/config.yaml`.
        on_validation: called with (model, step) every `validation_steps` and at the end on the main process, with
            the EMA weights where they are used; returns scalars to log.

    Resuming is exact: samples, time steps and noise are functions of seed and step, and the rest of the state is in
    the checkpoint.
    """

    def __init__(
        self,
        model: CameoModel,
        pipeline: MultiViewPipeline,
        dataset: MultiViewDataset,
        config: TrainingConfig,
        *,
        on_validation: Callable[[CameoModel, int], Mapping[str, float]] | None = None,
    ) -> None:
        self.config, self.pipeline, self.dataset = config, pipeline, dataset
        self.on_validation = on_validation
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=config.report_to if config.report_to != "none" else None,
            project_config=ProjectConfiguration(
                project_dir=str(self.output_dir), logging_dir=str(self.output_dir / config.logging_dir)
            ),
        )
        set_seed(config.seed, device_specific=True)
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        self.model = model
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if config.weight == 0:  # the heads get a gradient from the alignment loss alone
            model.alignment_heads.requires_grad_(False)
            trainable = [parameter for parameter in trainable if parameter.requires_grad]
        if not trainable:
            raise ValueError("model: no parameter requires a gradient; add LoRA or call requires_grad_(True) first")
        for parameter in trainable:  # mixed precision keeps what is trained in float32
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(
            trainable,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        self.scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.prepared, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.accelerator.register_for_checkpointing(self.scheduler)
        self.accelerator.register_save_state_pre_hook(self._save_weights)
        self.accelerator.register_load_state_pre_hook(self._load_weights)
        self.ema = ModelEmaV3(model.base_model, decay=config.ema_decay, use_warmup=True) if config.use_ema else None
        self.step = 0

    @property
    def device(self) -> torch.device:
        """Where the model trains."""
        return self.accelerator.device

    def train(self) -> TrainingResult:
        """Run to `max_train_steps`, or to a SIGTERM or SIGINT, and return the loss history.

        Raises:
            DataError: if told to resume and there is nothing to resume from, or the output folder holds the
                checkpoints of an earlier run.
            FloatingPointError: if the loss is not finite; nothing is saved after that step.
        """
        config, accelerator = self.config, self.accelerator
        self._start()
        accumulate = config.gradient_accumulation_steps
        sampler = StepSampler(
            start=self.step * accumulate,
            stop=config.max_train_steps * accumulate,
            batch_size=config.train_batch_size,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        bar = tqdm(
            total=config.max_train_steps,
            initial=self.step,
            unit="it",
            desc="CAMEO" if config.weight else "without CAMEO",
            disable=not accelerator.is_main_process,
        )
        sums: dict[str, float] = {}
        self.prepared.train()
        with StopSignal() as stop, bar:
            for micro_step, batch in zip(sampler.steps, training_loader(self.dataset, sampler, config), strict=True):
                with accelerator.accumulate(self.prepared):
                    scalars = self._micro_step(batch, micro_step)
                for name, value in scalars.items():
                    sums[name] = sums.get(name, 0.0) + value / accumulate
                if not accelerator.sync_gradients:
                    continue
                self._finish_step(sums)
                bar.update()
                bar.set_postfix(loss=f"{sums['loss']:.4f}", align=f"{sums['alignment_loss']:.3f}", refresh=False)
                sums = {}
                stopped = self._agree(stop.received is not None)
                if stopped or self.step % config.checkpointing_steps == 0:
                    self.save_checkpoint()
                if stopped:
                    break
                if self.step % config.validation_steps == 0 and self.step < config.max_train_steps:
                    self._validate()
        stopped_by = (stop.received or "a signal to another process") if stopped else None
        if stopped_by is None:
            if self.ema is not None:
                self.model.base_model.load_state_dict(self.ema.module.state_dict())
            self._validate(use_ema=False)
        accelerator.end_training()
        return TrainingResult(self.step, self.output_dir / METRICS_NAME, stopped_by)

    def _start(self) -> None:
        config, accelerator = self.config, self.accelerator
        if config.resume_from_checkpoint:
            folder = checkpoint.find_checkpoint(self.output_dir, config.resume_from_checkpoint)
            self._resume(folder)
        elif checkpoint.list_checkpoints(self.output_dir):
            raise DataError(
                f"output_dir={self.output_dir} holds checkpoints of an earlier run. Continue it with "
                "resume_from_checkpoint=latest, or choose another output_dir"
            )
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.prune_checkpoints(self.output_dir, None)
            save_config(config, self.output_dir / "config.yaml")
            kept = [entry for entry in read_metrics(self.output_dir / METRICS_NAME) if entry["step"] <= self.step]
            lines = "".join(json.dumps(entry) + "\n" for entry in kept)  # cut back to where this run continues
            write_atomically(self.output_dir / METRICS_NAME, lines)
        if accelerator.log_with:
            flat = {k: v for k, v in vars(config).items() if isinstance(v, int | float | str) and k != "hub_token"}
            accelerator.init_trackers(config.tracker_project_name, config=flat)

    def _micro_step(self, batch: dict[str, Any], micro_step: int) -> dict[str, float]:
        config, accelerator = self.config, self.accelerator
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        match = None
        if config.weight:
            size = self.model.token_grid(*batch["images"].shape[-2:])
            match = match_batch(batch, size, kind=config.correspondence, cycle_threshold=config.cycle_threshold)
        inputs = noisy_inputs(self.pipeline, batch, config, micro_step, accelerator.process_index)
        output = self.prepared(*inputs.args, correspondence=match, **inputs.kwargs)
        loss = denoising = self.pipeline.denoising_loss(output, inputs).mean()
        alignment = torch.zeros((), device=self.device)
        if match is not None:
            alignment = self.model.alignment_loss
            loss = denoising + config.weight * alignment
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"step {self.step + 1}: the loss is not finite (denoising {float(denoising)}, alignment "
                f"{float(alignment)}) on samples {batch['key']}. Likely causes: a learning rate that is too high, or "
                "fp16 overflow (try mixed_precision=bf16)"
            )
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            trained = [parameter for parameter in self.prepared.parameters() if parameter.requires_grad]
            accelerator.clip_grad_norm_(trained, config.max_grad_norm)
        self.optimizer.step()
        if accelerator.sync_gradients:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        mean = accelerator.reduce(torch.stack([denoising.detach(), alignment.detach()]), reduction="mean")
        return {
            "loss": float(mean[0]),
            "alignment_loss": float(mean[1]),
            "supervised": float(self.model.num_supervised),
        }

    def _finish_step(self, sums: dict[str, float]) -> None:
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model.base_model, step=self.step)
        entry = {"step": self.step, **sums, "learning_rate": float(self.scheduler.get_last_lr()[0])}
        self.accelerator.log({name: value for name, value in entry.items() if name != "step"}, step=self.step)
        if self.accelerator.is_main_process:
            with (self.output_dir / METRICS_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _agree(self, stop: bool) -> bool:
        """Whether any process was told to stop; all of them must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        return bool(self.accelerator.reduce(torch.tensor([float(stop)], device=self.device))[0])

    def _validate(self, use_ema: bool = True) -> None:
        if self.on_validation is not None and self.accelerator.is_main_process:
            base = self.model.base_model
            kept = None
            if use_ema and self.ema is not None:
                kept = {name: value.clone() for name, value in base.state_dict().items()}
                base.load_state_dict(self.ema.module.state_dict())
            random_state = torch.get_rng_state()
            scalars = self.on_validation(self.model, self.step)
            torch.set_rng_state(random_state)
            if kept is not None:
                base.load_state_dict(kept)
            self.accelerator.log({f"validation/{name}": value for name, value in scalars.items()}, step=self.step)
            self.prepared.train()
        self.accelerator.wait_for_everyone()

    def save_checkpoint(self) -> Path:
        """Write `checkpoint-N` whole or not at all, then remove what is beyond `checkpoints_total_limit`."""
        staged = self.output_dir / f".checkpoint-{self.step}.partial"
        if self.accelerator.is_main_process:
            staged = checkpoint.staging_folder(self.output_dir, self.step)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(staged))
        self.accelerator.wait_for_everyone()
        final = self.output_dir / f"checkpoint-{self.step}"
        if self.accelerator.is_main_process:
            final = checkpoint.publish_checkpoint(staged, self.step, {"order": self._order()})
            checkpoint.prune_checkpoints(self.output_dir, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        return final

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        changed = {k: (v, self._order()[k]) for k, v in state["order"].items() if v != self._order()[k]}
        if changed:
            shown = ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in changed.items())
            raise ValueError(
                f"{folder}: the run cannot continue with other settings ({shown}). Restore them, or start a new run"
            )
        self.accelerator.load_state(str(folder))
        self.step = int(state["step"])
        logger.info("resumed from %s at step %d", folder, self.step)

    def _order(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in ORDER} | {"processes": self.accelerator.num_processes}

    def _save_weights(self, models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        weights.clear()  # accelerate would write the frozen base too
        if self.accelerator.is_main_process:
            self.model.save_pretrained(folder, include_head=True)
            if self.ema is not None:
                weights_of_ema = {name: value.contiguous() for name, value in self.ema.module.state_dict().items()}
                save_file(weights_of_ema, str(Path(folder) / EMA_NAME))

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        models.clear()
        checkpoint.load_trained(self.model, folder)
        if self.ema is not None:
            self.ema.module.load_state_dict(load_file(str(Path(folder) / EMA_NAME)))


def noisy_inputs(
    pipeline: MultiViewPipeline, batch: Mapping[str, Any], config: TrainingConfig, micro_step: int, process: int = 0
) -> Any:
    """Noise a batch with time steps and noise that are functions of seed, step and process alone."""
    state = np.random.SeedSequence((config.seed, micro_step, process)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]) >> 1)
    samples = batch["images"].shape[0]
    uniform = torch.rand(samples, generator=generator)
    level = uniform if config.timestep_sampling == "uniform" else 1 - uniform.square()
    timesteps = (level * pipeline.num_train_timesteps).long().clamp(max=pipeline.num_train_timesteps - 1)
    return pipeline.training_inputs(
        batch, generator=generator, timesteps=timesteps, condition_dropout=config.condition_dropout
    )


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read `metrics.jsonl`; a last line that a killed process left unfinished is skipped."""
    if not Path(path).is_file():
        return []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]
