"""The alignment loss of a step is the mean over all matches of the whole batch, however it is cut into parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cameo import Correspondence
from cameo.alignment.supervision import match_totals, supervision_weights
from tests.helpers.alignment_inputs import make_inputs
from tests.helpers.training_runs import fresh_accelerate, make_trainer, scene_cache
from tests.helpers.wrapped_models import gradients, matches, nothing_visible, tokens, toy


def halves(match: Correspondence) -> list[Correspondence]:
    parts = []
    for part in (slice(0, 1), slice(1, 2)):
        weight, distance = (None if values is None else values[part] for values in (match.match_weight, match.distance))
        parts.append(Correspondence(match.index[part], match.token_grids, weight, distance))
    return parts


@pytest.mark.parametrize("options", [{}, {"reduction": "released", "num_reference_views": 1}], ids=["mean", "released"])
@pytest.mark.parametrize("weighted", [False, True])
def test_weights_of_the_parts_are_those_of_the_whole(options: dict[str, Any], weighted: bool) -> None:
    _, _, match = make_inputs(weighted=weighted, visible=0.3)
    parts = halves(match)
    totals = torch.stack([match_totals(part, **options) for part in parts]).sum(dim=0)
    assert totals.shape == (2 if options else 1,)
    joined = torch.cat([supervision_weights(part, totals=totals, **options) for part in parts])
    torch.testing.assert_close(joined, supervision_weights(match, **options))
    with pytest.raises(ValueError, match="divides by nothing"):
        match_totals(match, reduction="sum")
    with pytest.raises(ValueError, match="divides by nothing"):
        supervision_weights(match, reduction="sum", totals=totals)


@pytest.mark.parametrize("second", [matches(seed=1), nothing_visible()], ids=["matches in both", "matches in one"])
def test_accumulated_parts_have_the_gradient_of_the_whole_batch(second: Correspondence) -> None:
    first, model = matches(seed=0), toy().double()
    x = [tokens(seed=seed).double() for seed in (0, 1)]
    whole = Correspondence(torch.cat([first.index, second.index]), first.token_grids)
    model(torch.cat(x), correspondence=whole)
    model.alignment_loss.backward()
    expected, loss = gradients(model), model.alignment_loss.item()
    model.zero_grad()
    totals = (model.match_totals(first) + model.match_totals(second)) / 2
    losses = []
    for part, match in zip(x, (first, second), strict=True):
        model(part, correspondence=match, match_totals=totals)
        (model.alignment_loss / 2).backward()
        losses.append(model.alignment_loss.item())
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-10, atol=1e-14)


def test_a_run_that_accumulates_takes_the_mean_over_all_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    sums: list[Tensor] = []
    with fresh_accelerate():
        trainer = make_trainer(tmp_path / "run", max_train_steps=1, gradient_accumulation_steps=3, train_batch_size=1)
        model = trainer.model
        forward = type(model)._align

        def align(self: Any, captured: Any, losses: Any) -> None:
            forward(self, captured, losses)
            (planned,) = losses
            totals = planned.options["totals"]
            assert totals is not None
            # what the matches of this micro batch add up to, and how many they are
            sums.append(torch.stack([self.alignment_loss.detach() * totals[0], planned.local.matched.sum()]))

        monkeypatch.setattr(type(model), "_align", align)
        trainer.train()
    (entry,) = trainer.metrics.read()
    added, counts = torch.stack(sums).T
    assert len(set(counts.tolist())) > 1  # else it would be the mean of the means too
    assert entry["alignment_loss"] == pytest.approx((added.sum() / counts.sum()).item(), rel=1e-5)
    assert entry["supervised"] == counts.sum()
