"""Depth and point maps of other programs, in files beside the photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cameo.correspondence import Correspondence
from cameo.data import MultiViewDataset, open_views
from cameo.data.estimated_depth import EstimatedDepth, read_estimated_depth
from cameo.errors import DataError
from cameo.geometry import unproject
from cameo.training.data import build_dataset
from cameo.training.settings import TrainingConfig
from tests.helpers.posed_formats import room_views, write_nerfstudio, write_realestate10k

SIZE = (4, 4)
INTRINSICS = torch.tensor([[4.0, 0, 2], [0, 4, 2], [0, 0, 1]]).repeat(2, 1, 1)
NAMES = ["first.jpg", "second.png"]


def extrinsics() -> torch.Tensor:
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[1, :3, 3] = torch.tensor([-1.0, 0.5, 0.25])
    return poses


def read(folder: Path, names: list[str] = NAMES, **options: float) -> torch.Tensor | None:
    return read_estimated_depth(folder, names, SIZE, INTRINSICS, extrinsics(), **options)


def test_a_folder_without_them_has_none(tmp_path: Path) -> None:
    assert read(tmp_path) is None


def test_depth_is_cropped_and_read_at_pixels(tmp_path: Path) -> None:
    (tmp_path / "depth").mkdir()
    wide = np.tile(np.arange(1.0, 17.0), (8, 1))  # 8 x 16: of the columns 4 to 11 every second pair is read
    np.save(tmp_path / "depth" / "first.npy", wide)
    confidence = np.ones((2, 2))
    confidence[0, 1] = 0.4
    coarse = np.array([[1.0, 2.0], [np.nan, -1.0]], dtype=np.float16)
    np.savez(tmp_path / "depth" / "second.npz", depth=coarse, confidence=confidence)
    found = read(tmp_path, min_confidence=0.5)
    assert found is not None
    assert (found.shape, found.dtype) == ((2, 1, 4, 4), torch.float32)
    assert found[0, 0].tolist() == [[6.0, 8.0, 10.0, 12.0]] * 4
    assert found[1, 0].tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2 + [[0.0] * 4] * 2
    found = read(tmp_path)
    assert found is not None
    assert found[1, 0, 0].tolist() == [1.0, 1.0, 2.0, 2.0]


def test_points_become_depth(tmp_path: Path) -> None:
    (tmp_path / "points").mkdir()
    depth = torch.rand(1, 2, 1, *SIZE, generator=torch.Generator().manual_seed(0)) + 1
    points = unproject(depth, INTRINSICS[None], extrinsics()[None])[0].permute(0, 2, 3, 1).numpy()
    points[1, 2, 3] = np.nan
    for name, frame in zip(("first", "second"), points, strict=True):
        np.savez(tmp_path / "points" / f"{name}.npz", points=frame)
    found = read(tmp_path)
    expected = depth[0].clone()
    expected[1, 0, 2, 3] = 0
    torch.testing.assert_close(found, expected)
    np.save(tmp_path / "points" / "first.npy", points[0] + np.array([3.0, 0, 0]))  # .npy comes first
    with pytest.raises(ValueError, match=r"first\.npy: half of its points .* expected points in the world of the"):
        read(tmp_path)


def test_frames_without_a_file_are_counted(tmp_path: Path) -> None:
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth" / "second.npy", np.ones((4, 4)))
    with pytest.warns(UserWarning, match=r"depth: 1 of 2 frames have no file and so no depth; first: first\.jpg"):
        found = read(tmp_path)
    assert found is not None
    assert found.flatten(1).sum(1).tolist() == [0.0, 16.0]
    with pytest.raises(ValueError, match=r"depth: holds no file for any frame, such as third\.npy"):
        read_estimated_depth(tmp_path, ["third.jpg"], SIZE, INTRINSICS[:1], extrinsics()[:1])
    (tmp_path / "points").mkdir()
    with pytest.raises(ValueError, match="holds both depth and points"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("kind", "stored", "message"),
    [
        ("depth", {"depth": np.ones((4, 4, 3))}, r"first\.npz: expected depth \[h, w\], got \[4, 4, 3\]"),
        ("depth", {"points": np.ones((4, 4))}, r"first\.npz: expected an array named depth"),
        ("depth", {"depth": np.ones((4, 4)), "confidence": np.ones((2, 2))}, r"expected confidence \[4, 4\], got"),
        ("depth", {"depth": np.array([["a"]])}, "expected numbers, got <U1"),
        ("depth", {"depth": np.ones((0, 4))}, r"expected depth \[h, w\], got \[0, 4\]"),
        ("points", {"points": np.ones((4, 4))}, r"expected points \[h, w, 3\], got \[4, 4\]"),
        ("depth", b"PK\x03\x04 no archive", r"first\.npz: cannot be read as a NumPy file"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, kind: str, stored: object, message: str) -> None:
    (tmp_path / kind).mkdir()
    path = tmp_path / kind / "first.npz"
    path.write_bytes(stored) if isinstance(stored, bytes) else np.savez(path, **stored)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_a_single_channel_may_be_in_front_or_behind(tmp_path: Path) -> None:
    (tmp_path / "depth").mkdir()
    np.save(tmp_path / "depth" / "first.npy", np.full((1, 4, 4), 2.0))
    np.save(tmp_path / "depth" / "second.npy", np.full((4, 4, 1), 3))
    found = read(tmp_path)
    assert found is not None
    assert found.flatten(1).mean(1).tolist() == [2.0, 3.0]


def test_photographs_with_estimated_depth_are_a_scene_with_depth(tmp_path: Path) -> None:
    views = room_views(4)
    folder = write_realestate10k(tmp_path / "photos", views)
    (folder / "depth").mkdir()
    for view in range(3):  # the last has none
        np.save(folder / "depth" / f"{1000 * view}.npy", views.depth[view, 0].numpy())
    with pytest.warns(UserWarning, match=r"1 of 4 frames have no file"):
        source = EstimatedDepth(open_views(folder, views.size), folder)
    found = source.select(0, [2, 0])
    assert torch.equal(found.depth, views.depth[[2, 0]])
    assert not source.views(0).depth[3].any()
    expected, match = (
        Correspondence.from_depth(
            one.depth[None, :3], one.intrinsics[None, :3], one.extrinsics[None, :3], token_grid=(6, 8)
        ).index
        for one in (views, source.views(0))
    )
    assert (match == expected).float().mean() > 0.99  # poses in text are rounded
    assert (expected >= 0).any()
    assert MultiViewDataset(source, num_views=2)[0]["depth"].any()

    settings = {"num_views": 2, "resolution": 24, "correspondence": "depth", "min_overlap": 0.1}
    config = TrainingConfig(train_data_dir=str(folder), estimated_depth=str(folder), **settings)
    assert build_dataset(config, "train")[0]["depth"].any()  # the last view is held out


def test_estimated_depth_that_does_not_fit_the_data_is_refused(tmp_path: Path) -> None:
    views = room_views(2)
    photos = open_views(write_realestate10k(tmp_path / "photos", views), views.size)
    with pytest.raises(DataError, match="expected a folder depth/ or points/"):
        EstimatedDepth(photos, tmp_path)
    measured = open_views(write_nerfstudio(tmp_path / "measured", views), views.size)
    (tmp_path / "depth").mkdir()
    with pytest.raises(DataError, match="have depth of their own"):
        EstimatedDepth(measured, tmp_path)
    with pytest.raises(DataError, match="holds no file for any frame"):
        EstimatedDepth(photos, tmp_path)
