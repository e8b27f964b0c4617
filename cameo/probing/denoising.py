"""Errors of a denoiser on fixed samples, noise and noise levels, with which all models are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cameo.attention.capture import AttentionCapture, AttentionLayer
from cameo.correspondence import Correspondence
from cameo.data import MultiViewSample, collate
from cameo.data.batches import to_device
from cameo.errors import DataError
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline, TrainingInputs
from cameo.probing.mode import evaluation_mode, native_precision

__all__ = [
    "MAX_PSNR",
    "NO_DEPTH",
    "NO_REFERENCES",
    "DenoisingErrors",
    "DenoisingPass",
    "ValidationSettings",
    "check_noise_levels",
    "covisible_pixels",
    "denoising_passes",
    "fixed_inputs",
    "measure_denoising",
    "psnr_of_error",
    "sample_batches",
]

# The PSNR of a perfect prediction is infinite; it is capped here, at a mean squared error of 1e-10.
MAX_PSNR = 100.0
# Why there are no covisible pixels, in the notes of results.
NO_REFERENCES = "num_reference_views=0: there is no reference view that could see a pixel"
NO_DEPTH = "the data has no depth, so it is not known which pixels a reference view sees"


@dataclass(frozen=True)
class ValidationSettings:
    """Settings of `measure_denoising`; they are written into every result file.

    Attributes:
        num_samples: number of samples, the first ones of the validation set.
        batch_size: samples per forward pass; changes the result by rounding only.
        noise_levels: shares of the last timestep in [0, 1], at which everything is measured.
        high_noise: noise level from which on levels count for the PSNR of the predicted clean image.
        seed: seed of the noise, the same for all models that are compared.
    """

    num_samples: int = 32
    batch_size: int = 8
    noise_levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
    high_noise: float = 0.95
    seed: int = 1234

    @property
    def high_levels(self) -> tuple[float, ...]:
        """Noise levels that count for the PSNR of the predicted clean image."""
        return tuple(level for level in self.noise_levels if level >= self.high_noise)


def check_noise_levels(name: str, levels: Sequence[Any]) -> None:
    """Raise `ValueError` unless these are different noise levels; `name` is the argument that gave them.

    Example:
        >>> check_noise_levels("noise_levels", (0.5, 2))
        Traceback (most recent call last):
        ValueError: noise_levels: expected different shares of the last timestep in [0, 1], got (0.5, 2)
    """
    are_shares = all(isinstance(level, int | float) and 0 <= level <= 1 for level in levels)
    if not levels or not are_shares or len(set(levels)) < len(levels):
        raise ValueError(f"{name}: expected different shares of the last timestep in [0, 1], got {levels}")


def psnr_of_error(squared_error: Tensor) -> Tensor:
    """Convert mean squared errors of images in [0, 1] into PSNR in dB, at most `MAX_PSNR`; NaN stays NaN.

    Example:
        >>> psnr_of_error(torch.tensor([0.01, 0.0], dtype=torch.float64)).tolist()
        [20.0, 100.0]
    """
    return -10 * squared_error.clamp_min(10 ** (-MAX_PSNR / 10)).log10()


def covisible_pixels(batch: MultiViewSample | dict[str, Any]) -> Tensor:
    """Target pixels that some reference view sees, bool `[B, V, 1, H, W]`; False in reference views.

    Without reference views (`num_reference_views=0`) no pixel is covisible.

    Raises:
        DataError: if the batch has no depth.
    """
    if "depth" not in batch:
        raise DataError(f"sample {batch.get('key', '?')}: has no depth, and evaluation takes the true matches from it")
    depth: Tensor = batch["depth"]
    height, width = depth.shape[-2:]
    references = int(batch["num_reference_views"])
    if not references:
        return torch.zeros_like(depth, dtype=torch.bool)
    match = Correspondence.from_depth(depth, batch["intrinsics"], batch["extrinsics"], token_grid=(height, width))
    seen = match.matched[:, :, :references].any(dim=2).unflatten(-1, (height, width))
    seen[:, :references] = False
    return seen[:, :, None]


@dataclass(frozen=True)
class DenoisingPass:
    """One forward pass of the denoiser at a fixed noise level, as `denoising_passes` yields it.

    Attributes:
        batch: collated samples.
        indices: their numbers in the data.
        covisible: their covisible pixels, see `covisible_pixels`.
        level: noise level.
        inputs, output: inputs and output of the denoiser.
        captured: queries and keys of the observed layers.
    """

    batch: dict[str, Any]
    indices: range
    covisible: Tensor
    level: float
    inputs: TrainingInputs
    output: Any
    captured: AttentionCapture


@dataclass
class DenoisingErrors:
    """Errors of the denoiser by noise level and sample.

    Example:
        >>> errors = DenoisingErrors(predict_from=0.95)
        >>> errors.loss = {0.1: [0.5, 0.7], 1.0: [0.1, 0.3]}
        >>> errors.squared = {1.0: [0.01, 0.1]}
        >>> [round(value, 3) for value in errors.sample_losses((0.1, 1.0))], errors.sample_psnr(errors.squared, [1.0])
        ([0.3, 0.5], [20.0, 10.0])

    Attributes:
        predict_from: noise level from which on clean images are predicted.
        keys: keys of the samples, in the order of every list below.
        loss: noise level to the denoising loss of each sample.
        squared: noise level, at least `predict_from`, to the mean squared error of the predicted clean image over the
            pixels of the target views.
        squared_covisible: the same over the pixels that a reference view sees; NaN where a sample has none.
        pixels: number of covisible pixels over all samples and these levels.
        references: number of reference views of a sample.
        has_depth: whether any sample so far has depth.
    """

    predict_from: float
    keys: list[str] = field(default_factory=list)
    loss: dict[float, list[float]] = field(default_factory=dict)
    squared: dict[float, list[float]] = field(default_factory=dict)
    squared_covisible: dict[float, list[float]] = field(default_factory=dict)
    pixels: int = 0
    references: int = 0
    has_depth: bool = False

    @property
    def not_covisible(self) -> str | None:
        """Why it is not known which pixels a reference view sees; None where it is."""
        if not self.references:
            return NO_REFERENCES
        return None if self.has_depth else NO_DEPTH

    def add(self, denoised: DenoisingPass, pipeline: MultiViewPipeline) -> None:
        """Measure a forward pass; all noise levels of a batch come one after another, as in `denoising_passes`."""
        level, batch = denoised.level, denoised.batch
        if len(self.loss.get(level, ())) == len(self.keys):  # the first level of a batch
            self.keys += batch["key"]
        self.references = int(batch["num_reference_views"])
        self.has_depth |= bool((batch["depth"] > 0).any())
        losses = pipeline.denoising_loss(denoised.output, denoised.inputs)
        self.loss.setdefault(level, []).extend(losses.double().tolist())
        if level < self.predict_from:
            return
        squared = (pipeline.predict_clean(denoised.output, denoised.inputs) - batch["images"]).square()
        # Not inputs.loss_views: a model may also train on reference views, or leave out some target views.
        targets = torch.ones_like(denoised.covisible)
        targets[:, : self.references] = False
        self.squared.setdefault(level, []).extend(_per_sample(squared, targets))
        self.squared_covisible.setdefault(level, []).extend(_per_sample(squared, denoised.covisible))
        self.pixels += int(denoised.covisible.sum())

    def sample_losses(self, levels: Sequence[float]) -> list[float]:
        """Return the loss of each sample, mean over some noise levels."""
        return torch.tensor([self.loss[level] for level in levels], dtype=torch.float64).mean(0).tolist()

    @staticmethod
    def sample_psnr(squared: Mapping[float, Sequence[float]], levels: Sequence[float]) -> list[float]:
        """Return the PSNR of each sample in dB, mean over some noise levels of `squared` or `squared_covisible`.

        NaN where a sample has no such pixel.
        """
        errors = torch.tensor([squared[level] for level in levels], dtype=torch.float64)
        return psnr_of_error(errors).mean(0).tolist()

    def check(self, settings: ValidationSettings) -> None:
        """Raise `ValueError` if the data or the noise levels leave nothing to measure."""
        if not settings.high_levels:
            raise ValueError(
                f"validation settings: no target view at a noise level of high_noise={settings.high_noise} or more, so "
                f"nothing can be measured; got noise_levels={settings.noise_levels}. Give some at and above high_noise"
            )
        if self.not_covisible is None and not self.pixels:
            raise ValueError(
                "validation data: no target pixel is seen by a reference view, so nothing can be measured. "
                "Raise min_overlap, or take a rig in which views see each other's surface"
            )


def measure_denoising(
    model: CameoModel,
    pipeline: MultiViewPipeline,
    data: Dataset[MultiViewSample],
    settings: ValidationSettings,
    *,
    predict_from: float | None = None,
    layers: Sequence[AttentionLayer] = (),
    observe: Callable[[DenoisingPass], None] | None = None,
) -> DenoisingErrors:
    """Measure the loss and the error of the predicted clean image of each sample; the model is left as it was.

    Args:
        model: wraps `pipeline.denoiser`.
        pipeline: turns batches into inputs of the denoiser.
        data: samples with depth.
        settings: samples, noise levels and noise.
        predict_from: noise level from which on clean images are predicted; default `settings.high_noise`.
        layers: layers whose queries and keys are captured for `observe`.
        observe: is called after each forward pass, with all noise levels of a batch one after another.

    Raises:
        DataError: if the samples have no depth, or there are too few.
        ValueError: if no target pixel is seen by a reference, where there is one, or no noise level is high.
    """
    errors = DenoisingErrors(settings.high_noise if predict_from is None else predict_from)
    with evaluation_mode(model):
        for denoised in denoising_passes(model, pipeline, data, settings, layers):
            errors.add(denoised, pipeline)
            if observe is not None:
                observe(denoised)
    errors.check(settings)
    return errors


def denoising_passes(
    model: CameoModel,
    pipeline: MultiViewPipeline,
    data: Dataset[MultiViewSample],
    settings: ValidationSettings,
    layers: Sequence[AttentionLayer] = (),
) -> Iterator[DenoisingPass]:
    """Run the denoiser on fixed samples and noise, at all noise levels of a batch one after another.

    The caller keeps the model in `evaluation_mode`. The queries and keys of `layers` are captured.
    """
    device = next(model.parameters()).device
    for indices, batch in sample_batches(data, settings.num_samples, settings.batch_size, device):
        covisible = covisible_pixels(batch)
        for level in settings.noise_levels:
            inputs = fixed_inputs(pipeline, batch, indices, level, settings.seed)
            with native_precision(model), model.capture(list(layers)) as captured:
                output = model.base_model(*inputs.args, **inputs.kwargs)
            yield DenoisingPass(batch, indices, covisible, level, inputs, output, captured)


def sample_batches(
    data: Dataset[MultiViewSample], total: int, size: int, device: torch.device, *, setting: str = "num_samples"
) -> Iterator[tuple[range, dict[str, Any]]]:
    """Yield batches of samples 0 .. total-1 of the data, each with the numbers of its samples.

    Keys are made unique: if a sample shows the same views of a scene as an earlier one, `#2` is appended to its key.
    `setting` is the name of `total` in an error.

    Raises:
        DataError: if the data has fewer samples.
    """
    if isinstance(data, Sized) and len(data) < total:
        raise DataError(f"data: expected at least {setting}={total} samples, got {len(data)}; lower {setting}")
    seen: Counter[str] = Counter()
    for start in range(0, total, size):
        indices = range(start, min(start + size, total))
        batch = to_device(collate([data[index] for index in indices]), device)
        seen.update(batch["key"])
        for position, key in enumerate(batch["key"]):
            earlier = seen[key] - batch["key"][position:].count(key)
            batch["key"][position] = key if not earlier else f"{key}#{earlier + 1}"
        yield indices, batch


def fixed_inputs(
    pipeline: MultiViewPipeline, batch: dict[str, Any], indices: Sequence[int], level: float, seed: int
) -> TrainingInputs:
    """Add noise to a batch; it depends on the numbers of the samples and the noise level, not on the batch size."""
    shape = pipeline.latent_shape(batch["images"].shape)[1:]
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in indices])
    timestep = round(level * (pipeline.num_train_timesteps - 1))
    return pipeline.training_inputs(batch, noise=noise, timesteps=torch.full((len(indices),), timestep))


def _per_sample(squared: Tensor, mask: Tensor) -> list[float]:
    """Mean squared error of each sample over the pixels of the mask; NaN for samples without any."""
    total = torch.where(mask, squared, 0).sum(dim=(1, 2, 3, 4)).double()
    count = (mask.sum(dim=(1, 2, 3, 4)) * squared.shape[2]).double()
    return (total / count).tolist()
