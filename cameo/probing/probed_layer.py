"""The counts of one layer in a probe, as `LayerProbe` holds them.

Axes: T noise levels, S samples, A angle bins, W distances.
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
        index, path: index and path of the attention layer.
        reach: the tokens of each view that a query reaches, as `TokenLayout.reach`; "cell" also where a view has only
            one token. In a layer of reach "cell" there is no choice among tokens, so that precision is the share of
            queries whose most-attended view shows the surface point.
        tokens: token grids of the views, as shown in tables.
        reason: why the layer was not probed, or None; a layer with a reason has no counts.
        unsupervised: why the layer cannot be supervised, or None.
        pairs: number of matches by sample and bin, int64 `[S, A]`.
        chance: expected hits of uniform attention, `[S, A, W]`.
        ceiling: number of matches whose matched token has its own center within 2 cm, `[S, A]`, or None.
        hits: hits per readout, int64 `[T, S, A, W]`; of several heads, those of the head with most hits within 1 token
            at that noise level, over all samples.
        heads: index of that head, by readout and noise level.
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
