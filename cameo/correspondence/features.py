"""Frozen image features, for REPA and for matches where no geometry is known.

Axes: B samples, V views, C channels, X images, H W image pixels, h w patches.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cameo.correspondence.xfeat import XFEAT, XFeatCells
from cameo.errors import DataError, ShapeError, WeightsUnavailable, unknown_name
from cameo.geometry.cameras import full_precision

__all__ = ["FeatureExtractor", "resize_for_network"]

# Number of images that the network computes at once.
IMAGES_AT_ONCE = 64


class FeatureExtractor(nn.Module):
    """Local features of a frozen network: a vision transformer, after its last normalization, or XFeat.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(action="ignore"):  # which say that random weights are a control
        ...     extractor = FeatureExtractor("vit_tiny_patch16_224", pretrained=False, size=32)
        >>> extractor(torch.rand(1, 2, 3, 64, 128)).shape
        torch.Size([1, 2, 192, 2, 4])

    Args:
        name: `xfeat`, whose weights come with the extra `matching`, or the name of a vision transformer in timm, such
            as `vit_small_patch14_dinov2.lvd142m`.
        checkpoint: file with its weights (.safetensors or .pth, of XFeat .pt); None takes those of the package of
            XFeat, or those of the Hub or its cache.
        pretrained: False draws random weights, the same ones each time: a control, not a description of images.
        size: length in pixels to which the shorter side of the images is resized (bicubic, antialiased); both sides
            are then rounded to whole patches, for XFeat to multiples of 32. None takes the size with which the weights
            of a vision transformer were trained, and 256 for XFeat.

    Attributes:
        dim: number of channels, C.
        patch: height and width of a patch in pixels.

    Raises:
        ValueError: the name is unknown, the model has no patch tokens, or the arguments contradict each other.
        DataError: the checkpoint does not exist or does not fit.
        ImportError: the package of XFeat is not installed.
        WeightsUnavailable: the Hub cannot be reached and the weights are not in its cache.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str | Path | None = None,
        pretrained: bool = True,
        *,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        if checkpoint is not None and not pretrained:
            raise ValueError(f"pretrained=False: random weights, and checkpoint={checkpoint}; give one of them")
        with torch.random.fork_rng(devices=[]):  # the state of the caller's random generators does not change
            torch.random.default_generator.manual_seed(0)  # torch.manual_seed would also seed the generators of GPUs
            self.network: XFeatCells | VitPatches = (
                XFeatCells(checkpoint, pretrained) if name == XFEAT else VitPatches(name, checkpoint, pretrained)
            )
        self.network.requires_grad_(False).eval()
        if not pretrained:
            warnings.warn(
                f"{name} has random weights (pretrained=False): its features are a control, no result of the method",
                stacklevel=2,
            )
        self.size = size or self.network.size
        self.patch: tuple[int, int] = self.network.patch
        self.dim: int = self.network.dim

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Stay in evaluation mode, since the network is frozen."""
        return super().train(False)

    @torch.no_grad()
    @full_precision
    def forward(self, images: Tensor) -> Tensor:
        """Return the features `[B, V, C, h, w]` of images `[B, V, 3, H, W]` in [0, 1].

        Raises:
            ShapeError: the images have another shape.
        """
        if images.ndim != 5 or images.shape[2] != 3:
            raise ShapeError("images", expected="[B, V, 3, H, W]", got=images.shape)
        parts = [self._features(part) for part in images.flatten(0, 1).float().split(IMAGES_AT_ONCE)]
        return torch.cat(parts).unflatten(0, images.shape[:2])

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(resize_for_network(images, self.size, self.network.multiple))
        return features


def resize_for_network(images: Tensor, shorter: int, multiple: tuple[int, int]) -> Tensor:
    """Resize images `[X, 3, H, W]` so that the shorter side has about `shorter` pixels: bicubic, antialiased.

    Example:
        >>> resize_for_network(torch.rand(1, 3, 30, 60), 64, (32, 32)).shape
        torch.Size([1, 3, 64, 128])

    Both sides are rounded to whole multiples.
    """
    height, width = (
        max(1, round(side * shorter / min(images.shape[-2:]) / unit)) * unit
        for side, unit in zip(images.shape[-2:], multiple, strict=True)
    )
    return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)


class VitPatches(nn.Module):
    """The patch tokens of a vision transformer of timm; the attributes are those of `XFeatCells`."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, checkpoint: str | Path | None, pretrained: bool) -> None:
        super().__init__()
        self.network = _build(name, checkpoint, pretrained)
        from timm.data import resolve_model_data_config

        data = resolve_model_data_config(self.network)
        self.dim: int = self.network.num_features
        self.patch: tuple[int, int] = tuple(self.network.patch_embed.patch_size)
        self.multiple = self.patch
        self.size: int = min(data["input_size"][1:])
        self.register_buffer("mean", torch.tensor(data["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data["std"])[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features `[X, C, h, w]` of images `[X, 3, H, W]` in [0, 1]."""
        (features,) = self.network.forward_intermediates(
            (images - self.mean) / self.std, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return features


def _build(name: str, checkpoint: str | Path | None, pretrained: bool) -> Any:
    """Build the network with its weights."""
    import timm
    from safetensors import SafetensorError

    known = timm.list_models()
    if name.split(".")[0] not in known:
        raise unknown_name("feature_model", name, [XFEAT, *(model for model in known if model.startswith("vit_"))])
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise DataError(f"feature_checkpoint={checkpoint}: no such file")
    options: dict[str, Any] = {"num_classes": 0, "dynamic_img_size": True}
    if checkpoint is not None:
        options["pretrained_cfg_overlay"] = {"file": str(checkpoint)}
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:  # only vision transformers accept `dynamic_img_size`
        raise ValueError(
            f"feature_model={name}: has no patch tokens for images of any size ({error}); take a plain vision "
            "transformer of timm, such as vit_small_patch14_dinov2.lvd142m"
        ) from error
    except OSError as error:
        raise WeightsUnavailable(
            f"feature_model={name}: its weights are not reachable ({error}). Give feature_checkpoint=FILE with the "
            f"weights as timm publishes them, feature_model={XFEAT}, which needs no download, or "
            "feature_pretrained=false for random ones as a control"
        ) from error
    except (RuntimeError, KeyError, SafetensorError) as error:
        if checkpoint is None:
            raise
        first = " ".join(str(error).split("\n\t")[:2])  # torch lists every parameter
        raise DataError(f"feature_checkpoint={checkpoint}: does not fit {name}: {first}") from error
