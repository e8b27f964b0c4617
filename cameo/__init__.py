"""CAMEO: supervise one cross-view attention layer of a multi-view diffusion model with geometric correspondence.

Example:
    >>> import cameo
    >>> "cat3d" in cameo.backbones()
    True
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cameo.lazy import load_on_use
from cameo.renamed import modules
from cameo.version import __version__ as __version__

if TYPE_CHECKING:
    from cameo.alignment import AlignmentHead, alignment_loss
    from cameo.attention.layout import TokenLayout
    from cameo.backbone import backbones, register_backbone
    from cameo.correspondence import Correspondence, Tracks
    from cameo.hub import from_pretrained
    from cameo.probing import LayerProbe, probe_layers
    from cameo.wrap import CameoModel, wrap
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        {
            "AlignmentHead": "cameo.alignment",
            "CameoModel": "cameo.wrap",
            "Correspondence": "cameo.correspondence",
            "LayerProbe": "cameo.probing",
            "TokenLayout": "cameo.attention.layout",
            "Tracks": "cameo.correspondence",
            "alignment_loss": "cameo.alignment",
            "backbones": "cameo.backbone",
            "from_pretrained": "cameo.hub",
            "probe_layers": "cameo.probing",
            "register_backbone": "cameo.backbone",
            "wrap": "cameo.wrap",
        },
    )

modules.install()

__all__ = [
    "AlignmentHead",
    "CameoModel",
    "Correspondence",
    "LayerProbe",
    "TokenLayout",
    "Tracks",
    "alignment_loss",
    "backbones",
    "from_pretrained",
    "probe_layers",
    "register_backbone",
    "wrap",
]


class _Package(ModuleType):
    """Keeps `cameo.wrap` the function when the module of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "wrap" and isinstance(value, ModuleType):
            value = value.wrap
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
