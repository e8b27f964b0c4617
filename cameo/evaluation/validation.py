"""Validation during training: the convergence curve with little variance.

The effect of CAMEO shows at high noise, where the model must take the target view from the reference view, through the
attention that the loss supervises. The main figure is therefore the PSNR of the predicted clean image at noise levels
>= 0.95 on the target pixels that a reference view sees. The PSNR of all pixels and the denoising loss are reported too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from cameo.data import MultiViewSample
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline
from cameo.probing.denoising import NOT_COVISIBLE, DenoisingErrors, DenoisingPass, ValidationSettings, measure_denoising
from cameo.probing.tally import BatchMatches, LayerHitCounter
from cameo.renamed import old_functions

__all__ = ["validate"]

if not TYPE_CHECKING:  # a type checker is to see the new names alone
    __getattr__ = old_functions(__name__)


def validate(
    model: CameoModel, pipeline: MultiViewPipeline, data: Dataset[MultiViewSample], settings: ValidationSettings
) -> dict[str, Any]:
    """Measure a model on fixed samples, noise and noise levels; the attention is that of the first supervised layer.

    Returns:
        - `loss` (mean over noise levels) and `loss_by_level`.
        - `psnr_all` in dB at high noise, over the target views. `psnr_covisible`, over their pixels that a reference
          view sees; None without reference views.
        - `precision`: share of matches whose most-attended token is the matched one (`@0`) or lies within one token of
          it (`@1`, tokens of the key view), for the mean over heads, the best head, and through the alignment head.
          None where a query reaches only one token of each view, or no match.
        - `precision_view`, only where a query reaches one token of each view: share of query tokens with a match whose
          most-attended other view shows the same surface point; with `chance`, the share that a view drawn at random
          would have.
        - `notes`: the reason for each None. `settings`, and the number of `pairs` and `pixels` behind the figures.

    Raises:
        DataError: if the samples have no depth.
        ValueError: if no target pixel is seen by a reference, where there is one, or no noise level is high.
    """
    attention = _SupervisedAttention(model)
    errors = measure_denoising(model, pipeline, data, settings, layers=[attention.layer], observe=attention.observe)
    return {
        **_denoising_report(errors, settings.high_levels),
        **_attention_report(attention.counter, errors.references),
        "settings": asdict(settings),
    }


class _SupervisedAttention:
    """Counts the hits of the first supervised layer during the forward passes of the denoising."""

    def __init__(self, model: CameoModel) -> None:
        self.layer, self.head = model.supervised_layers[0], model.alignment_heads[0]
        self.counter = LayerHitCounter(self.layer)
        self._matches: BatchMatches | None = None

    def observe(self, denoised: DenoisingPass) -> None:
        if self._matches is None or self._matches.batch is not denoised.batch:
            if self._matches is not None:
                self.counter.close_batch()
            self._matches = BatchMatches(denoised.batch, metric=False)
        captured = denoised.captured[self.layer.path]
        self.counter.count(captured, self._matches, (0, 1), None, self.head)  # type: ignore[arg-type]


def _denoising_report(errors: DenoisingErrors, high_levels: Sequence[float]) -> dict[str, Any]:
    by_level = {str(level): _mean(values) for level, values in errors.loss.items()}
    covisible = [value for value in errors.sample_psnr(errors.squared_covisible, high_levels) if not math.isnan(value)]
    return {
        "loss": _mean(list(by_level.values())),
        "loss_by_level": by_level,
        "psnr_covisible": _mean(covisible) if errors.references else None,
        "psnr_all": _mean(errors.sample_psnr(errors.squared, high_levels)),
        "pixels": errors.pixels,
    }


def _attention_report(counter: LayerHitCounter, references: int) -> dict[str, Any]:
    hits, pairs, chance = counter.totals()
    one_token = counter.one_token and pairs > 0
    notes = {}
    if not references:
        notes["psnr_covisible"] = NOT_COVISIBLE
    if one_token:
        notes["precision"] = "a query reaches one token of each view, so there is no choice; see precision_view"
    else:
        notes["precision_view"] = "a query reaches several tokens of a view; see precision"
        if not pairs:
            notes["precision"] = "no query of the layer reaches a token that shows the same surface point"
    # By readout, of several heads the best one.
    shares = {readout: (count.amax(0) / pairs).tolist() for readout, count in hits.items()}
    tokens = {f"{name}@{within}": share[within] for name, share in shares.items() for within in (0, 1)[: len(share)]}
    views = {readout: share[0] for readout, share in shares.items()}
    return {
        "precision": None if one_token else tokens or None,
        "precision_view": {**views, "chance": chance[0] / pairs} if one_token else None,
        "notes": notes,
        "pairs": pairs,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
