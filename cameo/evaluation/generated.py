"""Generate the target views and compare them with the true views, and with each other.

Axes: V views (reference views first), H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cameo.data import MultiViewSample
from cameo.errors import ShapeError, WeightsUnavailable
from cameo.evaluation.consistency import EpipolarPair, tsed, warp_error
from cameo.evaluation.metrics import Fid, Lpips, psnr, ssim
from cameo.evaluation.settings import EvaluationSettings, Section
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline
from cameo.probing.denoising import covisible_pixels, sample_batches
from cameo.probing.mode import generate_views

__all__ = ["SampledViews", "consistency", "novel_views", "sample_targets"]


@dataclass(frozen=True)
class SampledViews:
    """Generated target views with the samples they belong to, on the CPU; returned by `sample_targets`.

    Attributes:
        batches: collated batches of one sample each.
        images: all views of each batch, `[1, V, 3, H, W]`: the given reference views and the generated target views.
    """

    batches: list[dict[str, Any]]
    images: list[Tensor]


def sample_targets(
    model: CameoModel, pipeline: MultiViewPipeline, data: Dataset[MultiViewSample], settings: EvaluationSettings
) -> SampledViews:
    """Generate the target views of samples 0 .. `num_sampled`-1.

    Samples are generated one at a time, so that the noise of a sample depends on its number only.

    Raises:
        DataError: if the data has fewer samples.
        ValueError: if the model generates values that are not finite.
    """
    device = next(model.parameters()).device
    sampled = SampledViews([], [])
    for (index,), batch in sample_batches(data, settings.num_sampled, 1, device, setting="num_sampled"):
        images = generate_views(
            model,
            pipeline,
            batch,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=torch.Generator().manual_seed(settings.noise_seed + index),
        )
        if not bool(images.isfinite().all()):
            raise ValueError(f"model: generates values that are not finite for sample {batch['key'][0]}")
        sampled.batches.append({name: _to_cpu(value) for name, value in batch.items()})
        sampled.images.append(images.float().cpu())
    return sampled


def novel_views(sampled: SampledViews, settings: EvaluationSettings) -> Section:
    """Compare the generated target views with the true ones; the value of a sample is the mean over its views."""
    section = Section()
    keys = [batch["key"][0] for batch in sampled.batches]
    references = int(sampled.batches[0]["num_reference_views"])
    generated = [images[0, references:] for images in sampled.images]
    truth = [batch["images"][0, references:] for batch in sampled.batches]
    seen = [covisible_pixels(batch)[0, references:] for batch in sampled.batches]
    pairs = list(zip(generated, truth, strict=True))
    section.add("psnr", keys, [float(psnr(*pair).mean()) for pair in pairs])
    covisible = [float(psnr(*pair, mask).nanmean()) for pair, mask in zip(pairs, seen, strict=True)]
    section.add("psnr_covisible", keys, covisible, missing="no target pixel is seen by a reference")
    _measure(section, "ssim", keys, pairs, lambda: ssim)
    if settings.lpips is None:
        section.notes["lpips"] = "lpips=null: left out"
    else:
        _measure(section, f"lpips_{settings.lpips}", keys, pairs, lambda: Lpips(str(settings.lpips)))
    if settings.fid:
        _measure_fid(section, pairs)
    section.details = {"images": sum(len(images) for images in generated)}
    return section


def _measure(
    section: Section,
    name: str,
    keys: Sequence[str],
    pairs: Sequence[tuple[Tensor, Tensor]],
    metric: Callable[[], Callable[[Tensor, Tensor], Tensor]],
) -> None:
    """Add a metric of image pairs, or the reason why it cannot be computed: missing weights, images too small."""
    try:
        measured = metric()
        section.add(name, keys, [float(measured(*pair).mean()) for pair in pairs])
    except WeightsUnavailable as error:  # the message says that the metric is skipped
        section.mean[name], section.notes[name] = None, str(error)
    except ShapeError as error:
        section.mean[name], section.notes[name] = None, f"skipped: {error}"


def _measure_fid(section: Section, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add FID, one number for all images together, which has no values per sample."""
    try:
        metric = Fid()
        for images, truth in pairs:
            metric.update(images, truth)
        section.mean["fid"] = metric.compute()
        if section.mean["fid"] is None:
            section.notes["fid"] = f"skipped: {metric.count} images are fewer than {metric.min_images}"
    except WeightsUnavailable as error:
        section.mean["fid"], section.notes["fid"] = None, str(error)
    except ImportError as error:
        section.mean["fid"], section.notes["fid"] = None, f"skipped: {error}"


def consistency(sampled: SampledViews, settings: EvaluationSettings) -> Section:
    """Measure the consistency of generated views with each other and with the reference views.

    The value of a sample is the mean over its pairs of views, whatever number of pixels both views show. Pairs of two
    reference views are left out.
    """
    section = Section()
    if not settings.consistency:
        section.notes["all"] = "consistency=false: left out"
        return section
    keys = [batch["key"][0] for batch in sampled.batches]
    warped, matched = [], []
    for batch, images in zip(sampled.batches, sampled.images, strict=True):
        views, references = images.shape[1], int(batch["num_reference_views"])
        cameras, truth = (batch["intrinsics"], batch["extrinsics"]), batch["images"]
        pairs = [(i, j) for i in range(views) for j in range(views) if i != j and max(i, j) >= references]
        warped.append(warp_error(images, batch["depth"], *cameras, truth=truth, pairs=pairs))
        matched.append(_epipolar(section, images, cameras, truth, [(i, j) for i, j in pairs if i > j], settings))
    for name, attribute in (
        ("warp_error", "absolute"),
        ("warp_error_truth", "true_absolute"),
        ("warp_psnr", "psnr"),
        ("warp_psnr_truth", "true_psnr"),
    ):
        values = [_mean_of(getattr(pair, attribute) for pair in of_sample) for of_sample in warped]
        section.add(name, keys, values, missing="no two views show the same surface")
    if "epipolar" not in section.notes:
        judged = [[pair for pair in of_sample if pair.consistent is not None] for of_sample in matched]
        consistent = [_mean_of(pair.consistent for pair in of_sample) for of_sample in judged]
        missing = "no two views whose true images are found consistent"
        section.add("epipolar_consistent", keys, consistent, missing=missing)
        distance = [_mean_of(pair.distance for pair in of_sample) for of_sample in judged]
        section.add("epipolar_distance", keys, distance, missing=f"{missing}, or no SIFT match in them,")
        section.details["epipolar_pairs"] = [sum(map(len, judged)), sum(map(len, matched))]
    section.details["warped"] = [
        {"angle": pair.angle, "pixels": pair.pixels, "error": pair.absolute, "truth": pair.true_absolute}
        for of_sample in warped
        for pair in of_sample
    ]
    return section


def _epipolar(
    section: Section,
    images: Tensor,
    cameras: tuple[Tensor, Tensor],
    truth: Tensor,
    pairs: Sequence[tuple[int, int]],
    settings: EvaluationSettings,
) -> list[EpipolarPair]:
    """Judge pairs of views; without OpenCV none are, and the section says so."""
    try:
        return tsed(
            images,
            *cameras,
            truth=truth,
            pairs=pairs,
            max_distance=settings.epipolar_threshold,
            min_matches=settings.epipolar_matches,
        )
    except ImportError as error:
        section.notes["epipolar"] = f"skipped: {error}"
        return []


def _mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the known values; None if there is none."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
