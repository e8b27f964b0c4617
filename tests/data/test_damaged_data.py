"""Damaged data sets: one clear error that names the file and the cure, or frames that are left out with a warning."""

from __future__ import annotations

import gzip
import json
import math
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cameo.data import open_views
from cameo.errors import DataError
from tests.helpers import posed_formats as formats
from tests.helpers.damage import (
    Damage,
    all_of,
    cut,
    edited,
    patched,
    removed,
    repacked,
    replaced,
    resized,
    saved,
    set_in,
    written,
)

SIZE = (24, 32)
NAN = [[math.nan] * 4] * 4
FRAME = ("frames", 1)
JSON = "transforms.json"
PNG = "images/0001.png"
CLIP = "clip.txt"
ANNOTATIONS = "frame_annotations.jgz"
CAMERAS = "scene000000.cameras.json"


def in_cameras(*path: object, value: object) -> Damage:
    def edit(members: dict[str, bytes]) -> None:
        content = json.loads(members[CAMERAS])
        set_in(*path, value=value)(content)
        members[CAMERAS] = json.dumps(content).encode()

    return repacked(edit)


def member(name: str, content: bytes | None) -> Damage:
    def edit(members: dict[str, bytes]) -> None:
        if content is None:
            del members[name]
        else:
            members[name] = content

    return repacked(edit)


