"""Images as text inside a page."""

from __future__ import annotations

import base64
import io

from torch import Tensor

__all__ = ["data_url"]

# Images of at least so many pixels a side are stored as JPEG, and none is larger than the second.
JPEG_FROM, LARGEST = 128, 384


def data_url(image: Tensor) -> str:
    """Return an image `[3, H, W]` in [0, 1] as a `data:` address; small ones lose nothing.

    Example:
        >>> import torch
        >>> data_url(torch.zeros(3, 4, 4))[:22]
        'data:image/png;base64,'
    """
    from PIL import Image

    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture, buffer = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((LARGEST, LARGEST))
    kind = "JPEG" if min(pixels.shape[:2]) >= JPEG_FROM else "PNG"
    picture.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
