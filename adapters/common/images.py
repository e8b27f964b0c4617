"""Zero123++'s images: the canvas of six views, and the processors of its encoders.

Axes: B samples, C channels, H W image pixels, h w cells of one view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["by_canvas", "from_canvas", "image_processor", "process", "processor_side", "to_canvas"]


def to_canvas(views: Tensor) -> Tensor:
    """Lay six views `[B, 6, C, h, w]` out in three rows of two, `[B, C, 3h, 2w]`.

    Example:
        >>> to_canvas(torch.arange(6).reshape(1, 6, 1, 1, 1))[0, 0].tolist()
        [[0, 1], [2, 3], [4, 5]]
    """
    return rearrange(views, "b (r c) k h w -> b k (r h) (c w)", r=3, c=2)


def from_canvas(canvas: Tensor) -> Tensor:
    """Cut a canvas `[B, C, 3h, 2w]` into its six views `[B, 6, C, h, w]`.

    Example:
        >>> from_canvas(torch.arange(6).reshape(1, 1, 3, 2)).flatten().tolist()
        [0, 1, 2, 3, 4, 5]
    """
    return rearrange(canvas, "b k (r h) (c w) -> b (r c) k h w", r=3, c=2)


def by_canvas(function: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """Apply `function` to `[B, V, ...]`, where the last six of six or seven views are one image."""
    if views.shape[1] not in (6, 7):
        return function(views)
    targets = from_canvas(function(to_canvas(views[:, -6:])[:, None])[:, 0])
    return targets if views.shape[1] == 6 else torch.cat([function(views[:, :1]), targets], dim=1)


def image_processor(side: int, **values: float) -> Any:
    """Build a `CLIPImageProcessor` for squares of `side` pixels; `mean` and `std` other than CLIP's can be given."""
    from transformers import CLIPImageProcessor

    normal = {f"image_{name}": value for name, value in values.items()}
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **normal)


def processor_side(processor: Any) -> int:
    """Side in pixels of the squares that an image processor hands on."""
    size = processor.crop_size
    return int(size if isinstance(size, int) else size["height"])


def process(processor: Any, images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] as the processor hands them on, in 8 bits like the image files it is made for."""
    eight_bits = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return processor(images=list(eight_bits), return_tensors="pt").pixel_values.to(images)
