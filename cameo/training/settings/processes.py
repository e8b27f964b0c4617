"""Settings of a run of several processes."""

from __future__ import annotations

from dataclasses import dataclass

from cameo.settings import Settings, setting

__all__ = ["ProcessSettings"]


@dataclass
class ProcessSettings(Settings):
    """Processes: what a run of several ones does about one that is lost."""

    # Seconds without a sign of life after which a process of a run counts as lost, and ends the others, >= 10. 40 by
    # default, so that nobody waits for more than a minute; null waits.
    process_timeout: float | None = setting(40.0, at_least=10, changeable=True)
