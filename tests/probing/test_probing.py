"""`cameo.probe_layers`, what it found as `LayerProbe`, and `layer="auto"`."""

from __future__ import annotations

import json
import runpy
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

import cameo
from cameo import Correspondence, LayerProbe, TokenLayout, probe_layers
from cameo.adapters.cat3d import BUNDLED
from cameo.adapters.common.latent_pipeline import LatentPipeline
from cameo.attention.capture import AttentionLayer
from cameo.backbone import core_module, get_backbone
from cameo.config import CameoConfig
from cameo.data import EmbeddedScenes, MultiViewDataset, collate
from cameo.errors import DataError, ShapeError
from cameo.evaluation.validation import validate
from cameo.hub.card import CardFacts, model_card
from cameo.probing.denoising import ValidationSettings
from cameo.probing.hits import attention_maps, count_hits
from cameo.probing.probed_layer import ProbedLayer
from cameo.probing.truth import ANGLE_BINS, Truth, angle_bins, surface_points, view_angles
from cameo.training import setup
from cameo.training.data import build_dataset
from cameo.training.layer_choice import probe_for
from cameo.training.setup import load_pipeline
from cameo.wrap import CameoModel
from tests.evaluation.test_evaluation import ZERO123, Planted, joined, per_cell, plain_hits, tiled
from tests.helpers import backbone_checks as checks
from tests.helpers.backbone_rows import TINY, Row, every_tiny
from tests.helpers.batches import make_batch
from tests.helpers.training_runs import RECIPES, make_config, scene_cache

LEVELS = (0.5, 1.0)
CAT3D = TINY[0]


# What the queries should find


def test_view_angles_are_those_between_the_optical_axes() -> None:
    rotations = Rotation.random(5, random_state=np.random.default_rng(0))
    extrinsics = torch.eye(4).repeat(1, 5, 1, 1)
    extrinsics[0, :, :3, :3] = torch.tensor(rotations.as_matrix(), dtype=torch.float32)
    extrinsics[0, :, :3, 3] = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    axes = rotations.inv().apply([0, 0, 1])  # in the world
    expected = np.degrees(np.arccos(np.clip(axes @ axes.T, -1, 1)))
    torch.testing.assert_close(view_angles(extrinsics)[0], torch.tensor(expected), rtol=0, atol=2e-5)


def test_an_angle_on_a_limit_belongs_to_the_bin_above() -> None:
    degrees = [0, 14.9, 15, 29.9, 30, 60, 180]
    extrinsics = torch.eye(4).repeat(1, len(degrees), 1, 1)
    extrinsics[0, :, :3, :3] = torch.tensor(
        Rotation.from_rotvec([[0, one, 0] for one in degrees], degrees=True).as_matrix()
    )
    assert angle_bins(extrinsics)[0, 0].tolist() == [0, 0, 1, 1, 2, 3, 3]


def matches(samples: int, token_grids: Any, seed: int = 0) -> Correspondence:
    generator = torch.Generator().manual_seed(seed)
    views, tokens = len(token_grids), max(h * w for h, w in token_grids)
    index = torch.full((samples, views, views, tokens), -1)
    for i, (height, width) in enumerate(token_grids):
        for j, (key_height, key_width) in enumerate(token_grids):
            if i != j:
                shape = (samples, height * width)
                index[:, i, j, : height * width] = torch.randint(-1, key_height * key_width, shape, generator=generator)
    return Correspondence(index, tuple(token_grids))


