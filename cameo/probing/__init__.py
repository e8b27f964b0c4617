"""Where the attention of a model looks, layer by layer."""

from __future__ import annotations

from cameo.probing.probe import probe_layers
from cameo.probing.result import LayerProbe

__all__ = [
    "LayerProbe",
    "probe_layers",
]
