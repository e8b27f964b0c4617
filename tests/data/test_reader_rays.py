"""Conventions of each format, by hand: a known point of the world falls on the pixel where it should.

The camera stands at (1, 2, 3) and looks along x, with z up. The point (5, 1, 2) lies 4 in front of it, 1 to its right
and 1 below, so with a focal length of 70 it is 17.5 pixels right of the principal point and below it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cameo.data import open_views
from cameo.data.readers.source import PosedScenes
from cameo.geometry import project

HEIGHT, WIDTH = 48, 64
POINT = (5.0, 1.0, 2.0)
PRINCIPAL = (30.0, 26.0)
OPENCV_C2W = [[0, 0, 1, 1], [-1, 0, 0, 2], [0, -1, 0, 3], [0, 0, 0, 1]]
OPENCV_W2C = [[0, -1, 0, 2], [0, 0, -1, 3], [1, 0, 0, -1], [0, 0, 0, 1]]
OPENGL_C2W = [[0, 0, -1, 1], [-1, 0, 0, 2], [0, 1, 0, 3], [0, 0, 0, 1]]
BLENDER_W2C = [[0, -1, 0, 2], [0, 0, 1, -3], [-1, 0, 0, 1]]


def image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 150)).save(path)


def nerfstudio(folder: Path, **changes: object) -> None:
    image(folder / "a.png")
    camera = {"fl_x": 70, "fl_y": 70, "cx": 30, "cy": 26, "w": WIDTH, "h": HEIGHT, **changes}
    frames = [{"file_path": "a.png", "transform_matrix": OPENGL_C2W}]
    content = {**{name: value for name, value in camera.items() if value is not None}, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(content))


def colmap(folder: Path) -> None:
    image(folder / "images" / "a.png")
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    (model / "cameras.txt").write_text(f"7 SIMPLE_PINHOLE {WIDTH} {HEIGHT} 70 30 26\n")
    (model / "images.txt").write_text("1 0.5 0.5 -0.5 0.5 2 3 -1 7 a.png\n\n")
    (model / "points3D.txt").write_text("")


def co3d(folder: Path, form: str = "ndc_isotropic") -> None:
    image(folder / "seq" / "a.png")
    half = (24.0, 24.0) if form == "ndc_isotropic" else (32.0, 24.0)
    entry = {
        "sequence_name": "seq",
        "frame_number": 3,
        "image": {"path": f"{folder.name}/seq/a.png", "size": [HEIGHT, WIDTH]},
        "viewpoint": {
            "R": [[0, 0, 1], [1, 0, 0], [0, 1, 0]],
            "T": [-2, -3, -1],
            "focal_length": [70 / half[0], 70 / half[1]],
            # In NDC x points left and y up: 2 pixels left of the center and 2 below it.
            "principal_point": [2 / half[0], -2 / half[1]],
            "intrinsics_format": form,
        },
    }
    (folder / "frame_annotations.jgz").write_bytes(gzip.compress(json.dumps([entry]).encode()))


def seven_scenes(folder: Path) -> None:
    image(folder / "frame-000000.color.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 4000, dtype=np.uint16)).save(folder / "frame-000000.depth.png")
    np.savetxt(folder / "frame-000000.pose.txt", OPENCV_C2W)
    np.savetxt(folder / "camera-intrinsics.txt", [[70, 0, 30], [0, 70, 26], [0, 0, 1]])


def realestate10k(folder: Path) -> None:
    image(folder / "clip" / "33.png")
    numbers = [70 / WIDTH, 70 / HEIGHT, 30 / WIDTH, 26 / HEIGHT, 0, 0, *np.array(OPENCV_W2C)[:3].flatten()]
    (folder / "clip.txt").write_text("https://video\n33 " + " ".join(map(str, numbers)) + "\n")


WRITERS: dict[str, Callable[[Path], None]] = {
    "nerfstudio": nerfstudio,
    "colmap": colmap,
    "co3d": co3d,
    "co3d in image bounds": lambda folder: co3d(folder, "ndc_norm_image_bounds"),
    "rgbd": seven_scenes,
    "realestate10k": realestate10k,
}


def place_of_point(opened: PosedScenes) -> list[float]:
    cameras = opened.cameras(0)
    xy, z = project(torch.tensor(POINT).expand(1, 1, 1, 3), cameras.intrinsics[None], cameras.extrinsics[None])
    assert z.item() == pytest.approx(4.0, abs=1e-5)
    return xy.flatten().tolist()


@pytest.mark.parametrize("name", WRITERS)
def test_a_point_falls_on_its_pixel(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "scene")
    opened = open_views(tmp_path / "scene", (HEIGHT, WIDTH))
    assert opened.format == name.split()[0]
    assert place_of_point(opened) == pytest.approx([17.5 + 30, 17.5 + 26], abs=1e-3)
    # Cut to 32 columns about the middle and 24 rows: 64x48 loses 16 columns on the left, and both halve.
    small = open_views(tmp_path / "scene", (24, 16))
    assert place_of_point(small) == pytest.approx([(47.5 - 16) / 2, 43.5 / 2], abs=1e-3)


def test_a_render_of_zero123(tmp_path: Path) -> None:
    image(tmp_path / "000.png", (64, 64))
    np.save(tmp_path / "000.npy", np.array(BLENDER_W2C, dtype=float))
    opened = open_views(tmp_path, (64, 64))
    # A 35 mm lens on a 32 mm sensor has a focal length of 64 * 35 / 32 = 70 pixels.
    assert place_of_point(opened) == pytest.approx([17.5 + 32, 17.5 + 32], abs=1e-3)
    assert opened.cameras(0).up.tolist() == [0, 0, 1]
    field_of_view = 2 * np.degrees(np.arctan(32 / opened.cameras(0).intrinsics[0, 0, 0].item()))
    assert field_of_view == pytest.approx(49.13, abs=0.01)


def test_tum_counts_pixels_from_zero(tmp_path: Path) -> None:
    folder = tmp_path / "rgbd_dataset_freiburg3_room"
    image(folder / "rgb" / "1.png", (640, 480))
    Image.fromarray(np.full((480, 640), 20000, dtype=np.uint16)).save(folder / "d.png")
    (folder / "rgb.txt").write_text("1.0 rgb/1.png\n")
    (folder / "depth.txt").write_text("1.0 d.png\n")
    (folder / "groundtruth.txt").write_text("1.0 1 2 3 -0.5 0.5 -0.5 0.5\n")
    opened = open_views(folder, (480, 640))
    assert place_of_point(opened) == pytest.approx([535.4 / 4 + 320.6, 539.2 / 4 + 248.1], abs=1e-3)
    assert opened.views(0).depth.unique().tolist() == [4.0]


def test_webdataset(tmp_path: Path) -> None:
    import io
    import tarfile

    image(tmp_path / "kitchen.a.png")
    matrix = [[70, 0, 30], [0, 70, 26], [0, 0, 1]]
    view = {"name": "a", "intrinsics": matrix, "extrinsics": OPENCV_W2C, "size": [HEIGHT, WIDTH]}
    content = json.dumps({"views": [view], "up": [0, 0, 2]}).encode()
    with tarfile.open(tmp_path / "rooms.tar", "w") as archive:
        archive.add(tmp_path / "kitchen.a.png", "kitchen.a.png")
        member = tarfile.TarInfo("kitchen.cameras.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    opened = open_views(tmp_path, (HEIGHT, WIDTH))
    assert (opened.format, opened.cameras(0).key) == ("webdataset", "kitchen")
    assert place_of_point(opened) == pytest.approx([47.5, 43.5], abs=1e-3)
    assert opened.cameras(0).up.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("changes", "focal_lengths", "principal"),
    [
        # An angle of 2 atan(32 / 70) sees 64 pixels with a focal length of 70.
        ({"fl_x": None, "fl_y": None, "camera_angle_x": 2 * np.arctan(32 / 70)}, (70, 70), (30, 26)),
        ({**dict.fromkeys(("fl_x", "fl_y", "cx", "cy", "w", "h")), "camera_angle_x": 2 * np.arctan(0.5)},
         (64, 64), (32, 24)),
        ({"fl_x": None, "fl_y": None, "camera_angle_x": 2 * np.arctan(0.5), "camera_angle_y": 2 * np.arctan(0.25)},
         (64, 96), (30, 26)),
        ({"fl_y": None}, (70, 70), (30, 26)),
        ({"camera_angle_x": 0.1}, (70, 70), (30, 26)),  # a focal length wins
    ],
)  # fmt: skip
def test_intrinsics_of_nerfstudio(
    changes: dict, focal_lengths: tuple[float, float], principal: tuple[float, float], tmp_path: Path
) -> None:
    nerfstudio(tmp_path, **changes)
    matrix = open_views(tmp_path, (HEIGHT, WIDTH)).cameras(0).intrinsics[0]
    assert matrix.diagonal()[:2].tolist() == pytest.approx(focal_lengths, abs=1e-3)
    assert matrix[:2, 2].tolist() == pytest.approx(principal, abs=1e-4)


def test_intrinsics_of_a_frame_win_over_shared_ones(tmp_path: Path) -> None:
    nerfstudio(tmp_path)
    content = json.loads((tmp_path / "transforms.json").read_text())
    image(tmp_path / "b.png", (32, 24))
    own = {"fl_x": 35, "fl_y": 36, "cx": 16, "cy": 12, "w": 32, "h": 24}
    content["frames"].append({"file_path": "b.png", "transform_matrix": OPENGL_C2W, **own})
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    first, second = open_views(tmp_path, (48, 64)).cameras(0).intrinsics
    assert first.diagonal().tolist() == [70, 70, 1]
    assert second.tolist() == [[70, 0, 32], [0, 72, 24], [0, 0, 1]]  # 32x24 became 64x48


def test_the_world_is_that_before_the_applied_transform(tmp_path: Path) -> None:
    """The axes that nerfstudio exchanges when it converts a COLMAP model: x, z, -y."""
    nerfstudio(tmp_path, applied_transform=[[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]])
    path = tmp_path / "transforms.json"
    content = json.loads(path.read_text())
    applied = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    content["frames"][0]["transform_matrix"] = (applied @ np.array(OPENGL_C2W)).tolist()
    path.write_text(json.dumps(content))
    assert place_of_point(open_views(tmp_path, (HEIGHT, WIDTH))) == pytest.approx([47.5, 43.5], abs=1e-3)


def test_a_blender_scene_of_nerf(tmp_path: Path) -> None:
    image(tmp_path / "train" / "r_0.png")
    frames = [{"file_path": "./train/r_0", "transform_matrix": OPENGL_C2W}]
    content = {"camera_angle_x": 2 * np.arctan(32 / 70), "frames": frames}
    (tmp_path / "transforms_train.json").write_text(json.dumps(content))
    opened = open_views(tmp_path, (HEIGHT, WIDTH))
    assert place_of_point(opened) == pytest.approx([17.5 + 32, 17.5 + 24], abs=1e-3)


@pytest.mark.parametrize(
    ("parent", "name", "found"),
    [
        ("a", "rgbd_dataset_freiburg1_desk", 517.3),
        ("rgbd_dataset_freiburg2_xyz", "sequence", 520.9),
        ("scans_for_freiburg2_people", "office", None),
        ("rgbd_dataset_freiburg1_desk/deep", "office", None),
    ],
)
def test_a_calibration_is_that_of_the_folder_s_own_name(
    parent: str, name: str, found: float | None, tmp_path: Path
) -> None:
    from cameo.data.readers.frames import ReadOptions
    from cameo.data.readers.rgbd import _tum_lens
    from cameo.errors import DataError

    folder = tmp_path / parent / name
    folder.mkdir(parents=True)
    if found is None:
        with pytest.raises(DataError, match=r"no camera intrinsics .*pass intrinsics="):
            _tum_lens(folder, (480, 640), ReadOptions())
    else:
        assert _tum_lens(folder, (480, 640), ReadOptions()).fx == found


def test_marks_of_byte_order_and_commas_are_read(tmp_path: Path) -> None:
    seven_scenes(tmp_path)
    rows = "\n".join(", ".join(map(str, row)) for row in OPENCV_C2W)
    (tmp_path / "frame-000000.pose.txt").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    (tmp_path / "camera-intrinsics.txt").write_text("70,0,30,0\n0,70,26,0\n0,0,1,0\n0,0,0,1", encoding="utf-16")
    assert place_of_point(open_views(tmp_path, (HEIGHT, WIDTH))) == pytest.approx([47.5, 43.5], abs=1e-3)
    realestate10k(tmp_path / "clips")
    path = tmp_path / "clips" / "clip.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b" ", b", "))
    assert place_of_point(open_views(tmp_path / "clips", (HEIGHT, WIDTH))) == pytest.approx([47.5, 43.5], abs=1e-3)
