"""Zero123++: six views at fixed poses from one image, denoised as one canvas."""

from cameo.adapters.zero123plus.adapter import Zero123Plus

__all__ = ["Zero123Plus"]
