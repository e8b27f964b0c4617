"""One door to every format: the same room is read from each, and what a folder is is told."""

from __future__ import annotations

import gzip
import json
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cameo.correspondence import Correspondence
from cameo.data import MultiViewDataset, RGBDSequence, collate, open_views
from cameo.data.readers import images
from cameo.errors import DataError, ShapeError
from cameo.geometry import plucker_rays
from tests.helpers import posed_formats as formats

SIZE = (formats.HEIGHT, formats.WIDTH)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMEO_CACHE", str(tmp_path / "cache"))


def options(name: str) -> dict:
    # The folder of the TUM layout has no name of a published archive, so its calibration has to be given.
    return {"intrinsics": formats.CALIBRATION} if name == "rgbd tum" else {}


@pytest.mark.parametrize("name", formats.WRITERS)
def test_a_room_in_every_format_is_the_same_room(name: str, tmp_path: Path) -> None:
    room = formats.room_views()
    folder = formats.WRITERS[name](tmp_path / "room", room)
    opened = open_views(folder, SIZE, **options(name))
    assert opened.format == name.split()[0]
    assert len(opened) == 1
    views = opened.views(0)
    assert torch.equal(views.images, room.images)
    torch.testing.assert_close(views.intrinsics, room.intrinsics, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(views.extrinsics, room.extrinsics, rtol=0, atol=2e-6)
    rays = [plucker_rays(one.intrinsics[None], one.extrinsics[None], SIZE, (6, 8)) for one in (views, room)]
    torch.testing.assert_close(*rays, rtol=0, atol=1e-5)
    if name in formats.WITH_DEPTH:
        # 16-bit millimeters are off by half of one, half floats by 2 ** -11 of the depth.
        torch.testing.assert_close(views.depth, room.depth, rtol=2**-11, atol=5e-4 + 1e-6)
        match, true = (
            Correspondence.from_depth(one.depth[None], one.intrinsics[None], one.extrinsics[None], token_grid=12)
            for one in (views, room)
        )
        assert (match.index == true.index).float().mean() > 0.995
        assert true.matched.float().mean() > 0.2
    else:
        assert not views.depth.any()
        assert not opened.cameras(0).has_depth


@pytest.mark.parametrize("name", ["nerfstudio", "zero123", "rgbd", "colmap"])
def test_several_scenes_in_a_folder(name: str, tmp_path: Path) -> None:
    for scene in ("a", "b", "c", ".hidden"):
        formats.WRITERS[name](tmp_path / "rooms" / "indoor" / scene, formats.room_views())
    opened = open_views(tmp_path / "rooms", (12, 16))
    assert opened.format == name
    assert [opened.cameras(scene).key for scene in range(len(opened))] == ["a", "b", "c"]
    held = [open_views(tmp_path / "rooms", (12, 16), split=split) for split in ("train", "validation")]
    assert [[one.cameras(scene).key for scene in range(len(one))] for one in held] == [["a", "b"], ["c"]]
    assert len(held[0].views(1)) == 4


def test_one_scene_is_divided_in_time(tmp_path: Path) -> None:
    formats.write_nerfstudio(tmp_path, formats.room_views())
    train, validation = (open_views(tmp_path, split=split, holdout=0.5) for split in ("train", "validation"))
    assert train.names(0) == ["images/0000.png", "images/0001.png"]
    assert validation.names(0) == ["images/0002.png", "images/0003.png"]
    assert validation.cameras(0).key.endswith("-validation")


def test_what_was_taken_and_why_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    formats.write_nerfstudio(tmp_path, formats.room_views())
    formats.write_colmap(tmp_path, formats.room_views())
    with caplog.at_level(logging.INFO, logger="cameo"):
        opened = open_views(tmp_path)
    (line,) = caplog.messages
    assert opened.reason in line
    assert "read as nerfstudio" in line
    assert opened.reason == "transforms.json; it holds sparse/0/images.txt (data_format=colmap) too"
    assert open_views(tmp_path, data_format="colmap").format == "colmap"


def test_a_mesh_in_a_sequence_does_not_make_it_a_folder_of_meshes(tmp_path: Path) -> None:
    formats.write_seven_scenes(tmp_path / "kitchen", formats.room_views())
    (tmp_path / "kitchen" / "scene_mesh.ply").write_text("ply")
    assert open_views(tmp_path / "kitchen").format == "rgbd"


def test_hidden_meshes_are_skipped(tmp_path: Path) -> None:
    cube = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\n"
    (tmp_path / "o.obj").write_text(cube)
    (tmp_path / "._o.obj").write_bytes(b"\0\5\26\7")
    opened = open_views(tmp_path, (8, 8))
    assert opened.format == "meshes"
    assert opened.reason == "o.obj"
    (tmp_path / "o.obj").unlink()
    with pytest.raises(DataError, match="not recognized as a data set"):
        open_views(tmp_path)


def test_an_unknown_folder_is_told_what_it_holds_and_what_formats_need(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").touch()
    (tmp_path / "notes.txt").write_text("a holiday")
    with pytest.raises(
        DataError, match=r"(?s)it holds 3 \.jpg, 1 \.txt\. Known .*nerfstudio: .*colmap: .*zero123: "
    ) as e:
        open_views(tmp_path)
    assert all(f"- {name.split()[0]}:" in str(e.value) for name in (*formats.WRITERS, "meshes"))
    with pytest.raises(DataError, match=r"(?s)not recognized as data_format=colmap.*colmap: cameras, images") as e:
        open_views(tmp_path, data_format="colmap")
    assert "zero123" not in str(e.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data_format": "colmapp"}, ValueError, "unknown data_format 'colmapp': did you mean 'colmap'"),
        ({"split": "test"}, ValueError, "unknown split 'test'"),
        ({"holdout": 0.0}, ValueError, "holdout: expected a share"),
        ({"stride": 0}, ValueError, "size, stride: expected at least 1"),
        ({"size": (0, 4)}, ValueError, "size, stride: expected at least 1"),
        ({"cache_bytes": -1}, ValueError, "cache_bytes: expected 0 or more"),
        ({"depth_scale": -1.0}, ValueError, "depth_scale: expected units per meter > 0"),
        ({"background": (0, 0, 300)}, ValueError, r"background: expected red, green and blue in \[0, 1\]"),
        ({"intrinsics": np.eye(4)}, ShapeError, r"intrinsics: expected \[3, 3\], got \[4, 4\]"),
        ({"intrinsics": [[0.9, 0, 0.5], [0, 0.9, 0.5], [0, 0, 1]]}, DataError, "room: intrinsics: .*normalized values"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], message: str, tmp_path: Path) -> None:
    formats.write_nerfstudio(tmp_path / "room", formats.room_views())
    with pytest.raises(error, match=message):
        open_views(tmp_path / "room", **arguments)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: expected a folder of posed images or meshes, found nothing"):
        open_views(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: expected a folder of posed images or meshes, found a file"):
        open_views(tmp_path / "file")


class Counted:
    """Counts the color images that are decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        read = images.read_color

        def counted(frame: object, *arguments: object) -> torch.Tensor:
            self.names.append(frame.name)  # type: ignore[attr-defined]
            return read(frame, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr("cameo.data.readers.source.read_color", counted)


def test_only_the_views_of_a_sample_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    room = formats.room_views(8)
    opened = open_views(formats.write_seven_scenes(tmp_path / "room", room), (24, 32))
    assert counted.names == ["frame-000000"]  # a look at the first one when it is opened
    dataset = MultiViewDataset(opened, num_views=2, min_overlap=0.05)
    assert counted.names == ["frame-000000"]
    sample = dataset[0]  # measures the overlap, for which depth alone is decoded
    assert len(set(counted.names) | {f"frame-{view:06d}" for view in sample["scene_views"]}) <= 3
    before = len(counted.names)
    dataset[0]
    assert len(counted.names) == before  # kept
    opened.views(0)
    assert len(counted.names) == 8
    chosen = sample["scene_views"]
    assert torch.equal(sample["images"], opened.views(0).select(chosen).images.float() / 255)


def test_decoded_views_are_kept_up_to_a_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = formats.write_seven_scenes(tmp_path / "room", formats.room_views(8))
    counted = Counted(monkeypatch)
    one_view = 24 * 32 * (3 + 4)  # 3 bytes of color and 4 of depth per pixel
    opened = open_views(folder, (24, 32), cache_bytes=3 * one_view)
    opened.select(0, range(8))
    assert opened._decoded.bytes == 3 * one_view
    counted.names.clear()
    opened.select(0, [5, 6, 7, 0])
    assert counted.names == ["frame-000000"]
    opened.select(0, [6])  # the one that was used last stays
    opened.select(0, [1, 2, 6])
    assert counted.names == ["frame-000000", "frame-000001", "frame-000002"]
    nothing = open_views(folder, (24, 32), cache_bytes=0)
    nothing.select(0, range(8))
    assert nothing._decoded.bytes == 0


def test_a_source_is_sent_to_other_processes_without_what_it_decoded(tmp_path: Path) -> None:
    opened = open_views(formats.write_colmap(tmp_path / "room", formats.room_views()), (24, 32))
    expected = opened.views(0)
    sent = pickle.dumps(opened)
    assert len(sent) < expected.images.nbytes
    again = pickle.loads(sent).views(0)
    assert torch.equal(again.images, expected.images)
    assert torch.equal(again.tracks.xy, expected.tracks.xy)


def test_views_that_are_not_there(tmp_path: Path) -> None:
    opened = open_views(formats.write_nerfstudio(tmp_path / "room", formats.room_views()))
    with pytest.raises(IndexError, match="indices: expected 0 to 3, got 4"):
        opened.select(0, [0, 4])
    with pytest.raises(IndexError, match="scene: this is one scene"):
        opened.views(1)


def test_tracks_go_with_the_views_of_a_sample(tmp_path: Path) -> None:
    room = formats.room_views()
    opened = open_views(formats.write_colmap(tmp_path / "room", room), SIZE)
    dataset = MultiViewDataset(opened, num_views=2, min_overlap=0.05, max_overlap=1.0)
    samples = [dataset[0], dataset[1]]
    batch = collate(samples)
    assert batch["tracks"] == [sample["tracks"] for sample in samples]
    chosen = samples[0]["scene_views"]
    expected = room.tracks.of_views(chosen)
    found = samples[0]["tracks"]
    order, other = (np.lexsort((one.view, one.point)) for one in (found, expected))
    torch.testing.assert_close(found.xy[order], expected.xy[other], rtol=0, atol=1e-4)
    assert torch.equal(found.view[order], expected.view[other])


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    room = formats.write_seven_scenes(tmp_path / "room", formats.room_views())
    other = tmp_path / "other.png"
    (room / "frame-000001.color.png").rename(other)
    (room / "frame-000001.color.png").symlink_to(other)
    with pytest.raises(DataError, match=r"names 'frame-000001.color.png', which leaves the folder .*copy what a link"):
        open_views(room)
    (room / "frame-000001.color.png").unlink()
    other.rename(room / "stored.png")
    (room / "frame-000001.color.png").symlink_to("stored.png")
    assert len(open_views(room).views(0)) == 4


@pytest.mark.parametrize(("name", "count"), [("fox", 50), ("rgbd_room", 234)])
def test_real_data_opens(name: str, count: int, real_data: Callable[[str], Path]) -> None:
    with warnings.catch_warnings(action="error"):
        opened = open_views(real_data(name), (32, 32))
    assert len(opened.cameras(0)) == count
    assert opened.select(0, [0, count - 1]).images.float().std() > 20


def test_transparent_pixels_show_the_background(tmp_path: Path) -> None:
    room = formats.room_views()
    formats.write_zero123(tmp_path, room)
    pixels = np.zeros((*SIZE, 4), dtype=np.uint8)
    pixels[..., 0], pixels[:, :32, 3], pixels[:, 32:48, 3] = 200, 255, 102  # red; opaque, 40 %, transparent
    Image.fromarray(pixels).save(tmp_path / "000.png")
    white = open_views(tmp_path, SIZE).select(0, [0]).images[0]
    assert white[:, 0, 0].tolist() == [200, 0, 0]
    assert white[:, 0, 40].tolist() == [233, 153, 153]  # 0.4 * 200 + 0.6 * 255 and 0.6 * 255
    assert white[:, 0, 63].tolist() == [255, 255, 255]
    green = open_views(tmp_path, SIZE, background=(0, 1, 0)).select(0, [0]).images[0]
    assert green[:, 0, 63].tolist() == [0, 255, 0]


def test_depth_of_co3d_counts_where_its_mask_does(tmp_path: Path) -> None:
    folder = formats.write_co3d(tmp_path / "chair", formats.room_views())
    path = folder / "frame_annotations.jgz"
    entries = json.loads(gzip.decompress(path.read_bytes()))
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[:, :20] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    entries[0]["depth"]["mask_path"] = "chair/mask.png"
    path.write_bytes(gzip.compress(json.dumps(entries).encode()))
    depth = open_views(folder, SIZE).views(0).depth
    assert (depth[0, 0, :, :20] > 0).any()
    assert not depth[0, 0, :, 20:].any()
    assert (depth[1, 0, :, 20:] > 0).any()


def test_gray_of_sixteen_bit_keeps_its_shades(tmp_path: Path) -> None:
    formats.write_seven_scenes(tmp_path, formats.room_views())
    shades = np.tile(np.linspace(0, 65535, formats.WIDTH), (formats.HEIGHT, 1))
    Image.fromarray(shades.astype(np.uint16)).save(tmp_path / "frame-000000.color.png")
    image = RGBDSequence(tmp_path, SIZE).select(0, [0]).images[0]
    np.testing.assert_allclose(image[1, 5].numpy(), shades[0] / 257, atol=1)


def test_a_photograph_that_exif_turns_is_turned_if_its_camera_says_so(tmp_path: Path) -> None:
    formats.write_nerfstudio(tmp_path, formats.room_views())
    upright = Image.open(tmp_path / "images" / "0000.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned by 90 degrees clockwise
    turned.save(tmp_path / "images" / "0000.png", exif=exif)
    views = open_views(tmp_path, SIZE).views(0)
    assert torch.equal(views.images, formats.room_views().images)
    turned.save(tmp_path / "images" / "0000.png")
    with pytest.raises(DataError, match=r"0000.png: is 48x64, and its camera is for 64x48"):
        open_views(tmp_path, SIZE)


def test_of_several_models_of_colmap_the_first_is_read_and_the_others_are_told(tmp_path: Path) -> None:
    formats.write_colmap(tmp_path, formats.room_views())
    (tmp_path / "sparse" / "1").mkdir()
    with pytest.warns(UserWarning, match=r"sparse: holds several models, which share no world; .*sparse/0 is read"):
        assert len(open_views(tmp_path).cameras(0)) == 4
