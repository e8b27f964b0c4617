"""Runs with latents that are computed once: the losses of runs that encode in every step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import cameo.training.data
from cameo.errors import DataError
from cameo.latents.store import LatentReader
from cameo.training.checkpoints.folder import check_continues
from cameo.training.data import StepSampler, build_dataset, training_batches
from cameo.training.trainer import Trainer
from tests.helpers.latents import latent_config, latent_trainer, pipeline
from tests.helpers.training_runs import make_trainer

pytestmark = pytest.mark.usefixtures("alone_on_shared_scenes")


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "latents").rglob("*.safetensors"))


def losses(trainer: Trainer) -> list[dict[str, float]]:
    return trainer.train().history()


def forbid_encoding(built: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a pipeline fail where it would encode views; conditions may still use the VAE."""
    monkeypatch.setattr(type(built), "encode_views", lambda *_: pytest.fail("a view is encoded that should be read"))
    return built


@pytest.mark.parametrize(
    "backbone",
    ["cat3d", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mvdream", "sv3d", "zero123plus"))],
)
def test_losses_are_bit_identical_with_latents_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    expected = losses(latent_trainer(tmp_path / "live", backbone))
    cached = {"cache_latents": True, "latent_precision": "float32"}
    first = latent_trainer(tmp_path, backbone, **cached)
    assert losses(first) == expected
    assert expected[0]["loss"] > 0
    files = shards(tmp_path)
    assert files
    built = forbid_encoding(pipeline(backbone), monkeypatch)
    again = latent_trainer(tmp_path, backbone, built=built, **cached, output_dir=str(tmp_path / "again"))
    assert losses(again) == expected
    assert shards(tmp_path) == files
    for ours, theirs in zip(again.trained, first.trained, strict=True):
        assert torch.equal(ours, theirs)


def test_half_precision_rounds_float32_latents_alone(tmp_path: Path) -> None:
    expected = losses(latent_trainer(tmp_path / "live"))
    found = losses(latent_trainer(tmp_path, cache_latents=True))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours != theirs
        # Float16 rounds by at most 2 ** -11, and the loss is a square.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2**-9)
        assert ours["supervised"] == theirs["supervised"]
    (reader,) = [LatentReader(folder) for folder in (tmp_path / "latents").iterdir()]
    assert reader.shards[0].settings["stored_in"] == "float16"
    assert len(reader) == 4 * 6  # scenes and their views


def test_latents_of_an_encoder_in_bfloat16_are_kept_as_they_are(tmp_path: Path) -> None:
    expected = losses(latent_trainer(tmp_path / "live", mixed_precision="bf16"))
    found = latent_trainer(tmp_path, mixed_precision="bf16", cache_latents=True)
    assert losses(found) == expected
    assert found.pipeline.encoder_precision == torch.bfloat16
    assert found.pipeline.vae.dtype == torch.float32  # so what is saved is not rounded
    (reader,) = [LatentReader(folder) for folder in (tmp_path / "latents").iterdir()]
    settings = reader.shards[0].settings
    assert (settings["encoded_in"], settings["stored_in"]) == ("bfloat16", "bfloat16")
    assert reader.read(reader._keys[:1].tolist()).dtype == torch.bfloat16


@pytest.mark.slow
def test_matches_and_workers_go_along(tmp_path: Path) -> None:
    expected = losses(latent_trainer(tmp_path / "live"))
    changes = {"cache_latents": True, "latent_precision": "float32"}
    assert losses(latent_trainer(tmp_path, **changes, dataloader_num_workers=2, correspondence_in="worker")) == expected


def test_a_source_that_gives_other_pixels_is_told(tmp_path: Path) -> None:
    trainer = latent_trainer(tmp_path, cache_latents=True)
    source = trainer.dataset.source
    views, seen = source.views, set()

    def unsteady(scene: int) -> Any:
        found = views(scene)
        if scene in seen:
            found.images[:, 0, 0, 0] += 1
        seen.add(scene)
        return found

    source.views = unsteady
    with pytest.raises(DataError, match=r"sample train-0000\d.*: its pixels are not among those that were encoded"):
        trainer.train()


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_latents=true: keeps what the VAE.*cat3d works on pixels, without a"):
        make_trainer(tmp_path / "pixels", cache_latents=True).train()
    drawn = {"camera_rig": None, "max_overlap": 1.0, "min_overlap": 0.0, "views_per_scene": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = latent_trainer(tmp_path / "drawn", "zero123plus", cache_latents=True, **drawn)
        with pytest.raises(ValueError, match=r"zero123plus encodes 6 views of a sample as one image.*camera_rig="):
            trainer.train()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_latents_and_may_move_them(tmp_path: Path) -> None:
    cached = {"cache_latents": True, "max_train_steps": 2}
    whole = losses(latent_trainer(tmp_path / "whole", **cached, checkpointing_steps=1))
    part = latent_trainer(tmp_path, **{**cached, "max_train_steps": 1}, checkpointing_steps=1)
    part.train()
    (tmp_path / "latents").rename(tmp_path / "moved")
    resumed = {"resume_from_checkpoint": "latest", "latents_dir": str(tmp_path / "moved")}
    assert losses(latent_trainer(tmp_path, **cached, **resumed)) == whole
    folder, fixed = tmp_path / "run" / "checkpoint-1", part._fixed_settings()
    with pytest.raises(ValueError, match=r"cannot continue with other settings \(cache_latents: True -> False\)"):
        check_continues(folder, {**fixed, "cache_latents": False}, 2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_wait_in_pinned_memory_for_a_gpu_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    asked: dict[str, Any] = {}

    def loader(dataset: Any, **options: Any) -> list[dict[str, Any]]:
        asked.update(options)
        return [options["collate_fn"]([dataset[index]]) for (index,) in options["batch_sampler"]]

    monkeypatch.setattr(cameo.training.data, "DataLoader", loader)
    seen: list[torch.dtype] = []
    monkeypatch.setattr(
        cameo.training.data,
        "on_device",
        lambda batches, _: (seen.append(one["images"].dtype) or one for one in batches),
    )
    config = latent_config(tmp_path)
    sampler = StepSampler(start=0, stop=2, batch_size=1)
    with training_batches(build_dataset(config, "train"), sampler, config, torch.device(device)) as batches:
        assert [step for step, _ in batches] == [0, 1]
    assert asked["pin_memory"] == (device == "cuda")
    assert seen == [torch.uint8] * 2
