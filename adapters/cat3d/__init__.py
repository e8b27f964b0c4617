"""CAT3D-style models: a U-Net or a diffusion transformer whose self-attentions join all views."""

from cameo.adapters.cat3d.adapter import BUNDLED, Cat3D

__all__ = ["BUNDLED", "Cat3D"]
