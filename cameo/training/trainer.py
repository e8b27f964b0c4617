"""The training loop that all recipes share: it trains the pipeline of any backbone, with or without CAMEO."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from cameo.alarms import RunWatch
from cameo.attention.compiled.in_place import compile_in_place
from cameo.backbone import unwrap_peft
from cameo.data import MultiViewDataset
from cameo.inspection.at_start import warn_of_misfit
from cameo.model import CameoModel
from cameo.pipeline import LatentEncoder, MultiViewPipeline
from cameo.processes.accelerator import log_pictures, make_accelerator, numbers_in, start_trackers
from cameo.processes.peers import watched_by_others
from cameo.processes.stopping import StopSignal
from cameo.scenes.views import MultiViewSample
from cameo.training.checkpoints.folder import how_to_go_on, prune_checkpoints, refuse_used_folder
from cameo.training.checkpoints.machines import RECORDS, remove_checkpoints
from cameo.training.checkpoints.training_state import Checkpoints
from cameo.training.data import StepSampler, noisy_inputs, training_batches, with_latents, with_matches
from cameo.training.output_folder import hold_folder
from cameo.training.records import Records, TrainingResult
from cameo.training.settings import TrainingConfig, continued_settings, save_config
from cameo.training.supervision import MicroStep, Supervision, figure
from cameo.training.trained_weights import load_trained

__all__ = ["HALF", "Trainer"]

CONFIG_FILE = "config.yaml"
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Trainer:
    """Train the parameters of a `CameoModel` that require a gradient.

    Args:
        model: wraps `pipeline.denoiser`, with LoRA or fully trainable.
        pipeline: turns batches into the denoiser's inputs and target.
        dataset: training set without an end, a pure function of seed and index.
        config: all settings; written to `output_dir/config.yaml`.
        on_validation: called with (model, step) on the main process before the first step, every
            `validation_steps` and at the end, with the EMA weights where they are used. What it returns is kept in
            `output_dir/validations.jsonl`, and its numbers are logged.

    Resuming is exact: samples, timesteps and noise are functions of seed and step, and the rest of the state is in
    the checkpoint. A checkpoint is written every `checkpointing_steps`, at the end, and on SIGTERM or SIGINT.
    """

    def __init__(
        self,
        model: CameoModel,
        pipeline: MultiViewPipeline,
        dataset: MultiViewDataset,
        config: TrainingConfig,
        *,
        on_validation: Callable[[CameoModel, int], Mapping[str, Any]] | None = None,
    ) -> None:
        self.config, self.pipeline, self.dataset, self.model = config, pipeline, dataset, model
        self.on_validation = on_validation
        self.output_dir = Path(config.output_dir)
        self.metrics, self.validations = (Records(self.output_dir / name) for name in RECORDS)
        self.step = 0
        self.accelerator = make_accelerator(config)
        set_seed(config.seed, device_specific=True)
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        if hasattr(pipeline, "to"):  # its VAE is not part of the model
            pipeline.to(self.device)
        if isinstance(pipeline, LatentEncoder):
            pipeline.encoder_precision = HALF.get(config.mixed_precision)
        self.supervision = Supervision(model, pipeline, dataset, config, self.device)
        self.watch = RunWatch(model.supervised_layers, config)
        self.trained = [parameter for parameter in self.supervision.module.parameters() if parameter.requires_grad]
        if not self.trained:
            raise ValueError("model: no parameter requires a gradient; add LoRA or call requires_grad_(True) first")
        for parameter in self.trained:  # mixed precision keeps trained parameters in float32
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(
            self.trained,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True if self.device.type == "cuda" else None,
        )
        self.scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        compile_in_place(model.base_model, unwrap_peft(model.base_model), config.torch_compile)
        self.prepared, self.optimizer = self.accelerator.prepare(self.supervision.module, optimizer)
        self.ema: EMAModel | None = None
        if config.use_ema:
            self.ema = EMAModel(self.trained, decay=config.ema_decay, use_ema_warmup=True, foreach=True)
        self.checkpoints = Checkpoints(
            self.output_dir,
            self.accelerator,
            {
                "optimizer": self.optimizer,
                "scheduler": self.scheduler,
                "scaler": self.accelerator.scaler,
                "average": self.ema,
            },
            save_weights=self._save_weights,
            load_weights=self._load_weights,
        )

    @property
    def device(self) -> torch.device:
        """Where the model trains."""
        return self.accelerator.device

    def train(self) -> TrainingResult:
        """Run to `max_train_steps`, or to a SIGTERM or SIGINT, and return the loss history.

        Raises:
            DataError: if told to resume and there is nothing to resume from, the output folder holds the
                checkpoints of an earlier run or another process is writing there, or the folder of precomputed
                matches is not one of this run.
            ValueError: if told to resume with other settings than the run had.
            FloatingPointError: if a loss or a gradient is not finite; nothing is saved from that step on.
        """
        go_on = partial(how_to_go_on, self.output_dir)
        with watched_by_others(self.config.process_timeout, go_on), hold_folder(self.output_dir):
            return self._train()

    def _train(self) -> TrainingResult:
        accelerator, start = self.accelerator, time.monotonic()
        matched = with_matches(self.dataset, self.model, self.config, num_processes=accelerator.num_processes)
        samples = with_latents(matched, self.dataset, self.pipeline, self.config, accelerator)
        self._start()
        try:
            stopped_by = self._run(samples)
            if stopped_by is None:
                if self.ema is not None:
                    self.ema.copy_to(self.trained)
                self._validate(use_ema=False)
        finally:
            for tracker in self.accelerator.trackers:  # end_training() would also end the process group of a next run
                tracker.finish()
        validations = self.validations.read() if accelerator.is_main_process else []
        alarms = self.watch.alarms()
        for alarm in alarms:
            accelerator.print(f"\n{alarm.paragraph(f'config={self.output_dir / CONFIG_FILE}')}")
        seconds = time.monotonic() - start
        return TrainingResult(self.step, self.metrics.path, validations, stopped_by, alarms, seconds)

    def _start(self) -> None:
        config, accelerator = self.config, self.accelerator
        if config.resume_from_checkpoint:
            folder, self.step = self.checkpoints.resume(
                config.resume_from_checkpoint, self._fixed_settings(), config.max_train_steps
            )
            if self.ema is not None:
                self.ema.to(self.device)
            accelerator.print(f"resumed from {folder} at step {self.step}")
        elif config.overwrite_output_dir:
            remove_checkpoints(self.output_dir)
        else:
            refuse_used_folder(self.output_dir)
        count = sum(parameter.numel() for parameter in self.trained)
        processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
        accelerator.print(f"training {count:,} parameters on {processes} ({self.device.type})")
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            prune_checkpoints(self.output_dir, None)
            save_config(config, self.output_dir / CONFIG_FILE)
            # A data set of somebody else may have no source.
            if (source := getattr(self.dataset, "source", None)) is not None:
                self.watch.data_is_wrong = warn_of_misfit(source)
            self.metrics.keep_until(self.step, every_step=True)
            self.validations.keep_until(self.step)
            self.watch.see(self.metrics.read())
        start_trackers(accelerator, config)

    def _run(self, dataset: Dataset[MultiViewSample]) -> str | None:
        """Train to the end, or until a signal, whose name is returned."""
        config, accelerator = self.config, self.accelerator
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
            desc=config.supervision.upper() if config.loss_weight else "without CAMEO",
            disable=not accelerator.is_main_process,
        )
        self.prepared.train()
        with StopSignal() as stop, training_batches(dataset, sampler, config, self.device) as batches, bar:
            if self.step % config.validation_steps == 0 and self.step < config.max_train_steps:
                self._validate()
            while self.step < config.max_train_steps:
                entry, stopping = self._train_step(batches, stop)
                bar.update()
                bar.set_postfix(self._shown(entry), refresh=False)
                last = self.step == config.max_train_steps
                if self.step % config.validation_steps == 0 and not (last or stopping):
                    self._validate()  # before the checkpoint, which would otherwise be resumed without this entry
                if self.step % config.checkpointing_steps == 0 or last or stopping:
                    self.save_checkpoint()
                if stopping and not last:
                    return stop.received or "a signal to another process"
        return None

    def _train_step(self, batches: Iterator[tuple[int, Any]], stop: StopSignal) -> tuple[dict[str, Any], bool]:
        """Take one optimizer step; returns its entry of the records, and whether a process was told to stop."""
        sums, samples = self._accumulate_gradients(batches)
        norm = self.accelerator.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        entry, num_wanted, norm_sum, stopping = self._exchange(sums, norm, stop)
        self._check_finite(entry, norm_sum, samples)
        self.supervision.watch.see(num_wanted, entry["supervised"], warn=self.accelerator.is_main_process)
        self.watch.see([entry])
        if words := self.watch.words():
            entry["alarm"] = words
        self._update_weights()
        self._record(entry)
        return entry, stopping

    def _accumulate_gradients(self, batches: Iterator[tuple[int, Any]]) -> tuple[Tensor, list[str]]:
        """Run the forward and backward passes of a step.

        Returns:
            The sums of the denoising losses, the alignment losses, the numbers of matches and `Supervision.figures`;
            the keys of the samples.
        """
        accumulate = self.config.gradient_accumulation_steps
        micro_steps = [self._prepare(batch, number) for number, batch in islice(batches, accumulate)]
        totals = self._match_totals(micro_steps)
        sums = torch.zeros(6, device=self.device)
        for part, micro_step in enumerate(micro_steps, start=1):
            with nullcontext() if part == accumulate else self.accelerator.no_sync(self.prepared):
                loss, denoising, alignment = self._losses(micro_step, totals)
                self.accelerator.backward(loss / accumulate)
            figures = [denoising.detach(), alignment.detach(), self.supervision.num_supervised, *micro_step.figures]
            sums += torch.stack([figure(one, self.device) for one in figures])
        return sums, [key for micro_step in micro_steps for key in micro_step.samples]

    def _prepare(self, batch: dict[str, Any], number: int) -> MicroStep:
        """Add the noise of a micro batch, and find its matches."""
        process = self.accelerator.process_index
        inputs = noisy_inputs(self.pipeline, batch, self.config, number, process)
        targets = self.supervision.targets(batch, inputs, number, process)
        return MicroStep(number, batch["key"], inputs, targets, self.supervision.figures())

    def _match_totals(self, micro_steps: Sequence[MicroStep]) -> Tensor | None:
        """Return what each alignment loss divides by, so that their mean is that over all matches of the whole batch.

        None where the batch is not cut into parts, of several processes or one after the other.
        """
        parts = len(micro_steps) * self.accelerator.num_processes
        if parts == 1 or not self.supervision.divides_by_matches:
            return None
        totals = torch.stack([self.supervision.totals(micro_step.targets) for micro_step in micro_steps]).sum(dim=0)
        return self.accelerator.reduce(totals, "sum") / parts

    def _losses(self, micro_step: MicroStep, totals: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the training loss of a micro batch, its denoising part and its alignment part."""
        inputs, targets = micro_step.inputs, micro_step.targets
        self.supervision.begin(micro_step.number, self.accelerator.process_index)
        if targets and totals is not None:
            targets = {**targets, "match_totals": totals}
        output = self.prepared(*inputs.args, **targets, **inputs.kwargs)
        denoising = self.pipeline.denoising_loss(output, inputs).mean()
        alignment = self.supervision.module.alignment_loss if targets else self.supervision.no_loss(denoising)
        loss_weight = self.supervision.weight(micro_step.number)
        return denoising + loss_weight * alignment, denoising, alignment

    def _exchange(self, sums: Tensor, norm: Tensor, stop: StopSignal) -> tuple[dict[str, Any], float, float, bool]:
        """Let all processes agree on the figures of a step and on stopping, in the one exchange of the step.

        Returns:
            The entry of the records, the number of samples that were to be supervised, the sum of the processes'
            gradient norms, and whether a process was told to stop.
        """
        stopping = figure(stop.received is not None, self.device)
        figures = torch.stack([*sums, stopping, norm.float()])
        totals = self.accelerator.reduce(figures, "sum").tolist()
        denoising, alignment, supervised, num_wanted, chance, matchable, stopping_sum, norm_sum = totals
        count = self.config.gradient_accumulation_steps * self.accelerator.num_processes
        entry = {
            "step": self.step + 1,
            "loss": denoising / count,
            "alignment_loss": alignment / count,
            "supervised": supervised,
            "learning_rate": float(self.scheduler.get_last_lr()[0]),
        }
        if self.config.uses_matches:
            entry |= {"alignment_chance": chance / count, "matchable": matchable}
        return entry, num_wanted, norm_sum, stopping_sum > 0

    def _shown(self, entry: Mapping[str, Any]) -> dict[str, str]:
        """Return what the progress bar shows of a step."""
        shown = {"loss": f"{entry['loss']:.4f}", "align": f"{entry['alignment_loss']:.3f}"}
        if self.config.loss_weight:
            name = "matches" if self.config.uses_matches else "tokens"
            shown[name] = f"{entry['supervised']:.0f}"
        return shown | ({"alarm": entry["alarm"]} if "alarm" in entry else {})

    def _update_weights(self) -> None:
        """Apply the accumulated gradient to the weights, the learning rate schedule and the averaged weights."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.accelerator.optimizer_step_was_skipped:  # fp16 skips the steps whose gradient overflows
            return
        self.scheduler.step()
        if self.ema is not None:
            self.ema.step(self.trained)

    def _record(self, entry: Mapping[str, Any]) -> None:
        """Write the figures of a step to the tracker and to `metrics.jsonl`."""
        numbers = {name: value for name, value in entry.items() if name not in ("step", "alarm")}
        self.accelerator.log(numbers, step=self.step)
        if self.accelerator.is_main_process:
            self.metrics.append(entry)

    def _check_finite(self, entry: Mapping[str, Any], norm: float, samples: list[str]) -> None:
        values = {"denoising": entry["loss"], "alignment": entry["alignment_loss"], "norm of the gradient": norm}
        if self.accelerator.scaler is not None:  # with fp16 a gradient may overflow, and the step is skipped
            del values["norm of the gradient"]
        if not all(map(math.isfinite, values.values())):
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            raise FloatingPointError(
                f"step {entry['step']}: the loss or its gradient is not finite ({shown}) on samples {samples}; nothing "
                "is saved from this step on. Likely causes: a learning rate that is too high, damaged samples, or fp16 "
                "overflow (try mixed_precision=bf16)"
            )

    def _validate(self, use_ema: bool = True) -> None:
        accelerator = self.accelerator
        if self.on_validation is not None and accelerator.is_main_process and not self._is_validated():
            averaged = self.ema if use_ema else None
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):  # a validation must not change the dropout of later steps
                if averaged is not None:
                    averaged.store(self.trained)
                    averaged.copy_to(self.trained)
                try:
                    metrics = self.on_validation(self.model, self.step)
                finally:
                    if averaged is not None:
                        averaged.restore(self.trained)
            self.prepared.train()
            self.validations.append({"step": self.step, **metrics})
            accelerator.log({f"validation/{name}": value for name, value in numbers_in(metrics)}, step=self.step)
            log_pictures(accelerator, [self.output_dir / path for path in metrics.get("pictures", [])], step=self.step)
        accelerator.wait_for_everyone()

    def _is_validated(self) -> bool:
        return any(entry["step"] == self.step for entry in self.validations.read())

    def save_checkpoint(self) -> Path:
        """Write `checkpoint-N` whole or not at all, then remove checkpoints beyond `checkpoints_total_limit`."""
        if self.accelerator.is_main_process:
            self.metrics.flush()
            self.validations.flush()
        return self.checkpoints.save(self.step, self._fixed_settings(), self.config.checkpoints_total_limit)

    def _fixed_settings(self) -> dict[str, Any]:
        return continued_settings(self.config) | {"processes": self.accelerator.num_processes}

    def _save_weights(self, folder: Path) -> None:
        self.model.save_pretrained(folder, include_head=True)
        self.supervision.save(folder)

    def _load_weights(self, folder: Path) -> None:
        load_trained(self.model, folder)
        self.supervision.load(folder)
