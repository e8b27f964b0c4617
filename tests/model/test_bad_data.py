"""Bad images, depth and folders of data at the public entry points: an error that names the file and the cure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cameo.data import EmbeddedScenes, RGBDSequence, collate
from cameo.training.data import build_dataset
from tests.helpers.bad_input import Bench, OneScene, changed
from tests.helpers.training_runs import fresh_accelerate, make_config, make_trainer, scene_cache

NAN = float("nan")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CAMEO_CACHE", scene_cache())
    with fresh_accelerate():
        yield


def truncated(b: Bench) -> None:
    path = b.sequence() / "frame-000002.color.png"
    path.write_bytes(path.read_bytes()[:200])
    RGBDSequence(path.parent, size=(32, 32)).views()


def without_intrinsics(b: Bench) -> None:
    folder = b.sequence()
    (folder / "camera-intrinsics.txt").unlink()
    build_dataset(make_config(b.folder, train_data_dir=str(folder)), "train")


def far_apart(views: int) -> torch.Tensor:
    extrinsics = torch.eye(4).repeat(views, 1, 1)
    extrinsics[:, 0, 3] = 100.0 * torch.arange(views)
    return extrinsics


def without_depth(b: Bench) -> None:
    folder = b.sequence()
    for path in folder.glob("*.depth.png"):
        Image.fromarray(np.zeros((48, 64), dtype=np.uint16)).save(path)
    build_dataset(make_config(b.folder, train_data_dir=str(folder)), "train")[0]


def eight_bit_depth(b: Bench) -> None:
    folder = b.sequence()
    Image.fromarray(np.zeros((48, 64), dtype=np.uint8)).save(folder / "frame-000000.depth.png")
    RGBDSequence(folder, size=(32, 32))


def file_as_folder(b: Bench) -> None:
    path = b.folder / "video.mp4"
    path.touch()
    build_dataset(make_config(b.folder, train_data_dir=str(path)), "train")


def mesh_without_faces(b: Bench) -> None:
    for number in range(9):
        (b.folder / f"chair-{number}.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    EmbeddedScenes(num_scenes=1, size=(8, 8), mesh_dir=b.folder, cache_dir=b.folder / "cache", progress=False)


CASES: dict[str, tuple[Callable[[Bench], Any], type[Exception], str]] = {
    "NaN images": (
        lambda b: b.train_on(OneScene(b.views(images=changed(b.batch["images"][0], (1, 0, 3, 3), NAN)))),
        ValueError,
        r"sample kitchen/.*: images hold NaN or infinite values; check the source's files",
    ),
    "images up to 255": (
        lambda b: b.train_on(OneScene(b.views(images=b.batch["images"][0] * 255))),
        ValueError,
        r"sample kitchen/.*expected in \[0, 1\].*uint8",
    ),
    "images with four channels": (
        lambda b: b.views(images=torch.zeros(3, 4, 32, 32)),
        ValueError,
        r"images of 'kitchen': expected \[F, 3, H, W\]",
    ),
    "depth of another size": (
        lambda b: b.views(depth=torch.ones(3, 1, 16, 16)),
        ValueError,
        r"depth of 'kitchen': expected \[3, 1, 32, 32\]",
    ),
    "samples of different sizes": (
        lambda b: collate(
            [{"images": torch.zeros(2, 3, s, s), "num_reference_views": 1, "key": f"room/{s}"} for s in (8, 16)]
        ),
        ValueError,
        r"images of room/16: expected \[2, 3, 8, 8\].*same image size",
    ),
    "no overlapping views": (
        lambda b: b.train_on(OneScene(b.views(extrinsics=far_apart(3)))),
        ValueError,
        r"no scene has 2 views whose overlap.*Widen the bounds",
    ),
    "truncated image": (truncated, ValueError, r"frame-000002.color.png: cannot decode the color image"),
    "sequence without intrinsics": (without_intrinsics, ValueError, r"office: no camera intrinsics .*pass intrinsics="),
    "sequence without any depth": (without_depth, ValueError, r"office: no frame has any depth .*16-bit originals"),
    "8-bit depth image": (eight_bit_depth, ValueError, r"frame-000000.depth.png: expected a 16-bit gray depth image"),
    "absent data folder": (
        lambda b: build_dataset(make_config(b.folder, train_data_dir=str(b.folder / "rooms")), "train"),
        ValueError,
        r"train_data_dir=.*rooms: no such folder",
    ),
    "file as data folder": (file_as_folder, ValueError, r"train_data_dir=.*video.mp4: no such folder"),
    "empty data folder": (
        lambda b: build_dataset(make_config(b.folder, train_data_dir=str(b.folder)), "train"),
        ValueError,
        r"not recognized as a data set; it holds no files.*rgbd: frame-NNNNNN.color.png",
    ),
    "sequence format without folder": (
        lambda b: build_dataset(make_config(b.folder, data_format="rgbd"), "train"),
        ValueError,
        r"data_format=rgbd needs train_data_dir=",
    ),
    "rig of another number of views": (
        lambda b: build_dataset(make_config(b.folder, camera_rig="mvdream", num_views=3), "train"),
        ValueError,
        r"camera_rig=mvdream with num_views=3: .*has 4 views",
    ),
    "mesh without faces": (mesh_without_faces, ValueError, r"chair-0.obj: .*faces"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_data_is_explained(name: str, tmp_path: Path) -> None:
    act, kind, message = CASES[name]
    with pytest.raises(kind, match=rf"(?s){message}"):
        act(Bench(tmp_path))


def test_training_goes_on_over_a_sample_without_depth(tmp_path: Path) -> None:
    class Sometimes:
        def __init__(self, base: Any) -> None:
            self.base = base

        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = dict(self.base[index])
            return {**sample, "depth": torch.zeros_like(sample["depth"])} if index < 2 else sample

    trainer = make_trainer(tmp_path, max_train_steps=2)
    trainer.dataset = Sometimes(trainer.dataset)
    first, second = trainer.train().history()
    assert (first["alignment_loss"], first["supervised"]) == (0.0, 0.0)
    assert second["alignment_loss"] > 0
    assert second["supervised"] > 0
