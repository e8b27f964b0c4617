"""Denoising validation at fixed noise and noise levels: the convergence curve with little variance.

Where CAMEO shows is at high noise: the model must then take the target view from the reference, through the
attention that the loss supervises. So the headline is the PSNR of the predicted clean image at noise levels >= 0.95
on the target pixels that a reference view sees; all pixels and the denoising loss stand beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cameo.attention.capture import AttentionCapture, AttentionSite
from cameo.correspondence import Correspondence
from cameo.data import MultiViewSample, collate
from cameo.errors import DataError
from cameo.evaluation.metrics import psnr_of_error
from cameo.pipeline import MultiViewPipeline, TrainingInputs
from cameo.probing.hits import Hits
from cameo.probing.mode import evaluation_mode, native_precision
from cameo.training.correspondences import layer_grids, match_batch
from cameo.training.data import to_device
from cameo.wrap import CameoModel

__all__ = [
    "DenoisingErrors",
    "DenoisingPass",
    "ValidationSettings",
    "covisible_pixels",
    "denoising_passes",
    "fixed_inputs",
    "measure_denoising",
    "sample_batches",
    "validate",
]


@dataclass(frozen=True)
class ValidationSettings:
    """Settings of `validate`; written into every result file.

    Attributes:
        num_samples: samples 0 .. n-1 of the validation set.
        batch_size: samples per forward; does not change the result beyond rounding.
        noise_levels: fractions of the last time step at which everything is measured.
        high_noise: levels from here on count for the PSNR of the predicted clean image.
        seed: of the noise, the same for every model that is compared.
    """

    num_samples: int = 32
    batch_size: int = 8
    noise_levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)
    high_noise: float = 0.95
    seed: int = 1234

    @property
    def high_levels(self) -> tuple[float, ...]:
        """Levels that count for the PSNR of the predicted clean image."""
        return tuple(level for level in self.noise_levels if level >= self.high_noise)


def covisible_pixels(batch: MultiViewSample | dict[str, Any]) -> Tensor:
    """Target pixels that some reference view sees, bool `[B, V, 1, H, W]`; False in reference views.

    Without reference views (`num_reference_views=0`) no pixel is.

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
    match = Correspondence.from_depth(depth, batch["intrinsics"], batch["extrinsics"], size=(height, width))
    seen = match.visible[:, :, :references].any(dim=2).unflatten(-1, (height, width))
    seen[:, :references] = False
    return seen[:, :, None]


@dataclass(frozen=True)
class DenoisingPass:
    """One forward of the denoiser at a fixed noise level; what `denoising_passes` hands out.

    - `batch`: collated samples number `indices` of the data; `level`: their noise level.
    - `seen`: their covisible pixels, see `covisible_pixels`.
    - `inputs`, `output`: of the denoiser. `captured`: queries and keys of the observed layers.
    """

    batch: dict[str, Any]
    indices: range
    seen: Tensor
    level: float
    inputs: TrainingInputs
    output: Any
    captured: AttentionCapture


