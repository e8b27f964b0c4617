"""A rendered room, and writers of it in every format that is read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cameo.correspondence.tracks import Tracks
from cameo.data import Views, write_tars
from cameo.geometry import project
from cameo.scenes.rendering import render
from cameo.scenes.rooms import random_cameras, random_room

HEIGHT, WIDTH = 48, 64
# That of zero123's renders, so that all formats can state it.
FOCAL_LENGTH = WIDTH * 35.0 / 32.0
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
CALIBRATION = np.array([[FOCAL_LENGTH, 0.0, WIDTH / 2], [0.0, FOCAL_LENGTH, HEIGHT / 2], [0.0, 0.0, 1.0]])


@cache
def room_views(count: int = 4) -> Views:
    """Some views of an embedded room, with tracks of points of its surfaces."""
    rng = np.random.default_rng(5)
    geometry, extent = random_room(rng)
    _, extrinsics = random_cameras(rng, geometry, extent, count, (HEIGHT, WIDTH))
    intrinsics = np.tile(CALIBRATION, (count, 1, 1))
    images, depth = render(geometry, intrinsics, extrinsics.astype(np.float32).astype(float), (HEIGHT, WIDTH))
    views = Views(
        images=torch.from_numpy(images),
        depth=torch.from_numpy(depth),
        intrinsics=torch.from_numpy(intrinsics).float(),
        extrinsics=torch.from_numpy(extrinsics).float(),
        key="room",
    )
    return replace(views, tracks=_tracks(views))


def _tracks(views: Views) -> Tracks:
    """Twenty points in front of the first camera, wherever they fall into an image; nothing hides them."""
    xy = np.random.default_rng(0).uniform((8, 8), (WIDTH - 8, HEIGHT - 8), (20, 2))
    rays = np.concatenate([(xy - CALIBRATION[:2, 2]) / FOCAL_LENGTH, np.ones((20, 1))], axis=1)
    to_world = np.linalg.inv(views.extrinsics[0].double().numpy())
    points = torch.from_numpy((1.5 * rays) @ to_world[:3, :3].T + to_world[:3, 3])
    count = len(views)
    places, _ = project(
        points.expand(1, count, -1, 3), views.intrinsics[None].double(), views.extrinsics[None].double()
    )
    inside = ((places[0] >= 0) & (places[0] < torch.tensor([WIDTH, HEIGHT]))).all(-1)
    view, point = inside.nonzero().unbind(1)
    return Tracks(point=point, view=view, xy=places[0][view, point].float(), num_views=count)


def save_images(folder: Path, views: Views, name: Callable[[int], str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for view, image in enumerate(views.images):
        path = folder / name(view)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def camera_to_world(views: Views) -> np.ndarray:
    return np.linalg.inv(views.extrinsics.double().numpy())


def write_nerfstudio(folder: Path, views: Views) -> Path:
    save_images(folder, views, lambda view: f"images/{view:04d}.png")
    frames = []
    for view, pose in enumerate(camera_to_world(views)):
        np.save(folder / f"depth_{view}.npy", views.depth[view, 0].numpy())
        entry = {"file_path": f"images/{view:04d}.png", "depth_file_path": f"depth_{view}.npy"}
        frames.append({**entry, "transform_matrix": (pose @ OPENGL).tolist()})
    camera = {"fl_x": FOCAL_LENGTH, "fl_y": FOCAL_LENGTH, "cx": WIDTH / 2, "cy": HEIGHT / 2, "w": WIDTH, "h": HEIGHT}
    content = {**camera, "depth_unit_scale_factor": 1.0, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """As `w x y z`."""
    from scipy.spatial.transform import Rotation

    return Rotation.from_matrix(rotation).as_quat()[[3, 0, 1, 2]]


def write_colmap(folder: Path, views: Views, camera: str = "", *, binary: bool = False) -> Path:
    """`camera` is a line of cameras.txt behind the number of the camera."""
    save_images(folder / "images", views, lambda view: f"{view:04d}.png")
    model = folder / "sparse" / "0"
    model.mkdir(parents=True, exist_ok=True)
    line = camera or f"PINHOLE {WIDTH} {HEIGHT} {FOCAL_LENGTH} {FOCAL_LENGTH} {WIDTH / 2} {HEIGHT / 2}"
    (model / "cameras.txt").write_text(f"# CAMERA_ID MODEL WIDTH HEIGHT PARAMS\n1 {line}\n")
    tracks = views.tracks
    assert tracks is not None
    images, seen = [], {int(point): [] for point in tracks.point.unique()}
    for view, matrix in enumerate(views.extrinsics.double().numpy()):
        pose = " ".join(f"{value:.12f}" for value in (*quaternion(matrix[:3, :3]), *matrix[:3, 3]))
        mine = (tracks.view == view).nonzero().flatten().tolist()
        points = " ".join(f"{tracks.xy[i, 0]:.6f} {tracks.xy[i, 1]:.6f} {int(tracks.point[i]) + 1}" for i in mine)
        images += [f"{view + 1} {pose} 1 {view:04d}.png", f"3.0 4.0 -1 {points}"]
        for place, sighting in enumerate(mine, start=1):
            seen[int(tracks.point[sighting])].append(f"{view + 1} {place}")
    (model / "images.txt").write_text("\n".join(images) + "\n")
    lines = [f"{point + 1} 0 0 1 9 9 9 0.5 {' '.join(where)}" for point, where in seen.items()]
    (model / "points3D.txt").write_text("\n".join(lines) + "\n")
    if binary:
        import pycolmap

        reconstruction = pycolmap.Reconstruction(str(model))
        for path in model.glob("*.txt"):
            path.unlink()
        reconstruction.write_binary(str(model))
    return folder


def write_zero123(folder: Path, views: Views) -> Path:
    save_images(folder, views, lambda view: f"{view:03d}.png")
    for view, matrix in enumerate(views.extrinsics.double().numpy()):
        np.save(folder / f"{view:03d}.npy", (OPENGL @ matrix)[:3])
    return folder


def write_realestate10k(folder: Path, views: Views) -> Path:
    save_images(folder / "clip", views, lambda view: f"{1000 * view}.png")
    lines = ["https://www.youtube.com/watch?v=none"]
    for view, matrix in enumerate(views.extrinsics.double().numpy()):
        values = [FOCAL_LENGTH / WIDTH, FOCAL_LENGTH / HEIGHT, 0.5, 0.5, 0, 0, *matrix[:3].flatten()]
        lines.append(" ".join([str(1000 * view), *(f"{value:.9f}" for value in values)]))
    (folder / "clip.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_co3d(folder: Path, views: Views, form: str = "ndc_isotropic") -> Path:
    """A category of one sequence; the paths begin with the category, as published."""
    save_images(folder / "seq" / "images", views, lambda view: f"frame{view:06d}.png")
    flip, entries = np.diag([-1.0, -1.0, 1.0]), []
    half = np.array([WIDTH, HEIGHT]) / 2
    scale = np.full(2, half.min()) if form == "ndc_isotropic" else half
    (folder / "seq" / "depths").mkdir(exist_ok=True)
    for view, matrix in enumerate(views.extrinsics.double().numpy()):
        half_floats = (views.depth[view, 0].numpy() / 0.5).astype(np.float16).view(np.uint16)
        Image.fromarray(half_floats).save(folder / "seq" / "depths" / f"frame{view:06d}.png")
        entries.append(
            {
                "sequence_name": "seq",
                "frame_number": view,
                "image": {"path": f"{folder.name}/seq/images/frame{view:06d}.png", "size": [HEIGHT, WIDTH]},
                "depth": {"path": f"{folder.name}/seq/depths/frame{view:06d}.png", "scale_adjustment": 0.5},
                "viewpoint": {
                    "R": (flip @ matrix[:3, :3]).T.tolist(),
                    "T": (flip @ matrix[:3, 3]).tolist(),
                    "focal_length": (FOCAL_LENGTH / scale).tolist(),
                    "principal_point": [0.0, 0.0],
                    "intrinsics_format": form,
                },
            }
        )
    (folder / "frame_annotations.jgz").write_bytes(gzip.compress(json.dumps(entries).encode()))
    return folder


def write_webdataset(folder: Path, views: Views) -> Path:
    class Room:
        def __len__(self) -> int:
            return 1

        def views(self, scene: int) -> Views:
            return views

    write_tars(Room(), folder)
    return folder


def write_seven_scenes(folder: Path, views: Views) -> Path:
    save_images(folder, views, lambda view: f"frame-{view:06d}.color.png")
    for view, pose in enumerate(camera_to_world(views)):
        millimeters = np.rint(1000 * views.depth[view, 0].numpy()).astype(np.uint16)
        Image.fromarray(millimeters).save(folder / f"frame-{view:06d}.depth.png")
        np.savetxt(folder / f"frame-{view:06d}.pose.txt", pose)
    np.savetxt(folder / "camera-intrinsics.txt", CALIBRATION)
    return folder


def write_tum(folder: Path, views: Views) -> Path:
    save_images(folder / "rgb", views, lambda view: f"{view}.png")
    (folder / "depth").mkdir(exist_ok=True)
    lines: dict[str, list[str]] = {"rgb": [], "depth": [], "groundtruth": []}
    for view, pose in enumerate(camera_to_world(views)):
        Image.fromarray(np.rint(5000 * views.depth[view, 0].numpy()).astype(np.uint16)).save(
            folder / "depth" / f"{view}.png"
        )
        w, x, y, z = quaternion(pose[:3, :3])
        numbers = " ".join(f"{value:.9f}" for value in (*pose[:3, 3], x, y, z, w))
        for name, line in (("rgb", f"rgb/{view}.png"), ("depth", f"depth/{view}.png"), ("groundtruth", numbers)):
            lines[name].append(f"{view}.0 {line}")
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
    return folder


# By the name that `open_views` gives; two layouts are of the format rgbd.
WRITERS: dict[str, Callable[[Path, Views], Path]] = {
    "nerfstudio": write_nerfstudio,
    "colmap": write_colmap,
    "co3d": write_co3d,
    "rgbd": write_seven_scenes,
    "rgbd tum": write_tum,
    "realestate10k": write_realestate10k,
    "webdataset": write_webdataset,
    "zero123": write_zero123,
}
WITH_DEPTH = ("nerfstudio", "co3d", "rgbd", "rgbd tum", "webdataset")