def loop_chance(match: Correspondence, groups: Tensor, within: tuple[int, ...]) -> Tensor:
    """Share of the key view's tokens within some tokens of each match, one token at a time."""
    total = torch.zeros(match.batch_size, 4, len(within), dtype=torch.float64)
    for b, i, j, x in (match.index >= 0).nonzero().tolist():
        (height, width), target = match.token_grids[j], int(match.index[b, i, j, x])
        away = [
            max(abs(row - target // width), abs(column - target % width))
            for row in range(height)
            for column in range(width)
        ]
        for column, limit in enumerate(within):
            total[b, groups[b, i, j], column] += sum(distance <= limit for distance in away) / (height * width)
    return total


@pytest.mark.parametrize("token_grids", [((3, 4),) * 3, ((2, 5), (3, 3), (3, 3)), ((1, 7),) * 2])
def test_chance_is_that_of_a_plain_loop(token_grids: Any) -> None:
    match = matches(2, token_grids)
    views = len(token_grids)
    groups = torch.randint(4, (2, views, views), generator=torch.Generator().manual_seed(1))
    truth = Truth(match, groups, 4)
    torch.testing.assert_close(truth.chance((0, 1, 2)), loop_chance(match, groups, (0, 1, 2)))
    for b, group in ((0, 0), (1, 3)):
        assert truth.pairs[b, group] == int((match.matched[b] & (groups[b] == group)[..., None]).sum())


@pytest.mark.parametrize("layout", ["b (v h w)", "(b h) (v w)", "(b w) (v h)"])
def test_uniform_attention_is_at_chance_and_the_oracle_always_right(layout: str) -> None:
    """Attention that is uniform up to noise: its hits are those of a random token, which `chance` expects."""
    token_layout, match = TokenLayout(layout), matches(60, ((4, 4),) * 2)
    truth = Truth.of_layer(token_layout, match, torch.zeros(60, 2, 2, dtype=torch.long), 1)
    index = truth.match.index
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(index.shape[0], 8, 2, index.shape[-1], 3, generator=generator) for _ in range(2))
    hits = count_hits(query, key, truth, None, 1e-3, (0, 1, 2))["best_head"]
    shares, chance = hits.sum((1, 2)).mean(0) / truth.pairs.sum(), truth.chance((0, 1, 2)).sum((0, 1))
    # Some 1000 pairs and eight heads: the standard error is below 0.02 even where the heads repeat each other.
    torch.testing.assert_close(shares.double(), chance / truth.pairs.sum(), rtol=0, atol=0.05)

    tokens = index.shape[-1]
    codes = nn.functional.one_hot(index.clamp_min(0), tokens) * truth.match.matched[..., None]
    query = codes.permute(0, 1, 3, 2, 4).flatten(3)[:, None].float() * 99
    key = torch.eye(2 * tokens).view(1, 1, 2, tokens, -1).expand(len(query), -1, -1, -1, -1)
    assert torch.equal(count_hits(query, key, truth, None, 1.0, (0, 1))["mean"][0, :, 0, 0], truth.pairs[:, 0].float())


def test_hits_by_sample_and_group_add_up_to_those_of_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    match = matches(3, ((2, 3), (3, 3), (3, 3)))
    query, key = (torch.randn(3, 2, 3, 9, 4, generator=generator) for _ in range(2))
    groups = torch.randint(4, (3, 3, 3), generator=generator)
    truth = Truth(match, groups, 4)
    found = count_hits(query, key, truth, None, 1.0, (0, 1, 2))
    maps = attention_maps(query, key, match.token_grids, None, 1.0)
    for sample in range(3):
        for group in range(4):
            alone = match.index[sample : sample + 1].clone()
            alone[(groups[sample] != group)[None, :, :, None].expand_as(alone)] = -1
            part = {name: value[sample : sample + 1] for name, value in maps.items()}
            hits, pairs = plain_hits(part, replace(match, index=alone), (0, 1, 2))
            assert truth.pairs[sample, group] == pairs
            for name, value in hits.items():
                assert torch.equal(found[name][:, sample, group], value)


def test_matches_of_another_number_of_views_are_refused() -> None:
    truth = Truth.plain(matches(1, ((2, 2),) * 3))
    with pytest.raises(ShapeError, match=r"truth.match.index: expected \[1, 2, 2, 4\] as the call, got \[1, 3, 3, 4\]"):
        count_hits(torch.zeros(1, 1, 2, 4, 3), torch.zeros(1, 1, 2, 4, 3), truth, None, 1.0, (0,))


def test_distances_in_the_world_are_those_of_a_plain_loop() -> None:
    batch = make_batch(samples=2, views=2, size=16)
    batch["depth"] = 1.5 + torch.rand(2, 2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(
        -1, -1, -1, 16, -1
    )
    batch["extrinsics"][:, 1, :3, :3] = torch.tensor(Rotation.from_euler("y", 5, degrees=True).as_matrix())
    token_grids, near = ((8, 8),) * 2, 0.15
    points = surface_points(batch["depth"], batch["intrinsics"], batch["extrinsics"], token_grids)
    match = matches(2, token_grids)
    truth = Truth.of_layer(TokenLayout("b (v h w)"), match, torch.zeros(2, 2, 2, dtype=torch.long), 1, points)
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, 1, 2, 64, 3, generator=generator) for _ in range(2))
    hits = count_hits(query, key, truth, None, 3.0, (1,), near=near)["mean"]
    maps = attention_maps(query, key, token_grids, None, 3.0)["mean"]
    expected, chance, ceiling = (torch.zeros(2) for _ in range(3))
    for b, i, j, x in match.matched.nonzero().tolist():
        away = (points[b, j] - points[b, i, x]).norm(dim=-1) <= near
        expected[b] += away[maps[b, 0, i, x, j].argmax()]
        chance[b] += away.float().mean()
        ceiling[b] += away[match.index[b, i, j, x]]
    assert hits[0, :, 0, 1].tolist() == expected.tolist()
    assert 0 < expected.sum() < truth.pairs.sum()
    torch.testing.assert_close(truth.chance((1,), near)[:, 0, 1], chance.double(), rtol=1e-5, atol=0)
    assert truth.ceiling(near)[:, 0].tolist() == ceiling.tolist()


