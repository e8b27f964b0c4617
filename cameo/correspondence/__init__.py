"""Which tokens of different views show the same surface point, and the ways of finding out."""

from __future__ import annotations

from cameo.correspondence.correspondence import DEPTH_TOLERANCE, Correspondence, GridSize

__all__ = [
    "DEPTH_TOLERANCE",
    "Correspondence",
    "GridSize",
]
