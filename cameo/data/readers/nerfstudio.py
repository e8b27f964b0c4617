"""`transforms.json` of nerfstudio and instant-ngp, and the `transforms_train.json` of NeRF's synthetic scenes.

Conventions: docs.nerf.studio, "Data conventions", and nerfstudio/data/dataparsers/nerfstudio_dataparser.py;
instant-ngp, docs/nerf_dataset_tips.md. Poses are camera-to-world with OpenGL axes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from cameo.data.readers.files import StoredFile, inside, number, read_json
from cameo.data.readers.frames import DepthImage, Format, Frame, Listing, ReadOptions, SceneFiles, one_scene
from cameo.data.readers.images import image_size
from cameo.data.readers.lenses import Lens
from cameo.data.readers.poses import OPENGL_TO_OPENCV, matrix_4x4, rigid
from cameo.errors import DataError

__all__ = ["FORMAT"]

NAMES = ("transforms.json", "transforms_train.json")
# Tried where the file of a frame has no ending of its own.
ENDINGS = ("", ".png", ".jpg", ".jpeg", ".PNG", ".JPG")
PERSPECTIVE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
FISHEYE = ("OPENCV_FISHEYE", "FISHEYE")
# nerfstudio takes depth in millimeters unless the file says otherwise.
DEPTH_PER_UNIT = 1000.0


def _recognize(folder: Path) -> str | None:
    return next((name for name in NAMES if (folder / name).is_file()), None)


def _read(scene: SceneFiles, options: ReadOptions) -> Listing:
    folder = scene.path
    path = inside(folder, next(name for name in NAMES if (folder / name).is_file()), stated_in=folder)
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("frames"), list):
        raise DataError(f'{path}: expected an object with a list "frames", got {_shown(content)}')
    undo = _applied(path, content)
    listing = Listing()
    for position, entry in enumerate(content["frames"]):
        if not isinstance(entry, dict) or "file_path" not in entry:
            raise DataError(f'{path}: frame {position}: expected an object with "file_path", got {_shown(entry)}')
        where = f"{path}: frame {position}"
        named = inside(folder, entry["file_path"], stated_in=where)
        color = next((found for end in ENDINGS if (found := named.with_name(named.name + end)).is_file()), None)
        matrix = matrix_4x4(entry.get("transform_matrix"))
        pose = None if matrix is None else rigid(undo @ matrix)
        if pose is None:
            listing.dropped.append((entry["file_path"], "its transform_matrix is not a finite rigid 4x4 matrix"))
        elif color is None:
            listing.dropped.append((entry["file_path"], "no such image"))
        else:
            color_file = StoredFile(color)
            values = {**content, **entry}
            listing.frames.append(
                Frame(
                    name=entry["file_path"],
                    color=color_file,
                    extrinsics=np.linalg.inv(pose @ OPENGL_TO_OPENCV),
                    lens=_lens(where, values, color_file, options),
                    depth=_depth(folder, where, values, entry, options),
                )
            )
    listing.frames.sort(key=lambda frame: frame.name)
    return listing


def _applied(path: Path, content: dict[str, Any]) -> np.ndarray:
    """Undo `applied_transform`, so that the world is that of the reconstruction which the file was made from."""
    if content.get("applied_transform") is None:
        return np.eye(4)
    matrix = matrix_4x4(content["applied_transform"])
    applied = None if matrix is None else rigid(matrix)
    if applied is None:
        raise DataError(
            f"{path}: applied_transform: expected a rigid 3x4 or 4x4 matrix, got "
            f"{_shown(content['applied_transform'])}; remove it, and the world stays as the file has it"
        )
    return np.linalg.inv(applied)


def _lens(where: str, values: dict[str, Any], color: StoredFile, options: ReadOptions) -> Lens:
    """The camera of a frame: its own values before shared ones, focal lengths before angles."""

    def given(name: str) -> float | None:
        return None if values.get(name) is None else number(values[name], named=name, stated_in=where)

    width, height = given("w"), given("h")
    if width is None or height is None:
        size = image_size(color)
    else:
        size = (round(height), round(width))
        if min(size) < 1:
            raise DataError(f"{where}: w, h: expected an image of at least one pixel, got {width:g} x {height:g}")
    if (stated := options.lens(size)) is not None:
        lens = stated
    else:
        fx = _focal_length(where, given("fl_x"), given("camera_angle_x"), size[1])
        fy = _focal_length(where, given("fl_y"), given("camera_angle_y"), size[0])
        if fx is None:
            fx = fy
        if fx is None:
            raise DataError(
                f"{where}: no camera intrinsics; write fl_x, fl_y, cx, cy in pixels or camera_angle_x in radians, or "
                "pass intrinsics= as a 3x3 matrix"
            )
        cx, cy = given("cx"), given("cy")
        lens = Lens(
            size, fx, fx if fy is None else fy, size[1] / 2 if cx is None else cx, size[0] / 2 if cy is None else cy
        )
    model = values.get("camera_model", "FISHEYE" if values.get("is_fisheye") else "OPENCV")
    if model not in PERSPECTIVE + FISHEYE:
        raise DataError(
            f"{where}: camera_model {model!r} cannot be undistorted; known: {', '.join(PERSPECTIVE + FISHEYE)}"
        )
    k1, k2, k3, k4, p1, p2 = (given(name) or 0.0 for name in ("k1", "k2", "k3", "k4", "p1", "p2"))
    if model in FISHEYE:
        return lens.distorted("fisheye", (k1, k2, k3, k4))
    if k4:
        raise DataError(f"{where}: k4={k4:g}: a fourth radial coefficient cannot be undone; undistort the images first")
    return lens.distorted("opencv", (k1, k2, p1, p2, k3))


def _focal_length(where: str, pixels: float | None, angle: float | None, side: int) -> float | None:
    if pixels is not None or angle is None:
        return pixels
    if not 0 < angle < math.pi:
        raise DataError(f"{where}: camera_angle: expected radians between 0 and pi, got {angle:g}")
    return 0.5 * side / math.tan(0.5 * angle)


def _depth(
    folder: Path, where: str, values: dict[str, Any], entry: dict[str, Any], options: ReadOptions
) -> DepthImage | None:
    name = entry.get("depth_file_path", entry.get("depth_path"))
    if name is None:
        return None
    path = inside(folder, name, stated_in=where)
    if not path.is_file():
        raise DataError(f"{where}: depth file {path} is not there; restore it, or remove depth_file_path")
    if options.depth_scale is not None:
        return DepthImage(StoredFile(path), options.depth_scale)
    unit = next(
        (key for key in ("depth_unit_scale_factor", "integer_depth_scale") if values.get(key) is not None), None
    )
    if unit is None:
        return DepthImage(StoredFile(path), DEPTH_PER_UNIT)
    scale = number(values[unit], named=unit, stated_in=where)
    if not scale > 0:
        raise DataError(f"{where}: {unit}: expected a factor > 0, got {scale:g}")
    return DepthImage(StoredFile(path), 1.0 / scale)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


FORMAT = Format(
    name="nerfstudio",
    needs='transforms.json (or transforms_train.json) with "frames", and the images that it names',
    recognize=_recognize,
    scenes=one_scene,
    read=_read,
)
