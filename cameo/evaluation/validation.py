"""Validation during training: the convergence curve with little variance.

Where CAMEO shows is at high noise: the model must then take the target view from the reference, through the
attention that the loss supervises. So the headline is the PSNR of the predicted clean image at noise levels >= 0.95
on the target pixels that a reference view sees; all pixels and the denoising loss stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch.utils.data import Dataset

from cameo.data import MultiViewSample
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline
from cameo.probing.denoising import DenoisingErrors, DenoisingPass, ValidationSettings, measure_denoising
from cameo.probing.tally import BatchMatches, LayerHitCounter

__all__ = ["validate"]


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
    counted = _SupervisedLayer(model)
    errors = measure_denoising(model, pipeline, data, settings, layers=[counted.layer], observe=counted.observe)
    return {
        **_denoising_report(errors, settings.high_levels),
        **_attention_report(counted.tally, errors.references),
        "settings": asdict(settings),
    }


class _SupervisedLayer:
    """Counts how often the attention of the first supervised layer finds the true match, on the way."""

    def __init__(self, model: CameoModel) -> None:
        self.layer, self.head = model.supervised_layers[0], model.alignment_heads[0]
        self.tally = LayerHitCounter(self.layer)
        self._truths: BatchMatches | None = None

    def observe(self, one: DenoisingPass) -> None:
        if self._truths is None or self._truths.batch is not one.batch:
            if self._truths is not None:
                self.tally.close_batch()
            self._truths = BatchMatches(one.batch, metric=False)
        self.tally.count(one.captured[self.layer.path], self._truths, (0, 1), None, self.head)  # type: ignore[arg-type]


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


def _attention_report(tally: LayerHitCounter, references: int) -> dict[str, Any]:
    hits, pairs, chance = tally.totals()
    one_token = tally.one_token and pairs > 0
    notes = {}
    if not references:
        notes["psnr_covisible"] = "num_reference_views=0: there is no reference view that could see a pixel"
    if one_token:
        notes["precision"] = "a query reaches one token of each view: no choice among tokens; see precision_view"
    else:
        notes["precision_view"] = "a query reaches several tokens of a view; see precision"
        if not pairs:
            notes["precision"] = "no query of the layer reaches a token that shows the same surface point"
    shares = {name: (value.amax(0) / pairs).tolist() for name, value in hits.items()}  # of several heads the best
    tokens = {f"{name}@{within}": share[within] for name, share in shares.items() for within in (0, 1)[: len(share)]}
    views = {name: share[0] for name, share in shares.items()}
    return {
        "precision": None if one_token else tokens or None,
        "precision_view": {**views, "chance": chance[0] / pairs} if one_token else None,
        "notes": notes,
        "pairs": pairs,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
