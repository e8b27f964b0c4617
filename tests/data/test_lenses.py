"""Lens distortion: against OpenCV and COLMAP, in images, depth and tracks, with pixel centers at +0.5."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
import torch
from PIL import Image

from cameo.correspondence.tracks import Tracks
from cameo.data import open_views
from cameo.data.readers.images import output_intrinsics
from cameo.data.readers.lenses import Lens, rays_to_pixels, straightened
from cameo.errors import DataError
from cameo.geometry import project
from tests.helpers import posed_formats as formats

SIZE = (96, 128)
PLAIN = Lens(SIZE, 110.0, 112.0, 61.0, 50.0)
BARREL = (-0.25, 0.05, 0.002, -0.001)
LENSES = {
    "barrel": PLAIN.distorted("opencv", BARREL),
    "pincushion": PLAIN.distorted("opencv", (0.2, 0.05, -0.003, 0.002)),
    "six radial": PLAIN.distorted("opencv", (-0.2, 0.03, 0.001, 0.001, 0.01, 0.02, 0.01, 0.003)),
    "fisheye": PLAIN.distorted("fisheye", (0.05, -0.01, 0.003, -0.001)),
}


def opencv_pixels(lens: Lens, rays: np.ndarray) -> np.ndarray:
    """Where OpenCV, which counts from 0, sees the rays, and half a pixel more."""
    matrix = lens.matrix - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
    points = np.concatenate([rays, np.ones((len(rays), 1))], axis=1)[:, None]
    call = cv2.fisheye.projectPoints if lens.model == "fisheye" else cv2.projectPoints
    return call(points, np.zeros(3), np.zeros(3), matrix, np.array(lens.params))[0][:, 0] + 0.5


@pytest.mark.parametrize("name", LENSES)
def test_points_fall_where_opencv_projects_them(name: str) -> None:
    rays = np.random.default_rng(0).uniform(-0.4, 0.4, (50, 2))
    np.testing.assert_allclose(rays_to_pixels(LENSES[name], rays), opencv_pixels(LENSES[name], rays), atol=1e-9)


@pytest.mark.parametrize("name", LENSES)
def test_the_straightened_image_is_as_wide_as_it_can_be_without_empty_pixels(name: str) -> None:
    lens = LENSES[name]
    straight = straightened(lens)
    assert (straight.cx, straight.cy) == (lens.cx, lens.cy)
    height, width = SIZE
    x, y = np.meshgrid(np.linspace(0, width, 65), np.linspace(0, height, 65))
    border = (x == 0) | (y == 0) | (x == width) | (y == height)

    def seen(zoom: float) -> np.ndarray:
        rays = np.stack([(x - lens.cx) / (straight.fx * zoom), (y - lens.cy) / (straight.fy * zoom)], -1)[border]
        pixels = rays_to_pixels(lens, rays)
        return ((pixels >= -0.01) & (pixels <= np.array([width, height]) + 0.01)).all(-1)

    assert seen(1.0).all()
    assert not seen(0.99).all()


def test_a_zero_distortion_changes_nothing() -> None:
    assert PLAIN.distorted("opencv", (0.0, 0.0, 0.0, 0.0)) == PLAIN
    assert straightened(PLAIN) is PLAIN


@pytest.mark.parametrize(
    "lens",
    [
        PLAIN.distorted("opencv", (500.0, 0.0, 0.0, 0.0)),  # leaves no ray within the image
        PLAIN.distorted("opencv", (-40.0, 0.0, 0.0, 0.0)),  # folds back before it reaches the border
    ],
)
def test_a_distortion_that_leaves_nothing(lens: Lens) -> None:
    with pytest.raises(DataError, match="leaves nothing of the image of 128x96; check the parameters"):
        straightened(lens)


def nerfstudio(folder: Path, color: np.ndarray, depth: np.ndarray | None = None, **camera: object) -> None:
    Image.fromarray(color).save(folder / "a.png")
    frame = {"file_path": "a.png", "transform_matrix": np.eye(4).tolist()}
    if depth is not None:
        np.save(folder / "a.npy", depth)
        frame["depth_file_path"] = "a.npy"
    shared = {"fl_x": PLAIN.fx, "fl_y": PLAIN.fy, "cx": PLAIN.cx, "cy": PLAIN.cy, "w": SIZE[1], "h": SIZE[0]}
    (folder / "transforms.json").write_text(json.dumps({**shared, **camera, "frames": [frame]}))


@pytest.mark.parametrize(
    ("name", "camera"),
    [
        ("barrel", dict(zip(("k1", "k2", "p1", "p2"), BARREL, strict=True))),
        ("pincushion", {"k1": 0.2, "k2": 0.05, "p1": -0.003, "p2": 0.002, "camera_model": "OPENCV"}),
        ("fisheye", {"k1": 0.05, "k2": -0.01, "k3": 0.003, "k4": -0.001, "camera_model": "OPENCV_FISHEYE"}),
        ("fisheye", {"k1": 0.05, "k2": -0.01, "k3": 0.003, "k4": -0.001, "is_fisheye": True}),
    ],
)
def test_what_a_pixel_shows_is_what_the_lens_saw_there(name: str, camera: dict, tmp_path: Path) -> None:
    """The image is painted by its own coordinates, so that each new pixel tells which old one it was taken from."""
    x, y = np.meshgrid(np.arange(SIZE[1]) + 0.5, np.arange(SIZE[0]) + 0.5)
    color = np.stack([2 * x - 1, 2 * y - 1, np.zeros_like(x)], -1)
    nerfstudio(tmp_path, color.astype(np.uint8), depth=1000 * (1 + x + 200 * np.floor(y)), **camera)
    opened = open_views(tmp_path, SIZE)
    views = opened.views(0)
    rays = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 3) @ np.linalg.inv(views.intrinsics[0].numpy()).T
    expected = opencv_pixels(LENSES[name], rays[:, :2]).reshape(*SIZE, 2)
    inner = (slice(3, -3), slice(3, -3))  # a cubic filter reaches beyond the border
    found = (views.images[0, :2].permute(1, 2, 0).numpy() + 1.0) / 2
    error = (found - expected)[inner]
    assert np.abs(error.mean((0, 1))).max() < 0.01  # half a pixel off would be 0.5
    assert np.abs(error).max() < 0.6  # 8-bit coordinates have steps of half a pixel
    picked = views.depth[0, 0].numpy() - 1
    column, row = np.mod(picked, 200), np.floor(picked / 200)
    assert np.abs(column - expected[..., 0]).max() <= 0.51  # the pixel under the center, at its own center
    assert np.abs(row + 0.5 - expected[..., 1]).max() <= 0.51


MODELS = {
    "SIMPLE_RADIAL": "110 61 50 -0.2",
    "RADIAL": "110 61 50 -0.2 0.03",
    "OPENCV": "110 112 61 50 -0.2 0.03 0.002 -0.001",
    "FULL_OPENCV": "110 112 61 50 -0.2 0.03 0.002 -0.001 0.01 0.02 0.01 0.003",
    "OPENCV_FISHEYE": "110 112 61 50 0.05 -0.01 0.003 -0.001",
    "SIMPLE_RADIAL_FISHEYE": "110 61 50 0.02",
    "RADIAL_FISHEYE": "110 61 50 0.02 0.01",
    "FOV": "110 112 61 50 0.6",
    "THIN_PRISM_FISHEYE": "110 112 61 50 0.05 -0.01 0.001 0.001 0.003 -0.001 0.001 0.001",
    "RAD_TAN_THIN_PRISM_FISHEYE": "110 112 61 50 0.05 -0.01 0.003 -0.001 0.001 0.001 0.001 0.001 0 0 0 0",
    "SIMPLE_FISHEYE": "110 61 50",  # bends without a coefficient
    "FISHEYE": "110 112 61 50",
    "SIMPLE_DIVISION": "110 61 50 -0.2",
    "DIVISION": "110 112 61 50 -0.2",
    "EUCM": "110 112 61 50 0.6 1.1",
    "SIMPLE_PINHOLE": "110 61 50",
    "PINHOLE": "110 112 61 50",
}


@pytest.mark.parametrize(("model", "binary"), [*((model, True) for model in MODELS), ("SIMPLE_RADIAL", False)])
def test_tracks_of_colmap_fall_on_the_points_that_they_show(model: str, binary: bool, tmp_path: Path) -> None:
    """Sightings are written where the lens saw the points, and read where the returned camera projects them."""
    height, width = SIZE
    camera = pycolmap.Camera.create_from_model_name(1, model, 100.0, width, height)
    camera.params = [float(value) for value in MODELS[model].split()]
    room = formats.room_views()
    world = torch.from_numpy(np.random.default_rng(1).uniform((-0.5, -0.4, 2.0), (0.5, 0.4, 4.0), (30, 3)))
    to_world = torch.linalg.inv(room.extrinsics[0].double())
    world = world @ to_world[:3, :3].T + to_world[:3, 3]
    in_camera = (
        torch.einsum("vij,pj->vpi", room.extrinsics[:, :3, :3].double(), world) + room.extrinsics[:, None, :3, 3]
    )
    seen = np.stack([camera.img_from_cam(points, check_cheirality=False) for points in in_camera.numpy()])
    ahead = in_camera[..., 2] > in_camera[..., :2].norm(dim=-1)  # farther out the polynomials of lenses fold back
    inside = ((seen >= 0) & (seen < (width, height))).all(-1) & ahead.numpy()
    view, point = (torch.from_numpy(place) for place in inside.nonzero())
    places = torch.from_numpy(seen[inside]).float()
    big = torch.zeros(len(room), 3, *SIZE, dtype=torch.uint8)
    written = replace(
        room,
        images=big,
        depth=torch.zeros(len(room), 1, *SIZE),
        tracks=Tracks(point=point, view=view, xy=places, num_views=len(room)),
    )
    formats.write_colmap(tmp_path, written, f"{model} {width} {height} {MODELS[model]}", binary=binary)
    opened = open_views(tmp_path, (40, 50))
    cameras = opened.cameras(0)
    assert len(cameras.tracks) > 0.5 * len(view)  # the others are cut off
    expected, _ = project(
        world.expand(1, len(room), -1, 3), cameras.intrinsics[None].double(), cameras.extrinsics[None].double()
    )
    found = cameras.tracks
    order = {int(number) + 1: int(number) for number in point.unique()}
    index = torch.tensor([order[int(number)] for number in found.point])
    torch.testing.assert_close(found.xy.double(), expected[0, found.view, index], rtol=0, atol=0.01)


def test_a_crop_and_a_smaller_size_move_the_camera_along() -> None:
    lens = Lens((96, 128), 110.0, 110.0, 60.0, 50.0)
    # 128x96 to 40x40: 16 columns go on each side, then 96 pixels become 40.
    matrix = output_intrinsics(lens, (40, 40))
    assert matrix[:2, 2].tolist() == pytest.approx([(60 - 16) * 40 / 96, 50 * 40 / 96])
    assert matrix[0, 0].item() == pytest.approx(110 * 40 / 96)


def test_a_model_without_a_flat_image_is_refused(tmp_path: Path) -> None:
    formats.write_colmap(tmp_path, formats.room_views(), f"EQUIRECTANGULAR {formats.WIDTH} {formats.HEIGHT} 64 48")
    with pytest.raises(DataError, match=r"camera 1: the model EQUIRECTANGULAR has no flat image"):
        open_views(tmp_path)


def test_a_fourth_coefficient_of_a_perspective_lens_is_refused(tmp_path: Path) -> None:
    nerfstudio(tmp_path, np.zeros((*SIZE, 3), dtype=np.uint8), k1=0.1, k4=0.01)
    with pytest.raises(DataError, match=r"frame 0: k4=0.01: a fourth radial coefficient cannot be undone"):
        open_views(tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    nerfstudio(tmp_path, np.zeros((*SIZE, 3), dtype=np.uint8), k1=0.0123)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(DataError, match=r'needs the package cv2; pip install "cameo-diffusion\[readers\]"'):
        open_views(tmp_path)
