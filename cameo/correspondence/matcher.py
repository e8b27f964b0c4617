"""Pairs of pixels by a matcher of images, for photographs without depth.

Axes: B samples, V views, X images, M pairs of pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from cameo.correspondence.features import resize_for_network
from cameo.correspondence.tracks import Tracks
from cameo.correspondence.xfeat import XFEAT, XFeatPairs
from cameo.errors import DataError, ShapeError, WeightsUnavailable
from cameo.geometry.cameras import full_precision
from cameo.geometry.epipolar import epipolar_distance

__all__ = ["KeypointMatcher", "TransformersPairs"]

# A matcher of transformers returns places in whole pixels of an image size of our choice: one so many times as large.
SUBPIXELS = 64


class KeypointMatcher(nn.Module):
    """Finds pixels of two views that show the same point: XFeat, or a keypoint matcher of transformers.

    Example:
        >>> matcher = KeypointMatcher("xfeat")  # doctest: +SKIP
        >>> tracks = matcher(images, intrinsics, extrinsics)  # doctest: +SKIP
        >>> match = cameo.Correspondence.from_tracks(tracks, image_size=(256, 256), token_grid=16)  # doctest: +SKIP

    Args:
        name: `xfeat`, whose weights come with the extra `matching`, or the Hub id or folder of a keypoint matcher of
            transformers, such as `zju-community/efficientloftr`.
        size: length in pixels to which the shorter side of the images is resized; None takes 256 for XFeat, and the
            size of the matcher's own image processor.
        threshold: least confidence of a pair, in [0, 1); None takes 0.82 for XFeat, and keeps all that a matcher of
            transformers returns.
        max_epipolar_error: pairs that miss the cameras by more than this, in pixels of the resized images
            (`cameo.geometry.epipolar.epipolar_distance`), are left out; None does not ask the cameras.

    Raises:
        DataError: the name is no folder or model of a matcher.
        ImportError: the package of XFeat is not installed.
        WeightsUnavailable: the Hub cannot be reached and the weights are not in its cache.
    """

    def __init__(
        self,
        name: str = XFEAT,
        *,
        size: int | None = None,
        threshold: float | None = None,
        max_epipolar_error: float | None = 4.0,
    ) -> None:
        super().__init__()
        self.name, self.max_epipolar_error = name, max_epipolar_error
        self.network: XFeatPairs | TransformersPairs = XFeatPairs() if name == XFEAT else TransformersPairs(name)
        self.network.requires_grad_(False).eval()
        self.size = size or self.network.size
        self.threshold = self.network.threshold if threshold is None else threshold

    def train(self, mode: bool = True) -> KeypointMatcher:
        """Stay in evaluation mode, since the network is frozen."""
        return super().train(False)

    @torch.no_grad()
    @full_precision
    def forward(
        self,
        images: Tensor,
        intrinsics: Tensor | None = None,
        extrinsics: Tensor | None = None,
        *,
        pairs: Iterable[tuple[int, int]] | None = None,
    ) -> list[Tracks]:
        """Return the pairs of pixels of each sample, as tracks of two views each.

        Args:
            images: `[B, V, 3, H, W]` in [0, 1].
            intrinsics, extrinsics: `[B, V, 3, 3]` in pixels of the images and `[B, V, 4, 4]` world-to-camera, with
                which the pairs are checked; None where `max_epipolar_error` is None.
            pairs: the pairs of views to match; None matches all.

        Raises:
            ShapeError: the images have another shape.
            ValueError: the cameras are missing.
        """
        if images.ndim != 5 or images.shape[2] != 3:
            raise ShapeError("images", expected="[B, V, 3, H, W]", got=images.shape)
        if self.max_epipolar_error is not None and (intrinsics is None or extrinsics is None):
            raise ValueError(
                "intrinsics, extrinsics: expected the cameras with which max_epipolar_error="
                f"{self.max_epipolar_error:g} checks the pairs, got None. Cure: max_epipolar_error=None"
            )
        wanted = list(combinations(range(images.shape[1]), 2) if pairs is None else pairs)
        found = []
        for number, sample in enumerate(images.float()):
            resized = resize_for_network(sample, self.size, self.network.multiple)
            scale = resized.new_tensor([sample.shape[-1] / resized.shape[-1], sample.shape[-2] / resized.shape[-2]])
            paired = {}
            for (i, j), (here, there) in self.network.pairs(resized, wanted, self.threshold).items():
                places = here * scale, there * scale
                if self.max_epipolar_error is not None:
                    assert intrinsics is not None
                    assert extrinsics is not None
                    cameras = intrinsics[number, [i, j]], extrinsics[number, [i, j]]
                    kept = epipolar_distance(*places, *cameras) <= self.max_epipolar_error * float(scale.mean())
                    places = places[0][kept], places[1][kept]
                paired[i, j] = places
            found.append(Tracks.from_pairs(paired, images.shape[1]))
        return found


class TransformersPairs(nn.Module):
    """A keypoint matcher of transformers; the attributes are those of `XFeatPairs`.

    Args:
        name: Hub id or folder.

    Raises:
        DataError: it is no folder or model of a matcher.
        WeightsUnavailable: the Hub cannot be reached and the weights are not in its cache.
    """

    multiple, threshold = (32, 32), 0.0

    def __init__(self, name: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoModelForKeypointMatching

        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            self.model: nn.Module = AutoModelForKeypointMatching.from_pretrained(name, trust_remote_code=False)
        except OSError as error:
            raise WeightsUnavailable(
                f"matcher={name}: its weights are not reachable ({error}). Give a folder that `save_pretrained` of "
                f"transformers has filled, or matcher={XFEAT}, which needs no download"
            ) from error
        except ValueError as error:
            raise DataError(f"matcher={name}: is no keypoint matcher of transformers ({error})") from error
        self.size: int = min(self.processor.size["height"], self.processor.size["width"])

    def pairs(
        self, images: Tensor, wanted: list[tuple[int, int]], threshold: float
    ) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Return the places `[M, 2]` in both views for each of the wanted pairs of images `[X, 3, H, W]`."""
        height, width = images.shape[-2:]
        found = {}
        for i, j in wanted:
            both = [images[i], images[j]]
            inputs = self.processor(both, do_resize=False, do_rescale=False, return_tensors="pt").to(images.device)
            sizes = [((SUBPIXELS * height, SUBPIXELS * width),) * 2]
            matched = self.processor.post_process_keypoint_matching(self.model(**inputs), sizes, threshold)[0]
            # Keypoints count from the center of the first pixel.
            here, there = (matched[name].float() / SUBPIXELS + 0.5 for name in ("keypoints0", "keypoints1"))
            found[i, j] = (here, there)
        return found
