"""Attention maps as bytes for a page: rounded to 8 bits, with the rarely wanted left out where they are many.

Axes: N tokens of the query view, M tokens of the key view, k kept keys of a query.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Kept", "Pack", "choose_kept"]

# Most bytes of all maps of a page, before they are compressed; base64 makes 4 of 3, so a page stays below 40 MB.
BUDGET = 27 * 10**6
# Keys per query that are kept where whole maps are too many, from which on rows are left out instead.
MOST_KEYS, LEAST_KEYS = 64, 16
# Bytes of a row beside its values: its most-attended token and its largest share.
ROW_BYTES = 4


@dataclass(frozen=True)
class Kept:
    """What of the maps is kept on a page.

    - `keys`: keys per query, those with the largest shares; None for all.
    - `step`: every so many rows and columns of query tokens.

    Example:
        >>> Kept(None, 1).told(), Kept(32, 2).told()
        ('', '32 keys per query, every 2nd row and column of query tokens')
    """

    keys: int | None
    step: int

    def told(self) -> str:
        """Say what is left out, or nothing."""
        parts = [] if self.keys is None else [f"{self.keys} keys per query"]
        if self.step > 1:
            parts.append(f"every {self.step}{'nd' if self.step == 2 else 'rd' if self.step == 3 else 'th'} "
                         "row and column of query tokens")  # fmt: skip
        return ", ".join(parts)

    def size(self, queries: int, keys: int) -> int:
        """Bytes of one map `[N, M]`, about."""
        rows = queries // self.step**2
        per_key = 1 if self.keys is None else 3
        return rows * (ROW_BYTES + per_key * (keys if self.keys is None else min(keys, self.keys)))


def choose_kept(sizes: list[tuple[int, int]], budget: int = BUDGET) -> Kept:
    """Choose what is kept of maps of these sizes `(N, M)`: everything if it fits, then top keys, then fewer queries.

    Example:
        >>> choose_kept([(64, 64)] * 100), choose_kept([(1024, 1024)] * 200)
        (Kept(keys=None, step=1), Kept(keys=40, step=1))
    """
    whole = Kept(None, 1)
    if sum(whole.size(*size) for size in sizes) <= budget:
        return whole
    for step in range(1, 1 + max(queries for queries, _ in sizes)):
        for keys in range(MOST_KEYS, LEAST_KEYS - 1, -4):
            kept = Kept(keys, step)
            if sum(kept.size(*size) for size in sizes) <= budget:
                return kept
    return Kept(LEAST_KEYS, step)


@dataclass
class Pack:
    """Maps one after the other, each with a record of where it lies and what it shows.

    A map of N query tokens is stored as: uint16 `[N]`, the most-attended token, exactly; uint16 `[N]`, its share times
    65535; then uint8 `[N, M]`, the square root of share / largest share times 255. Where only k keys are kept, the
    latter is uint16 `[N, k]`, the keys, and uint8 `[N, k]`. All are little-endian, and each map begins at an even
    byte.

    Example:
        >>> import torch
        >>> pack = Pack(Kept(None, 1))
        >>> pack.add(torch.tensor([[0.75, 0.25]]), (1, 1), model=0)
        >>> pack.records, list(pack.data)
        ([{'model': 0, 'at': 0}], [0, 0, 255, 191, 255, 147])
    """

    kept: Kept
    records: list[dict[str, Any]] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)

    def add(self, shares: Tensor, query_grid: tuple[int, int], **shown: Any) -> None:
        """Append a map, probabilities `[N, M]` of the query tokens of a grid."""
        height, width = query_grid
        step = self.kept.step
        rows = shares.float().numpy().reshape(height, width, -1)[::step, ::step]
        rows = rows.reshape(-1, rows.shape[-1])
        best = rows.argmax(-1)
        peak = np.take_along_axis(rows, best[:, None], -1)
        relative = np.sqrt(np.divide(rows, peak, out=np.zeros_like(rows), where=peak > 0))
        values = np.rint(255 * relative).astype(np.uint8)
        parts = [best.astype("<u2"), np.rint(65535 * peak[:, 0]).astype("<u2")]
        if self.kept.keys is not None:
            count = min(self.kept.keys, rows.shape[1])
            order = np.argsort(-rows, axis=-1, kind="stable")[:, :count]
            parts.append(order.astype("<u2"))
            values = np.take_along_axis(values, order, -1)
        if len(self.data) % 2:
            self.data.append(0)
        self.records.append({**shown, "at": len(self.data)})
        for part in (*parts, values):
            self.data += part.tobytes()

    def text(self) -> str:
        """Return all maps as base64 of a zlib stream, which browsers read without help."""
        return base64.b64encode(zlib.compress(bytes(self.data), 9)).decode()
