"""What handed-over cameras and depth might really be: each reading undoes one or several common mistakes.

Axes: F views of a scene.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cameo.geometry.cameras import NORMALIZED_FOCAL_LENGTH, invert_extrinsics, most_exact

__all__ = ["AS_GIVEN", "Reading", "are_normalized", "combinations", "true_cameras", "variations"]

# Axes of a camera, as the rows of the rotation from them to those of OpenCV (x right, y down, z forward).
AXES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "OpenCV": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "OpenGL": ((1, 0, 0), (0, -1, 0), (0, 0, -1)),
    "PyTorch3D": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "ROS": ((0, -1, 0), (0, 0, -1), (1, 0, 0)),
}
AXES_WORDS = {
    "OpenGL": "OpenGL axes (y up, looking along -z)",
    "PyTorch3D": "PyTorch3D axes (x left, y up)",
    "ROS": "ROS axes (x forward, y left, z up)",
}
AXES_CURES = {
    "OpenGL": "camera_to_world[..., :3, 1:3] *= -1, then invert",
    "PyTorch3D": "camera_to_world[..., :3, :2] *= -1, then invert",
    "ROS": "multiply camera_to_world from the right by the rotation from OpenCV to ROS axes, then invert",
}
# Factors between the units of depth and of camera positions that files have: millimeters, centimeters or decimeters
# for meters, and 5000 units per meter (TUM) for 1000 (7-Scenes).
UNITS = (1000.0, 100.0, 10.0, 5.0)
# Frames by which images, depth or poses may be late.
SHIFTS = (1, -1, 2, -2, 3, -3)
# Factors by which the focal lengths may be too long while the principal point is right.
FOCALS = (2.0, 1.25, 1.1, 0.9, 0.8, 0.5)
# A principal point farther than this share of the image from its center may be that of another image size or crop.
OFF_CENTER = 0.05
# Two focal lengths that differ by more than this share are those of an image that was stretched or cropped.
UNEQUAL_FOCALS = 0.02


@dataclass(frozen=True)
class Reading:
    """One reading of cameras and depth; the default takes everything as `cameo` documents it.

    - `axes`: the camera axes that the poses are in, a name of `AXES`.
    - `camera_to_world`: whether the extrinsics are camera-to-world.
    - `unit`: how many units of depth are one unit of the camera positions: 1000 for depth in mm, positions in m.
    - `intrinsics`: "given"; "normalized", by the image size; "resized", scaled so that the principal point comes to the
      center of the image; "cropped", with the principal point alone to be moved there; "fx" or "fy", with both focal
      lengths equal to this one.
    - `focal`: factor by which the focal lengths are too long.
    - `ray_length`: whether depth is measured along the ray.
    - `late`: "poses", "depth" or "images", which are late by `shift` frames; empty for none.

    Example:
        >>> Reading(axes="OpenGL", camera_to_world=True).names
        ('OpenGL axes', 'camera-to-world')
    """

    axes: str = "OpenCV"
    camera_to_world: bool = False
    unit: float = 1.0
    intrinsics: str = "given"
    focal: float = 1.0
    ray_length: bool = False
    late: str = ""
    shift: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """A short name for each mistake that it undoes; none for the default."""
        found = {
            f"{self.axes} axes": self.axes != "OpenCV",
            "camera-to-world": self.camera_to_world,
            "unit of depth": self.unit != 1,
            "normalized intrinsics": self.intrinsics == "normalized",
            "intrinsics of another image": self.intrinsics not in ("given", "normalized") or self.focal != 1,
            "ray length": self.ray_length,
            f"{self.late} of another frame": bool(self.shift),
        }
        return tuple(name for name, holds in found.items() if holds)

    @property
    def words(self) -> str:
        """What it looks like, and the cure, in words; empty for the default."""
        found = []
        if self.axes != "OpenCV":
            found.append(f"{AXES_WORDS[self.axes]} given as OpenCV; cure: {AXES_CURES[self.axes]}")
        if self.camera_to_world:
            found.append("camera-to-world poses given as world-to-camera; cure: torch.linalg.inv(extrinsics)")
        if self.unit != 1:
            size = f"{self.unit:g} times too large" if self.unit > 1 else f"{1 / self.unit:g} times too small"
            found.append(
                f"depth {size} for the camera positions; cure: "
                f"{'divide' if self.unit > 1 else 'multiply'} it by {max(self.unit, 1 / self.unit):g} "
                "(depth_scale= of a sequence)"
            )
        if words := _INTRINSICS_WORDS.get(self.intrinsics):
            found.append(words)
        if self.focal != 1:
            found.append(
                f"focal lengths about {self.focal:g} times the right ones, as of another camera or image size; cure: "
                "the intrinsics of these images"
            )
        if self.ray_length:
            found.append("distance along the ray given as z-depth; cure: divide by the length of inv(K) @ (x, y, 1)")
        if self.shift:
            found.append(
                f"{self.late} {abs(self.shift)} frame{'s' if abs(self.shift) > 1 else ''} "
                f"{'late' if self.shift > 0 else 'early'} for the rest; cure: compare the order of the files"
            )
        return "; and ".join(found)


_INTRINSICS_WORDS = {
    "normalized": "intrinsics divided by the image size; cure: multiply the first row by the width and the second by "
    "the height in pixels",
    "resized": "intrinsics of another image size; cure: cameo.geometry.resize_intrinsics",
    "cropped": "the principal point of an image before cropping; cure: cameo.geometry.crop_intrinsics",
    "fx": "fy of another image than fx, as after a crop that only one of them knows; cure: crop_intrinsics before "
    "resize_intrinsics",
    "fy": "fx of another image than fy, as after a crop that only one of them knows; cure: crop_intrinsics before "
    "resize_intrinsics",
}
AS_GIVEN = Reading()


def are_normalized(intrinsics: Tensor) -> bool:
    """Tell whether intrinsics ``[F, 3, 3]`` are divided by the image size, by the measure of `check_cameras`.

    Example:
        >>> are_normalized(torch.tensor([[0.9, 0, 0.5], [0, 1.2, 0.5], [0, 0, 1]])[None])
        True
    """
    focal = intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2].amax(-1)
    return bool(((focal < NORMALIZED_FOCAL_LENGTH) & (intrinsics[..., :2, 2].amax(-1) < 1)).all())


def true_cameras(
    reading: Reading, intrinsics: Tensor, extrinsics: Tensor, image_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return what the cameras of a scene are if a reading is right, `shift` left aside.

    Example:
        >>> intrinsics = torch.tensor([[64.0, 0, 32], [0, 64, 32], [0, 0, 1]])[None]
        >>> half = true_cameras(Reading(intrinsics="resized"), intrinsics, torch.eye(4)[None], (32, 32))[0]
        >>> half[0, :2].tolist()
        [[32.0, 0.0, 16.0], [0.0, 32.0, 16.0]]

    Args:
        reading: what is supposed.
        intrinsics: `[F, 3, 3]`, as given.
        extrinsics: `[F, 4, 4]`, as given.
        image_size: (H, W) of the images.

    Returns:
        Intrinsics `[F, 3, 3]` in pixels and extrinsics `[F, 4, 4]` in the most exact precision, world-to-camera in
        OpenCV axes, with positions in the unit of depth.
    """
    height, width = image_size
    pose = most_exact(extrinsics)
    if reading.camera_to_world:
        pose = invert_extrinsics(pose)
    turn = torch.eye(4, dtype=pose.dtype)
    turn[:3, :3] = torch.tensor(AXES[reading.axes], dtype=pose.dtype)
    # If E is world-to-camera in other axes, turn @ E is so in those of OpenCV.
    pose = turn @ pose
    pose[..., :3, 3] *= reading.unit
    matrix = intrinsics.float().clone()
    if reading.intrinsics == "normalized":
        matrix = matrix * torch.tensor([width, height, 1.0])[:, None]
    elif reading.intrinsics == "resized":
        center = matrix[..., :2, 2].clamp(min=1e-6)
        matrix[..., :2, :] *= (torch.tensor([width / 2, height / 2]) / center)[..., None]
    elif reading.intrinsics == "cropped":
        matrix[..., :2, 2] = torch.tensor([width / 2, height / 2])
    elif reading.intrinsics in ("fx", "fy"):
        axis = int(reading.intrinsics == "fy")
        matrix[..., 0, 0] = matrix[..., 1, 1] = matrix[..., axis, axis].clone()
    matrix[..., [0, 1], [0, 1]] /= reading.focal
    return matrix, pose