def folder_instead(name: str) -> Damage:
    def act(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return act


def shallow_depth(name: str) -> Damage:
    return lambda folder: Image.new("L", (formats.WIDTH, formats.HEIGHT), 9).save(folder / name)


# Format, what is done to it, and what the error says.
ERRORS: list[tuple[str, Damage, str]] = [
    ("nerfstudio", cut(JSON, 200), r"transforms.json: expected JSON .*cut short"),
    ("nerfstudio", written(JSON, b"\xff\xfa\x00"), r"transforms.json: expected a text file in UTF-8 .*save it as UTF-"),
    ("nerfstudio", written(JSON, "[1, 2]"), r'transforms.json: expected an object with a list "frames", got \[1, 2\]'),
    ("nerfstudio", edited(JSON, set_in("frames", value=[])), r"holds no frames; nerfstudio needs transforms.json"),
    ("nerfstudio", edited(JSON, set_in(*FRAME, value=7)), r'frame 1: expected an object with "file_path", got 7'),
    ("nerfstudio", edited(JSON, set_in(*FRAME, "file_path", value="../a.png")), r"names '../a.png', which leaves the"),
    ("nerfstudio", edited(JSON, set_in(*FRAME, "file_path", value="/etc/a.png")), r"names '/etc/a.png', which leaves"),
    ("nerfstudio", edited(JSON, set_in(*FRAME, "file_path", value=3)), r"frame 1: expected the name of a file, got 3"),
    ("nerfstudio", edited(JSON, set_in("w", value=640)), r"0000.png: is 64x48, and its camera is for 640x48; restore"),
    ("nerfstudio", edited(JSON, set_in("fl_x", value="wide")), r"frame 0: fl_x: expected a finite number, got 'wide'"),
    ("nerfstudio", edited(JSON, set_in("fl_x", value=-3)), r"room: intrinsics: .*focal length that is not positive"),
    ("nerfstudio", edited(JSON, set_in("cx", value=500)), r"principal point \(500.0, 24.0\) lies outside the 64x48"),
    ("nerfstudio", edited(JSON, lambda content: [content.pop(key) for key in ("fl_x", "fl_y")] and None),
     r"frame 0: no camera intrinsics; write fl_x"),
    ("nerfstudio", edited(JSON, set_in("camera_model", value="LENTICULAR")), r"camera_model 'LENTICULAR' cannot be un"),
    ("nerfstudio", edited(JSON, set_in("applied_transform", value=[[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]])),
     r"applied_transform: expected a rigid 3x4"),
    ("nerfstudio", edited(JSON, set_in("depth_unit_scale_factor", value=0)), r"expected a factor > 0, got 0"),
    ("nerfstudio", removed("depth_2.npy"), r"frame 2: depth file .*depth_2.npy is not there; restore it, or remove"),
    ("nerfstudio", saved("depth_1.npy", np.zeros((3, 48, 64))), r"depth_1.npy: expected depth as numbers \[H, W\]"),
    ("nerfstudio", saved("depth_1.npy", [{"a": 1}]), r"depth_1.npy: cannot read the depth .*without objects"),
    ("nerfstudio", saved("depth_1.npy", np.zeros((10, 64))), r"depth of 64x10 has another aspect than its color image"),
    ("nerfstudio", cut(PNG, 300), r"0001.png: cannot decode the color image .*replace it by the original"),
    ("nerfstudio", cut(PNG, 3), r"0001.png: cannot decode the color image"),
    ("colmap", cut("sparse/0/images.bin", 100), r"images.bin: 100 bytes do not hold its 4 entries; .*cut short"),
    ("colmap", cut("sparse/0/images.bin", 700), r"sparse/0: COLMAP cannot read the model|images.bin: 700 bytes do not"),
    ("colmap", cut("sparse/0/cameras.bin", 4), r"cameras.bin: 4 bytes do not hold"),
    ("colmap", written("sparse/0/points3D.bin", b"\xff" * 64), r"points3D.bin: 64 bytes do not hold its"),
    ("colmap", removed("sparse/0/points3D.bin"), r"points3D.bin: no such file; a sparse model has"),
    ("colmap", resized(PNG), r"0001.png: is 30x20, and its camera is for 64x48"),
    ("colmap", cut(PNG, 300), r"0001.png: cannot decode the color image"),
    ("colmap text", replaced("sparse/0/images.txt", "0001.png", "../0001.png"), r"names '../0001.png', which leaves"),
    ("colmap text", replaced("sparse/0/cameras.txt", "PINHOLE", "PEEPHOLE"), r"COLMAP cannot read the model"),
    # Behind the count, the number, the model, the width and the height lie the focal lengths.
    ("colmap", patched("sparse/0/cameras.bin", 32, struct.pack("d", math.nan)), r"camera 1: expected a size and finit"),
    ("colmap text", replaced("sparse/0/cameras.txt", " 70.0 70.0", " nan nan"), r"COLMAP cannot read the model"),
    ("colmap text", replaced("sparse/0/cameras.txt", " 70.0 70.0", ""), r"COLMAP cannot read the model"),
    ("colmap text", replaced("sparse/0/cameras.txt", " 70.0 70.0", " 70.0 -5.0"), r"focal length that is not positive"),
    ("colmap text", written("sparse/0/images.txt", b"\xff\xfa\x00"), r"images.txt: expected a text file in UTF-8"),
    ("colmap text", written("sparse/0/images.txt", "# none\n"), r"COLMAP cannot read the model .*export it again"),
    ("colmap text", all_of(written("sparse/0/images.txt", ""), written("sparse/0/points3D.txt", "")),
     r"holds no registered image; run COLMAP's mapper again"),
    ("colmap text", replaced("sparse/0/images.txt", " 1 0001.png", " 9 0001.png"), r"COLMAP cannot read the model"),
    ("co3d", cut(ANNOTATIONS, 60), r"jgz: expected JSON packed with gzip .*download it again"),
    ("co3d", written(ANNOTATIONS, "[]"), r"jgz: expected JSON packed with gzip"),
    ("co3d", written(ANNOTATIONS, b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 9), r"jgz: expected JSON packed .*\(Error -3"),
    ("co3d", written(ANNOTATIONS, gzip.compress(b"{}")), r"jgz: expected a list of frames, got dict"),
    ("co3d", written(ANNOTATIONS, gzip.compress(b"[]")), r"jgz: holds no frames; download it again"),
    ("co3d", edited(ANNOTATIONS, set_in(1, "sequence_name", value=None)), r"frame 1: expected an object with a seq"),
    ("co3d", edited(ANNOTATIONS, set_in(1, "viewpoint", value={})), r"seq, frame 1: expected image.path.*failed at Ke"),
    ("co3d", edited(ANNOTATIONS, set_in(1, "viewpoint", "intrinsics_format", value="px")), r"unknown intrinsics_forma"),
    ("co3d", edited(ANNOTATIONS, set_in(1, "viewpoint", "focal_length", value=[-1, 1])), r"finite focal lengths > 0"),
    ("co3d", edited(ANNOTATIONS, set_in(1, "image", "path", value="room/../../x.png")), r"which leaves the folder"),
    ("co3d", edited(ANNOTATIONS, set_in(1, "image", "size", value=[480, 640])), r"is 64x48, and its camera is for 640"),
    ("co3d", edited(ANNOTATIONS, set_in(1, "depth", "scale_adjustment", value=-1)), r"expected a factor > 0, got -1"),
    ("co3d", cut("seq/depths/frame000001.png", 90), r"frame000001.png: cannot decode the depth image"),
    ("co3d", shallow_depth("seq/depths/frame000001.png"), r"expected a 16-bit gray depth image, got uint8"),
    ("realestate10k", replaced(CLIP, "1000 ", "1000 5 "), r"clip.txt, line 3: expected 19 columns.*got 20"),
    ("realestate10k", replaced(CLIP, "1000 1.0", "1000 one"), r"clip.txt, line 3: expected numbers"),
    ("realestate10k", replaced(CLIP, "1000 1.0937", "1000 -1.0937"), r"line 3: expected fx fy cx cy as shares"),
    ("realestate10k", replaced(CLIP, "1000 1.093750000 1.458333333 0.5", "1000 70 70 32"), r"divide intrinsics in pix"),
    ("realestate10k", replaced(CLIP, "\n1000 ", "\n../../a "), r"line 3: names '../../a.png', which leaves"),
    ("realestate10k", lambda folder: (folder / CLIP).write_bytes((folder / CLIP).read_bytes() + b"\xff\xfe\xff"),
     r"clip.txt: expected a text file in UTF-8"),
    ("realestate10k", lambda folder: (folder / "clip").rename(folder / "film"), r"1 clips, and no frames of any; put"),
    ("realestate10k", cut("clip/1000.png", 300), r"1000.png: cannot decode the color image"),
    ("realestate10k", written("clip/1000.png", "moved"), r"1000.png: cannot decode the color image"),
    ("realestate10k", folder_instead(CLIP), r"not recognized as data_format=realestate10k"),
    ("webdataset", cut("scenes-00000.tar", 3000), r"scenes-00000.tar: (is cut short|cannot be read as a tar)"),
    ("webdataset", written("scenes-00000.tar", gzip.compress(b"1" * 999)), r"tar: cannot be read .*unpack one that is"),
    ("webdataset", member(CAMERAS, None), r"tar: holds no SCENE.cameras.json; write it with cameo.data.write_tars"),
    ("webdataset", member(CAMERAS, b"{"), r"tar: scene000000.cameras.json: expected JSON"),
    ("webdataset", member(CAMERAS, b"{}"), r'cameras.json: expected an object with a list "views"'),
    ("webdataset", in_cameras("views", 1, value={}), r'view 1: expected an object with a "name"'),
    ("webdataset", in_cameras("views", 1, "size", value=[48]), r'view 1: expected "size" \[H, W\] and "intrinsics"'),
    ("webdataset", in_cameras("views", 1, "size", value=[480, 640]), r"0001.png: is 64x48, and its camera is for 640x"),
    ("webdataset", in_cameras("depth_per_unit", value=0), r"depth_per_unit: expected a number > 0, got 0"),
    ("webdataset", in_cameras("up", value=[0, 0, 0]), r"up: expected a direction of 3 numbers or null"),
    ("webdataset", member("scene000000.0001.png", b"\x89PNG"), r"0001.png: cannot decode the color image"),
    ("webdataset", member("scene000000.0001.depth.npz", b"PK"), r"0001.depth.npz: cannot read the depth"),
    ("webdataset", member("scene000000.tracks.npz", b"PK"), r"tracks.npz: expected arrays point, view and xy"),
    ("zero123", cut("001.npy", 90), r"001.npy: expected a 3x4 matrix written with numpy.save .*render the view again"),
    ("zero123", written("001.npy", ""), r"001.npy: expected a 3x4 matrix"),
    ("zero123", saved("001.npy", [{"pose": 1}]), r"001.npy: expected a 3x4 matrix"),
    ("zero123", cut("001.png", 300), r"001.png: cannot decode the color image"),
    ("zero123", written("001.png", "<html>"), r"001.png: cannot decode the color image"),
    ("rgbd", cut("frame-000001.color.png", 300), r"000001.color.png: cannot decode the color image"),
    ("rgbd", resized("frame-000001.color.png"), r"000001.color.png: is 30x20, and its camera is for 64x48"),
    ("rgbd", shallow_depth("frame-000001.depth.png"), r"000001.depth.png: expected a 16-bit gray depth image"),
    ("rgbd", written("camera-intrinsics.txt", "1 2\n3"), r"camera-intrinsics.txt, line 2: expected 2 numbers as befor"),
    ("rgbd", written("camera-intrinsics.txt", "f = 70"), r"camera-intrinsics.txt, line 1: expected numbers"),
    ("rgbd tum", written("rgb.txt", b"\xff\xfa\x00"), r"rgb.txt: expected a text file in UTF-8"),
    ("rgbd tum", replaced("rgb.txt", "1.0 rgb", "one rgb"), r"rgb.txt, line 2: expected 2 columns, time stamp first"),
    ("rgbd tum", replaced("depth.txt", "depth/1", "../1"), r"depth.txt: names '../1.png', which leaves the folder"),
    ("rgbd tum", written("depth.txt", "# none\n"), r"4 of 4 frames left out; first: rgb/0.png \(no depth image within"),
    ("rgbd tum", cut("depth/1.png", 80), r"depth/1.png: cannot decode the depth image"),
]  # fmt: skip

# Format, what is done to it, and the reason for which frames are left out.
DROPPED: list[tuple[str, Damage, str]] = [
    ("nerfstudio", edited(JSON, set_in(*FRAME, "transform_matrix", value=NAN)), r"1 of 4 .*images/0001.png \(its tran"),
    ("nerfstudio", edited(JSON, set_in(*FRAME, "transform_matrix", value=[[1]])), r"1 of 4 .*finite rigid 4x4 matrix"),
    ("nerfstudio", removed(PNG), r"1 of 4 frames left out; first: images/0001.png \(no such image\)"),
    ("colmap", removed(PNG), r"1 of 4 frames left out; first: 0001.png \(no such image in .*images\)"),
    ("co3d", edited(ANNOTATIONS, set_in(1, "viewpoint", "T", value=[0, 0, math.inf])), r"1 of 4 .*frame 1 \(its viewp"),
    ("co3d", removed("seq/images/frame000001.png"), r"1 of 4 frames left out; first: frame 1 \(no image"),
    ("realestate10k", removed("clip/1000.png"), r"1 of 4 .*1000 \(no image of this time stamp"),
    ("realestate10k", lambda folder: (folder / CLIP).write_text(
        "\n".join(line if number != 2 else " ".join([*line.split()[:7], *["nan"] * 12])
                  for number, line in enumerate((folder / CLIP).read_text().splitlines()))),
     r"1 of 4 .*1000 \(its pose is not a finite rigid 3x4"),
    ("webdataset", in_cameras("views", 1, "extrinsics", value=NAN), r"1 of 4 .*0001 \(its extrinsics are not a finite"),
    ("webdataset", member("scene000000.0001.png", None), r"1 of 4 .*0001 \(no scene000000.0001.png in the tar\)"),
    ("zero123", saved("001.npy", np.full((3, 4), np.nan)), r"1 of 4 .*001 \(its pose is not a finite rigid 3x4"),
    ("zero123", saved("001.npy", np.zeros((4, 3))), r"1 of 4 .*001 \(its pose is not a finite rigid 3x4"),
    ("zero123", saved("001.npy", 3 * np.eye(4)[:3]), r"1 of 4 .*001 \(its pose is not a finite rigid 3x4"),
    ("zero123", folder_instead("001.npy"), r"1 of 4 .*001 \(no pose file\)"),
    ("zero123", removed("001.npy"), r"1 of 4 .*001 \(no pose file\)"),
    ("zero123", removed("001.png"), r"1 of 4 .*001 \(no image file\)"),
    ("rgbd", written("frame-000001.pose.txt", "nan " * 16), r"1 of 4 .*000001 \(its pose"),
    ("rgbd", removed("frame-000001.depth.png"), r"1 of 4 .*000001 \(no depth file\)"),
    ("rgbd tum", lambda folder: (folder / "groundtruth.txt").write_text(
        "\n".join(["1.0 0 0 0 0 0 0 0", *(line for line in (folder / "groundtruth.txt").read_text().splitlines()
                                          if not line.startswith("1.0"))])),
     r"1 of 4 .*rgb/1.png \(its pose is not finite or its quaternion is not a rotation"),
    ("rgbd tum", removed("rgb/1.png"), r"1 of 4 .*rgb/1.png \(no color file\)"),
]  # fmt: skip


def opened_after(name: str, damage: Damage, tmp_path: Path) -> object:
    folder = tmp_path / "room"
    if name.startswith("colmap"):
        formats.write_colmap(folder, formats.room_views(), binary=name == "colmap")
    else:
        formats.WRITERS[name](folder, formats.room_views())
    damage(folder)
    options = {"intrinsics": formats.CALIBRATION} if name == "rgbd tum" else {}
    return open_views(folder, SIZE, data_format=name.split()[0], **options)


@pytest.mark.parametrize(("name", "damage", "message"), ERRORS)
def test_damaged_data_is_explained(name: str, damage: Damage, message: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"), pytest.raises(DataError, match=rf"(?s){message}"):
        opened_after(name, damage, tmp_path).views(0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "damage", "message"), DROPPED)
def test_frames_that_cannot_be_used_are_left_out(name: str, damage: Damage, message: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=message):
        views = opened_after(name, damage, tmp_path).views(0)  # type: ignore[attr-defined]
    assert len(views) == 3
    kept = formats.room_views().select([0, 2, 3])
    np.testing.assert_allclose(views.extrinsics, kept.extrinsics, atol=2e-6)


@pytest.mark.parametrize("name", [name.split()[0] for name in formats.WRITERS])
def test_every_format_has_ten_damaged_forms(name: str) -> None:
    assert sum(case[0].split()[0] == name for case in ERRORS + DROPPED) >= 10
