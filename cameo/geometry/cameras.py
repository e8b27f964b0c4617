"""What all functions on cameras need: checks of cameras and depth, and sufficient precision.

Axes: B samples, V views, H W image pixels. Conventions as in :mod:`cameo.geometry`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from cameo.errors import ShapeError

__all__ = ["camera_centers", "check_cameras", "check_depth", "full_precision", "invert_extrinsics"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Largest deviation of R @ R.T from the identity: poses stored as text keep three to seven digits.
ROTATION_TOLERANCE = 1e-3
# Intrinsics that are divided by the image size have a principal point below 1 and, for a field of view of at least 19
# degrees, a focal length below 3. In pixels, no camera with more than one pixel has such values.
NORMALIZED_FOCAL_LENGTH = 3.0
# A crop whose principal point lies farther outside than this many of its own sides would be less than an eighth as wide
# as a frame with the principal point in its middle: nobody cuts that out, and intrinsics of a larger image are common.
FARTHEST_PRINCIPAL_POINT = 3.0
# In pixels. Shorter ones see half a turn in a single pixel, longer ones less than a pixel of any planet.
FOCAL_LENGTHS = (1e-2, 1e8)
# In units of the world; the distance of the Sun is 1.5e11 meters.
FARTHEST_ORIGIN = 1e12
# In the order of the checks in check_cameras: argument, fault, cure.
CAMERA_FAULTS = (
    ("intrinsics", "non-finite values", "drop the view or repair its file"),
    ("intrinsics", "a focal length that is not positive", "use OpenCV cameras, with focal lengths in pixels"),
    (
        "intrinsics",
        "a focal length that no camera has, below 0.01 or above 1e8 pixels",
        "give it in pixels of the image",
    ),
    ("intrinsics", "a last row other than 0 0 1", "divide the matrix by its last entry"),
    (
        "intrinsics",
        "a value other than 0 below the focal length fx",
        "pass [[fx, skew, cx], [0, fy, cy], [0, 0, 1]]; a matrix stored by columns needs .mT",
    ),
    (
        "intrinsics",
        "a skew larger than the focal length",
        "check the order of its values: fx, skew, cx in the first row",
    ),
    (
        "intrinsics",
        "normalized values (focal length below 3, principal point below 1)",
        "multiply the first row by the width and the second by the height of the image in pixels",
    ),
    ("extrinsics", "non-finite values", "drop views without a pose"),
    (
        "extrinsics",
        "a translation beyond 1e12 units of the world, where no two cameras can be told apart",
        "move the origin of the world to the scene",
    ),
    ("extrinsics", "a last row other than 0 0 0 1", "pass [R | t] with the translation in the last column"),
    (
        "extrinsics",
        "a rotation that is not orthonormal",
        "orthonormalize it; a scale belongs in the translation and the depth",
    ),
    ("extrinsics", "a rotation with determinant -1", "convert the axes to OpenCV without a mirror"),
)


def full_precision(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Run ``function`` outside autocast.

    Autocast would compute matrix products in half precision, in which a rotation is not orthonormal and a projected
    point is off by several pixels.
    """

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tensor is None or not torch.amp.is_autocast_available(tensor.device.type):
            return function(*args, **kwargs)
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


@full_precision
def check_cameras(
    intrinsics: Tensor, extrinsics: Tensor, *, batch: int | None = None, check_values: bool = True
) -> None:
    """Raise unless these are usable pinhole cameras.

    Example:
        >>> intrinsics = torch.tensor([[64.0, 0, 32], [0, 64, 32], [0, 0, 1]]).expand(1, 2, 3, 3)
        >>> check_cameras(intrinsics, torch.eye(4).expand(1, 2, 4, 4))

    Args:
        intrinsics: ``[B, V, 3, 3]`` in pixels.
        extrinsics: ``[B, V, 4, 4]`` world-to-camera.
        batch: the expected number of samples, or None for any.
        check_values: whether to check the values as well as the shapes; on a GPU the host waits for this check.

    Raises:
        ShapeError: a tensor has another shape, or another number of samples or views.
        ValueError: a camera is missing or not finite, a focal length is not positive or beyond that of any camera, a
            translation is beyond 1e12, a last row is not ``0 0 1`` or
            ``0 0 0 1``, intrinsics are transposed, normalized by the image size or have a skew larger than their
            focal length, or a rotation is not orthonormal with determinant +1. The message names the sample and the
            view.
    """
    check_matrices("intrinsics", intrinsics, 3)
    check_matrices("extrinsics", extrinsics, 4)
    if intrinsics.shape[:2] != extrinsics.shape[:2]:
        raise ShapeError(
            "extrinsics",
            expected=f"[{intrinsics.shape[0]}, {intrinsics.shape[1]}, 4, 4] (B and V of the intrinsics)",
            got=extrinsics.shape,
        )
    if batch is not None and intrinsics.shape[0] != batch:
        raise ShapeError("intrinsics", expected=f"[{batch}, V, 3, 3]", got=intrinsics.shape)
    if check_values:
        _check_camera_values(intrinsics.detach(), extrinsics.detach())


