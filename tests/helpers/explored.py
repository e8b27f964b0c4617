"""A page of attention maps, read back, and what the library itself says of the model on it."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cameo.explore.maps import ViewMaps, layer_maps
from cameo.explore.packing import Pack
from cameo.explore.write import SEED
from cameo.probing.denoising import fixed_inputs
from cameo.probing.tally import BatchMatches
from cameo.wrap import CameoModel

LEVELS = (0.5, 1.0)


class Page(NamedTuple):
    """A page, and the model, pipeline and batch that it shows."""

    path: Path
    model: CameoModel
    pipeline: Any
    batch: dict[str, Any]

    def maps(self, level: float) -> list[ViewMaps]:
        """Compute the maps of the supervised layer anew."""
        inputs = fixed_inputs(self.pipeline, self.batch, range(len(self.batch["images"])), level, SEED)
        layer = self.model.supervised_layers[0]
        maps, _ = layer_maps(self.model, BatchMatches(self.batch, metric=False), inputs, [layer], trained_head=True)
        return list(maps[layer.path])


def unpacked(pack: Pack, record: dict[str, Any], rows: int, keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Most-attended token `[N]`, its share `[N]` and shares `[N, M]`, 0 for what is not kept."""
    data = zlib.decompress(base64.b64decode(pack.text()))
    at = record["at"]
    assert at % 2 == 0
    best = np.frombuffer(data, "<u2", rows, at)
    peak = np.frombuffer(data, "<u2", rows, at + 2 * rows) / 65535
    at += 4 * rows
    shares = np.zeros((rows, keys))
    if pack.kept.keys is None:
        values = np.frombuffer(data, np.uint8, rows * keys, at).reshape(rows, keys)
        shares[:] = peak[:, None] * (values / 255.0) ** 2
    else:
        count = min(pack.kept.keys, keys)
        tokens = np.frombuffer(data, "<u2", rows * count, at).reshape(rows, count)
        values = np.frombuffer(data, np.uint8, rows * count, at + 2 * rows * count).reshape(rows, count)
        np.put_along_axis(shares, tokens.astype(int), peak[:, None] * (values / 255.0) ** 2, -1)
    return best, peak, shares