def test_surface_points_are_where_the_camera_sees_them() -> None:
    batch = make_batch(samples=1, views=2, size=8)
    batch["depth"][0, 1, 0, :4] = 0  # not measured
    points = surface_points(batch["depth"], batch["intrinsics"], batch["extrinsics"], ((2, 2), (1, 2)))
    torch.testing.assert_close(points[0, 0, 0], torch.tensor([-0.5, -0.5, 2.0]))
    torch.testing.assert_close(points[0, 0, 3], torch.tensor([0.5, 0.5, 2.0]))
    assert points[0, 1, 2:].isnan().all()  # beyond its two tokens
    # Its camera stands at x = 0.25, and both tokens have their centre on the lower, measured half.
    torch.testing.assert_close(points[0, 1, 0], torch.tensor([-0.25, 0.0, 2.0]))


# The probe


def planted_probe(layout: TokenLayout, arrange: Any, batch: Any, *, shift: int = 0, **options: Any) -> LayerProbe:
    """Probe a model whose attention looks where the test says."""
    model = Planted(layout, arrange, shift=shift)
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
        assert probe.precision("attn", within=limit, readout="best_head", timestep=1.0) == pytest.approx(expected)
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
    model = Planted(TokenLayout("(b h w) v", references_last=1), per_cell, sign=1.0 if shift == 0 else -1.0)
    probe = probe_layers(model.wrapped(normalize="all_views"), [batch], LEVELS, prepare=model)
    assert probe.precision(0) == probe.precision(0, within=2) == expected
    assert probe.chance(0) == pytest.approx(1 / 3)
    assert probe.pairs(0) == 2 * 4 * 16
    assert probe.layers[0].reach == "cell"
    assert "the share that look at a view" in probe.table()


@pytest.mark.parametrize("within", [(0, 1, 2), (1,)])
def test_a_view_of_one_token_is_asked_for_too_and_not_supervised(within: tuple[int, ...]) -> None:
    """As in the middle of a latent UNet at a small resolution, where the layer's layout knows no cells."""
    batch = make_batch(samples=2, views=4, size=12)
    batch["extrinsics"][:, :, 0, 3] = torch.tensor([0.0, 0.0, -5.0, -5.0])
    model = Planted(TokenLayout("b (v h w)"), joined)
    probe = probe_layers(model.wrapped(), [batch], LEVELS, prepare=model, within=within, metric=True)
    assert (probe.layers[0].tokens, probe.layers[0].reach) == ("1 x 1", "cell")
    assert probe.pairs(0) == 2 * 4
    assert probe.precision(0) == probe.skill(0) == 1.0
    assert probe.chance(0) == pytest.approx(1 / 3)
    assert LayerProbe.from_dict(json.loads(json.dumps(probe.to_dict()))).skill(0) == 1.0
    with pytest.raises(ValueError, match=r"no layer that can be supervised .*a view is one token"):
        _ = probe.best  # the loss within a view would be 0 whatever the layer does