def _check_camera_values(k: Tensor, e: Tensor) -> None:
    tolerance = max(ROTATION_TOLERANCE, 4 * torch.finfo(e.dtype).eps)
    k, e = k.to(at_least_float32(k)), e.to(at_least_float32(e))
    rotation, focal = e[..., :3, :3], k.diagonal(dim1=-2, dim2=-1)[..., :2]
    identity = torch.eye(4, dtype=e.dtype, device=e.device)
    volume = (rotation[..., 0, :] * torch.linalg.cross(rotation[..., 1, :], rotation[..., 2, :])).sum(-1)
    bad = [
        ~k.isfinite().all(-1).all(-1),
        (k[..., 0, 0] <= 0) | (k[..., 1, 1] <= 0),
        (focal.amin(-1) < FOCAL_LENGTHS[0]) | (focal.amax(-1) > FOCAL_LENGTHS[1]),
        (k[..., 2, :] - identity[3, 1:].to(k)).abs().amax(-1) > tolerance,
        k[..., 1, 0].abs() > tolerance * k[..., 1, 1],
        k[..., 0, 1].abs() > k[..., 0, 0],
        (k.diagonal(dim1=-2, dim2=-1)[..., :2].amax(-1) < NORMALIZED_FOCAL_LENGTH) & (k[..., :2, 2].amax(-1) < 1),
        ~e.isfinite().all(-1).all(-1),
        e[..., :3, 3].abs().amax(-1) > FARTHEST_ORIGIN,
        (e[..., 3, :] - identity[3]).abs().amax(-1) > tolerance,
        (rotation @ rotation.mT - identity[:3, :3]).abs().amax(dim=(-2, -1)) > tolerance,
        volume < 0,
    ]
    faults = torch.stack(bad).nonzero()  # all checks are read at once, since the host waits for a GPU each time
    if len(faults):
        check, sample, view = faults[0].tolist()
        name, what, cure = CAMERA_FAULTS[check]
        raise ValueError(f"{name}: sample {sample}, view {view} has {what}. Cure: {cure}")


def check_image_size(intrinsics: Tensor, image_size: Sequence[int], *, stacklevel: int | None = 2) -> None:
    """Refuse or warn of intrinsics that are those of images of another size than ``(H, W)``.

    They are refused if the principal point of a view lies farther outside than `FARTHEST_PRINCIPAL_POINT` image sides.
    Those of a crop may lie outside as well, so a warning is given only where no view has its own inside.

    Example:
        >>> intrinsics = torch.tensor([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])  # of 480 x 640 pixels
        >>> check_image_size(intrinsics.expand(1, 2, 3, 3), (480, 640))

    Args:
        intrinsics: ``[B, V, 3, 3]`` in pixels; on a GPU the host waits for the check.
        image_size: ``(H, W)``.
        stacklevel: of the warning, counted from the caller of this function; None gives no warning.

    Raises:
        ValueError: a principal point lies too far outside; names the sample and the view.
    """
    height, width = image_size
    side = torch.tensor([width, height], dtype=torch.float32)
    center = intrinsics.detach()[..., :2, 2].cpu().float() / side
    if not center.numel():
        return
    outside = torch.maximum(-center, center - 1).amax(-1)
    cure = "Cure: cameo.geometry.resize_intrinsics or crop_intrinsics, as the images were resized or cropped"
    if (outside > FARTHEST_PRINCIPAL_POINT).any():
        sample, view = (outside > FARTHEST_PRINCIPAL_POINT).nonzero()[0].tolist()
        x, y = (center[sample, view] * side).tolist()
        raise ValueError(
            f"intrinsics: sample {sample}, view {view} has its principal point at x={x:.1f}, y={y:.1f}, far outside "
            f"the image of {height} x {width} pixels, so they are of another image size. {cure}"
        )
    if stacklevel is not None and (outside > 0).all():
        x, y = (center.flatten(0, -2)[0] * side).tolist()
        warnings.warn(
            f"intrinsics: every principal point lies outside the image of {height} x {width} pixels, that of the first "
            f"view at x={x:.1f}, y={y:.1f}. They seem to be for another image size. {cure}",
            stacklevel=stacklevel + 1,
        )


