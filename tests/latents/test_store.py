"""Latents on disk: what was written is read, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cameo.errors import DataError, ShapeError
from cameo.latents.samples import LatentDataset
from cameo.latents.store import LatentReader, LatentWriter, image_keys
from tests.helpers.latents import pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_precision_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    latents = torch.randn(5, 4, 3, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    keys = [3, -(2**63), 2**63 - 1, 0, 17]
    for half in (slice(0, 2), slice(2, 5)):
        with LatentWriter(tmp_path, {"resolution": 24}) as writer:
            for key, one in zip(keys[half], latents[half], strict=True):
                writer.add(key, one)
    reader = LatentReader(tmp_path)
    assert len(reader) == 5
    assert reader.read([17, 3, 17]).dtype == dtype
    assert torch.equal(reader.read([17, 3, 17]), latents[[4, 0, 4]])
    assert torch.equal(reader.read(keys), latents)
    assert 4 not in reader
    with pytest.raises(KeyError):
        reader.read([3, 4])


def test_two_runs_that_write_at_once_keep_both_shards(tmp_path: Path) -> None:
    with LatentWriter(tmp_path, {}) as one, LatentWriter(tmp_path, {}) as other:
        one.add(1, torch.ones(1, 2, 2))
        other.add(1, torch.ones(1, 2, 2))
        other.add(2, torch.zeros(1, 2, 2))
    assert len(list(tmp_path.iterdir())) == 2
    assert LatentReader(tmp_path).read([1, 2])[:, 0, 0, 0].tolist() == [1, 0]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    old, young = tmp_path / ".latents-1.safetensors.7.7.tmp", tmp_path / ".latents-2.safetensors.8.8.tmp"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    LatentWriter(tmp_path, {})
    assert list(tmp_path.iterdir()) == [young]  # which another process may be writing


def test_samples_without_a_scene_are_found_by_their_pixels(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float() / 255
    with LatentWriter(tmp_path, {}) as writer:
        for number, image in enumerate(images):
            writer.add(image_keys(image[None])[0], torch.full((4, 1, 1), float(number)))
    samples = [
        {"images": images, "key": "a"},
        {"images": images.flip(0), "key": "b"},
        {"images": images + 1, "key": "c"},
    ]
    dataset = LatentDataset(samples, LatentReader(tmp_path), lambda views: [[view] for view in range(views)])
    assert dataset[0]["latents"][:, 0, 0, 0].tolist() == [0, 1]
    assert dataset[1]["latents"][:, 0, 0, 0].tolist() == [1, 0]
    with pytest.raises(DataError, match="sample c: its pixels are not among those that were encoded"):
        dataset[2]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: cannot write the latents .*choose a folder with room and write access"):
        LatentWriter(tmp_path / "file", {})


def test_keys_are_of_pixels_and_of_their_company() -> None:
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    alone = [image_keys(image[None])[0] for image in images]
    together = image_keys(images)
    assert len({*alone, *together}) == 6
    assert image_keys(images.float() / 255) == together
    assert image_keys(images.transpose(2, 3).contiguous()) != together
    changed = images.clone()
    changed[2, 0, 0, 0] += 1
    assert not {*image_keys(changed)} & {*together}  # one canvas: every view's latents may change


def test_latents_of_another_size_are_refused() -> None:
    built = pipeline()
    batch = {"images": torch.rand(1, 2, 3, 32, 32), "latents": torch.zeros(1, 2, 4, 8, 8)}
    with pytest.raises(ShapeError, match=r"latents: expected \[1, 2, 4, 4, 4\], got \[1, 2, 4, 8, 8\]"):
        built.batch_latents(batch)