def small_batches(row: Row) -> list[dict[str, Any]]:
    batch = row.batch(samples=2)
    batch["key"] = ["wall-0/0", "wall-1/0"]
    return [batch]


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
    inflate, batches = bool(row.wrap.get("inflate")), small_batches(row)
    with monkeypatch.context() as watched:
        watched.setattr("torch.cuda.manual_seed_all", lambda seed: pytest.fail("the GPUs' generators were seeded"))
        probe = probe_layers(pipeline, batches, LEVELS, inflate=inflate, metric=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in denoiser.modules()] == modes
    assert checks.hooks(denoiser) == count
    assert all(torch.equal(value, state[name]) for name, value in denoiser.state_dict().items())
    assert checks.same(checks.run(denoiser.eval(), inputs), before)

    adapter = get_backbone(row.backbone)
    attention_layers = adapter.inflatable_layers(denoiser) if inflate else adapter.attention_layers(denoiser)
    assert [layer.path for layer in probe.layers] == [attention_layer.path for attention_layer in attention_layers]
    assert all(layer.reason is None for layer in probe.layers)
    assert {place.path for place in probe.ranking} == {attention_layer.path for attention_layer in attention_layers}
    assert probe.backbone == row.backbone
    again = probe_layers(pipeline, small_batches(row), LEVELS, inflate=inflate, metric=True)
    assert again.to_dict() == probe.to_dict()


