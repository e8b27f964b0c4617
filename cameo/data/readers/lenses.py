"""Lenses: from rays to pixels with distortion, and the pinhole camera that shows the same without it.

Axes: M points, H W pixels of the full image. Pixel centers are at +0.5; OpenCV counts from 0, so half a pixel is taken
off where it reads an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from cameo.data.readers.files import optional_package
from cameo.errors import DataError

__all__ = ["Lens", "rays_to_pixels", "straightened", "undistort_image", "undistort_points"]

Array = np.ndarray
# Focal lengths that are tried for the undistorted image, as shares of the lens's: from a narrow view, in which no lens
# folds back, to a wide one. The image is not enlarged more than MOST_ZOOM times.
ZOOMS, MOST_ZOOM = 64.0 * 0.5 ** (np.arange(141) / 20), 4.0
# Points along each side of the image border that must lie in the original image.
BORDER_POINTS = 33
COLMAP = "COLMAP "
# As a share of the focal length; less is rounding.
MOST_SKEW = 1e-3


@dataclass(frozen=True)
class Lens:
    """Camera of an image: size, focal lengths and principal point in pixels, and its distortion.

    - `size`: (H, W) of the full image.
    - `model`: "pinhole"; "opencv" with `params` k1 k2 p1 p2 [k3 [k4 k5 k6]]; "fisheye" with k1 k2 k3 k4, both as in
      OpenCV; or "COLMAP NAME" with all parameters of that model of COLMAP.

    Example:
        >>> Lens((48, 64), 60.0, 60.0, 32.0, 24.0).matrix[0].tolist()
        [60.0, 0.0, 32.0]
    """

    size: tuple[int, int]
    fx: float
    fy: float
    cx: float
    cy: float
    model: str = "pinhole"
    params: tuple[float, ...] = ()

    @property
    def matrix(self) -> Array:
        """The camera matrix `[3, 3]` without the distortion."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    @classmethod
    def of_matrix(cls, matrix: Array, size: tuple[int, int]) -> Lens:
        """Return the pinhole of a camera matrix `[3, 3]` in pixels; `DataError` where it has a skew."""
        if abs(matrix[0, 1]) > MOST_SKEW * abs(matrix[0, 0]):
            raise DataError(f"intrinsics: expected no skew, got {matrix[0, 1]:g} pixels; rectify the images first")
        return cls(size, float(matrix[0, 0]), float(matrix[1, 1]), float(matrix[0, 2]), float(matrix[1, 2]))

    def distorted(self, model: str, params: tuple[float, ...]) -> Lens:
        """Return this lens with a distortion; parameters that are all 0 leave an OpenCV lens a pinhole."""
        if model == "opencv" and not any(params):
            return self
        return replace(self, model=model, params=params)


def rays_to_pixels(lens: Lens, rays: Array) -> Array:
    """Project rays `[M, 2]`, x / z and y / z in the camera, to pixels `[M, 2]`; not finite where there is no pixel."""
    if lens.model == "pinhole":
        return rays * (lens.fx, lens.fy) + (lens.cx, lens.cy)
    if lens.model.startswith(COLMAP):
        return np.asarray(_colmap_camera(lens).img_from_cam(np.concatenate([rays, np.ones((len(rays), 1))], axis=1)))
    cv2 = optional_package("cv2", needed_for="lens distortion")
    points, still = np.concatenate([rays, np.ones((len(rays), 1))], axis=1)[:, None], np.zeros(3)
    if lens.model == "fisheye":
        pixels, _ = cv2.fisheye.projectPoints(points, still, still, lens.matrix, np.array(lens.params))
    else:
        pixels, _ = cv2.projectPoints(points, still, still, lens.matrix, np.array(lens.params))
    return pixels[:, 0]


def undistort_points(lens: Lens, pixels: Array) -> Array:
    """Move pixels `[M, 2]` of the original image to where the straightened image shows them."""
    straight = straightened(lens)
    if lens.model.startswith(COLMAP):
        rays = np.asarray(_colmap_camera(lens).cam_from_img(np.ascontiguousarray(pixels, dtype=float)))
        return rays_to_pixels(straight, rays.reshape(-1, 2))
    return pixels


