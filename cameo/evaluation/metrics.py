"""Image quality of generated views against the true ones: PSNR, SSIM, LPIPS, FID.

Axes: N images, H W image pixels. Images are floating point RGB in [0, 1]. PSNR, SSIM and LPIPS give one value per
image, so that runs can be compared image by image; FID is one number for a whole set.
"""

from __future__ import annotations

import contextlib
import pickle
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cameo.errors import DataError, ShapeError, WeightsUnavailable, unknown_name
from cameo.geometry.cameras import at_least_float32
from cameo.probing.denoising import MAX_PSNR, psnr_of_error

__all__ = ["MAX_PSNR", "Fid", "Lpips", "WeightsUnavailable", "psnr", "psnr_of_error", "ssim"]

# Side of the Gaussian window of SSIM in pixels, and how far it reaches to each side.
SSIM_WINDOW = 11
SSIM_REACH = SSIM_WINDOW // 2
# How long to wait for the answer of a server, in seconds.
TIMEOUT = 10.0
# For each LPIPS trunk: the torchvision model, its class of weights, and the smallest image side that it can process.
TRUNKS = {
    "alex": ("alexnet", "AlexNet_Weights", 31),
    "vgg": ("vgg16", "VGG16_Weights", 16),
    "squeeze": ("squeezenet1_1", "SqueezeNet1_1_Weights", 17),
}


def psnr(images: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, ``[N]``; at most `MAX_PSNR`.

    Example:
        >>> targets = torch.zeros(2, 3, 8, 8)
        >>> images = torch.stack([targets[0], targets[1] + 0.1])
        >>> [round(value, 4) for value in psnr(images, targets).tolist()]
        [100.0, 20.0]

    Args:
        images: ``[N, 3, H, W]``; values outside [0, 1] are not clamped.
        targets: ``[N, 3, H, W]`` in [0, 1].
        mask: bool ``[N, 1, H, W]``: the pixels that count; None counts all.

    Returns:
        NaN for an image whose mask is empty, or with values in the mask that are not finite.

    Raises:
        ShapeError: wrong shapes, or shapes that do not fit each other.
        ValueError: images that are not floating point, or a mask that is not bool.
    """
    _check_pair(images, targets)
    dtype = torch.promote_types(at_least_float32(images), at_least_float32(targets))
    squared = (images.to(dtype) - targets.to(dtype)).square()
    if mask is None:
        return psnr_of_error(squared.mean(dim=(1, 2, 3)))
    if mask.shape != (images.shape[0], 1, *images.shape[2:]):
        raise ShapeError("mask", expected=str([images.shape[0], 1, *images.shape[2:]]), got=mask.shape)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected bool, got {mask.dtype}. Cure: compare with a threshold")
    # Not a product with the mask: outside of it, values may be infinite or NaN.
    total = torch.where(mask, squared, 0).sum(dim=(1, 2, 3))
    return psnr_of_error(total / (mask.sum(dim=(1, 2, 3)) * squared.shape[1]))


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each image, ``[N]`` in [-1, 1], computed in float64.

    Gaussian windows of 11 x 11 pixels (sigma 1.5) that lie completely inside the image, as in the original code and in
    scikit-image (``gaussian_weights=True, use_sample_covariance=False``). torchmetrics computes the map; its own mean
    includes or excludes windows over a mirrored border, depending on the version.

    Example:
        >>> images = torch.rand(1, 3, 16, 16)
        >>> round(ssim(images, images).item(), 4)
        1.0

    Args:
        images: ``[N, 3, H, W]`` in [0, 1].
        targets: ``[N, 3, H, W]`` in [0, 1].

    Raises:
        ShapeError: wrong shapes, or images with a side below 11 pixels, since a smaller window is another metric.
        ValueError: images that are not floating point, or values outside [0, 1] or not finite.

    Source: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_pair(images, targets)
    _check_side("SSIM", images, SSIM_WINDOW)
    _check_range(images, targets)
    # Variances are differences of squares, which in uniform areas are wrong in the third digit in float32.
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    _, similarity = structural_similarity_index_measure(
        images.to(dtype), targets.to(dtype), data_range=1.0, reduction="none", return_full_image=True
    )
    inside = slice(SSIM_REACH, -SSIM_REACH)
    return similarity[..., inside, inside].mean(dim=(1, 2, 3))


class Lpips:
    """Learned perceptual distance of each image, ``[N]``; 0 is equal.

    Values of different trunks cannot be compared, so `name` contains the trunk.

    Example:
        >>> metric = Lpips("alex")  # doctest: +SKIP
        >>> metric.name, metric(torch.rand(4, 3, 64, 64), torch.rand(4, 3, 64, 64)).shape  # doctest: +SKIP
        ('lpips_alex', torch.Size([4]))

    Args:
        trunk: "alex" (the default of the authors for comparisons), "vgg" or "squeeze".

    Raises:
        ValueError: an unknown trunk.
        WeightsUnavailable: the trunk's weights are neither in torch's hub folder nor reachable.
        DataError: the file of weights there cannot be read.

    Source: Zhang et al. 2018 (arXiv 1801.03924), as torchmetrics implements it.
    """

    def __init__(self, trunk: str = "alex") -> None:
        if trunk not in TRUNKS:
            raise unknown_name("LPIPS trunk", trunk, TRUNKS)
        import torchvision  # type: ignore[import-untyped]
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self.name = f"lpips_{trunk}"
        _, weights, self._smallest_side = TRUNKS[trunk]
        with _weights(f"the {trunk} trunk", getattr(torchvision.models, weights).DEFAULT.url):
            self._network = LearnedPerceptualImagePatchSimilarity(net_type=trunk, normalize=True).net

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Compare ``[N, 3, H, W]`` in [0, 1] with ``[N, 3, H, W]`` in [0, 1].

        Raises:
            ShapeError: wrong shapes, or images too small for the trunk (31 pixels for alex, 16 vgg, 17 squeeze).
            ValueError: images that are not floating point, or values outside [0, 1] or not finite.
        """
        _check_pair(images, targets)
        _check_side(self.name, images, self._smallest_side)
        _check_range(images, targets)
        network = self._network.to(images.device)
        return network(images.float(), targets.float(), normalize=True).flatten()


class Fid:
    """Fréchet Inception distance between a set of generated images and the true ones; 0 is equal.

    Needs far more images than the other metrics: with fewer images than features the covariance is singular, and
    the number says more about the count than about the images.

    Example:
        >>> metric = Fid()  # doctest: +SKIP
        >>> for images, targets in batches:  # doctest: +SKIP
        ...     metric.update(images, targets)
        >>> metric.name, metric.compute(), metric.count  # doctest: +SKIP
        ('fid_inception_2048', 12.3, 4096)

    Args:
        features: which layer of Inception v3, by its number of features: 64, 192, 768 or 2048 (the standard).
        min_images: `compute` refuses fewer images than this; None for one more than there are features.

    Raises:
        ValueError: an unknown layer, or `min_images` below 2.
        ImportError: torch-fidelity is not installed.
        WeightsUnavailable: the weights are neither in torch's hub folder nor reachable.
        DataError: the file of weights there cannot be read.

    Source: Heusel et al. 2017 (arXiv 1706.08500), as torchmetrics and torch-fidelity implement it.
    """

    def __init__(self, features: int = 2048, *, min_images: int | None = None) -> None:
        if features not in (64, 192, 768, 2048):
            raise ValueError(f"features: expected 64, 192, 768 or 2048, got {features}")
        self.min_images = features + 1 if min_images is None else min_images
        if self.min_images < 2:
            raise ValueError(f"min_images: expected at least 2, got {min_images}")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-untyped]
                URL_INCEPTION_V3,
            )
        except ImportError as error:
            raise ImportError(f'FID: {error}. Cure: pip install "cameo-diffusion[evaluation]"') from error
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.name = f"fid_inception_{features}"
        self.count = 0
        with _weights("Inception v3", URL_INCEPTION_V3):
            self._metric = FrechetInceptionDistance(feature=features, normalize=True)

    @torch.no_grad()
    def update(self, images: Tensor, targets: Tensor) -> None:
        """Add generated ``[N, 3, H, W]`` and true images ``[N, 3, H, W]`` in [0, 1].

        Raises:
            ShapeError: wrong shapes.
            ValueError: images that are not floating point, or values outside [0, 1] or not finite.
        """
        _check_pair(images, targets)
        _check_range(images, targets)
        metric = self._metric.to(images.device)
        metric.update(images.float(), real=False)
        metric.update(targets.float(), real=True)
        self.count += len(images)

    def compute(self) -> float | None:
        """Return the distance, or None with a warning that states the number of images if there are too few."""
        if self.count < self.min_images:
            warnings.warn(
                f"{self.name}: {self.count} images are too few, expected at least {self.min_images}; not computed",
                stacklevel=2,
            )
            return None
        return float(self._metric.compute())


