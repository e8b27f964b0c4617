"""Where the attention of a model looks, layer by layer."""

from typing import TYPE_CHECKING

from cameo.lazy import load_on_use

if TYPE_CHECKING:
    from cameo.probing.layer_probe import LayerProbe
    from cameo.probing.probe import probe_layers
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        {
            "LayerProbe": "cameo.probing.layer_probe",
            "probe_layers": "cameo.probing.probe",
        },
    )

__all__ = [
    "LayerProbe",
    "probe_layers",
]