@dataclass
class DenoisingErrors:
    """Errors of the denoiser per noise level and sample.

    Example:
        >>> errors = DenoisingErrors(predict_from=0.95)
        >>> errors.loss = {0.1: [0.5, 0.7], 1.0: [0.1, 0.3]}
        >>> errors.squared = {1.0: [0.01, 0.1]}
        >>> [round(value, 3) for value in errors.sample_losses((0.1, 1.0))], errors.sample_psnr(errors.squared, [1.0])
        ([0.3, 0.5], [20.0, 10.0])

    - `keys`: of the samples, in the order of every list below.
    - `loss`: denoising loss by level.
    - `squared`, `squared_covisible`: by level >= `predict_from`, mean squared error of the predicted clean image over
      the pixels of the target views, and over those that a reference sees; NaN where a sample has none.
    - `pixels`: covisible pixels over all samples and these levels. `references`: reference views of a sample.
    """

    predict_from: float
    keys: list[str] = field(default_factory=list)
    loss: dict[float, list[float]] = field(default_factory=dict)
    squared: dict[float, list[float]] = field(default_factory=dict)
    squared_covisible: dict[float, list[float]] = field(default_factory=dict)
    pixels: int = 0
    references: int = 0

    def add(self, one: DenoisingPass, pipeline: MultiViewPipeline) -> None:
        """Measure a forward; the levels of a batch come one after another, as `denoising_passes` has them."""
        if len(self.loss.get(one.level, ())) == len(self.keys):  # the first level of a batch
            self.keys += one.batch["key"]
        self.references = int(one.batch["num_reference_views"])
        losses = pipeline.denoising_loss(one.output, one.inputs)
        self.loss.setdefault(one.level, []).extend(losses.double().tolist())
        if one.level < self.predict_from:
            return
        squared = (pipeline.predict_clean(one.output, one.inputs) - one.batch["images"]).square()
        # Not inputs.loss_views: a model may train views that are not asked for, or spare some that are.
        targets = torch.ones_like(one.seen)
        targets[:, : self.references] = False
        self.squared.setdefault(one.level, []).extend(_per_sample(squared, targets))
        self.squared_covisible.setdefault(one.level, []).extend(_per_sample(squared, one.seen))
        self.pixels += int(one.seen.sum())

    def sample_losses(self, levels: Sequence[float]) -> list[float]:
        """Return the loss of each sample, mean over some levels."""
        return torch.tensor([self.loss[level] for level in levels], dtype=torch.float64).mean(0).tolist()

    @staticmethod
    def sample_psnr(squared: Mapping[float, Sequence[float]], levels: Sequence[float]) -> list[float]:
        """Return the PSNR of each sample in dB, mean over some levels of `squared` or `squared_covisible`.

        NaN where a sample has no pixel.
        """
        errors = torch.tensor([squared[level] for level in levels], dtype=torch.float64)
        return psnr_of_error(errors).mean(0).tolist()

    def check(self, settings: ValidationSettings) -> None:
        """Raise `ValueError` where the data or the noise levels leave nothing to measure."""
        if not settings.high_levels:
            raise ValueError(
                f"validation settings: no target view at a noise level of high_noise={settings.high_noise} or more, so "
                f"nothing can be measured; got noise_levels={settings.noise_levels}. Give some at and above high_noise"
            )
        if self.references and not self.pixels:
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
) -> DenoisingErrors:
    """Measure loss and predicted clean images per sample, without a look at the attention.

    Args:
        model, pipeline, data, settings: as of `validate`.
        predict_from: noise level from which on clean images are predicted; default `settings.high_noise`.

    Raises:
        DataError, ValueError: as `validate`.
    """
    errors = DenoisingErrors(settings.high_noise if predict_from is None else predict_from)
    with evaluation_mode(model):
        for one in denoising_passes(model, pipeline, data, settings):
            errors.add(one, pipeline)
    errors.check(settings)
    return errors


def denoising_passes(
    model: CameoModel,
    pipeline: MultiViewPipeline,
    data: Dataset[MultiViewSample],
    settings: ValidationSettings,
    sites: Sequence[AttentionSite] = (),
) -> Iterator[DenoisingPass]:
    """Run the denoiser on fixed samples and noise, all levels of a batch one after another.

    The caller holds the model in `evaluation_mode`. `sites`: layers whose queries and keys are observed.
    """
    device = next(model.parameters()).device
    for indices, batch in sample_batches(data, settings.num_samples, settings.batch_size, device):
        seen = covisible_pixels(batch)
        for level in settings.noise_levels:
            inputs = fixed_inputs(pipeline, batch, indices, level, settings.seed)
            with native_precision(model), model.capture(list(sites)) as captured:
                output = model.base_model(*inputs.args, **inputs.kwargs)
            yield DenoisingPass(batch, indices, seen, level, inputs, output, captured)


def validate(
    model: CameoModel, pipeline: MultiViewPipeline, data: Dataset[MultiViewSample], settings: ValidationSettings
) -> dict[str, Any]:
    """Measure a model on fixed samples, noise and noise levels; of several supervised layers, the first.

    Returns:
        - `loss` (mean over levels) and `loss_by_level`.
        - `psnr_all` in dB at high noise, over the target views. `psnr_covisible` over their pixels that a reference
          view sees; None without reference views.
        - `precision`: share of visible query tokens whose most-attended token lies on (`@0`) or within one token
          (`@1`, tokens of the view looked at) of the true match in the other view, for the mean over heads, the best
          head, and through the alignment head. None where a query reaches one token of each view, or no match.
        - `precision_view`, only there: share of query tokens with a match whose most-attended view, among the others,
          shows the same surface point; with `chance`, the share that a view drawn at random would have.
        - `notes`: why each None is one. `settings` and the number of pairs and pixels behind the figures.

    Raises:
        DataError: if the samples carry no depth.
        ValueError: if no target pixel is seen by a reference, where there is one, or no noise level is high.
    """
    site, head = model.supervised_sites[0], model.alignment_heads[0]
    errors, hits = DenoisingErrors(settings.high_noise), Hits()
    match: tuple[range, Correspondence] | None = None
    with evaluation_mode(model):
        for one in denoising_passes(model, pipeline, data, settings, [site]):
            errors.add(one, pipeline)
            if match is None or match[0] != one.indices:
                match = one.indices, match_batch(one.batch, layer_grids(site, one.batch))
            query, key, local = model.split(site, one.captured[site.path], match[1])
            hits.count(query, key, local, head, one.captured[site.path].scale)  # type: ignore[arg-type]
    errors.check(settings)
    return {
        **_denoising_report(errors, settings.high_levels),
        **_attention_report(hits, errors.references),
        "settings": asdict(settings),
    }


