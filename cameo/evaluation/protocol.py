"""One evaluation for all backbones: novel views, attention, consistency of the views, and denoising."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import Dataset

from cameo.data import MultiViewSample
from cameo.evaluation.generated import SampledViews, consistency, novel_views, sample_targets
from cameo.evaluation.settings import EvaluationSettings, Section
from cameo.geometry.depth import is_measured
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline
from cameo.probing import probe_layers
from cameo.probing.denoising import DenoisingErrors, measure_denoising, sample_batches
from cameo.probing.hits import READOUTS
from cameo.probing.layer_probe import LayerProbe
from cameo.probing.probed_layer import ProbedLayer
from cameo.probing.result import NEAR

__all__ = ["EvaluationSettings", "SampledViews", "Section", "evaluate", "sample_targets"]

NO_REFERENCE = "num_reference_views=0: no reference view says which scene is asked for, so there are no true views"
NOT_SAMPLED = "num_sampled=0: no view was generated"
UNTRAINED = "the alignment head was not trained with these weights, so its readout is left out"
WITHIN = (0, 1, 2)


def evaluate(
    model: CameoModel,
    pipeline: MultiViewPipeline,
    data: Dataset[MultiViewSample],
    settings: EvaluationSettings,
    *,
    sampled: SampledViews | None = None,
    trained_head: bool = True,
) -> dict[str, Any]:
    """Measure a model on fixed samples and noise; the model is left as it was.

    Example:
        >>> import cameo
        >>> from cameo.backbone import get_backbone
        >>> pipeline = get_backbone("cat3d").build("tiny")
        >>> model = cameo.wrap(pipeline.denoiser, backbone="cat3d")
        >>> wall = {
        ...     "images": torch.rand(2, 3, 32, 32),
        ...     "depth": torch.full((2, 1, 32, 32), 2.0),
        ...     "intrinsics": torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).repeat(2, 1, 1),
        ...     "extrinsics": torch.eye(4).repeat(2, 1, 1),
        ...     "num_reference_views": 1,
        ...     "key": "wall/0-1",
        ... }
        >>> settings = EvaluationSettings(num_samples=1, num_sampled=0, attention_layers="none", noise_levels=(1.0,))
        >>> sections = evaluate(model, pipeline, [wall], settings)["sections"]
        >>> list(sections["denoising"]["per_sample"]["psnr_covisible"])
        ['wall/0-1']
        >>> sections["novel_views"]["notes"]
        {'all': 'num_sampled=0: no view was generated'}

    Args:
        model: wraps `pipeline.denoiser`.
        pipeline: turns batches into inputs of the denoiser, and samples.
        data: samples with depth; the same data for all models that are compared.
        settings: see `EvaluationSettings`.
        sampled: what `sample_targets` returned for this model and these settings, if it was already called.
        trained_head: whether the alignment heads were trained with the model; if not, their readout is left out.

    Returns:
        A JSON object: `settings`; `data` (number of views, image size, and mean color and depth of each sample, with
        which a comparison checks that the samples are the same); `sections`, each with the attributes of `Section`:

        - `novel_views`: `psnr`, `psnr_covisible` (pixels that a reference sees), `ssim`, `lpips_TRUNK`, `fid`.
        - `attention`: per layer, see `cameo.probe_layers`.
        - `consistency`: of generated views and reference views with each other, see `cameo.evaluation.consistency`.
        - `denoising`: `loss`, `loss_low`, `loss_mid`, `loss_high`; `psnr_covisible` and `psnr_all` of the clean image
          predicted at high noise.

    Raises:
        DataError: if the samples have no depth, or there are too few.
        ValueError: if nothing can be measured, see `validate`; if predictions of the model are not finite; or if
            `sampled` has another number of samples.
    """
    sections = {
        "novel_views": Section(),
        "attention": Section(),
        "consistency": Section(),
        "denoising": _denoising(model, pipeline, data, settings),
    }
    references = int(data[0]["num_reference_views"])
    if not references or not settings.num_sampled:
        for name in ("novel_views", "consistency"):
            sections[name].notes["all"] = NOT_SAMPLED if references else NO_REFERENCE
    else:
        sampled = sampled or sample_targets(model, pipeline, data, settings)
        if len(sampled.batches) != settings.num_sampled:
            raise ValueError(
                f"sampled: expected num_sampled={settings.num_sampled} samples, got {len(sampled.batches)}; "
                "call sample_targets with the settings of the evaluation"
            )
        sections["novel_views"] = novel_views(sampled, settings)
        sections["consistency"] = consistency(sampled, settings)
    sections["attention"] = _attention(model, pipeline, data, settings, trained_head)
    result = {
        "settings": asdict(settings),
        "data": _describe(data, settings),
        "sections": {name: asdict(section) for name, section in sections.items()},
    }
    # As it is read from a file, so that results in memory and results from files can be compared.
    return dict(json.loads(json.dumps(result, allow_nan=False)))


def _denoising(
    model: CameoModel, pipeline: MultiViewPipeline, data: Dataset[MultiViewSample], settings: EvaluationSettings
) -> Section:
    validation, section = settings.validation(), Section()
    errors = measure_denoising(model, pipeline, data, validation, predict_from=0.0)
    _check_finite(errors)
    low, high = settings.noise_bands
    bands: dict[str, list[float]] = {"loss": list(settings.noise_levels)}
    bands["loss_low"] = [level for level in settings.noise_levels if level < low]
    bands["loss_mid"] = [level for level in settings.noise_levels if low <= level <= high]
    bands["loss_high"] = [level for level in settings.noise_levels if level > high]
    for name, levels in bands.items():
        if levels:
            section.add(name, errors.keys, errors.sample_losses(levels))
        else:
            section.mean[name], section.notes[name] = None, f"no level of noise_levels={settings.noise_levels} is in it"
    if errors.not_covisible is None:
        covisible = errors.sample_psnr(errors.squared_covisible, validation.high_levels)
        section.add("psnr_covisible", errors.keys, covisible, missing="no target pixel is seen by a reference")
    else:
        section.mean["psnr_covisible"], section.notes["psnr_covisible"] = None, errors.not_covisible
    section.add("psnr_all", errors.keys, errors.sample_psnr(errors.squared, validation.high_levels))
    squared = {
        "psnr_all": errors.squared,
        "psnr_covisible": errors.squared_covisible if errors.not_covisible is None else {},
    }
    by_level = {"loss": errors.loss} | {
        name: {level: errors.sample_psnr(of_levels, [level]) for level in of_levels}
        for name, of_levels in squared.items()
        if of_levels
    }
    section.details["by_level"] = {
        name: {str(level): _mean(values) for level, values in of_levels.items()} for name, of_levels in by_level.items()
    }
    return section


def _check_finite(errors: DenoisingErrors) -> None:
    """Refuse a broken model, which would otherwise be measured on the samples with finite predictions only."""
    for level, losses in errors.loss.items():
        for key, *values in zip(errors.keys, losses, errors.squared[level], strict=True):
            if not all(map(math.isfinite, values)):
                raise ValueError(
                    f"model: its prediction for sample {key} at noise level {level} is not finite, so nothing can be "
                    "measured. Evaluate an earlier checkpoint, or in higher precision"
                )


def _describe(data: Dataset[MultiViewSample], settings: EvaluationSettings) -> dict[str, Any]:
    """Describe the samples, so that a comparison can check whether two results are of the same ones."""
    samples: dict[str, list[float]] = {}
    total = max(settings.num_samples, settings.num_sampled)
    batch: dict[str, Any] = {}
    for _, batch in sample_batches(data, total, 1, torch.device("cpu")):
        depth = batch["depth"].double()
        means = batch["images"].double().mean(), torch.where(is_measured(depth), depth, 0).mean()
        samples[batch["key"][0]] = [round(float(mean), 5) for mean in means]
    return {
        "num_views": batch["images"].shape[1],
        "num_reference_views": int(batch["num_reference_views"]),
        "image_size": list(batch["images"].shape[-2:]),
        "samples": samples,
    }


def _attention(
    model: CameoModel,
    pipeline: MultiViewPipeline,
    data: Dataset[MultiViewSample],
    settings: EvaluationSettings,
    trained_head: bool,
) -> Section:
    """Precision of the attention of each layer; `mean` is over all matches of all samples, as in the probe."""
    section = Section()
    if settings.attention_layers == "none":
        section.notes["all"] = "attention_layers=none: left out"
        return section
    supervised = [attention_layer.path for attention_layer in model.supervised_layers]
    device = next(model.parameters()).device
    probe = probe_layers(
        model,
        (batch for _, batch in sample_batches(data, settings.num_samples, settings.batch_size, device)),
        settings.attention_levels,
        prepare=pipeline,
        layers=supervised if settings.attention_layers == "supervised" else None,
        within=WITHIN,
        metric=settings.metric_depth,
        seed=settings.noise_seed,
    )
    if not trained_head:
        section.notes["through_head"] = UNTRAINED
    for layer in probe.layers:
        if layer.reason is not None:
            section.notes[layer.path] = f"not probed: {layer.reason}"
            continue
        measured = layer.hits if trained_head else layer.hits.keys() - {"through_head"}
        readouts = [name for name in READOUTS if name in measured]
        for readout in readouts if layer.path in supervised else ["mean"]:
            for within in probe.within if layer.reach != "cell" else (1,):
                _add_precision(section, probe, layer, readout, within)
        section.details[layer.path] = {readout: _by_angle_and_level(probe, layer, readout) for readout in readouts}
    return section


def _add_precision(section: Section, probe: LayerProbe, layer: ProbedLayer, readout: str, within: int | str) -> None:
    """Add the precision of a layer within a distance; with that of the mean over heads, also chance and ceiling."""
    suffix = "view" if layer.reach == "cell" else within
    column = 0 if layer.reach == "cell" else probe.within.index(within)
    assert layer.pairs is not None
    assert layer.chance is not None
    pairs = layer.pairs.sum(-1)
    counts = {readout: layer.hits[readout].mean(0)[..., column].sum(-1)}
    pooled = {readout: probe.precision(layer.path, within=within, readout=readout)}
    if readout == "mean":
        counts["chance"], pooled["chance"] = layer.chance[..., column].sum(-1), probe.chance(layer.path, within=within)
        if within == NEAR and layer.ceiling is not None:
            counts["ceiling"], pooled["ceiling"] = layer.ceiling.sum(-1), probe.ceiling(layer.path)
    for kind, hits in counts.items():
        name = f"{layer.path} {kind}@{suffix}"
        shares = [float(count / total) if total else None for count, total in zip(hits, pairs, strict=True)]
        section.add(name, probe.samples, shares, missing="no token of a view is visible in another")
        section.mean[name] = pooled[kind]


def _mean(values: Iterable[float]) -> float:
    """Mean over the samples that have a value; at least one has."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known)


def _by_angle_and_level(probe: LayerProbe, layer: ProbedLayer, readout: str) -> dict[str, Any]:
    """Precision within one token: of all noise levels by angle, with chance, and of all angles by noise level."""
    by_angle = [
        {
            "degrees": list(limits),
            "pairs": probe.pairs(layer.path, angle_bin=limits),
            "precision": probe.precision(layer.path, angle_bin=limits, readout=readout),
            "chance": probe.chance(layer.path, angle_bin=limits, readout=readout),
        }
        for limits in probe.angle_bins
    ]
    by_level = {
        str(level): probe.precision(layer.path, noise_level=level, readout=readout) for level in probe.noise_levels
    }
    return {"by_angle": by_angle, "by_level": by_level}
