"""What a training run warns of while it runs and at its end: alignment at chance, few matches, data that do not fit."""

from __future__ import annotations

from cameo.alarms.chance import alignment_chance, matchable_tokens
from cameo.alarms.watch import Alarm, RunWatch

__all__ = ["Alarm", "RunWatch", "alignment_chance", "matchable_tokens"]
