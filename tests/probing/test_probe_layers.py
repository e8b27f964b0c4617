"""`cameo.probe_layers` on planted attention, on every backbone, and on what it cannot probe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cameo
from cameo import Correspondence, LayerProbe, TokenLayout, probe_layers
from cameo.attention.capture import AttentionLayer
from cameo.backbone import get_backbone
from cameo.data import EmbeddedScenes, MultiViewDataset, collate
from cameo.errors import DataError
from cameo.evaluation.validation import validate
from cameo.probing.denoising import ValidationSettings
from tests.helpers import backbone_checks as checks
from tests.helpers.backbone_rows import TINY, Row, every_tiny
from tests.helpers.batches import make_batch
from tests.helpers.planted_attention import ZERO123, PlantedAttention, joined, per_cell, tiled
from tests.helpers.probes import CAT3D, LEVELS, small_batches


def planted_probe(layout: TokenLayout, arrange: Any, batch: Any, *, shift: int = 0, **options: Any) -> LayerProbe:
    """Probe a model whose attention looks where the test says."""
    model = PlantedAttention(layout, arrange, shift=shift)
    wrapped = model.wrapped(**({"normalize": "all_views"} if layout.reach == "cell" else {}))
    if options.pop("own_grid", False):
        model.layer = replace(model.layer, reference_size=(96, 96))
        wrapped._supervised = [model.layer]
    return probe_layers(wrapped, [batch], LEVELS, prepare=model, **options)


@pytest.mark.parametrize(("shift", "within"), [(0, 0), (1, 1), (2, 2), (4, 1)])
def test_an_oracle_is_right_and_a_shifted_one_off_by_its_shift(shift: int, within: int) -> None:
    batch = make_batch(views=3, size=48)  # 4 x 4 tokens of 12 pixels
    probe = planted_probe(TokenLayout("b (v h w)"), joined, batch, shift=shift)
    match = Correspondence.from_depth(batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grid=4)
    target = match.index[match.matched]
    looked = (target + shift) % 16
    distance = torch.maximum((target // 4 - looked // 4).abs(), (target % 4 - looked % 4).abs())
    for limit in (0, 1, 2):
        expected = float((distance <= limit).float().mean())
        assert probe.precision(0, within=limit) == pytest.approx(expected)
        assert probe.precision("attn", within=limit, readout="best_head", noise_level=1.0) == pytest.approx(expected)
    assert probe.precision(0, within=within) > 0.4
    assert within == 0 or probe.precision(0, within=0) == 0
    assert probe.pairs(0) == int(match.matched.sum())
    # The cameras look the same way.
    assert probe.pairs(0, angle_bin=(0, 15)) == probe.pairs(0)
    assert probe.precision(0, angle_bin=1) is None
    if not shift:
        assert probe.skill(0) == 1.0
        assert probe.best == "attn"


def test_tiles_with_a_reference_on_a_grid_of_its_own(tmp_path: Path) -> None:
    scenes = EmbeddedScenes(
        num_scenes=1, content="objects", rig="zero123plus-v1.2", size=(48, 48), cache_dir=tmp_path, progress=False
    )
    data = MultiViewDataset(scenes, num_views=7, num_reference_views=1, selection="in_order")
    probe = planted_probe(ZERO123, tiled, collate([data[0]]), own_grid=True)
    assert probe.precision(0, within=0) == 1.0
    assert probe.layers[0].tokens == "8 x 8 (1x), 4 x 4 (6x)"
    by_bin = [probe.pairs(0, angle_bin=number) for number in range(4)]
    assert sum(by_bin) == probe.pairs(0) > 0
    assert sum(count > 0 for count in by_bin) > 1


@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (None, 0.0)])
def test_a_layer_with_one_token_per_view_is_asked_for_the_view(shift: int | None, expected: float) -> None:
    batch = make_batch(samples=2, views=4, size=48)
    batch["extrinsics"][:, :, 0, 3] = torch.tensor([0.0, 0.0, -0.5, -0.5])
    model = PlantedAttention(TokenLayout("(b h w) v", references_last=1), per_cell, sign=1.0 if shift == 0 else -1.0)
    probe = probe_layers(model.wrapped(normalize="all_views"), [batch], LEVELS, prepare=model)
    assert probe.precision(0) == probe.precision(0, within=2) == expected
    assert probe.chance(0) == pytest.approx(1 / 3)
    assert probe.pairs(0) == 2 * 4 * 16
    assert probe.layers[0].reach == "cell"
    assert "the share of queries whose most-attended view" in probe.table()


@pytest.mark.parametrize("within", [(0, 1, 2), (1,)])
def test_a_view_of_one_token_is_asked_for_too_and_not_supervised(within: tuple[int, ...]) -> None:
    """As in the middle of a latent U-Net at a small resolution, where the layout itself has no cells."""
    batch = make_batch(samples=2, views=4, size=12)
    batch["extrinsics"][:, :, 0, 3] = torch.tensor([0.0, 0.0, -5.0, -5.0])
    model = PlantedAttention(TokenLayout("b (v h w)"), joined)
    probe = probe_layers(model.wrapped(), [batch], LEVELS, prepare=model, within=within, metric=True)
    assert (probe.layers[0].tokens, probe.layers[0].reach) == ("1 x 1", "cell")
    assert probe.pairs(0) == 2 * 4
    assert probe.precision(0) == probe.skill(0) == 1.0
    assert probe.chance(0) == pytest.approx(1 / 3)
    assert LayerProbe.from_dict(json.loads(json.dumps(probe.to_dict()))).skill(0) == 1.0
    with pytest.raises(ValueError, match=r"no layer that can be supervised .*a view is one token"):
        _ = probe.best  # the loss within a view would be 0 whatever the layer does


@every_tiny
def test_every_backbone_is_probed_and_left_as_it_was(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = row.pipeline()
    denoiser = pipeline.denoiser
    denoiser.train()
    next(denoiser.children()).eval()  # a user's choice within a model that trains
    modes = [module.training for module in denoiser.modules()]
    state = {name: value.clone() for name, value in denoiser.state_dict().items()}
    count = checks.hooks(denoiser)
    inputs = row.subject().inputs(denoiser)
    before = checks.run(denoiser.eval(), inputs)
    for module, mode in zip(denoiser.modules(), modes, strict=True):
        module.training = mode
    random = torch.get_rng_state()
    batches = small_batches(row)
    with monkeypatch.context() as watched:
        watched.setattr("torch.cuda.manual_seed_all", lambda seed: pytest.fail("the GPUs' generators were seeded"))
        probe = probe_layers(pipeline, batches, LEVELS, **row.wrap, metric=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in denoiser.modules()] == modes
    assert checks.hooks(denoiser) == count
    assert all(torch.equal(value, state[name]) for name, value in denoiser.state_dict().items())
    assert checks.same(checks.run(denoiser.eval(), inputs), before)

    adapter = get_backbone(row.backbone)
    attention_layers = adapter.layers_for(denoiser, **row.wrap)
    assert [layer.path for layer in probe.layers] == [attention_layer.path for attention_layer in attention_layers]
    assert all(layer.reason is None for layer in probe.layers)
    assert {place.path for place in probe.ranking} == {attention_layer.path for attention_layer in attention_layers}
    assert probe.backbone == row.backbone
    again = probe_layers(pipeline, small_batches(row), LEVELS, **row.wrap, metric=True)
    assert again.to_dict() == probe.to_dict()


def test_layers_are_probed_as_if_they_were_joined() -> None:
    """Inflating the first layer does not change its queries and keys, so that its hits stay the same."""
    row = TINY[-1]
    pipeline = row.pipeline()
    apart = probe_layers(pipeline, small_batches(row), LEVELS, inflate=True, layers=[0])
    get_backbone("sv3d").inflate(pipeline.denoiser, apart.layers[0].path)
    joined_up = probe_layers(pipeline, small_batches(row), LEVELS, inflate=True, layers=[0])
    # The inflated call sums in another order, which may decide an argmax between equal tokens.
    for readout in ("mean", "best_head"):
        difference = apart.layers[0].hits[readout] - joined_up.layers[0].hits[readout]
        assert np.abs(difference).sum() <= 0.01 * apart.pairs(0)


def test_the_probe_agrees_with_the_validation_and_reads_through_the_head() -> None:
    torch.manual_seed(0)
    pipeline = CAT3D.pipeline()
    model = cameo.wrap(pipeline.denoiser, "cat3d", layer=1)
    batch = CAT3D.batch(samples=2)
    samples = [
        {name: value[at] if isinstance(value, (Tensor, list)) else value for name, value in batch.items()}
        for at in range(2)
    ]
    settings = ValidationSettings(num_samples=2, batch_size=2, noise_levels=LEVELS, seed=1234)
    found = validate(model, pipeline, samples, settings)["precision"]
    for probe in (
        probe_layers(pipeline, [batch], LEVELS),
        probe_layers(model, [batch], LEVELS, prepare=pipeline),
        probe_layers(model, [collate([one]) for one in samples], LEVELS, prepare=pipeline),  # other batches, same noise
    ):
        for readout in ("mean", "through_head"):
            for within in (0, 1):
                # The batch size may decide an argmax between two equal tokens.
                shown = probe.precision(1, within=within, readout=readout)
                assert shown == pytest.approx(found[f"{readout}@{within}"], abs=2 / probe.pairs(1))
        assert "through_head" not in probe.layers[0].hits
    assert "through the head within 1" in probe.table()


def test_a_plain_denoiser_is_probed_with_a_function_that_prepares_its_inputs() -> None:
    pipeline = CAT3D.pipeline()
    seen = []

    def prepare(batch: Any, level: float) -> Any:
        seen.append(level)
        inputs = pipeline.training_inputs(batch, timesteps=torch.full((2,), round(level * 999)))  # draws noise itself
        return inputs.args, inputs.kwargs

    state = torch.get_rng_state()
    first, second = (
        probe_layers(pipeline.unet, small_batches(CAT3D), LEVELS, backbone="cat3d", prepare=prepare) for _ in range(2)
    )
    assert seen == [*LEVELS] * 2
    assert first.to_dict() == second.to_dict()
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_that_cannot_be_probed_are_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = CAT3D.pipeline()
    adapter = type(get_backbone("cat3d"))
    known = get_backbone("cat3d").attention_layers(pipeline.unet)
    extra = [
        replace(known[1], unsupported="its attention is masked"),
        replace(known[2], stride=None),
        AttentionLayer(3, "conv_in", 4, known[0].layout, stride=8),  # this module runs, but is no attention
    ]
    monkeypatch.setattr(adapter, "attention_layers", lambda self, model: [known[0], *extra])
    probe = probe_layers(pipeline, small_batches(CAT3D), LEVELS)
    reasons = [layer.reason for layer in probe.layers]
    assert reasons[:3] == [None, "its attention is masked", "its token grid is not known: the layer has no stride"]
    assert "no attention kernel was seen in it" in str(reasons[3])
    assert [place.index for place in probe.ranking] == [0]
    assert "Not ranked:" in probe.table()
    assert "`conv_in`: layer 'conv_in' ran, but no attention kernel" in probe.table()
    with pytest.raises(ValueError, match="layer 'conv_in' was not probed: layer 'conv_in' ran"):
        probe.precision("conv_in")
    again = LayerProbe.from_dict(json.loads(json.dumps(probe.to_dict())))
    assert again.table() == probe.table()

    monkeypatch.setattr(adapter, "attention_layers", lambda self, model: extra)
    with pytest.raises(ValueError, match=r"no layer can be probed: .*masked; .*has no stride; conv_in: "):
        probe_layers(pipeline, small_batches(CAT3D), LEVELS)


def test_views_that_share_nothing_leave_no_ranking() -> None:
    batch = CAT3D.batch()
    batch["depth"] = torch.zeros_like(batch["depth"])
    with pytest.raises(ValueError, match=r"no layer can be probed: .*none of its queries reaches a token"):
        probe_layers(CAT3D.pipeline(), [batch], LEVELS)


def bad_inputs() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    no_depth = {name: value for name, value in CAT3D.batch().items() if name != "depth"}
    return {
        "level": (
            {"noise_levels": (0.5, 500)},
            ValueError,
            r"noise_levels: expected .* in \[0, 1\], got \(0.5, 500",
        ),
        "no level": ({"noise_levels": ()}, ValueError, "noise_levels: expected different shares"),
        "layer": ({"layers": [99]}, ValueError, "layers.*99"),
        "within": ({"within": (0, 2)}, ValueError, "within: expected different numbers of tokens >= 0, 1 among them"),
        "no batch": ({"batches": []}, ValueError, "batches: expected at least one batch, got none"),
        "no depth": ({"batches": [no_depth]}, DataError, "has no depth, and the probe takes the true matches"),
        "backbone": ({"backbone": "cat4d"}, ValueError, "cat4d"),
        "another backbone": ({"backbone": "sv3d"}, ValueError, "backbone 'sv3d' does not fit"),
        "not inflatable": ({"inflate": True}, ValueError, "backbone 'cat3d' lists no inflatable layer"),
        "no model": ({"model": "unet"}, TypeError, "model: expected a pipeline of an adapter, .* got str"),
        "no prepare": ({"model": CAT3D.pipeline().unet}, ValueError, "prepare: a model without its pipeline needs"),
        "unknown model": ({"model": nn.Linear(1, 1), "prepare": CAT3D.pipeline()}, ValueError, "recognized by none"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_refused(case: str) -> None:
    changes, error, message = bad_inputs()[case]
    options = {"model": CAT3D.pipeline(), "batches": small_batches(CAT3D), "noise_levels": LEVELS, **changes}
    with pytest.raises(error, match=message):
        probe_layers(options.pop("model"), options.pop("batches"), options.pop("noise_levels"), **options)