@lru_cache(maxsize=256)
def straightened(lens: Lens) -> Lens:
    """Return the pinhole of the same size and principal point that shows as much as possible without empty pixels.

    Example:
        >>> straightened(Lens((48, 64), 60.0, 60.0, 32.0, 24.0)).fx
        60.0

    Raises:
        DataError: if the distortion leaves no part of the image, or the principal point lies outside.
    """
    height, width = lens.size
    if lens.model == "pinhole":
        return lens
    along = np.linspace(0.0, 1.0, BORDER_POINTS)
    side, other = np.stack([along, np.zeros_like(along)], 1), np.stack([along, np.ones_like(along)], 1)
    border = np.concatenate([side, other, side[:, ::-1], other[:, ::-1]]) * (width, height)
    center = np.array([lens.cx, lens.cy])
    rays = (border - center) / (lens.fx, lens.fy)

    def shown(zooms: Array) -> tuple[Array, Array]:
        """Whether all of the border lies in the original image, and how far each point is from the center."""
        pixels = rays_to_pixels(lens, (rays / zooms[:, None, None]).reshape(-1, 2)).reshape(len(zooms), -1, 2)
        inside = np.isfinite(pixels) & (pixels >= -1e-9) & (pixels <= np.array([width, height]) + 1e-9)
        return inside.all((1, 2)), np.linalg.norm(pixels - center, axis=-1)

    fits, distance = shown(ZOOMS)
    fits[1:] &= (np.diff(distance, axis=0) > 0).all(1)  # beyond, the polynomial of a lens folds back
    count = len(fits) if fits.all() else int(np.argmin(fits))
    if count == 0 or ZOOMS[count - 1] > MOST_ZOOM:
        raise DataError(
            f"lens {lens.model} with {', '.join(f'{value:g}' for value in lens.params)}: its distortion leaves nothing "
            f"of the image of {width}x{height}; check the parameters and their order"
        )
    zoom = float(ZOOMS[count - 1])
    if count < len(ZOOMS):
        narrow, wide = zoom, float(ZOOMS[count])
        for _ in range(30):
            middle = (narrow + wide) / 2
            fit, far = shown(np.array([middle]))
            grows = bool((far[0] > distance[count - 1]).all())
            narrow, wide = (middle, wide) if fit[0] and grows else (narrow, middle)
        zoom = narrow
    return Lens(lens.size, lens.fx * zoom, lens.fy * zoom, lens.cx, lens.cy)


def undistort_image(lens: Lens, image: Array) -> Array:
    """Return the image `[H, W, 3]` as the straightened camera shows it; the same array for a pinhole."""
    if lens.model == "pinhole":
        return image
    cv2 = optional_package("cv2", needed_for="lens distortion")
    x, y = _pixel_map(lens)
    return cv2.remap(image, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)


@lru_cache(maxsize=4)
def _pixel_map(lens: Lens) -> tuple[Array, Array]:
    """Where OpenCV, which counts from 0, finds each pixel of the straightened image."""
    (height, width), straight = lens.size, straightened(lens)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack([(x - straight.cx) / straight.fx, (y - straight.cy) / straight.fy], axis=-1)
    pixels = rays_to_pixels(lens, rays.reshape(-1, 2)).reshape(height, width, 2).astype(np.float32) - np.float32(0.5)
    return np.ascontiguousarray(pixels[..., 0]), np.ascontiguousarray(pixels[..., 1])


@lru_cache(maxsize=64)
def _colmap_camera(lens: Lens) -> Any:
    pycolmap = optional_package("pycolmap", needed_for=lens.model)
    height, width = lens.size
    camera = pycolmap.Camera.create_from_model_name(1, lens.model.removeprefix(COLMAP), lens.fx, width, height)
    camera.params = list(lens.params)
    return camera
