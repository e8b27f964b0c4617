"""Each view is encoded once: steps get the same inputs for every family, and nothing stale or damaged is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cameo.data.batches import to_device
from cameo.errors import DataError
from cameo.latents.encode import encode_missing, latent_settings, stored_dtype
from cameo.latents.samples import LatentDataset
from cameo.latents.store import LatentReader, LatentWriter
from cameo.scenes.views import collate
from cameo.training.data import build_dataset, noisy_inputs
from tests.helpers.latents import FAMILIES, latent_config, pipeline, vae
from tests.helpers.sequences import write_sequence

CPU = torch.device("cpu")


class Encoding:
    """A folder of latents of one pipeline, filled again and again, with the number of views that each call encoded."""

    def __init__(self, folder: Path, backbone: str = "cat3d", **changes: Any) -> None:
        self.config = latent_config(folder, backbone, **changes)
        self.root = folder / "latents"
        self.dataset = build_dataset(self.config, "train")
        self.calls: list[int] = []

    def fill(self, built: Any, stored: str = "float32", **options: Any) -> int:
        encode, self.calls = built.encode_views, []
        built.encode_views = lambda images: self.calls.append(images.shape[:2].numel()) or encode(images)
        settings = latent_settings(built, resolution=self.config.resolution, stored=stored)
        self.folder = self.root / f"{settings['vae']}-{settings['encoded_in']}-{settings['resolution']}"
        options = {"batch_size": 2, "stored": stored, "progress": False, **options}
        try:
            return encode_missing(built, self.dataset, self.folder, settings, **options)
        finally:
            del built.encode_views

    def samples(self, built: Any) -> LatentDataset:
        return LatentDataset(self.dataset, LatentReader(self.folder), built.encoded_together)


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in the arguments of a denoiser, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict | list | tuple):
        return [one for item in (value.values() if isinstance(value, dict) else value) for one in tensors(item)]
    return []


@pytest.mark.parametrize("backbone", FAMILIES)
def test_inputs_and_targets_are_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    encoding, built = Encoding(tmp_path, backbone, train_batch_size=2), pipeline(backbone)
    encoding.fill(built)
    live = [
        noisy_inputs(
            built, collate([encoding.dataset[2 * step], encoding.dataset[2 * step + 1]]), encoding.config, step
        )
        for step in range(2)
    ]
    monkeypatch.setattr(type(built), "encode_views", lambda *_: pytest.fail("encoded although the latents are there"))
    samples = encoding.samples(built)
    for step, expected in enumerate(live):
        batch = collate([samples[2 * step], samples[2 * step + 1]])
        found = noisy_inputs(built, batch, encoding.config, step)
        theirs = [expected.noisy, expected.target, *tensors(expected.args), *tensors(expected.kwargs)]
        ours = [found.noisy, found.target, *tensors(found.args), *tensors(found.kwargs)]
        assert len(ours) == len(theirs) > 3
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_conditions_follow_the_pixels_and_targets_the_latents(tmp_path: Path) -> None:
    """What is computed of pixels is not taken from the latents, nor the other way round."""
    for backbone in ("sv3d", "zero123plus"):
        encoding, built = Encoding(tmp_path / backbone, backbone), pipeline(backbone)
        encoding.fill(built)
        batch = collate([encoding.samples(built)[0]])
        plain = noisy_inputs(built, batch, encoding.config, 0)
        other_latents = noisy_inputs(built, {**batch, "latents": batch["latents"] + 1}, encoding.config, 0)
        other_pixels = noisy_inputs(built, {**batch, "images": 1 - batch["images"]}, encoding.config, 0)
        assert torch.equal(plain.target, other_pixels.target)
        assert not torch.equal(plain.target, other_latents.target)
        conditions = [tensors([inputs.args[2:], inputs.kwargs]) for inputs in (plain, other_latents, other_pixels)]
        assert all(torch.equal(one, other) for one, other in zip(conditions[0], conditions[1], strict=True))
        assert not all(torch.equal(one, other) for one, other in zip(conditions[0], conditions[2], strict=True))


def test_each_view_is_encoded_once_in_batches_of_a_step(tmp_path: Path) -> None:
    encoding, built = Encoding(tmp_path, num_views=3), pipeline()
    assert encoding.fill(built) == 24  # 4 scenes of 6 views
    assert encoding.calls == [6] * 4  # 2 samples of 3 views at a time
    assert encoding.fill(built) == 0
    assert encoding.calls == []
    rigged = Encoding(tmp_path, "zero123plus")
    assert rigged.fill(pipeline("zero123plus")) == 14
    assert sorted(rigged.calls) == [2, 12]  # two references, two canvases of six views


def test_processes_share_the_views(tmp_path: Path) -> None:
    scenes = Encoding(tmp_path / "scenes")
    assert [scenes.fill(pipeline(), process=process, num_processes=3) for process in range(3)] == [12, 6, 6]
    assert scenes.fill(pipeline()) == 0
    sequence = write_sequence(tmp_path / "office", frames=10)
    one = Encoding(tmp_path / "one", train_data_dir=str(sequence), max_overlap=0.99)
    assert sorted(one.fill(pipeline(), process=process, num_processes=3) for process in range(3)) == [2, 3, 3]
    assert one.fill(pipeline()) == 0


def test_an_interrupted_encoding_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, built = Encoding(tmp_path), pipeline()
    encode, count = type(built).encode_unscaled, [0]

    def interrupted(self: Any, images: torch.Tensor) -> torch.Tensor:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(type(built), "encode_unscaled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoding.fill(built)
    assert len(LatentReader(encoding.folder)) == 12  # three batches of 2 samples of 2 views
    assert encoding.fill(built) == 12
    whole = Encoding(tmp_path / "whole")
    whole.fill(built)
    for index in range(8):
        assert torch.equal(encoding.samples(built)[index]["latents"], whole.samples(built)[index]["latents"])


def test_what_was_written_before_a_kill_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that are full are on the disk while the rest is encoded."""
    monkeypatch.setattr(LatentWriter.__init__, "__kwdefaults__", {"shard_bytes": 1300})
    encoding, built, there = Encoding(tmp_path), pipeline(), []
    encode = type(built).encode_unscaled

    def look(self: Any, images: torch.Tensor) -> torch.Tensor:
        there.append(len(LatentReader(encoding.folder)))
        return encode(self, images)

    monkeypatch.setattr(type(built), "encode_unscaled", look)
    encoding.fill(built)
    assert there == [0, 0, 5, 10, 15, 15]  # of 256 bytes a view, 5 views to a shard
    files = [path for path in encoding.folder.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert all(path.suffix == ".safetensors" and path.stat().st_size < 1300 + 1500 for path in files)


@pytest.mark.parametrize("damage", ["cut", "flipped", "header", "other shape"])
def test_a_damaged_shard_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    encoding, built = Encoding(tmp_path), pipeline()
    encoding.fill(built)
    (path,) = encoding.folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    table = LatentReader(encoding.folder).shards[0].tensors["latents"]
    if damage == "cut":
        content = content[:-100]
    elif damage == "flipped":
        for row in range(table.shape[0]):
            content[table.offset + row * table.row_bytes] ^= 1
    elif damage == "header":
        content[:8] = b"\xff" * 8
    else:
        with LatentWriter(encoding.folder, {}) as writer:
            writer.add(1, torch.zeros(4, 2, 2))
    path.write_bytes(content)
    name = r"latents-\w+.safetensors" if damage == "other shape" else path.name
    with pytest.raises(DataError, match=rf"{name}: damaged \(.*\); remove the file; the next start"):
        encoding.samples(built)[0]
    if damage != "other shape":
        path.unlink()
        assert encoding.fill(built) == 24


def test_another_encoder_precision_or_size_has_a_folder_of_its_own(tmp_path: Path) -> None:
    def other(seed: int = 1, **options: Any) -> Any:
        built = pipeline()
        built.register_modules(vae=vae(seed, **options))
        return built

    lowered, decoder = pipeline(), pipeline()
    lowered.encoder_precision = torch.bfloat16
    with torch.no_grad():
        decoder.vae.decoder.conv_in.weight.add_(1)
    encoding, found = Encoding(tmp_path), {}
    for name, built in (
        ("as before", pipeline()),
        ("weights", other(seed=5)),
        ("configuration", other(force_upcast=False)),
        ("precision", lowered),
    ):
        assert encoding.fill(built) == 24, name
        batch = collate([encoding.dataset[0], encoding.dataset[1]])
        expected = built.encode_views(batch["images"])
        found[name] = collate([encoding.samples(built)[index] for index in (0, 1)])["latents"]
        assert torch.equal(found[name], expected), name
    assert not torch.equal(found["weights"], found["as before"])
    assert not torch.equal(found["precision"], found["as before"])
    assert encoding.fill(decoder) == 0  # latents do not depend on it
    assert Encoding(tmp_path, resolution=64).fill(pipeline()) == 24


def test_pixels_that_changed_are_encoded_again(tmp_path: Path) -> None:
    sequence = write_sequence(tmp_path / "office", frames=10)
    settings = {"train_data_dir": str(sequence), "max_overlap": 0.99}
    assert Encoding(tmp_path, **settings).fill(pipeline()) == 8  # the training part of the sequence
    path = sorted(sequence.glob("*.color.png"))[2]
    changed = np.array(Image.open(path))
    changed[: len(changed) // 2] = 255 - changed[: len(changed) // 2]
    Image.fromarray(changed).save(path)
    encoding, built = Encoding(tmp_path, **settings), pipeline()
    assert encoding.fill(built) == 1
    assert encoding.calls == [4]  # one view, in a batch as large as that of a step
    samples = encoding.samples(built)
    for index in range(8):
        batch = collate([samples[index], samples[index]])
        assert torch.equal(batch["latents"], built.encode_views(batch["images"]))
    moved = sequence.rename(tmp_path / "elsewhere")
    assert Encoding(tmp_path, **{**settings, "train_data_dir": str(moved)}).fill(pipeline()) == 0


def test_float_images_have_the_latents_of_their_bytes(tmp_path: Path) -> None:
    encoding, built = Encoding(tmp_path), pipeline()
    encoding.fill(built)
    views = encoding.dataset.source.views
    encoding.dataset.source.views = lambda scene: as_floats(views(scene))
    assert encoding.fill(built) == 0
    batch = to_device(collate([encoding.samples(built)[0]]), CPU)
    assert batch["latents"].shape == (1, 2, 4, 4, 4)


def as_floats(views: Any) -> Any:
    object.__setattr__(views, "images", views.images.float() / 255)
    return views


def test_half_precision_is_the_encoders_own_where_it_has_one() -> None:
    built = pipeline()
    assert stored_dtype(built, "half") == torch.float16
    built.encoder_precision = torch.bfloat16
    assert stored_dtype(built, "half") == torch.bfloat16
    assert stored_dtype(built, "float32") == torch.float32
    with pytest.raises(ValueError, match=r"latent_precision: expected half or float32, got 'int8'"):
        stored_dtype(built, "int8")


def test_latents_beyond_the_range_are_refused(tmp_path: Path) -> None:
    encoding, built = Encoding(tmp_path), pipeline()
    with torch.no_grad():
        built.vae.quant_conv.bias.add_(1e5)  # beyond float16, not beyond float32
    with pytest.raises(DataError, match=r"the VAE gives latents that are not finite in float32, kept in float16"):
        encoding.fill(built, stored="half")
    assert encoding.fill(built, stored="float32") == 24
