"""Denoising validation at fixed noise and noise levels: the convergence curve with little variance.

Where CAMEO shows is at high noise: the model must then take the target view from the reference, through the
attention that the loss supervises. So the headline is the PSNR of the predicted clean image at noise levels >= 0.95
on the target pixels that a reference view sees; all pixels and the denoising loss stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cameo.correspondence import Correspondence
from cameo.data import MultiViewSample, collate
from cameo.errors import DataError
from cameo.evaluation.attention import Hits
from cameo.evaluation.mode import evaluation_mode, native_precision
from cameo.pipeline import MultiViewPipeline
from cameo.training.correspondences import layer_grids, match_batch
from cameo.training.data import to_device
from cameo.wrap import CameoModel

__all__ = ["ValidationSettings", "covisible_pixels", "validate"]


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


@dataclass
class _Measured:
    """What `validate` adds up."""

    losses: dict[float, list[Tensor]]
    errors: list[float] = field(default_factory=list)
    errors_covisible: list[float] = field(default_factory=list)
    hits: Hits = field(default_factory=Hits)
    pixels: int = 0
    references: int = 0


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
    site = model.supervised_sites[0]
    device = next(model.parameters()).device
    measured = _Measured({level: [] for level in settings.noise_levels})
    with evaluation_mode(model):
        for indices in _batches(settings.num_samples, settings.batch_size):
            batch = to_device(collate([data[index] for index in indices]), device)
            measured.references = int(batch["num_reference_views"])
            seen = covisible_pixels(batch)
            match = match_batch(batch, layer_grids(site, batch))
            for level in settings.noise_levels:
                inputs = pipeline.training_inputs(batch, **_fixed_noise(pipeline, batch, indices, level, settings.seed))
                with native_precision(model), model.capture([site]) as captured:
                    output = model.base_model(*inputs.args, **inputs.kwargs)
                measured.losses[level].append(pipeline.denoising_loss(output, inputs))
                query, key, local = model.split(site, captured[site.path], match)
                measured.hits.count(query, key, local, model.alignment_heads[0], captured[site.path].scale)  # type: ignore[arg-type]
                if level >= settings.high_noise:
                    squared = (pipeline.predict_clean(output, inputs) - batch["images"]).square()
                    # Not inputs.loss_views: a model may train views that are not asked for, or spare some that are.
                    targets = torch.ones_like(seen)
                    targets[:, : measured.references] = False
                    measured.errors_covisible += _per_sample(squared, seen)
                    measured.errors += _per_sample(squared, targets)
                    measured.pixels += int(seen.sum())
    return _report(measured, settings)


def _report(measured: _Measured, settings: ValidationSettings) -> dict[str, Any]:
    hits = measured.hits
    if not measured.errors:
        raise ValueError(
            f"validation settings: no target view at a noise level of high_noise={settings.high_noise} or more, so "
            f"nothing can be measured; got noise_levels={settings.noise_levels}. Give some at and above high_noise"
        )
    if measured.references and not measured.errors_covisible:
        raise ValueError(
            "validation data: no target pixel is seen by a reference view, so nothing can be measured. "
            "Raise min_overlap, or take a rig in which views see each other's surface"
        )
    notes = {}
    if not measured.references:
        notes["psnr_covisible"] = "num_reference_views=0: there is no reference view that could see a pixel"
    if hits.queries:
        notes["precision"] = "a query reaches one token of each view: no choice among tokens; see precision_view"
    else:
        notes["precision_view"] = "a query reaches several tokens of a view; see precision"
        if not hits.pairs:
            notes["precision"] = "no query of the layer reaches a token that shows the same surface point"
    by_level = {str(level): float(torch.cat(values).mean()) for level, values in measured.losses.items()}
    tokens = {
        f"{name}@{within}": float(value[:, column].max() / hits.pairs)
        for name, value in hits.token.items()
        for column, within in enumerate((0, 1))
    }
    views = {name: float(value.max() / hits.queries) for name, value in hits.view.items()}
    return {
        "loss": sum(by_level.values()) / len(by_level),
        "loss_by_level": by_level,
        "psnr_covisible": _mean_psnr(measured.errors_covisible) if measured.errors_covisible else None,
        "psnr_all": _mean_psnr(measured.errors),
        "precision": tokens or None,
        "precision_view": {**views, "chance": hits.chance / hits.queries} if hits.queries else None,
        "notes": notes,
        "pairs": hits.pairs or hits.queries,
        "pixels": measured.pixels,
        "settings": asdict(settings),
    }


def _batches(total: int, size: int) -> Sequence[range]:
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def _fixed_noise(
    pipeline: MultiViewPipeline, batch: dict[str, Any], indices: range, level: float, seed: int
) -> dict[str, Any]:
    """Time steps and noise that depend on the sample and the level only, not on the batch size."""
    shape = pipeline.latent_shape(batch["images"].shape)[1:]
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in indices])
    step = round(level * (pipeline.num_train_timesteps - 1))
    return {"noise": noise, "timesteps": torch.full((len(indices),), step)}


def _per_sample(squared: Tensor, mask: Tensor) -> list[float]:
    """Mean squared error of each sample over the masked pixels; samples without any are left out."""
    total = (squared * mask).sum(dim=(1, 2, 3, 4)).double()
    count = (mask.sum(dim=(1, 2, 3, 4)) * squared.shape[2]).double()
    return (total[count > 0] / count[count > 0]).tolist()


def _mean_psnr(errors: list[float]) -> float:
    return float(-10 * torch.tensor(errors, dtype=torch.float64).clamp_min(1e-10).log10().mean())
