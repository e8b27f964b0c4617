"""One training step on tensors without contents: its memory, its FLOPs and what they consist of."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from accelerate.utils.operations import convert_to_fp32
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from cameo.estimate.building import OutlinedRun, batch_bytes, example_batch, example_matches, reads_images
from cameo.estimate.fakes import Fakes, GpuAutocast, encoders_of
from cameo.estimate.tracking import INSIDE, Tracker
from cameo.estimate.workspace import alignment_flops, alignment_workspace
from cameo.pipeline import TrainingInputs
from cameo.training.settings import TrainingConfig

__all__ = ["HELD", "KINDS", "StepEstimate", "estimate_step"]

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
MOST_DRAWS = 64  # until the views of a batch attend to each other, where some batches are of single images
WEIGHTS, TRAINED, ENCODERS = "frozen weights", "trained weights", "encoders"
OPTIMIZER, AVERAGED, BATCH = "optimizer state", "averaged weights", "batch"
GRADIENTS, INPUTS, ACTIVATIONS = "gradients", "inputs of the denoiser", "activations"
# What is held between two steps, and what comes and goes in each.
HELD = (WEIGHTS, TRAINED, ENCODERS, OPTIMIZER, AVERAGED, BATCH)
KINDS = (*HELD, GRADIENTS, INPUTS, ACTIVATIONS, INSIDE)


@dataclass(frozen=True)
class StepEstimate:
    """What a training step takes, in bytes and in floating-point operations.

    Attributes:
        parameters: number of parameters by part: denoiser, alignment heads, and each encoder.
        num_trained: number of parameters that are trained.
        held: bytes between two steps, by kind.
        peaks: largest number of bytes held at a time, by phase of the step.
        at_peak: bytes by kind at the largest of all times.
        kept: bytes of activations that the forward pass keeps for the backward pass.
        flops: floating-point operations of an optimizer step, by phase.
        seconds: that the estimate took.
    """

    parameters: Mapping[str, int]
    num_trained: int
    held: Mapping[str, int]
    peaks: Mapping[str, int]
    at_peak: Mapping[str, int]
    kept: int
    flops: Mapping[str, int]
    seconds: float

    @property
    def peak(self) -> int:
        """Largest number of bytes that are held at a time."""
        return max(self.peaks.values())

    @property
    def beyond_held(self) -> int:
        """What the peak adds to what is held between two steps, in bytes."""
        return self.peak - sum(self.held.values())

    @property
    def total_flops(self) -> int:
        """Floating-point operations of an optimizer step."""
        return sum(self.flops.values())


def estimate_step(
    config: TrainingConfig, outline: Callable[[TrainingConfig], OutlinedRun], device: str
) -> StepEstimate:
    """Compute what a step of a training takes, without its weights and without its data.

    Example:
        >>> from cameo.training.runs import outlined_run
        >>> config = TrainingConfig(preset="tiny", num_views=2, resolution=32, train_batch_size=1)
        >>> step = estimate_step(config, lambda config: outlined_run(config, full=True), "cpu")
        >>> step.num_trained == sum(step.parameters.values())
        True

    The model runs a forward and a backward pass, clipping, AdamW and the averaging on tensors that have shapes and no
    contents. The peak is that of any step but the first. Not in it: what a library allocates inside an operator, and on
    a GPU its context, the workspaces of cuDNN, and what the allocator keeps in pieces.

    Args:
        config: settings of the run.
        outline: builds the run without its weights, as `cameo.training.runs.outlined_run` does.
        device: "cpu", or "cuda" for a GPU, which need not be there.

    Raises:
        DataError, ValueError: those of `outline`; for settings that do not fit the backbone, as in a training.
    """
    start = time.monotonic()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # which the training itself will give
        run = outline(config)
        step = _Step(config, run, on_gpu=device == "cuda")
        parameters = {
            "denoiser": _count(run.model.base_model),
            "alignment heads": _count(run.model.alignment_heads),
            **{name: _count(module) for name, module in step.encoders.items()},
        }
        num_trained = sum(parameter.numel() for parameter in step.trained)
        step.prepare()
        step.take()
    seconds = time.monotonic() - start
    return StepEstimate(parameters, num_trained, step.held, step.peaks, step.at_peak, step.kept, step.flops, seconds)


class _Step:
    """A step of a training, phase by phase, as `Trainer` takes it."""

    def __init__(self, config: TrainingConfig, run: OutlinedRun, *, on_gpu: bool) -> None:
        self.config, self.on_gpu = config, on_gpu
        self.pipeline, self.model, self.inputs = run.pipeline, run.model, run.inputs
        self.held: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self.at_peak: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.kept = 0
        alignment = torch.ops.cameo.alignment_loss.default
        most = config.max_queries
        self.tracker = Tracker(
            inside={
                alignment: lambda query, _key, index, _weights, head, kind, _grids, normalize, *_: alignment_workspace(
                    query, index, head, kind, normalize, max_queries=most, on_gpu=on_gpu
                )
            },
            products={
                alignment: lambda query, _key, _index, _weights, _head, _kind, _grids, normalize, *_: alignment_flops(
                    query, normalize, max_queries=most
                )
            },
        )
        self.fakes = Fakes(self.tracker, *([GpuAutocast()] if on_gpu else []))
        self.encoders = encoders_of(self.pipeline)
        for module in (self.model, *self.encoders.values()):
            self.fakes.empty_module(module)
        self.model.train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.batch = example_batch(config, self.pipeline)
        self.matches = example_matches(self.model, self.batch, distances=config.reduction == "released")

    def prepare(self) -> None:
        """Hold what is held between two steps."""
        tracker, config = self.tracker, self.config
        tracker.see_all(_tensors(self.model), WEIGHTS)
        tracker.see_all(self.trained, TRAINED)
        tracker.see_all(chain.from_iterable(map(_tensors, self.encoders.values())), ENCODERS)
        with self.fakes.computing():
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, foreach=self.on_gpu)
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)
            self.optimizer.step()  # which makes its state
            self.optimizer.zero_grad(set_to_none=True)
            tracker.see_all(_states(self.optimizer), OPTIMIZER)
            self.averaged: EMAModel | None = None
            if config.use_ema:
                self.averaged = EMAModel(self.trained, decay=config.ema_decay, use_ema_warmup=True, foreach=True)
                tracker.see_all(self.averaged.shadow_params, AVERAGED)
            # On a GPU the next batch is copied while a step runs.
            size = batch_bytes(config, self.matches if config.uses_matches else []) * (2 if self.on_gpu else 1)
            self.kept_batch = torch.empty(size, dtype=torch.uint8)
            tracker.see(self.kept_batch, BATCH)
        self.held = {kind: tracker.by_kind.get(kind, 0) for kind in HELD}
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(self._see_gradient)

    def take(self) -> None:
        """Take an optimizer step."""
        parts = self.config.gradient_accumulation_steps
        for part in range(min(parts, 2)):  # those after the second hold the same
            times = 1 if part == 0 else parts - 1
            with self._phase("encoders", times, computing=False):
                inputs = self._inputs()
            with self._phase("forward", times):
                self.tracker.see_all(_tensors_in(inputs), INPUTS)
                loss = self._loss(inputs)
                self.kept = max(self.kept, self.tracker.by_kind.get(ACTIVATIONS, 0))
            with self._phase("backward", times):
                loss.backward()
            del loss, inputs
        with self._phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.averaged is not None:
                self.averaged.step(self.trained)

    @contextmanager
    def _phase(self, name: str, times: int = 1, *, computing: bool = True) -> Iterator[None]:
        tracker = self.tracker
        tracker.reset()
        before = tracker.flops
        with self.fakes.computing() if computing else nullcontext():
            yield
        if tracker.peak > max(self.peaks.values(), default=0):
            self.at_peak = dict(tracker.at_peak)
        self.peaks[name] = max(self.peaks.get(name, 0), tracker.peak)
        self.flops[name] = self.flops.get(name, 0) + times * (tracker.flops - before)

    def _inputs(self) -> TrainingInputs:
        """Inputs of the denoiser: the encoders run without contents, and what is small is computed."""
        config, pipeline = self.config, self.pipeline
        if not reads_images(pipeline) and not config.cache_latents:
            with self.fakes.computing(), torch.no_grad():
                pipeline.encode_views(self.fakes.empty(torch.zeros(()).expand(self.batch["images"].shape)))
        with self.fakes.encoders_without_contents(self.encoders):
            drawn = (self.inputs(self.batch, number) for number in range(MOST_DRAWS))
            inputs = next(one for one in drawn if one.aligned)
        # An index of the views in place of a mask, whose number of views would not be known without contents.
        inputs.loss_views = inputs.loss_views.nonzero()[:, 0]
        return self.fakes.empty(inputs)

    def _loss(self, inputs: TrainingInputs) -> Tensor:
        config, half = self.config, HALF.get(self.config.mixed_precision)
        targets = {"correspondence": self.fakes.empty(self.matches)} if config.uses_matches else {}
        with torch.autocast("cpu", dtype=half, enabled=half is not None):
            output = self.model(*inputs.args, **targets, **inputs.kwargs)
        if half is not None:
            output = convert_to_fp32(output)
        loss = self.pipeline.denoising_loss(output, inputs).mean()
        if targets:
            loss = loss + config.loss_weight * self.model.alignment_loss
        return loss / config.gradient_accumulation_steps

    def _see_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.tracker.see(parameter.grad, GRADIENTS)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _states(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    states = (value for state in optimizer.state.values() for value in state.values())
    return (value for value in states if isinstance(value, Tensor))


def _tensors_in(inputs: TrainingInputs) -> Iterator[Tensor]:
    from torch.utils._pytree import tree_iter

    leaves = tree_iter((inputs.args, inputs.kwargs, inputs.noisy, inputs.target, inputs.timesteps))
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))
