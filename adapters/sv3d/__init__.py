"""SV3D: an orbit of views from one image, by a video U-Net."""

from cameo.adapters.sv3d.adapter import SV3D
from cameo.adapters.sv3d.layers import use_non_reentrant_checkpointing

__all__ = ["SV3D", "use_non_reentrant_checkpointing"]
