"""Validation during training: the convergence curve with little variance.

The effect of CAMEO shows at high noise, where the model must take the target view from the reference view, through the
attention that the loss supervises. The main figure is therefore the PSNR of the predicted clean image at noise levels
>= 0.95 on the target pixels that a reference view sees. The PSNR of all pixels and the denoising loss are reported too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from cameo.alignment import AlignmentHead
from cameo.attention.capture import AttentionLayer
from cameo.data import MultiViewSample
from cameo.model import CameoModel
from cameo.pipeline import MultiViewPipeline
from cameo.probing.denoising import DenoisingErrors, DenoisingPass, ValidationSettings, measure_denoising
from cameo.probing.tally import BatchMatches, LayerHitCounter
from cameo.renamed import old_functions

__all__ = ["validate"]

if not TYPE_CHECKING:  # a type checker is to see the new names alone
    __getattr__ = old_functions(__name__)


def validate(
    model: CameoModel,
    pipeline: MultiViewPipeline,
    data: Dataset[MultiViewSample],
    settings: ValidationSettings,
    *,
    predict_from: float | None = None,
    layers: Sequence[AttentionLayer] = (),
) -> dict[str, Any]:
    """Measure a model on fixed samples, noise and noise levels; the attention is that of the first supervised layer.

    Args:
        model: wraps `pipeline.denoiser`.
        pipeline: turns batches into inputs of the denoiser.
        data: samples with depth, or with tracks, from which the true matches are taken where there is no depth.
        settings: samples, noise levels and noise.
        predict_from: noise level from which on the clean image is predicted, for `psnr_all_by_level` and
            `psnr_covisible_by_level`; default `settings.high_noise`. With 0 every level has a PSNR. A model with a
            VAE decodes the views once for each level.
        layers: further layers whose attention is measured in the same forward passes, for `precision_by_layer`.

    Returns:
        - `loss` (mean over noise levels) and `loss_by_level`.
        - `psnr_all` in dB at high noise, over the target views. `psnr_covisible`, over their pixels that a reference
          view sees; None without reference views or depth. `psnr_all_by_level` and `psnr_covisible_by_level`, the same
          at each noise level from `predict_from` on.
        - `precision`: share of matches whose most-attended token is the matched one (`@0`) or lies within one token of
          it (`@1`, tokens of the key view), for the mean over heads, the best head, and through the alignment head.
          None where a query reaches only one token of each view, or no match.
        - `precision_view`, only where a query reaches one token of each view: share of query tokens with a match whose
          most-attended other view shows the same surface point; with `chance`, the share that a view drawn at random
          would have.
        - `precision_by_layer`, only with `layers`: path of each of them to its `precision`, without an alignment head.
        - `notes`: the reason for each None. `settings`, and the number of `pairs` and `pixels` behind the figures at
          high noise.

    Raises:
        DataError: if the samples lack the field `depth`; it may be 0, which means not measured, everywhere.
        ValueError: if no target pixel is seen by a reference, where there is one, or no noise level is high.
    """
    attention = _ObservedAttention(model, layers)
    observed = list({layer.path: layer for layer in (attention.layer, *layers)}.values())
    start = settings.high_noise if predict_from is None else min(predict_from, settings.high_noise)
    errors = measure_denoising(
        model, pipeline, data, settings, predict_from=start, layers=observed, observe=attention.observe
    )
    return {
        **_denoising_report(errors, settings.high_levels),
        **_attention_report(attention.counter, errors.not_covisible),
        **attention.precision_by_layer(),
        "settings": asdict(settings),
    }


class _ObservedAttention:
    """Counts the hits of the first supervised layer and of `others` during the forward passes of the denoising."""

    def __init__(self, model: CameoModel, others: Sequence[AttentionLayer]) -> None:
        self.layer, self.head = model.supervised_layers[0], model.alignment_heads[0]
        self.counter = LayerHitCounter(self.layer)
        self.others = [LayerHitCounter(layer) for layer in others]
        self._matches: BatchMatches | None = None

    def observe(self, denoised: DenoisingPass) -> None:
        if self._matches is None or self._matches.batch is not denoised.batch:
            if self._matches is not None:
                for counter in (self.counter, *self.others):
                    counter.close_batch()
            self._matches = BatchMatches(denoised.batch, metric=False)
        self._count(self.counter, denoised, self.head)  # type: ignore[arg-type]
        for counter in self.others:
            self._count(counter, denoised, None)

    def _count(self, counter: LayerHitCounter, denoised: DenoisingPass, head: AlignmentHead | None) -> None:
        assert self._matches is not None
        counter.count(denoised.captured[counter.layer.path], self._matches, (0, 1), None, head)

    def precision_by_layer(self) -> dict[str, Any]:
        precision = {counter.layer.path: _precision(counter) for counter in self.others}
        return {"precision_by_layer": precision} if precision else {}


def _denoising_report(errors: DenoisingErrors, high_levels: Sequence[float]) -> dict[str, Any]:
    by_level = {str(level): _mean(values) for level, values in errors.loss.items()}

    def psnr(squared: Mapping[float, Sequence[float]], levels: Sequence[float]) -> float | None:
        finite = [value for value in errors.sample_psnr(squared, levels) if not math.isnan(value)]
        return _mean(finite) if finite else None

    covisible = errors.squared_covisible if errors.not_covisible is None else {}
    return {
        "loss": _mean(list(by_level.values())),
        "loss_by_level": by_level,
        "psnr_covisible": psnr(covisible, high_levels) if errors.not_covisible is None else None,
        "psnr_all": psnr(errors.squared, high_levels),
        "psnr_covisible_by_level": {str(level): psnr(covisible, [level]) for level in covisible},
        "psnr_all_by_level": {str(level): psnr(errors.squared, [level]) for level in errors.squared},
        "pixels": errors.pixels * len(high_levels) // max(len(errors.squared), 1),  # each level has the same
    }


def _attention_report(counter: LayerHitCounter, not_covisible: str | None) -> dict[str, Any]:
    hits, pairs, chance = counter.totals()
    one_token = counter.one_token and pairs > 0
    notes = {}
    if not_covisible is not None:
        notes["psnr_covisible"] = not_covisible
    if one_token:
        notes["precision"] = "a query reaches one token of each view, so there is no choice; see precision_view"
    else:
        notes["precision_view"] = "a query reaches several tokens of a view; see precision"
        if not pairs:
            notes["precision"] = "no query of the layer reaches a token that shows the same surface point"
    views = {readout: share[0] for readout, share in _shares(hits, pairs).items()}
    return {
        "precision": _precision(counter),
        "precision_view": {**views, "chance": chance[0] / pairs} if one_token else None,
        "notes": notes,
        "pairs": pairs,
    }


def _precision(counter: LayerHitCounter) -> dict[str, float] | None:
    """Share of matches that are found by readout and distance; None where a query reaches one token of each view."""
    hits, pairs, _ = counter.totals()
    if counter.one_token:
        return None
    shares = _shares(hits, pairs).items()
    return {f"{name}@{within}": share[within] for name, share in shares for within in (0, 1)[: len(share)]} or None


def _shares(hits: Mapping[str, Tensor], pairs: int) -> dict[str, list[float]]:
    """Share of matches that each readout finds, by distance; of several heads that of the best one."""
    return {readout: (count.amax(0) / pairs).tolist() for readout, count in hits.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
