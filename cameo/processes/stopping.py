"""SIGTERM and SIGINT end a run after the current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

__all__ = ["StopSignal", "ignored_sigterm", "leave_signals_to_parent"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A launcher passes Ctrl-C on to processes that have received it from the terminal already. A signal within this time
# is not a second key press.
ECHO_SECONDS = 0.5
# Seconds after which a data worker that received SIGTERM ends by itself.
WORKER_SECONDS = 60


class StopSignal:
    """During the `with` block the first SIGTERM or SIGINT is recorded, and a later one interrupts at once.

    Example:
        >>> with StopSignal() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.received
        'SIGTERM'

    Outside the main thread, where Python allows no handlers, signals keep their usual effect.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._time = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and time.monotonic() - self._time > ECHO_SECONDS:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._time = signal.Signals(number).name, time.monotonic()
            # os.write and not print: the handler may have interrupted a print.
            message = f"\n{self.received}: stopping after this step with a checkpoint; a second signal stops at once\n"
            os.write(2, message.encode())


@contextmanager
def ignored_sigterm() -> Iterator[None]:
    """Ignore SIGTERM during the `with` block, for a process that is about to end and has something to say before.

    Example:
        >>> with ignored_sigterm():
        ...     signal.raise_signal(signal.SIGTERM)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave_signals_to_parent(worker: int) -> None:
    """Let a data worker ignore the signals of `StopSignal`, which a terminal or scheduler sends to it as well.

    The parent ends its workers when it has written its checkpoint. A worker whose parent is gone ends by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_SECONDS) and None)