def check_depth(depth: Tensor, intrinsics: Tensor, extrinsics: Tensor, *, check_values: bool = True) -> None:
    """Raise unless ``depth [B, V, 1, H, W]`` is floating point and these cameras are usable and fit it.

    `check_values`: see :func:`check_cameras`.
    """
    if not isinstance(depth, Tensor):
        raise TypeError(f"depth: expected a tensor [B, V, 1, H, W], got {type(depth).__name__}")
    if depth.ndim != 5 or depth.shape[2] != 1:
        raise ShapeError("depth", expected="[B, V, 1, H, W]", got=depth.shape)
    if not depth.is_floating_point():
        raise ValueError(f"depth: expected floating point in world units, got {depth.dtype}. Cure: scale it")
    check_cameras(intrinsics, extrinsics, check_values=check_values)
    same_views("depth", depth, intrinsics)


def same_views(name: str, tensor: Tensor, intrinsics: Tensor) -> None:
    """Raise unless ``tensor [B, V, ...]`` has the samples and views of the intrinsics."""
    if tensor.shape[:2] != intrinsics.shape[:2]:
        raise ShapeError(
            "intrinsics",
            expected=f"[{tensor.shape[0]}, {tensor.shape[1]}, 3, 3] (B and V of {name})",
            got=intrinsics.shape,
        )


def check_matrices(name: str, matrices: Tensor, rank: int) -> None:
    """Raise unless ``matrices`` are floating point ``[B, V, rank, rank]``."""
    if not isinstance(matrices, Tensor):
        raise ValueError(  # noqa: TRY004 - a missing camera is a data problem, not a type problem
            f"{name}: expected a tensor [B, V, {rank}, {rank}], got {type(matrices).__name__}. "
            "Cure: pass the cameras of every view"
        )
    if matrices.ndim != 4 or matrices.shape[-2:] != (rank, rank):
        raise ShapeError(name, expected=f"[B, V, {rank}, {rank}]", got=matrices.shape)
    if not matrices.is_floating_point():
        raise ValueError(f"{name}: expected floating point, got {matrices.dtype}. Cure: convert with .float()")


def invert_extrinsics(extrinsics: Tensor) -> Tensor:
    """Invert rigid transforms ``[..., 4, 4]``."""
    rotation = extrinsics[..., :3, :3].mT
    top = torch.cat([rotation, -rotation @ extrinsics[..., :3, 3:]], dim=-1)
    return torch.cat([top, extrinsics[..., 3:, :]], dim=-2)


def camera_centers(extrinsics: Tensor) -> Tensor:
    """Return where cameras ``[..., 4, 4]`` stand, ``[..., 3]`` in world coordinates.

    Example:
        >>> extrinsics = torch.eye(4)
        >>> extrinsics[:3, 3] = torch.tensor([0.0, -3.0, 1.0])
        >>> camera_centers(extrinsics).tolist()
        [0.0, 3.0, -1.0]
    """
    return invert_extrinsics(extrinsics)[..., :3, 3]


def most_exact(extrinsics: Tensor) -> Tensor:
    """Convert to double precision where the device has it, so that a distant world origin costs no accuracy."""
    return extrinsics.to(at_least_float32(extrinsics)) if extrinsics.device.type == "mps" else extrinsics.double()


def at_least_float32(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in, at least float32: half precision cannot represent pixel positions."""
    return torch.promote_types(tensor.dtype, torch.float32)