def test_layers_are_probed_as_if_they_were_joined() -> None:
    """The first layer's queries and keys do not change when it is joined, so neither does what they find."""
    row = TINY[-1]
    pipeline = row.pipeline()
    apart = probe_layers(pipeline, small_batches(row), LEVELS, inflate=True, layers=[0])
    get_backbone("sv3d").inflate(pipeline.denoiser, apart.layers[0].path)
    joined_up = probe_layers(pipeline, small_batches(row), LEVELS, inflate=True, layers=[0])
    # The kernel of the joined call sums in another order; an argmax between equal tokens may turn.
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
                # An argmax between two equal tokens may turn with the batch size.
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
        AttentionLayer(3, "conv_in", 4, known[0].layout, stride=8),  # runs, and is no attention
    ]
    monkeypatch.setattr(adapter, "layers", lambda self, model: [known[0], *extra])
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

    monkeypatch.setattr(adapter, "layers", lambda self, model: extra)
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
        "level": ({"timesteps": (0.5, 500)}, ValueError, r"timesteps: expected different levels in \[0, 1\]"),
        "no level": ({"timesteps": ()}, ValueError, "timesteps: expected different levels"),
        "layer": ({"layers": [99]}, ValueError, "layers.*99"),
        "within": ({"within": (0, 2)}, ValueError, "within: expected different numbers of tokens >= 0, 1 among them"),
        "no batch": ({"batches": []}, ValueError, "batches: expected at least one batch, got none"),
        "no depth": ({"batches": [no_depth]}, DataError, "has no depth, and the probe takes the true matches"),
        "backbone": ({"backbone": "cat4d"}, ValueError, "cat4d"),
        "another backbone": ({"backbone": "sv3d"}, ValueError, "backbone 'sv3d' does not fit"),
        "not inflatable_layers": ({"inflate": True}, ValueError, "backbone 'cat3d' lists no inflatable_layers layer"),
        "no model": ({"model": "unet"}, TypeError, "model: expected a pipeline of an adapter, .* got str"),
        "no prepare": ({"model": CAT3D.pipeline().unet}, ValueError, "prepare: a model without its pipeline needs"),
        "unknown model": ({"model": nn.Linear(1, 1), "prepare": CAT3D.pipeline()}, ValueError, "recognised by none"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_refused(case: str) -> None:
    changes, error, message = bad_inputs()[case]
    options = {"model": CAT3D.pipeline(), "batches": small_batches(CAT3D), "timesteps": LEVELS, **changes}
    with pytest.raises(error, match=message):
        probe_layers(options.pop("model"), options.pop("batches"), options.pop("timesteps"), **options)


# What was found


def made_probe(
    *hits: list[int], pairs: int = 100, scenes: tuple[str, ...] = ("a", "b", "c", "d"), **options: Any
) -> Any:
    """Layers with so many hits within one token in each scene; chance is a fifth."""
    layers = []
    for number, of_scene in enumerate(hits):
        counts = np.array(of_scene)[None, :, None, None].repeat(2, axis=0)  # two levels
        layers.append(
            ProbedLayer(
                number,
                f"block.{number}.attn1",
                "all",
                "8 x 8",
                pairs=np.full((len(scenes), 1), pairs),
                chance=np.full((len(scenes), 1, 1), pairs / 5),
                hits={"mean": counts, "best_head": counts},
            )
        )
    samples = tuple(f"{scene}/0" for scene in scenes)
    return LayerProbe(tuple(layers), LEVELS, ((0.0, 180.0),), (1,), scenes, samples, **options)


def test_ranking_is_by_skill_and_says_what_it_cannot_tell_apart() -> None:
    probe = made_probe([30, 31, 30, 29], [61, 60, 59, 60], [60, 58, 60, 61])
    assert [place.index for place in probe.ranking] == [1, 2, 0]
    first, second, third = probe.ranking
    assert first.skill == pytest.approx((0.6 - 0.2) / 0.8)
    assert probe.skill(1) == first.skill
    assert first.behind is None
    low, high = second.behind
    assert low <= 0 < high  # a tie
    low, high = third.behind
    assert 0.3 < low < 0.375 < high < 0.45
    assert first.interval[0] < first.skill < first.interval[1]
    assert probe.ranking == made_probe([30, 31, 30, 29], [61, 60, 59, 60], [60, 58, 60, 61]).ranking


def test_the_interval_is_that_of_scenes_drawn_anew() -> None:
    """Against a plain loop over the same drawn scenes; those of a layer and of the first one are drawn together."""
    first, second = np.random.default_rng(0).integers(20, 90, size=(2, 12))
    first = first + 20
    probe = made_probe(list(first), list(second), scenes=tuple("abcdefghijkl"))
    generator, skills = np.random.default_rng(0), []
    for _ in range(10_000):
        drawn = generator.integers(12, size=12)
        skills.append([(hits[drawn].sum() / 1200 - 0.2) / 0.8 for hits in (first, second)])
    behind = [one - two for one, two in skills]
    expected = [np.quantile(values, (0.025, 0.975)) for values in (*zip(*skills, strict=True), behind)]
    found = [probe.ranking[0].interval, probe.ranking[1].interval, probe.ranking[1].behind]
    assert [place.index for place in probe.ranking] == [0, 1]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_samples_of_one_scene_count_together() -> None:
    probe = made_probe([10, 30, 80, 40], scenes=("a", "a", "b", "c"))
    assert probe.per_scene(0) == {"a": 0.2, "b": 0.8, "c": 0.4}
    assert probe.per_scene(0, kind="skill")["b"] == pytest.approx(0.75)
    assert probe.per_scene(0, kind="chance") == {"a": 0.2, "b": 0.2, "c": 0.2}
    single = made_probe([10], scenes=("a",))
    assert single.ranking[0].interval is None


def test_a_probe_is_written_and_read(tmp_path: Path) -> None:
    probe = probe_layers(CAT3D.pipeline(), small_batches(CAT3D), LEVELS, metric=True)
    path = probe.save(tmp_path / "new" / "probe.json")
    again = LayerProbe.load(path)
    assert again.to_dict() == probe.to_dict()
    assert again.ranking == probe.ranking
    assert again.table() == probe.table()
    assert again.ceiling(0) == 1.0  # the cameras stand whole tokens apart
    for content, message in (("{", "not a saved probe"), ("{}", "expected the keys"), ("[]", "not a saved probe")):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            LayerProbe.load(path)
    with pytest.raises(DataError, match="no such file"):
        LayerProbe.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"within": 3}, r"within: expected one of \(1,\), got 3"),
        ({"readout": "through_head"}, "readout of layer 'block.0.attn1'.*through_head"),
        ({"timestep": 0.2}, r"timestep: expected one of \(0.5, 1.0\) or None, got 0.2"),
        ({"angle_bin": 1}, r"angle_bin: expected one of \(\(0.0, 180.0\),\)"),
        ({"angle_bin": (0, 15)}, "angle_bin: expected one of"),
    ],
)
def test_what_was_not_probed_is_refused(selection: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made_probe([1, 2, 3, 4]).precision(0, **selection)


def test_the_heat_map_shows_every_layer_and_step() -> None:
    probe = probe_layers(CAT3D.pipeline(), small_batches(CAT3D), LEVELS)
    figure = probe.heat_map(within=1)
    panels = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in panels] == ["all pairs", "0-15 deg", "15-30 deg", "30-60 deg", "60-180 deg"]
    drawn = np.asarray(panels[0].images[0].get_array())
    assert drawn.shape == (len(probe.layers), len(LEVELS))
    assert drawn[2, 1] == pytest.approx(probe.skill(2, timestep=1.0))
    assert np.ma.getmaskarray(panels[3].images[0].get_array()).all()  # no such pair
    with pytest.raises(ValueError, match="kind"):
        probe.heat_map(kind="skills")


