"""Sparse models of COLMAP, text or binary, with the photographs and the points that several of them show.

Conventions: colmap.github.io/format.html. Poses are world-to-camera with OpenCV axes, pixel centers at +0.5. The world
has no unit of its own.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cameo.data.readers.files import StoredFile, inside, optional_package, read_text
from cameo.data.readers.frames import Format, Frame, Listing, ReadOptions, SceneFiles, Sightings, one_scene
from cameo.data.readers.lenses import COLMAP, Lens
from cameo.data.readers.poses import from_quaternion
from cameo.errors import DataError

__all__ = ["FORMAT"]

MODELS = ("sparse/0", "sparse", "colmap/sparse/0", "colmap/sparse", ".")
IMAGES = ("images", "input", ".")
NEEDED = ("cameras", "images")
# Bytes of an image, a point and a camera in a binary file at the least; a count that claims more than the file holds
# is found before memory is asked for.
LEAST_BYTES = {"cameras": 40, "images": 64, "points3D": 43}


def _model(folder: Path) -> tuple[Path, str] | None:
    """The folder of the model and the ending of its files."""
    for place in MODELS:
        for suffix in (".bin", ".txt"):
            if all((folder / place / f"{name}{suffix}").is_file() for name in NEEDED):
                return folder / place, suffix
    return None


def _recognize(folder: Path) -> str | None:
    found = _model(folder)
    return None if found is None else str((found[0] / f"images{found[1]}").relative_to(folder))


def _read(scene: SceneFiles, options: ReadOptions) -> Listing:
    folder, found = scene.path, _model(scene.path)
    assert found is not None  # the folder was recognized
    model, suffix = found
    if (model.parent / "1").is_dir() and model.name == "0":
        warnings.warn(
            f"{model.parent}: holds several models, which share no world; {model} is read. Open a copy of the scene "
            "with another one as sparse/0 to read that",
            stacklevel=5,
        )
    _check_counts(model, suffix)
    pycolmap = optional_package("pycolmap", needed_for=f"{model}: COLMAP's sparse models")
    reconstruction = pycolmap.Reconstruction()
    read = reconstruction.read_binary if suffix == ".bin" else reconstruction.read_text
    try:
        read(str(model))
    except Exception as error:  # pycolmap raises what its C++ throws
        raise DataError(f"{model}: COLMAP cannot read the model ({error}); export it again") from error
    images = _images_folder(folder, model, reconstruction)
    lenses: dict[int, Lens] = {}
    listing = Listing()
    for image in sorted(reconstruction.images.values(), key=lambda image: image.name):
        pose = _pose(image)
        path = inside(images, image.name, stated_in=model / f"images{suffix}")
        if pose is None:
            listing.dropped.append((image.name, "its pose is not finite or its quaternion is not a rotation"))
        elif not path.is_file():
            listing.dropped.append((image.name, f"no such image in {images}"))
        else:
            color = StoredFile(path)
            if image.camera_id not in lenses:
                lenses[image.camera_id] = _lens(model, reconstruction.cameras[image.camera_id])
            lens = lenses[image.camera_id]
            listing.frames.append(
                Frame(
                    name=image.name,
                    color=color,
                    extrinsics=pose,
                    lens=options.lens(lens.size) or lens,
                    sightings=_sightings(image),
                )
            )
    return listing


def _check_counts(model: Path, suffix: str) -> None:
    """Refuse binary files that are shorter than the number of entries that they begin with; text must be text."""
    for name, least in LEAST_BYTES.items():
        path = model / f"{name}{suffix}"
        if not path.is_file():
            raise DataError(f"{path}: no such file; a sparse model has cameras, images and points3D{suffix}")
        if not path.resolve().is_relative_to(model.resolve()):
            raise DataError(f"{path}: is a link that leaves its folder; copy the file into it")
        if suffix == ".txt":
            read_text(path)
            continue
        size = path.stat().st_size
        count = int.from_bytes(StoredFile(path).read()[:8], "little")
        if size < 8 or size < 8 + count * least:
            raise DataError(
                f"{path}: {size} bytes do not hold its {count} entries; the file is cut short, copy it again"
            )


def _images_folder(folder: Path, model: Path, reconstruction: Any) -> Path:
    names = [image.name for image in reconstruction.images.values()]
    if not names:
        raise DataError(f"{model}: holds no registered image; run COLMAP's mapper again")
    for place in IMAGES:
        if any((folder / place / name).is_file() for name in names[:16]):
            return folder / place
    return folder / IMAGES[0]


def _pose(image: Any) -> np.ndarray | None:
    if not image.has_pose:
        return None
    pose = image.cam_from_world()
    x, y, z, w = np.asarray(pose.rotation.quat)
    if not np.isfinite(pose.translation).all():
        return None
    return from_quaternion(np.array([w, x, y, z]), np.asarray(pose.translation))


def _lens(model: Path, camera: Any) -> Lens:
    where = f"{model}: camera {camera.camera_id}"
    params = [float(value) for value in camera.params]
    if not np.isfinite(params).all() or camera.width < 1 or camera.height < 1:
        raise DataError(f"{where}: expected a size and finite parameters, got {camera.width}x{camera.height}, {params}")
    if camera.is_spherical():
        raise DataError(
            f"{where}: the model {camera.model_name} has no flat image; render perspective views of it first"
        )
    size = (int(camera.height), int(camera.width))
    lens = Lens.of_matrix(np.asarray(camera.calibration_matrix()), size)
    if camera.is_perspective_pinhole() and camera.is_undistorted():  # a fisheye without coefficients is none
        return lens
    return lens.distorted(f"{COLMAP}{camera.model_name}", tuple(params))


def _sightings(image: Any) -> Sightings:
    points = image.get_observation_points2D()
    return Sightings(
        point=np.array([point.point3D_id for point in points], dtype=np.int64),
        xy=np.array([point.xy for point in points], dtype=float).reshape(-1, 2),
    )


FORMAT = Format(
    name="colmap",
    needs="cameras, images and points3D (.bin or .txt) in sparse/0, and the photographs in images/",
    recognize=_recognize,
    scenes=one_scene,
    read=_read,
)
