"""The alignment loss: its definition, its readable reference, and its fast forms."""

from __future__ import annotations

from cameo.alignment.head import AlignmentHead
from cameo.alignment.loss import alignment_loss
from cameo.alignment.options import GELUS, IMPLEMENTATIONS, NORMALISATIONS, REDUCTIONS, check_options
from cameo.alignment.supervision import supervision_weights

__all__ = [
    "GELUS",
    "IMPLEMENTATIONS",
    "NORMALISATIONS",
    "REDUCTIONS",
    "AlignmentHead",
    "alignment_loss",
    "check_options",
    "supervision_weights",
]
