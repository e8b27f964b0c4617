"""The recipes' settings open every format by the same door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cameo.data.settings import DataSettings, data_format
from cameo.errors import DataError
from cameo.training.data import build_dataset, match_settings
from tests.helpers import posed_formats as formats
from tests.helpers.training_runs import make_config


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["nerfstudio", "co3d", "rgbd", "webdataset"])
def test_a_run_reads_the_format_that_it_finds(name: str, tmp_path: Path) -> None:
    folder = formats.WRITERS[name](tmp_path / "room", formats.room_views(8))
    config = make_config(tmp_path, train_data_dir=str(folder), num_views=2, min_overlap=0.1)
    assert data_format(config) == name
    assert match_settings(config)["data_format"] == name
    assert match_settings(config)["views_per_scene"] is None
    train, validation = (build_dataset(config, split) for split in ("train", "validation"))
    assert train.source.format == name
    assert len(train.source.cameras(0)) + len(validation.source.cameras(0)) == 8
    sample = train[0]
    assert sample["images"].shape == (2, 3, config.resolution, config.resolution)
    assert (sample["depth"] > 0).float().mean() > 0.5


def test_data_without_depth_is_refused_where_matches_come_from_depth(tmp_path: Path) -> None:
    folder = formats.write_zero123(tmp_path / "object", formats.room_views(8))
    settings = {"train_data_dir": str(folder), "num_views": 2, "min_overlap": 0.05}
    with pytest.raises(DataError, match=r"object: zero123 data without depth, which correspondence=depth needs; give"):
        build_dataset(make_config(tmp_path, **settings), "train")
    dataset = build_dataset(make_config(tmp_path, **settings, loss_weight=0.0), "train")
    assert not dataset[0]["depth"].any()


def test_settings_of_the_images_reach_the_reader(tmp_path: Path) -> None:
    from PIL import Image

    folder = formats.write_zero123(tmp_path / "object", formats.room_views(8))
    for path in folder.glob("*.png"):
        Image.new("RGBA", (formats.WIDTH, formats.HEIGHT), (9, 9, 9, 0)).save(path)
    config = make_config(
        tmp_path,
        train_data_dir=str(folder),
        data_format="zero123",
        num_views=2,
        min_overlap=0.05,
        loss_weight=0.0,
        image_background=(0.0, 1.0, 0.0),
        view_cache_mb=0,
        intrinsics=[[60.0, 0.0, 32.0], [0.0, 60.0, 24.0], [0.0, 0.0, 1.0]],
    )
    dataset = build_dataset(config, "train")
    sample = dataset[0]
    assert torch.equal(sample["images"].mean((0, 2, 3)), torch.tensor([0.0, 1.0, 0.0]))
    assert sample["intrinsics"][0, 0, 0].item() == pytest.approx(60 * config.resolution / formats.HEIGHT)
    assert dataset.source.options.cache_bytes == 0


def test_a_format_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data_format=colmap needs train_data_dir="):
        build_dataset(make_config(tmp_path, data_format="colmap"), "train")
    with pytest.raises(ValueError, match=r"camera_rig=mvdream: .*needs data_format=.*got colmap"):
        DataSettings(data_format="colmap", train_data_dir="x", camera_rig="mvdream", num_views=4).check()
    with pytest.raises(ValueError, match="image_background"):
        make_config(tmp_path, image_background=(0.0, 2.0, 0.0))
