"""Images for the CLIP encoders of the releases, prepared by the image processors of transformers.

Axes: B samples, H W image pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["image_processor", "process", "processor_side"]


def image_processor(side: int, **values: float) -> Any:
    """Build a `CLIPImageProcessor` for squares of `side` pixels; `mean` and `std` other than CLIP's can be given."""
    from transformers import CLIPImageProcessor

    normal = {f"image_{name}": value for name, value in values.items()}
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **normal)


def processor_side(processor: Any) -> int:
    """Return the side in pixels of the squares that an image processor returns."""
    size = processor.crop_size
    return int(size if isinstance(size, int) else size["height"])


def process(processor: Any, images: Tensor) -> Tensor:
    """Prepare images `[B, 3, H, W]` in [0, 1], rounded to 8 bits as in the image files that the processor is made for.

    Returns:
        What the processor returns, `[B, 3, side, side]` in float32 where the images are.
    """
    eight_bits = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return processor(images=list(eight_bits), return_tensors="pt").pixel_values.to(images.device)
