"""SIFT keypoints of an image, and matches between those of two images.

Axes: H W image pixels, M keypoints, K matches. Needs OpenCV (extra ``evaluation``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cameo.errors import ShapeError

__all__ = ["find_keypoints", "match_descriptors"]

# Settings of COLMAP for the published consistency measure: the least contrast of a keypoint, and the greatest ratio of
# its principal curvatures, which is high at edges. RATIO is COLMAP's default for the ratio test.
CONTRAST = 0.02
EDGE = 30
RATIO = 0.8


def find_keypoints(image: Tensor) -> tuple[Tensor, Tensor]:
    """Find the SIFT keypoints of an image.

    Example:
        >>> positions, descriptors = find_keypoints(torch.rand(3, 64, 64))  # doctest: +SKIP
        >>> positions.shape, descriptors.shape  # doctest: +SKIP
        (torch.Size([123, 2]), torch.Size([123, 128]))

    Args:
        image: ``[3, H, W]`` RGB; values outside [0, 1] are clamped.

    Returns:
        x, y ``[M, 2]`` in pixels with centers at +0.5, float64, and descriptors ``[M, 128]``, on the CPU.

    Raises:
        ImportError: OpenCV is not installed.
        ShapeError: a wrong shape.
    """
    try:
        import cv2
    except ImportError as error:
        raise ImportError(f'SIFT keypoints: {error}. Cure: pip install "cameo-diffusion[evaluation]"') from error
    if image.ndim != 3 or image.shape[0] != 3:
        raise ShapeError("image", expected="[3, H, W]", got=image.shape)
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    # Without enable_precise_upscale, all positions are off by a quarter of a pixel.
    sift = cv2.SIFT.create(contrastThreshold=CONTRAST, edgeThreshold=EDGE, enable_precise_upscale=True)
    keypoints, descriptors = sift.detectAndCompute(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), None)
    if not keypoints:
        return torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 128)
    # In OpenCV the first pixel center is at 0.
    positions = np.array([keypoint.pt for keypoint in keypoints], dtype=np.float64) + 0.5
    return torch.from_numpy(positions), torch.from_numpy(descriptors)


def match_descriptors(first: Tensor, second: Tensor) -> Tensor:
    """Match descriptors that are mutual nearest neighbors and pass the ratio test in both directions.

    Example:
        >>> match_descriptors(torch.tensor([[0.0], [5.0], [9.0]]), torch.tensor([[9.1], [0.2]])).tolist()
        [[0, 1], [2, 0]]

    Args:
        first: ``[M, C]``.
        second: ``[M', C]``.

    Returns:
        int64 ``[K, 2]``: index in ``first``, index in ``second``. K is 0 if one side has fewer than two descriptors,
        since the ratio test needs the second nearest neighbor.

    Source: Lowe 2004, "Distinctive image features from scale-invariant keypoints", section 7.1.
    """
    if min(len(first), len(second)) < 2:
        return torch.zeros(0, 2, dtype=torch.int64)
    distance = torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
    forth, back = distance.topk(2, dim=1, largest=False), distance.mT.topk(2, dim=1, largest=False)
    distinct, distinct_back = (nearest.values[:, 0] < RATIO * nearest.values[:, 1] for nearest in (forth, back))
    target, source = forth.indices[:, 0], torch.arange(len(first))
    matched = distinct & distinct_back[target] & (back.indices[target, 0] == source)
    return torch.stack([source, target], dim=1)[matched]