# layer="auto"


def probe_of(model: nn.Module, best: int, **options: Any) -> LayerProbe:
    """A probe of a CAT3D model in which one layer is far ahead."""
    attention_layers = get_backbone("cat3d").attention_layers(core_module(model))
    probe = made_probe(
        *[[70 if attention_layer.index == best else 30] * 4 for attention_layer in attention_layers], **options
    )
    layers = tuple(
        replace(layer, path=attention_layer.path)
        for layer, attention_layer in zip(probe.layers, attention_layers, strict=True)
    )
    return replace(probe, layers=layers)


def test_auto_takes_the_best_layer_and_keeps_the_evidence(tmp_path: Path) -> None:
    unet = CAT3D.pipeline().unet
    probe = probe_of(unet, best=2, backbone="cat3d")
    model = cameo.wrap(unet, "cat3d", layer="auto", probe=probe)
    assert [layer.index for layer in model.supervised_layers] == [2]
    choice = model.cameo_config.layer_choice
    assert choice["layer"] == probe.best == model.cameo_config.layers[0]
    assert choice["ranking"][0]["skill"] == pytest.approx(0.625)
    assert choice["timesteps"] == list(LEVELS)
    assert (choice["scenes"], choice["samples"], choice["pairs"]) == (4, 4, 400)
    folder = model.save_pretrained(tmp_path / "saved", license="mit")
    assert CameoConfig.load(folder).layer_choice == choice
    card = (folder / "README.md").read_text()
    assert "| Layer chosen by |" in card
    assert "2: 0.625 (0.625 to 0.625)" in card
    again = cameo.from_pretrained(folder, base_model=CAT3D.pipeline().unet)
    assert again.cameo_config.layer_choice == choice


def test_a_card_without_a_probe_says_nothing_of_a_choice() -> None:
    config = CameoConfig(backbone=None, layers=["attn"])
    assert "chosen by" not in model_card(CardFacts("me/x", True, "peft", config, "Net", "unet", False, {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "auto"}, r'layer="auto": expected probe=.*cameo.probe_layers'),
        ({"layer": 1, "probe": True}, r'probe: is for layer="auto", got layer=1'),
        (
            {"layer": "auto", "probe": "sv3d"},
            "probe: is of backbone='sv3d' with inflate=False, expected backbone='cat3d'",
        ),
    ],
)
def test_auto_without_its_probe_is_refused(options: dict[str, Any], message: str) -> None:
    unet = CAT3D.pipeline().unet
    if "probe" in options:
        backbone = options["probe"] if isinstance(options["probe"], str) else "cat3d"
        options = {**options, "probe": probe_of(unet, best=1, backbone=backbone)}
    with pytest.raises(ValueError, match=message):
        cameo.wrap(unet, "cat3d", **options)
    assert isinstance(cameo.wrap(unet, "cat3d"), CameoModel)  # nothing is left behind