def _fitting_intrinsics(intrinsics: Tensor, image_size: tuple[int, int]) -> list[str]:
    """Which other readings of the intrinsics differ from the given one in this scene."""
    if are_normalized(intrinsics):
        return ["normalized"]
    height, width = image_size
    found = []
    if ((intrinsics[:, :2, 2] / torch.tensor([width, height]) - 0.5).abs() > OFF_CENTER).any():
        found += ["resized", "cropped"]
    fx, fy = intrinsics[:, 0, 0], intrinsics[:, 1, 1]
    if ((fx / fy - 1).abs() > UNEQUAL_FOCALS).any():
        found += ["fx", "fy"]
    return found


def variations(reading: Reading, intrinsics: Tensor, image_size: tuple[int, int], *, frames: bool) -> Iterator[Reading]:
    """Yield the readings with one more mistake than a given one.

    `frames`: whether the views are enough for one of images, depth and poses to be of another frame.

    Example:
        >>> pinhole = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]])[None]
        >>> found = list(variations(AS_GIVEN, pinhole, (8, 8), frames=False))
        >>> found[0].names, found[-1].names
        (('OpenGL axes',), ('ray length',))
    """
    if reading.axes == "OpenCV":
        yield from (replace(reading, axes=axes) for axes in AXES if axes != "OpenCV")
    if not reading.camera_to_world:
        yield replace(reading, camera_to_world=True)
    if reading.unit == 1:
        yield from (replace(reading, unit=unit) for factor in UNITS for unit in (factor, 1 / factor))
    if reading.intrinsics == "given":
        yield from (replace(reading, intrinsics=name) for name in _fitting_intrinsics(intrinsics, image_size))
    if reading.focal == 1:
        yield from (replace(reading, focal=factor) for factor in FOCALS)
    if frames and not reading.shift:
        yield from (
            replace(reading, late=late, shift=shift) for late in ("poses", "depth", "images") for shift in SHIFTS
        )
    if not reading.ray_length:
        yield replace(reading, ray_length=True)


def combinations(intrinsics: Tensor, image_size: tuple[int, int]) -> Iterator[Reading]:
    """Yield every combination of axes, direction of the poses, unit of depth and intrinsics, with few mistakes first.

    Example:
        >>> pinhole = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]])[None]
        >>> len(list(combinations(pinhole, (8, 8))))  # 4 axes, 2 directions, 9 units
        72
    """
    units = [1.0, *(unit for factor in UNITS for unit in (factor, 1 / factor))]
    kinds = ["given", *_fitting_intrinsics(intrinsics, image_size)]
    every = [Reading(*values) for values in itertools.product(AXES, (False, True), units, kinds)]
    yield from sorted(every, key=lambda reading: len(reading.names))
