"""How much memory a run takes on the CPU, counted where torch allocates, also inside operators."""

from __future__ import annotations

from collections.abc import Callable

import torch


def memory_of(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a run takes at the most beyond what was held before it, and that are left of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held
