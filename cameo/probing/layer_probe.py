"""`cameo.LayerProbe`: the result of a probe of a model's layers, as numbers, table and picture.

Axes: S samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cameo.probing.report import probe_figure, probe_table
from cameo.probing.result import ProbeResult
from cameo.renamed import KEYWORDS, old_attributes, old_fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerProbe"]


@old_attributes
@old_fields(KEYWORDS["LayerProbe"])
@dataclass(frozen=True, eq=False)
class LayerProbe(ProbeResult):
    """How precisely the attention of each layer finds the true match, by noise level, angle between views and scene.

    Returned by `cameo.probe_layers`; `cameo.wrap(..., layer="auto", probe=probe)` supervises its best layer.

    Example:
        >>> import numpy as np
        >>> from cameo.probing.probed_layer import ProbedLayer
        >>> counts = {"pairs": np.array([[10]]), "chance": np.array([[[2.0]]])}  # one sample, one bin, one distance
        >>> layers = [
        ...     ProbedLayer(number, path, "all", "8 x 8", hits={"mean": np.array([[[[hits]]]])}, **counts)
        ...     for number, (path, hits) in enumerate({"down.attn1": 2, "up.attn1": 6}.items())
        ... ]
        >>> probe = LayerProbe(tuple(layers), (1.0,), ((0.0, 180.0),), (1,), ("room",), ("room/0-1",))
        >>> probe.best, probe.precision("up.attn1"), probe.chance("up.attn1"), probe.skill("up.attn1")
        ('up.attn1', 0.6, 0.2, 0.5)

    Attributes:
        layers: the counts of each layer, in execution order.
        noise_levels: shares of the last timestep in [0, 1].
        angle_bins: degrees between the optical axes of the two views, (least, below).
        within: distances in tokens; the last one may be "2cm", in the world, for data in meters.
        scenes: scene of each sample, S names; the samples of a scene count together.
        samples: key of each sample.
        backbone: name of the adapter, or None.
        inflate: whether the layers are those that `inflate=True` inflates.
        seed: seed of the noise.
        own_view: whether the layers are those that `own_view=True` supervises within each view.

    `save` writes a probe to a file, and `load` reads it.
    """

    def table(self, *, columns: Mapping[str, Mapping[str, str]] | None = None) -> str:
        """Format the ranking as a Markdown table, best layer first; below it the layers that are not ranked, and why.

        Args:
            columns: additional columns: title of a column to layer path to the text of the cell.
        """
        return probe_table(self, columns or {})

    def heat_map(self, *, within: int | str = 1, readout: str = "mean", kind: str = "skill") -> Figure:
        """Draw layers x noise levels, one panel for all pairs of views and one per angle bin.

        Args:
            within: one of `self.within`.
            readout: "mean" of the heads, "best_head" or "through_head"; layers without it are left out.
            kind: "precision", "chance" or "skill".

        Raises:
            ValueError: for another distance or kind, or if no probed layer has the readout.
        """
        return probe_figure(self, within=within, readout=readout, kind=kind)
