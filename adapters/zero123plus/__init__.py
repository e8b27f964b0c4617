"""Zero123++: six views at fixed poses from one image, denoised as one canvas."""

from cameo.adapters.zero123plus.adapter import Zero123Plus
from cameo.adapters.zero123plus.convert import keep_references
from cameo.adapters.zero123plus.layers import set_reference_processors

__all__ = ["Zero123Plus", "keep_references", "set_reference_processors"]
