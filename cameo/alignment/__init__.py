"""The alignment loss: its definition, its readable reference, and its fast forms."""

from __future__ import annotations

from cameo.alignment.head import AlignmentHead
from cameo.alignment.loss import GELUS, IMPLEMENTATIONS, NORMALISATIONS, alignment_loss
from cameo.alignment.supervision import REDUCTIONS, supervision_weights

__all__ = [
    "GELUS",
    "IMPLEMENTATIONS",
    "NORMALISATIONS",
    "REDUCTIONS",
    "AlignmentHead",
    "alignment_loss",
    "supervision_weights",
]