@contextlib.contextmanager
def _weights(what: str, url: str) -> Iterator[None]:
    """Turn errors of the block, which loads weights from torch's hub folder or downloads ``url``, into clear ones.

    torch waits for a server that does not answer without a time limit, so the server is contacted first.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        try:
            urllib.request.urlopen(url, timeout=TIMEOUT).close()
        except OSError as error:
            raise _unavailable(what, url, path, error) from error
    try:
        yield
    except OSError as error:
        raise _unavailable(what, url, path, error) from error
    except (RuntimeError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path}: cannot be read as the weights of {what} ({error}). Cure: delete the file") from error


def _unavailable(what: str, url: str, path: Path, error: Exception) -> WeightsUnavailable:
    return WeightsUnavailable(
        f"weights of {what} are not reachable ({error}), skipped; put {url} into {path.parent} as {path.name} "
        "($TORCH_HOME moves that folder)"
    )


def _check_pair(images: Tensor, targets: Tensor) -> None:
    """Raise unless both are floating point ``[N, 3, H, W]`` of one shape."""
    for name, value in (("images", images), ("targets", targets)):
        if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[1] != 3:
            got: Any = value.shape if isinstance(value, Tensor) else type(value).__name__
            raise ShapeError(name, expected="[N, 3, H, W]", got=got)
        if not value.is_floating_point():
            raise ValueError(f"{name}: expected floating point in [0, 1], got {value.dtype}. Cure: divide by 255")
    if images.shape != targets.shape:
        raise ShapeError("targets", expected=f"{list(images.shape)} as the images", got=targets.shape)


def _check_side(metric: str, images: Tensor, smallest: int) -> None:
    if min(images.shape[2:]) < smallest:
        raise ShapeError(
            "images",
            expected=f"at least {smallest} x {smallest} pixels for {metric}",
            got=images.shape,
            cure="Cure: leave this metric out at this size",
        )


def _check_range(images: Tensor, targets: Tensor) -> None:
    for name, value in (("images", images), ("targets", targets)):
        if value.numel() and not bool(((value >= 0) & (value <= 1)).all()):
            low, high = (float(bound) for bound in value.aminmax())
            raise ValueError(f"{name}: expected values in [0, 1], got {low:.4g} to {high:.4g}. Cure: clamp them")
