"""Frozen image features, and the matches that are made from them."""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from cameo import Correspondence
from cameo.correspondence import matching as matching_module
from cameo.correspondence.features import FeatureExtractor
from cameo.data.batches import match_batch
from cameo.errors import DataError, ShapeError, WeightsUnavailable
from tests.helpers.memory import memory_of

NAME = "test_vit"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "correspondence" / "feature_matches.py"


def random_extractor(**options: int) -> FeatureExtractor:
    with warnings.catch_warnings(action="ignore"):
        return FeatureExtractor(NAME, pretrained=False, **options)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return random_extractor(size=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as timm publishes them, with a classifier."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(NAME, num_classes=10).state_dict(), path)
    return path


def test_features_are_the_patch_tokens_of_the_network(checkpoint: Path) -> None:
    extractor = FeatureExtractor(NAME, checkpoint, size=64)
    reference = timm.create_model(NAME, num_classes=10, dynamic_img_size=True).eval()
    reference.load_state_dict(timm.models.load_state_dict(str(checkpoint)))
    images = torch.rand(2, 3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    found = extractor(images)
    assert found.shape == (2, 3, extractor.dim, 4, 6)
    config = reference.pretrained_cfg
    normalized = (images.flatten(0, 1) - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[
        :, None, None
    ]
    with torch.no_grad():
        tokens = reference.forward_features(normalized)[:, reference.num_prefix_tokens :]
    torch.testing.assert_close(found.flatten(0, 1).flatten(2).mT, tokens, rtol=1e-4, atol=1e-5)


def test_images_are_resized_to_what_the_weights_were_trained_with() -> None:
    extractor = random_extractor()
    height, width = timm.create_model(NAME).pretrained_cfg["input_size"][1:]
    assert extractor.size == height == width
    patch = extractor.patch[0]
    assert extractor(torch.rand(1, 1, 3, 40, 80)).shape[-2:] == (height // patch, 2 * width // patch)


def test_sides_are_rounded_to_whole_patches() -> None:
    extractor = random_extractor(size=30)  # patches of 16 pixels
    assert extractor(torch.rand(1, 1, 3, 32, 32)).shape[-2:] == (2, 2)
    assert random_extractor(size=3)(torch.rand(1, 1, 3, 32, 32)).shape[-2:] == (1, 1)


def test_the_network_is_frozen_and_stays_in_evaluation_mode(extractor: FeatureExtractor) -> None:
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    images = torch.rand(1, 2, 3, 64, 64, requires_grad=True)
    assert not extractor(images).requires_grad


def test_random_weights_warn_are_the_same_each_time_and_leave_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    monkeypatch.setattr("torch.cuda.manual_seed_all", lambda seed: pytest.fail("the GPUs' generators were seeded"))
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match=r"test_vit has random weights .* a control"):
        first = FeatureExtractor(NAME, pretrained=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.random.default_generator.manual_seed(4)
    second = random_extractor()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_many_images_go_through_in_parts(extractor: FeatureExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    whole = extractor(images)
    monkeypatch.setattr("cameo.correspondence.features.IMAGES_AT_ONCE", 4)
    torch.testing.assert_close(extractor(images), whole)


def test_what_cannot_be_loaded_says_why(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"patch_embed.proj.weight": torch.zeros(2, 2)}, other)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(checkpoint.read_bytes()[:1000])
    cases = [
        ({"name": "test_vitt"}, ValueError, "unknown feature_model 'test_vitt'"),
        ({"name": "resnet18", "pretrained": False}, ValueError, "feature_model=resnet18: has no patch tokens"),
        (
            {"name": NAME, "checkpoint": tmp_path / "none.pth"},
            DataError,
            r"feature_checkpoint=.*none.pth: no such file",
        ),
        ({"name": NAME, "checkpoint": other}, DataError, r"other.safetensors: does not fit test_vit"),
        ({"name": NAME, "checkpoint": damaged}, DataError, r"damaged.safetensors: does not fit test_vit"),
        ({"name": NAME, "checkpoint": checkpoint, "pretrained": False}, ValueError, "give one of them"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            FeatureExtractor(**arguments)  # type: ignore[arg-type]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsUnavailable, match=r"test_vit: its weights are not reachable .*feature_checkpoint=FILE"):
        FeatureExtractor(NAME)


def test_images_of_another_shape_are_refused(extractor: FeatureExtractor) -> None:
    with pytest.raises(ShapeError, match=r"images: expected \[B, V, 3, H, W\], got \[2, 3, 8, 8\]"):
        extractor(torch.zeros(2, 3, 8, 8))


def by_loops(features: Tensor, threshold: float, least: float = -math.inf) -> Tensor:
    """Matches by their definition, one pair of tokens at a time, for features on the token grid."""
    batch, views, _, h, w = features.shape
    index = torch.full((batch, views, views, h * w), -1)
    for b in range(batch):
        vectors = [[features[b, v, :, x // w, x % w].double() for x in range(h * w)] for v in range(views)]
        for i in range(views):
            for j in range(views):
                for x in range(h * w) if i != j else ():
                    there, cosine = nearest(vectors[i][x], vectors[j])
                    back = nearest(vectors[j][there], vectors[i])[0] if there >= 0 else -1
                    apart = math.hypot(back // w - x // w, back % w - x % w)
                    if there >= 0 and apart < threshold and cosine >= least:
                        index[b, i, j, x] = there
    return index


def nearest(vector: Tensor, others: list[Tensor]) -> tuple[int, float]:
    best, highest = -1, -math.inf
    for y, other in enumerate(others):
        lengths = float(vector.norm() * other.norm())
        if math.isfinite(lengths) and lengths > 0 and float(vector @ other) / lengths > highest:
            best, highest = y, float(vector @ other) / lengths
    return best, highest


@pytest.mark.parametrize("threshold", [0.5, 1.5, 3.0])
def test_matches_are_those_of_a_plain_loop(threshold: float) -> None:
    features = torch.randn(2, 3, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    features *= torch.rand(2, 3, 1, 3, 4, generator=torch.Generator().manual_seed(1)) * 10  # lengths do not matter
    features[0, 1, :, 0, 2] = 0
    features[1, 2, 3, 1, 1] = math.nan
    features[1, 0, 0, 2, 2] = math.inf
    found = Correspondence.from_features(features, cycle_threshold=threshold)
    assert torch.equal(found.index, by_loops(features, threshold))
    assert found.distance is None
    assert 0 < found.matched.sum() < found.matched.numel() - 2 * 3 * 12


def test_a_least_similarity_drops_matches() -> None:
    features = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    for least in (-1.0, 0.8, 1.0):
        found = Correspondence.from_features(features, min_similarity=least)
        assert torch.equal(found.index, by_loops(features, 1.5, least))


def test_on_the_unit_sphere_they_are_those_of_point_maps() -> None:
    points = torch.nn.functional.normalize(
        torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(3)), dim=2
    )
    by_points = Correspondence.from_point_maps(points, token_grid=8)
    assert torch.equal(Correspondence.from_features(points * 7).index, by_points.index)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(2, 3, 6, 5, 7, generator=torch.Generator().manual_seed(4))
    features[0, 0, :, 1] = 0
    features[:, 2] = features[:, 1]  # ties between views, none within one
    features[:, 1, :, 0, 0] = features[:, 1, :, 4, 6]  # and ties within one, which the lower index wins
    whole = Correspondence.from_features(features).index
    for block in (1, 200):
        monkeypatch.setattr(matching_module, "BLOCK", block)
        assert torch.equal(Correspondence.from_features(features).index, whole)


def test_equal_features_match_the_first_token_and_fail_the_cycle_test() -> None:
    index = Correspondence.from_features(torch.ones(1, 2, 3, 4, 4)).index
    near_the_first = [0, 1, 4, 5]  # less than 1.5 tokens from it
    assert (index[0, 0, 1] >= 0).nonzero().flatten().tolist() == near_the_first
    assert index[0, 0, 1][near_the_first].unique().tolist() == [0]


def test_nothing_measured_gives_nothing() -> None:
    assert not Correspondence.from_features(torch.zeros(1, 2, 3, 4, 4)).matched.any()
    one_view = torch.randn(1, 2, 3, 4, 4)
    one_view[:, 1] = math.nan
    assert not Correspondence.from_features(one_view).matched.any()
    beyond = torch.randn(1, 2, 3, 4, 4)
    beyond[:, 1] *= torch.tensor([1e-30, 1e30])[:, None].expand(2, 8).reshape(4, 4)  # lengths of 0 and infinity
    assert not Correspondence.from_features(beyond).matched.any()
    assert Correspondence.from_features(torch.randn(1, 1, 3, 4, 4)).index.tolist() == [[[[-1] * 16]]]


def test_features_are_resampled_to_each_view_s_grid() -> None:
    coarse = torch.randn(1, 2, 16, 4, 4, generator=torch.Generator().manual_seed(5))
    fine = coarse.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
    found = Correspondence.from_features(fine, token_grid=((4, 4), (8, 8)))
    assert found.token_grids == ((4, 4), (8, 8))
    assert found.index.shape == (1, 2, 2, 64)
    assert (found.index[0, 0, 1, 16:] == -1).all()
    # Antialiasing changes the direction of constant cells so little that each still finds its own token.
    same = Correspondence.from_features(torch.cat([fine[:, :1], fine[:, :1]], dim=1), token_grid=4)
    assert same.index[0, 0, 1].tolist() == list(range(16))
    missing = fine.clone()
    missing[0, 0, :, 0, 0] = 0
    assert Correspondence.from_features(missing, token_grid=4).index[0, 0, 1, 0] == -1


def test_memory_is_bounded_by_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(1, 2, 8, 32, 32, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr(matching_module, "BLOCK", 1 << 16)
    peak, _ = memory_of(lambda: Correspondence.from_features(features))
    assert peak < 1 << 21  # all similarities of the two views alone would be 4 MiB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": torch.zeros(2, 3, 4, 4)}, r"features: expected \[B, V, C, h, w\]"),
        ({"features": torch.zeros(1, 2, 0, 4, 4)}, r"features: expected .*none of which is 0, got \[1, 2, 0, 4, 4\]"),
        ({"features": [1]}, r"features: expected .* got list"),
        ({"cycle_threshold": 0}, r"cycle_threshold: expected more than 0 tokens, got 0"),
        ({"min_similarity": 1.5}, r"min_similarity: expected a cosine in \[-1, 1\] or None, got 1.5"),
        ({"token_grid": ((4, 4),)}, r"token_grid: expected .* one \(h, w\) for each of 2 views"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Correspondence.from_features(**{"features": torch.randn(1, 2, 3, 4, 4), **arguments})


def test_a_batch_is_matched_by_its_features() -> None:
    features = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(8))
    found = match_batch({"features": features}, (4, 4), kind="features", cycle_threshold=3.0)
    assert torch.equal(found.index, Correspondence.from_features(features, cycle_threshold=3.0).index)
    with pytest.raises(DataError, match=r"sample \['room/1'\]: has no features"):
        match_batch({"key": ["room/1"]}, (4, 4), kind="features")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location(BENCHMARK.stem, BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_counts_what_a_plain_loop_counts(benchmark: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(-6, 16, (2, 2, 2, 16), generator=generator).clamp(min=-1) for _ in range(2)]
    for index in drawn:
        index[:, [0, 1], [0, 1]] = -1
    found, truth = (Correspondence(index, ((4, 4),) * 2) for index in drawn)
    score = benchmark.Score()
    score.add(found, truth)
    hits, judged, chance = [0, 0, 0], 0, 0.0
    for one, other in zip(drawn[0].flatten().tolist(), drawn[1].flatten().tolist(), strict=True):
        if one >= 0 and other >= 0:
            judged += 1
            apart = [max(abs(x // 4 - other // 4), abs(x % 4 - other % 4)) for x in range(16)]
            hits = [hit + (apart[one] <= within) for within, hit in enumerate(hits)]
            chance += sum(value <= 1 for value in apart) / 16
    assert list(score.hits) == hits
    assert (score.judged, score.tokens, score.pairs) == (judged, 2 * 2 * 16, 2 * 2)
    assert score.chance == pytest.approx(chance)
    perfect = benchmark.Score()
    perfect.add(truth, truth)
    assert perfect.row("truth", 1.5, None).count("100.0%") == 5  # exact, within 1, within 2, precision, recall


def test_the_benchmark_counts_chosen_pairs_of_views_alone(benchmark: ModuleType) -> None:
    truth = torch.full((1, 3, 3, 4), -1)
    truth[0, 0, 1], truth[0, 1, 0], truth[0, 0, 2] = torch.arange(4), torch.arange(4), torch.tensor([3, 2, -1, -1])
    found = torch.full_like(truth, -1)
    found[0, 0, 1, 0], found[0, 0, 2] = 3, torch.tensor([3, -1, 1, -1])
    pairs = torch.zeros(1, 3, 3, dtype=torch.bool)
    pairs[0, 0] = True  # with itself too, which is no pair
    score = benchmark.Score()
    score.add(Correspondence(found, ((2, 2),) * 3), Correspondence(truth, ((2, 2),) * 3), pairs)
    assert (score.pairs, score.tokens, score.visible, score.matched, score.judged) == (2, 8, 6, 3, 2)
    assert score.hits == (1, 2, 2)
    assert (score.precision, score.recall) == ("66.7%", "33.3%")


def test_the_benchmark_writes_its_page(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAMEO_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    out = tmp_path / "table.md"
    options = "--samples 1 --views 2 --resolutions 32 --grids 4 --vit-size 32 --data bare_rooms --sizes 32"
    benchmark.main(["--models", NAME, *options.split(), "--out", str(out)])
    text = out.read_text()
    assert "| colors | 1.5 | - |" in text
    assert "| test_vit, random weights | 1.5 | 0.9 |" in text
    assert "| features | 0 to 15 degrees, " in text
    assert "Not measured: test_vit with trained weights" in text
    assert text.strip() in capsys.readouterr().out
