"""MVDream and ImageDream: our own form, the original ldm code, and its diffusers port."""

from cameo.adapters.mvdream.adapter import MVDream
from cameo.adapters.mvdream.layers import disable_checkpointing, set_image_view

__all__ = ["MVDream", "disable_checkpointing", "set_image_view"]
