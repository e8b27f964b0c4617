"""Poses as files state them: rigid matrices, quaternions, and the axes of other conventions."""

from __future__ import annotations

import numpy as np

__all__ = ["OPENGL_TO_OPENCV", "from_quaternion", "matrix_4x4", "rigid"]

from cameo.geometry.cameras import FARTHEST_ORIGIN

Array = np.ndarray
# Turns the axes of a camera from x right, y up, z backward to x right, y down, z forward.
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
# A stretch of the axes by more than this is no rounding of a rotation.
MOST_STRETCH = 0.02


def rigid(pose: Array) -> Array | None:
    """Return the pose `[4, 4]` with an exact rotation, or None where it is not a pose of a camera.

    Example:
        >>> rigid(np.diag([1.0, 1.0, 1.001, 1.0]))[2, 2].item(), rigid(np.diag([1.0, 1.0, -1.0, 1.0]))
        (1.0, None)
    """
    if pose.shape != (4, 4) or not (np.abs(pose) <= FARTHEST_ORIGIN).all():
        return None
    if np.abs(pose[3] - (0.0, 0.0, 0.0, 1.0)).max() > 1e-3:
        return None
    left, stretch, right = np.linalg.svd(pose[:3, :3])
    if np.abs(stretch - 1.0).max() > MOST_STRETCH or np.linalg.det(left @ right) < 0:
        return None
    exact = np.eye(4)
    exact[:3, :3], exact[:3, 3] = left @ right, pose[:3, 3]
    return exact


def matrix_4x4(values: object) -> Array | None:
    """Return 3x4 or 4x4 numbers, also as one list of 12 or 16, as a 4x4 matrix; None where they are none.

    Example:
        >>> matrix_4x4([[1, 0, 0, 5], [0, 1, 0, 6], [0, 0, 1, 7]])[3].tolist()
        [0.0, 0.0, 0.0, 1.0]
    """
    try:
        matrix = np.array(values, dtype=float)
    except (TypeError, ValueError):
        return None
    if matrix.size not in (12, 16) or matrix.shape not in ((3, 4), (4, 4), (12,), (16,)):
        return None
    matrix = matrix.reshape(-1, 4)
    return matrix if len(matrix) == 4 else np.concatenate([matrix, [[0.0, 0.0, 0.0, 1.0]]])


def from_quaternion(quaternion: Array, translation: Array) -> Array | None:
    """Return the matrix of a quaternion `w x y z` and a translation; None where the quaternion is no rotation.

    Example:
        >>> from_quaternion(np.array([0.0, 0.0, 0.0, 1.0]), np.array([1.0, 2.0, 3.0]))[0].tolist()
        [-1.0, 0.0, 0.0, 1.0]
    """
    norm = np.linalg.norm(quaternion)
    if not np.isfinite(norm) or norm < 0.5:
        return None
    w, i, j, k = quaternion / norm
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (j * j + k * k), 2 * (i * j - w * k), 2 * (i * k + w * j)],
        [2 * (i * j + w * k), 1 - 2 * (i * i + k * k), 2 * (j * k - w * i)],
        [2 * (i * k - w * j), 2 * (j * k + w * i), 1 - 2 * (i * i + j * j)],
    ]
    pose[:3, 3] = translation
    return rigid(pose)