def test_auto_passes_over_a_layer_that_cannot_be_supervised() -> None:
    unet = CAT3D.pipeline().unet
    probe = probe_of(unet, best=3, backbone="cat3d")
    layers = [*probe.layers[:3], replace(probe.layers[3], unsupervised="its attention is masked")]
    probe = replace(probe, layers=tuple(layers))
    assert probe.ranking[0].index == 3
    assert probe.best == probe.layers[0].path
    assert "Cannot be supervised:" in probe.table()
    assert [place["index"] for place in probe.choice(top=1)["ranking"]] == [3, 0]  # the evidence holds the choice
    assert cameo.wrap(unet, "cat3d", layer="auto", probe=probe).supervised_layers[0].index == 0


def test_the_bundled_base_is_probed_and_its_best_layer_supervised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its best layer is far above chance, and is the default one."""
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    pipeline = get_backbone("cat3d").load(BUNDLED)
    scenes = EmbeddedScenes(content="bare_rooms", num_scenes=4, size=(32, 32), views_per_scene=6, progress=False)
    data = MultiViewDataset(scenes, num_views=3)
    probe = probe_layers(pipeline, [collate([data[0], data[1], data[2], data[3]])], (0.5, 0.9, 1.0))
    assert len(probe.ranking) == 6
    assert probe.ranking[0].skill == max(probe.skill(number) for number in range(6))
    assert probe.ranking[0].interval is not None
    assert probe.ranking[0].interval[0] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a choice that is not above chance is warned about
        model = cameo.wrap(pipeline.unet, "cat3d", layer="auto", probe=probe)
    assert model.cameo_config.layers == [probe.best]
    assert model.supervised_layers[0].index == get_backbone("cat3d").default_layer(pipeline.unet)


def test_a_training_run_probes_its_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    config = make_config(tmp_path, train_batch_size=5)
    data = build_dataset(config, "train")
    pipeline = load_pipeline(config)
    found = probe_for(pipeline, data, config)
    assert len(found.samples) == 16
    assert len(found.scene_names) == config.num_scenes
    assert [layer.index for layer in found.layers] == list(
        range(len(get_backbone("cat3d").attention_layers(pipeline.denoiser)))
    )


def test_the_layers_are_probed_on_the_device_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    config, order = make_config(tmp_path, layer="auto"), []
    data, device = build_dataset(config, "train"), torch.device("meta")
    monkeypatch.setattr(setup, "make_accelerator", lambda _config: SimpleNamespace(device=device))
    monkeypatch.setattr(LatentPipeline, "to", lambda _self, place: order.append(place))

    def probe(*_given: Any) -> None:
        order.append("probe")
        raise KeyboardInterrupt  # the rest of the run is not of interest

    monkeypatch.setattr(setup, "probe_for", probe)
    with pytest.raises(KeyboardInterrupt):
        setup.train_lora(config, data, data)
    assert order == [device, "probe"]


def test_all_processes_take_the_probe_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    config = make_config(tmp_path)
    data, pipeline = build_dataset(config, "train"), load_pipeline(config)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda shared: shared.__setitem__(0, "the first"))
    assert probe_for(pipeline, data, config) == "the first"


def test_the_recipe_writes_the_probe_and_what_each_layer_is_needed_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    settings = {
        "backbone": "cat3d",
        "num_validation_scenes": 2,
        "views_per_scene": 6,
        "num_validation_samples": 2,
        "num_views": 2,
        "layers": "0,2",
        "timesteps": "0.5,1",
        "output": tmp_path / "probe",
    }
    arguments = [f"{name}={value}" for name, value in settings.items()]
    runpy.run_path(str(RECIPES / "probe_layers.py"))["main"]([*arguments, "--perturb"])
    printed = capsys.readouterr().out
    probe = LayerProbe.load(tmp_path / "probe" / "probe.json")
    assert [layer.index for layer in probe.layers] == [0, 2]
    assert probe.timesteps == (0.5, 1.0)
    assert probe.within == (0, 1, 2, "2cm")
    assert probe.angle_bins == ANGLE_BINS
    table = (tmp_path / "probe" / "table.md").read_text()
    assert table.strip() in printed
    assert "PSNR lost without it (dB)" in table
    assert f"best layer: {probe.best}" in printed
    names = sorted(path.name for path in (tmp_path / "probe").iterdir())
    assert names == ["heat_map.png", "perturbation.png", "probe.json", "table.md"]
