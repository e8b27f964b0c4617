"""Denoising validation at fixed noise and noise levels: the convergence curve with little variance.

Where CAMEO shows is at high noise: the model must then take the target view from the reference, through the
attention that the loss supervises. So the headline is the PSNR of the predicted clean image at noise levels >= 0.95
on the target pixels that a reference view sees; all pixels and the denoising loss stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cameo.correspondence import Correspondence
from cameo.data import MultiViewSample, collate
from cameo.errors import DataError
from cameo.evaluation.attention import attention_hits, attention_maps
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

    Raises:
        DataError: if the batch has no depth.
    """
    if "depth" not in batch:
        raise DataError(f"sample {batch.get('key', '?')}: has no depth, and evaluation takes the true matches from it")
    depth: Tensor = batch["depth"]
    height, width = depth.shape[-2:]
    references = int(batch["num_reference_views"])
    match = Correspondence.from_depth(depth, batch["intrinsics"], batch["extrinsics"], size=(height, width))
    seen = match.visible[:, :, :references].any(dim=2).unflatten(-1, (height, width))
    seen[:, :references] = False
    return seen[:, :, None]


def validate(
    model: CameoModel, pipeline: MultiViewPipeline, data: Dataset[MultiViewSample], settings: ValidationSettings
) -> dict[str, Any]:
    """Measure a model on fixed samples, noise and noise levels; of several supervised layers, the first.

    Returns:
        `loss` (mean over levels) and `loss_by_level`; `psnr_covisible` and `psnr_all` in dB at high noise; and
        `precision`: share of visible query tokens whose most-attended token lies on (`@0`) or within one token
        (`@1`) of the true match in the other view, for the mean over heads, the best head, and through the
        alignment head. `settings` and the number of pairs and pixels behind the figures stand beside them.

    Raises:
        DataError: if the samples carry no depth.
        ValueError: if no target pixel is seen by a reference or no pair is visible: nothing could be measured.
    """
    site = model.supervised_sites[0]
    device = next(model.parameters()).device
    losses: dict[float, list[Tensor]] = {level: [] for level in settings.noise_levels}
    errors: list[float] = []
    errors_all: list[float] = []
    hits: dict[str, Tensor] = {}
    pairs = pixels = 0
    with evaluation_mode(model):
        for indices in _batches(settings.num_samples, settings.batch_size):
            batch = to_device(collate([data[index] for index in indices]), device)
            seen = covisible_pixels(batch)
            match = match_batch(batch, layer_grids(site, batch))
            for level in settings.noise_levels:
                inputs = pipeline.training_inputs(batch, **_fixed_noise(pipeline, batch, indices, level, settings.seed))
                with native_precision(model), model.capture([site]) as captured:
                    output = model.base_model(*inputs.args, **inputs.kwargs)
                losses[level].append(pipeline.denoising_loss(output, inputs))
                query, key, local = model.split(site, captured[site.path], match)
                maps = attention_maps(query, key, local, model.alignment_heads[0], captured[site.path].scale)  # type: ignore[arg-type]
                found, count = attention_hits(maps, local)
                hits = {name: hits.get(name, 0) + value.cpu() for name, value in found.items()}
                pairs += count
                if level >= settings.high_noise:
                    squared = (pipeline.predict_clean(output, inputs) - batch["images"]).square()
                    targets = inputs.loss_views[None, :, None, None, None].expand_as(seen)
                    errors += _per_sample(squared, seen)
                    errors_all += _per_sample(squared, targets)
                    pixels += int(seen.sum())
    if not errors or not pairs:
        raise ValueError(
            "validation data: no target pixel is seen by a reference view at high noise, so nothing can be measured. "
            "Raise min_overlap, or give noise_levels at and above high_noise"
        )
    by_level = {str(level): float(torch.cat(values).mean()) for level, values in losses.items()}
    return {
        "loss": sum(by_level.values()) / len(by_level),
        "loss_by_level": by_level,
        "psnr_covisible": _mean_psnr(errors),
        "psnr_all": _mean_psnr(errors_all),
        "precision": {
            f"{name}@{within}": float(value[:, column].max() / pairs)
            for name, value in hits.items()
            for column, within in enumerate((0, 1))
        },
        "pairs": pairs,
        "pixels": pixels,
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
