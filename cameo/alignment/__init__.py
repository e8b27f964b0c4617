"""The alignment loss: its definition, its readable reference, and its fast forms."""

from __future__ import annotations

from cameo.alignment.loss import (
    GELUS,
    IMPLEMENTATIONS,
    NORMALISATIONS,
    REDUCTIONS,
    AlignmentHead,
    alignment_loss,
    supervision_weights,
)

__all__ = [
    "GELUS",
    "IMPLEMENTATIONS",
    "NORMALISATIONS",
    "REDUCTIONS",
    "AlignmentHead",
    "alignment_loss",
    "supervision_weights",
]