def _denoising_report(errors: DenoisingErrors, high: Sequence[float]) -> dict[str, Any]:
    by_level = {str(level): _mean(values) for level, values in errors.loss.items()}
    covisible = [value for value in errors.sample_psnr(errors.squared_covisible, high) if not math.isnan(value)]
    return {
        "loss": _mean(list(by_level.values())),
        "loss_by_level": by_level,
        "psnr_covisible": _mean(covisible) if errors.references else None,
        "psnr_all": _mean(errors.sample_psnr(errors.squared, high)),
        "pixels": errors.pixels,
    }


def _attention_report(hits: Hits, references: int) -> dict[str, Any]:
    notes = {}
    if not references:
        notes["psnr_covisible"] = "num_reference_views=0: there is no reference view that could see a pixel"
    if hits.queries:
        notes["precision"] = "a query reaches one token of each view: no choice among tokens; see precision_view"
    else:
        notes["precision_view"] = "a query reaches several tokens of a view; see precision"
        if not hits.pairs:
            notes["precision"] = "no query of the layer reaches a token that shows the same surface point"
    tokens = {
        f"{name}@{within}": float(value[:, column].max() / hits.pairs)
        for name, value in hits.token.items()
        for column, within in enumerate((0, 1))
    }
    views = {name: float(value.max() / hits.queries) for name, value in hits.view.items()}
    return {
        "precision": tokens or None,
        "precision_view": {**views, "chance": hits.chance / hits.queries} if hits.queries else None,
        "notes": notes,
        "pairs": hits.pairs or hits.queries,
    }


def sample_batches(
    data: Dataset[MultiViewSample], total: int, size: int, device: torch.device, *, setting: str = "num_samples"
) -> Iterator[tuple[range, dict[str, Any]]]:
    """Collate samples 0 .. total-1 of the data, each batch with the numbers of its samples.

    `setting` is what `total` is called in an error.

    Keys are made unique: where a sample shows the same views of a scene as an earlier one, `#2` stands behind its key.

    Raises:
        DataError: if the data has fewer samples.
    """
    if isinstance(data, Sized) and len(data) < total:
        raise DataError(f"data: expected at least {setting}={total} samples, got {len(data)}; lower {setting}")
    known: Counter[str] = Counter()
    for start in range(0, total, size):
        indices = range(start, min(start + size, total))
        batch = to_device(collate([data[index] for index in indices]), device)
        known.update(batch["key"])
        for place, key in enumerate(batch["key"]):
            earlier = known[key] - batch["key"][place:].count(key)
            batch["key"][place] = key if not earlier else f"{key}#{earlier + 1}"
        yield indices, batch


def fixed_inputs(
    pipeline: MultiViewPipeline, batch: dict[str, Any], indices: Sequence[int], level: float, seed: int
) -> TrainingInputs:
    """Noise a batch; time steps and noise depend on the sample's number and the level, not on the batch size."""
    shape = pipeline.latent_shape(batch["images"].shape)[1:]
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in indices])
    step = round(level * (pipeline.num_train_timesteps - 1))
    return pipeline.training_inputs(batch, noise=noise, timesteps=torch.full((len(indices),), step))


def _per_sample(squared: Tensor, mask: Tensor) -> list[float]:
    """Mean squared error of each sample over the masked pixels; NaN for samples without any."""
    total = torch.where(mask, squared, 0).sum(dim=(1, 2, 3, 4)).double()
    count = (mask.sum(dim=(1, 2, 3, 4)) * squared.shape[2]).double()
    return (total / count).tolist()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
