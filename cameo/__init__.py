"""CAMEO: supervise one cross-view attention layer of a multi-view diffusion model with geometric correspondence.

Example:
    >>> import cameo
    >>> "cat3d" in cameo.backbones()
    True
"""

from cameo import moved
from cameo.alignment import AlignmentHead, alignment_loss
from cameo.attention.layout import TokenLayout
from cameo.backbone import backbones, register_backbone
from cameo.correspondence import Correspondence
from cameo.hub import from_pretrained
from cameo.probing import LayerProbe, probe_layers
from cameo.wrap import CameoModel, wrap

moved.install()

__version__ = "0.1.0"

__all__ = [
    "AlignmentHead",
    "CameoModel",
    "Correspondence",
    "LayerProbe",
    "TokenLayout",
    "alignment_loss",
    "backbones",
    "from_pretrained",
    "probe_layers",
    "register_backbone",
    "wrap",
]
