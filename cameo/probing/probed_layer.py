"""What was counted of one layer in a probe, as `LayerProbe` holds it.

Axes: T time steps (levels), S samples, A angle bins, W distances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

__all__ = ["ProbedLayer"]


@dataclass(frozen=True, eq=False)
class ProbedLayer:
    """Counts of one layer.

    Attributes:
        index, path: of the attention layer.
        reach: what a query sees of each view, as `TokenLayout.reach`; "cell" also where a view has one token only. In
            a layer of reach "cell" there is no choice among tokens, and its figures are the share of queries whose
            most-attended view shows the point.
        tokens: token grids of the views, as shown in tables.
        reason: why the layer was not probed, or None; without counts then.
        unsupervised: why the layer cannot be supervised, or None.
        pairs: visible pairs by sample and bin, int64 `[S, A]`.
        chance: expected hits of uniform attention, `[S, A, W]`.
        ceiling: pairs whose true token is itself within 2 cm, `[S, A]`, or None.
        hits: per readout, int64 `[T, S, A, W]`; of several heads those of the one with most hits within 1 token at
            that time step, over all samples.
        heads: number of that head by readout and time step.
    """

    index: int
    path: str
    reach: str
    tokens: str
    reason: str | None = None
    unsupervised: str | None = None
    pairs: np.ndarray | None = None
    chance: np.ndarray | None = None
    ceiling: np.ndarray | None = None
    hits: dict[str, np.ndarray] = field(default_factory=dict)
    heads: dict[str, list[int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        arrays = {name: value.tolist() for name, value in values.items() if isinstance(value, np.ndarray)}
        return {**values, **arrays, "hits": {name: value.tolist() for name, value in self.hits.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProbedLayer:
        """Undo `to_dict`."""
        kinds = {"pairs": np.int64, "chance": np.float64, "ceiling": np.float64}
        arrays = {name: np.array(values[name], kind) for name, kind in kinds.items() if values[name] is not None}
        hits = {name: np.array(value, np.int64) for name, value in values["hits"].items()}
        return cls(**{**values, **arrays, "hits": hits})
