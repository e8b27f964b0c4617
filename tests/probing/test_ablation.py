"""What the model loses without the cross-view attention of one layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import CameoModel, TokenLayout, probe_layers
from cameo.adapters.cat3d import BUNDLED
from cameo.attention.capture import AttentionLayer
from cameo.evaluation.validation import validate
from cameo.pipeline import TrainingInputs
from cameo.probing import ablation
from cameo.probing.ablation import (
    LayerEffect,
    QualityLoss,
    effects_figure,
    effects_table,
    perturb_layers,
    self_view_only,
)
from cameo.probing.bootstrap import paired_bootstrap
from cameo.probing.denoising import ValidationSettings, sample_batches
from cameo.training.data import build_dataset
from cameo.training.setup import load_pipeline
from tests.helpers.attention_kernels import DIMENSION, HEADS, sdpa
from tests.helpers.batches import make_batch
from tests.helpers.training_runs import make_config, scene_cache


class Attention(nn.Module):
    """Attention with the given queries, keys and values."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa(query, key, value)


class OneUsedLayer(nn.Module):
    """Denoiser and pipeline in one, with two cross-view layers of which only the first is used.

    Each of two views attends to the other one, and shows the mean of its tokens of 8 x 8 pixels; those of the second
    view are black, as it is yet unknown. The second layer attends just as well, and nobody takes what it finds.
    """

    num_train_timesteps = 1000

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.weight = Attention(), Attention(), nn.Parameter(torch.zeros(1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.unused(query, key, value)
        return self.used(query, key, value) + self.weight

    def latent_shape(self, image_shape: Any) -> tuple[int, ...]:
        return tuple(image_shape)

    def training_inputs(self, batch: Any, *, noise: Tensor, timesteps: Tensor) -> TrainingInputs:
        images = batch["images"]
        assert noise.shape == images.shape
        values = images.unfold(3, 8, 8).unfold(4, 8, 8).mean((-1, -2))  # [B, V, 3, h, w]
        tokens = F.pad(rearrange(values, "b v c h w -> b (v h w) c"), (0, HEADS * DIMENSION - 3))
        tokens[:, tokens.shape[1] // 2 :] = 0
        views = torch.eye(images.shape[1]).repeat_interleave(values.shape[-1] ** 2, dim=0)
        far = F.pad(50 * (1 - views), (0, DIMENSION - views.shape[1])).repeat(1, HEADS)  # of view 0 to the others
        near = F.pad(views, (0, DIMENSION - views.shape[1])).repeat(1, HEADS)
        query, key = (x.expand(len(images), -1, -1) for x in (far, near))
        target = torch.zeros(images.shape[1], dtype=torch.bool)
        target[int(batch["num_reference_views"]) :] = True
        return TrainingInputs((query, key, tokens), {}, images, images, target, timesteps)

    def predict_clean(self, output: Tensor, inputs: TrainingInputs) -> Tensor:
        side = inputs.target.shape[-1] // 8
        pictures = rearrange(output[..., :3], "b (v h w) c -> b v c h w", h=side, w=side)
        return pictures.repeat_interleave(8, 3).repeat_interleave(8, 4)

    def denoising_loss(self, output: Tensor, inputs: TrainingInputs) -> Tensor:
        squared = (self.predict_clean(output, inputs) - inputs.target).square()
        return squared[:, inputs.loss_views].mean((1, 2, 3, 4))


def planted_samples(scenes: int = 6, *, views: int = 2) -> list[dict[str, Any]]:
    """Scenes of one color each, which the target view can take from the reference view by cross-view attention only."""
    samples = []
    for scene in range(scenes):
        batch = make_batch(samples=1, views=views, size=32, seed=scene)
        color = torch.rand(3, generator=torch.Generator().manual_seed(scene))
        sample = {name: value[0] if isinstance(value, Tensor) else value for name, value in batch.items()}
        sample["images"] = color[None, :, None, None] * torch.ones(views, 1, 32, 32)
        for number in range(2):  # two samples of each scene
            samples.append({**sample, "key": f"scene-{scene}/{number}"})
    return samples


SETTINGS = ValidationSettings(num_samples=12, batch_size=5, noise_levels=(1.0,))


def planted() -> tuple[CameoModel, OneUsedLayer]:
    base = OneUsedLayer()
    return cameo.wrap(base, layer=["used", "unused"], layout="b (v h w)", heads=HEADS, stride=8), base


def test_a_layer_that_is_used_costs_and_one_that_is_not_costs_nothing() -> None:
    model, pipeline = planted()
    data = planted_samples()
    used, unused = perturb_layers(model, pipeline, data, SETTINGS)
    assert (used.index, used.path, unused.index, unused.path) == (0, "used", 1, "unused")
    assert unused.drop_loss == unused.drop_psnr_all == unused.drop_psnr_covisible == QualityLoss(0.0, 0.0, 0.0)
    # The whole model predicts a perfect image (capped at 100 dB), the cut model a black target view.
    black = [float((sample["images"][1] ** 2).mean()) for sample in data[::2]]
    assert used.loss == pytest.approx(sum(black) / 6, rel=1e-5)
    assert used.drop_loss.mean == pytest.approx(used.loss, rel=1e-4)
    expected = [100 + 10 * math.log10(value) for value in black]
    assert used.drop_psnr_all.mean == pytest.approx(sum(expected) / 6, abs=1e-3)
    assert list(used.per_scene["psnr_all"]) == [f"scene-{scene}" for scene in range(6)]
    assert list(used.per_scene["psnr_all"].values()) == pytest.approx(expected, abs=1e-3)
    low, high = paired_bootstrap([0.0] * 6, expected)[1:]
    assert used.drop_psnr_all[1:] == pytest.approx((low, high), abs=1e-3)
    assert used.drop_psnr_all.low > 30


def test_effects_are_the_same_again_and_for_other_batch_sizes() -> None:
    model, pipeline = planted()
    data = planted_samples()
    first = perturb_layers(model, pipeline, data, SETTINGS)
    assert perturb_layers(model, pipeline, data, SETTINGS) == first
    other = perturb_layers(model, pipeline, data, ValidationSettings(12, 3, (1.0,)))
    assert other[0].drop_psnr_all == pytest.approx(first[0].drop_psnr_all, abs=1e-4)
    picked = perturb_layers(model, pipeline, data, SETTINGS, layers=["unused", 0])
    assert picked == [first[1], first[0]]


def test_bad_requests_name_the_cure() -> None:
    model, pipeline = planted()
    with pytest.raises(ValueError, match=r"unknown layer 'unsued': did you mean 'unused'"):
        perturb_layers(model, pipeline, planted_samples(), SETTINGS, layers=["unsued"])
    with pytest.raises(ValueError, match=r"at least 2 scenes, got 1 \(scene-0\).*Raise num_samples"):
        perturb_layers(model, pipeline, planted_samples(), ValidationSettings(2, noise_levels=(1.0,)))


def test_a_layer_that_cannot_be_cut_stands_there_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pipeline = planted()
    layer = AttentionLayer(0, "used", HEADS, TokenLayout("b (v h w)"), stride=8, unsupported="it attends to the text")
    monkeypatch.setattr(CameoModel, "attention_layers", [layer])
    (effect,) = perturb_layers(model, pipeline, planted_samples(), SETTINGS)
    assert effect == LayerEffect(0, "used", reason="it attends to the text")
    assert effects_table([effect]).endswith("| 0 | used | - | - | - | - | - | - |\n\nused: it attends to the text")
    with pytest.raises(ValueError, match="at least one layer that was cut, got 1 without"):
        effects_figure([effect])


def test_without_references_all_pixels_remain() -> None:
    model, pipeline = planted()
    data = [{**sample, "num_reference_views": 0} for sample in planted_samples()]
    used, _ = perturb_layers(model, pipeline, data, SETTINGS)
    assert used.psnr_covisible is None
    assert used.drop_psnr_covisible is None
    assert used.drop_psnr_all == QualityLoss(0.0, 0.0, 0.0)  # what the first view gains, the second one loses
    assert used.psnr_all < 20
    assert "psnr_covisible" not in used.per_scene
    (bars,) = effects_figure([used]).axes[0].containers[1:]  # beside the error bars
    assert len(bars) == 1


def test_the_figure_shows_each_drop_and_its_interval() -> None:
    unchanged, covisible, all_pixels = QualityLoss(0, 0, 0), QualityLoss(1.0, 0.5, 1.75), QualityLoss(-0.5, -1.0, 0.25)
    effects = [
        LayerEffect(0, "a", 1.0, 2.0, 3.0, unchanged, covisible, all_pixels),
        LayerEffect(1, "b", reason="no"),
        LayerEffect(2, "c", 1.0, 2.0, 3.0, unchanged, QualityLoss(2.0, 1.5, 2.25), unchanged),
    ]
    axes = effects_figure(effects).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0  a", "2  c"]
    bars = [container for container in axes.containers if hasattr(container, "patches")]
    assert [[bar.get_width() for bar in one] for one in bars] == [[1.0, 2.0], [-0.5, 0.0]]
    ends = [segment[:, 0].tolist() for one in bars for segment in one.errorbar.lines[2][0].get_segments()]
    assert ends == [[0.5, 1.75], [1.5, 2.25], [-1.0, 0.25], [0.0, 0.0]]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The shipped base and its validation scenes."""
    config = make_config(
        tmp_path_factory.mktemp("bundled"),
        preset=None,
        preset_options={},
        pretrained_model_name_or_path=BUNDLED,
        data_format="bare_rooms",
        resolution=32,
        num_views=3,
        num_validation_scenes=16,
        views_per_scene=4,
    )
    pipeline = load_pipeline(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAMEO_CACHE", scene_cache())
        yield pipeline, build_dataset(config, "validation")


def test_validation_is_not_disturbed_by_a_cut_around_it(bundled: Any) -> None:
    """Inside the block `validate` measures what `perturb_layers` reports, and after it the whole model."""
    pipeline, data = bundled
    settings = ValidationSettings(num_samples=4, batch_size=4, noise_levels=(1.0,))
    model = cameo.wrap(pipeline.denoiser, "cat3d", head="mean")
    try:
        (effect,) = perturb_layers(model, pipeline, data, settings, layers=[2])
        before = validate(model, pipeline, data, settings)
        with self_view_only(model, model.attention_layers[2], ((8, 8),) * 3):
            cut = validate(model, pipeline, data, settings)
        assert validate(model, pipeline, data, settings) == before
    finally:
        model.unwrap()
    # Four samples of four scenes, so that the mean over scenes is that over samples.
    assert len(effect.per_scene["loss"]) == 4
    assert before["psnr_covisible"] - cut["psnr_covisible"] > 1  # the layer that the model needs
    for metric in ("loss", "psnr_covisible", "psnr_all"):
        assert getattr(effect, metric) == pytest.approx(cut[metric], rel=1e-6)
        worse = (cut[metric] - before[metric]) * (1 if metric == "loss" else -1)
        assert getattr(effect, f"drop_{metric}").mean == pytest.approx(worse, abs=1e-6)


def test_the_layer_that_the_probe_ranks_first_is_needed_most(bundled: Any) -> None:
    """In the shipped base, cutting this layer costs more than cutting any other, scene by scene."""
    pipeline, data = bundled
    batches = (batch for _, batch in sample_batches(data, 16, 8, torch.device("cpu")))
    probe = probe_layers(pipeline, batches, (0.5, 0.9, 1.0))
    model = cameo.wrap(pipeline.denoiser, "cat3d", layer="auto", probe=probe)
    settings = ValidationSettings(num_samples=16, noise_levels=(1.0,))
    try:
        effects = perturb_layers(model, pipeline, data, settings)
    finally:
        model.unwrap()
    cut = {effect.path: list(effect.per_scene["psnr_covisible"].values()) for effect in effects}
    best = cut.pop(probe.ranking[0].path)
    assert [layer.path for layer in model.supervised_layers] == [probe.ranking[0].path]
    assert len(best) == 16
    assert len(cut) == 5
    for other in cut.values():
        assert paired_bootstrap(other, best)[1] > 0


def test_a_cut_that_breaks_the_model_is_told_and_not_averaged() -> None:
    layer = AttentionLayer(2, "mid.attn1", heads=1, layout=TokenLayout("b (v h w)"))
    whole = {"loss": {"a": 0.1, "b": 0.2}, "psnr_covisible": {}, "psnr_all": {"a": 10.0, "b": 11.0}}
    cut = {"loss": {"a": 0.2}, "psnr_covisible": {}, "psnr_all": {"a": 9.0, "b": 9.0}}
    effect = ablation._effect(layer, whole, cut)
    assert effect.reason == "without it the model's loss is not finite in b"
    assert effect.drop_psnr_all is None
    assert effect.per_scene == {}
