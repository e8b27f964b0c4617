"""The processes of a run watch each other: where one is killed, fails, hangs or is cut off, the others end and say so.

A launcher ends the processes of the machine on which one has ended, and a library raises where a connection is closed.
Neither sees a process that hangs, a machine that is gone, or one that fails before it has met the others, and these
would wait for hours. So every process leaves a sign of life once a second in the store at which the launcher lets them
meet, and reads those of the others, in a thread of its own: a long validation or a wait for another process is no
silence.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

from torch import distributed

from cameo.processes.launch import Launch
from cameo.processes.stopping import ignored_sigterm

__all__ = ["LostProcessError", "watched_by_others"]

INTERVAL = 1.0  # seconds from one sign of life to the next
# Signs that a process has to miss before it is named as the one that broke a connection, and seconds to find it.
MISSED, NAMING = 4, 8.0
# Seconds in which a process may end by itself, with its own traceback, after another one has failed.
GRACE = 10.0
# Seconds in which all processes have to appear; their launchers start them at the same time.
APPEARANCE = 600.0
ENDED = "ended"
THREAD_NAME = "cameo-peers"

_watches: list[_Watch] = []


class LostProcessError(ConnectionError):
    """Another process of the run is gone; the message says which, and how to go on."""


@contextmanager
def watched_by_others(patience: float | None, cure: Callable[[], str]) -> Iterator[None]:
    """Watch the other processes of a run, and be watched by them, during the `with` block; may be nested.

    An exception that leaves the block is told to the others, which end with its words. Where this process hangs in an
    exchange with a process that is lost, it prints which one and exits with status 1.

    Example:
        >>> with watched_by_others(40, cure=lambda: "Start the run again"):  # of one process: nothing to watch
        ...     pass

    Args:
        patience: seconds without a sign of life after which a process is lost; None does not watch.
        cure: says how to go on; called when a process is lost.

    Raises:
        LostProcessError: in place of the error of a broken connection; names the process that broke it.
    """
    launch = Launch.from_environment()
    address = launch.environment.get("MASTER_ADDR"), launch.environment.get("MASTER_PORT")
    if patience is None or launch.num_processes == 1 or None in address or _watches:
        yield
        return
    watch = _Watch(launch, patience, cure)
    _watches.append(watch)
    state = ENDED
    try:
        yield
    except BaseException as error:
        if not _is_of_connection(error):
            state = f"{watch.name} has ended with {type(error).__name__}: {' '.join(str(error).split())[:500]}"
            raise
        with ignored_sigterm():  # which the launcher sends to all when one has ended
            state = watch.find_cause() or f"the connection between the processes is broken ({error})"
        raise LostProcessError(watch.message(state)) from error
    finally:
        _watches.remove(watch)
        watch.stop(state)


def _is_of_connection(error: BaseException) -> bool:
    """Tell whether an error is that of an exchange between processes; gloo raises no error of its own type."""
    return isinstance(error, distributed.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


@dataclass
class _Peer:
    """What was last heard of a process, and when that was new, on the clock of this process."""

    sign: str
    since: float

    @property
    def name(self) -> str:
        return str(json.loads(self.sign)["name"])

    @property
    def state(self) -> str:
        """Empty while it runs, then `ended`, or why it has ended too early."""
        return str(json.loads(self.sign)["state"])


class _Watch:
    """Two threads: one exchanges signs of life through the store, the other one judges them, also if that hangs."""

    def __init__(self, launch: Launch, patience: float, cure: Callable[[], str]) -> None:
        self.launch, self.patience, self.cure = launch, patience, cure
        self.name = f"process {launch.process} ({os.getpid()} on {platform.node()})"
        self._state, self._sent = "", 0
        self._peers: dict[int, _Peer] = {}
        # Without a store of the launcher the main process opens one when it makes its accelerator, after loading.
        self._has_met = launch.environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._begun = self._answered = time.monotonic()
        self._stopped = threading.Event()
        self._store: distributed.Store | None = None
        self._threads = [
            threading.Thread(target=run, name=THREAD_NAME, daemon=True) for run in (self._exchange, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self, state: str) -> None:
        """Leave a last sign of life, which says how this process has ended."""
        self._state = state
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * INTERVAL)

    def message(self, cause: str) -> str:
        """Say what ends this process and how to go on."""
        try:
            cure = self.cure()
        except OSError as error:  # the drive may be what was lost
            cure = f"What there is to go on from cannot be read ({error})"
        return f"{cause}. This process ends too, since the run cannot go on. {cure}"

    def find_cause(self) -> str | None:
        """Wait until it shows which process has broken a connection."""
        until = time.monotonic() + NAMING
        while (cause := self._cause(MISSED * INTERVAL, grace=0)) is None and time.monotonic() < until:
            time.sleep(INTERVAL / 10)
        return cause

    def _exchange(self) -> None:
        self._meet()
        while not self._stopped.wait(INTERVAL):
            self._meet()
        self._meet()

    def _meet(self) -> None:
        """Leave a sign of life and read those of the others; a store that does not answer is asked again later."""
        try:
            self._store = self._store or self._connect()
            self._sent += 1
            sign = json.dumps({"name": self.name, "state": self._state, "number": self._sent})
            self._store.set(self._key(self.launch.process), sign)
            others = set(range(self.launch.num_processes)) - {self.launch.process}
            known = [rank for rank in sorted(others) if rank in self._peers or self._store.check([self._key(rank)])]
            signs = self._store.multi_get([self._key(rank) for rank in known]) if known else []
            self._answered = time.monotonic()
            if not self._has_met:
                self._begun, self._has_met = self._answered, True
            for rank, read in zip(known, signs, strict=True):
                text = read.decode()
                if rank not in self._peers or self._peers[rank].sign != text:
                    self._peers[rank] = _Peer(text, self._answered)
        except (RuntimeError, OSError):  # torch's errors of stores are RuntimeErrors
            self._store = None

    def _connect(self) -> distributed.Store:
        """A connection of its own, since a thread that waits for a key keeps others from using the same one."""
        environment = self.launch.environment
        return distributed.TCPStore(
            environment["MASTER_ADDR"],
            int(environment["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=self.patience),
        )

    def _key(self, rank: int) -> str:
        """Name the sign of a process in the store, which a launcher keeps when it starts the processes once more."""
        return f"cameo/{self.launch.environment.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank}"

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(INTERVAL):
            now = time.monotonic()
            if (asleep := now - before) > MISSED * INTERVAL:  # this process was stopped, and has heard nobody
                self._answered += asleep
                for peer in list(self._peers.values()):  # the other thread may add one
                    peer.since += asleep
            before = now
            if cause := self._cause(self.patience, GRACE):
                self._exit(cause)

    def _cause(self, patience: float, grace: float) -> str | None:
        """Say which process is lost, None if none is: one that has failed, is silent, or has never appeared."""
        now, peers = time.monotonic(), sorted(self._peers.items())
        for _, peer in peers:
            if peer.state not in ("", ENDED) and now - peer.since > grace:
                return peer.state
        for _, peer in peers:
            # Nothing is heard of anybody while the store does not answer.
            if peer.state == "" and (silent := self._answered - peer.since) > patience:
                slow = (
                    f"; if it was only slow, raise process_timeout (now {patience:g})"
                    if patience == self.patience
                    else ""
                )
                return (
                    f"{peer.name} is lost: its last sign of life came {silent:.0f} s ago, so it was killed, hangs, or "
                    f"its machine cannot be reached{slow}"
                )
        if not self._has_met or (peers and all(peer.state == ENDED for _, peer in peers) and not self._missing()):
            return None  # nobody to meet yet, or any more: then the store may be gone as well
        if (silent := now - self._answered) > patience:
            # Where the main process is killed, its launcher takes the store away before it has missed enough signs.
            running = [peer for _, peer in peers if peer.state == ""]
            oldest = (
                f"; the oldest sign of life is that of {min(running, key=lambda peer: peer.since).name}"
                if running
                else ""
            )
            return (
                f"{self.name} has reached no other process for {silent:.0f} s: the place where they meet, "
                f"MASTER_ADDR={self.launch.environment['MASTER_ADDR']}, does not answer{oldest}"
            )
        if (missing := self._missing()) and now - self._begun > APPEARANCE:
            return f"process {missing[0]} is missing: it has not appeared in {APPEARANCE:.0f} s"
        return None

    def _missing(self) -> list[int]:
        """Numbers of the processes of which nothing was ever heard."""
        return sorted(set(range(self.launch.num_processes)) - {self.launch.process, *self._peers})

    def _exit(self, cause: str) -> NoReturn:
        """End this process, whose main thread waits for a lost one, in code that no exception reaches."""
        try:
            os.write(2, f"\n{self.message(cause)}\n".encode())
        finally:  # also where the launcher is gone, to which it is written
            os._exit(1)
