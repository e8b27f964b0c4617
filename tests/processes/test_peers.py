"""Processes that watch each other: what each says when another one fails, falls silent or never comes."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch import distributed

from cameo.processes import peers
from cameo.processes.launch import Launch
from cameo.processes.peers import LostProcessError, watched_by_others

# Longer than any machine is busy.
PATIENCE = 60.0
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:1: Connection reset by peer"

_others: list[peers._Watch] = []


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[distributed.TCPStore]:
    """The store of a launcher that has started this process as the first of two; signs of life come faster."""
    monkeypatch.setattr(peers, "INTERVAL", 0.05)
    monkeypatch.setattr(peers, "GRACE", 0.5)
    monkeypatch.setattr(peers, "MISSED", 40)
    monkeypatch.setattr(peers, "NAMING", 30.0)
    found = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.port)}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    yield found
    for other in _others:  # while the constants are still short, and nothing exits
        other.stop(peers.ENDED)
    _others.clear()
    for thread in threading.enumerate():
        if thread.name == peers.THREAD_NAME:  # none is left that would look for the store when it is gone
            thread.join(30)
            assert not thread.is_alive()
    assert not peers._watches


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the first process would have printed when it ended itself."""
    printed: list[str] = []

    def exit_instead(watch: peers._Watch, cause: str) -> None:
        if watch.launch.process == 0:
            printed.append(watch.message(cause))

    monkeypatch.setattr(peers._Watch, "_exit", exit_instead)
    return printed


def second(store: distributed.TCPStore) -> peers._Watch:
    """The other process, as a thread of this one."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    _others.append(peers._Watch(Launch(1, 2, 1, group), PATIENCE, lambda: ""))
    return _others[-1]


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class ByHand:
    """Two processes whose signs of life are exchanged by hand, on a clock that goes by hand: no thread runs."""

    def __init__(self, store: distributed.TCPStore, monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
        self.now = 0.0
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), **variables}
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", lambda thread: None)
            patched.setattr(time, "monotonic", lambda: self.now)
            self.first, self.second = (peers._Watch(Launch(rank, 2, 1, group), 40, lambda: "") for rank in range(2))
        self._patch = monkeypatch

    def after(self, seconds: float, *meeting: peers._Watch) -> str | None:
        """Let time pass and processes meet, and return what the first one would end with."""
        self.now += seconds
        with self._patch.context() as patched:
            patched.setattr(time, "monotonic", lambda: self.now)
            for watch in meeting:
                watch._meet()
            return self.first._cause(self.first.patience, peers.GRACE)


@pytest.fixture
def pair(store: distributed.TCPStore, monkeypatch: pytest.MonkeyPatch) -> ByHand:
    return ByHand(store, monkeypatch, TORCHELASTIC_USE_AGENT_STORE="True")


def cut_off(watch: peers._Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the store away from a process."""

    def refuse() -> None:
        raise distributed.DistNetworkError

    watch._store = None
    monkeypatch.setattr(watch, "_connect", refuse)


def test_nothing_is_said_of_processes_that_go_on_or_have_finished(
    pair: ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        assert pair.after(30, pair.second, pair.first) is None
    pair.second._state = peers.ENDED
    assert pair.after(1, pair.second, pair.first) is None
    assert pair.after(1000, pair.first) is None
    cut_off(pair.first, monkeypatch)  # the launcher of those that have finished has ended with them
    assert pair.after(1000, pair.first) is None


def test_a_silent_process_is_named(pair: ByHand) -> None:
    assert pair.after(0, pair.second, pair.first) is None
    assert pair.after(40, pair.first) is None
    assert re.fullmatch(
        rf"process 1 \({os.getpid()} on .*\) is lost: its last sign of life came 41 s ago, so it was killed, hangs, or "
        r"its machine cannot be reached; if it was only slow, raise process_timeout \(now 40\)",
        str(pair.after(1, pair.first)),
    )


def test_a_process_that_never_comes_is_named(pair: ByHand) -> None:
    assert pair.after(peers.APPEARANCE, pair.first) is None
    assert pair.after(1, pair.first) == "process 1 is missing: it has not appeared in 600 s"


def test_a_store_that_is_gone_is_named(pair: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.after(0, pair.second, pair.first)
    cut_off(pair.first, monkeypatch)
    assert pair.after(40, pair.first) is None
    said = str(pair.after(1, pair.first))
    assert re.match(r"process 0 \(.*\) has reached no other process for 41 s", said)
    assert "MASTER_ADDR=127.0.0.1, does not answer; the oldest sign of life is that of process 1 (" in said


def test_a_store_that_the_main_process_opens_after_loading_is_waited_for(
    store: distributed.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ByHand(store, monkeypatch)  # started by MPI, without a store of the launcher
    connect = pair.first._connect
    cut_off(pair.first, monkeypatch)
    assert pair.after(2 * peers.APPEARANCE, pair.first) is None
    monkeypatch.setattr(pair.first, "_connect", connect)
    assert pair.after(1, pair.first) is None  # the others may appear from now on
    assert pair.after(peers.APPEARANCE, pair.first) is None
    assert "is missing" in str(pair.after(1, pair.first))


def test_a_process_ends_also_where_nobody_reads_its_words(pair: ByHand, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    def write(descriptor: int, content: bytes) -> None:
        written.append(content)
        raise BrokenPipeError

    def end(status: int) -> None:
        raise SystemExit(status)

    def lost_drive() -> str:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "_exit", end)
    pair.first.cure = lost_drive
    with pytest.raises(SystemExit, match="1"):
        pair.first._exit("process 1 is lost")
    assert b"process 1 is lost. This process ends too" in written[0]
    assert b"What there is to go on from cannot be read ([Errno 116] Stale file handle)" in written[0]


def test_the_words_of_a_process_that_failed_are_passed_on(store: distributed.TCPStore, exits: list[str]) -> None:
    with watched_by_others(PATIENCE, lambda: "Start it again"):
        other = second(store)
        other.stop("process 1 (4711 on far) has ended with DataError: no data")
        wait_for(lambda: exits)
    assert exits[0].startswith("process 1 (4711 on far) has ended with DataError: no data. This process ends too")


def test_a_broken_connection_names_the_process_that_broke_it(store: distributed.TCPStore) -> None:
    other = second(store)

    def lose() -> None:
        wait_for(lambda: peers._watches[0]._peers)
        other._meet = lambda: None  # type: ignore[method-assign]
        raise RuntimeError(GLOO)

    message = r"^process 1 \(.*\) is lost: .*\. Start it again$"
    with pytest.raises(LostProcessError, match=message) as raised, watched_by_others(60, lambda: "Start it again"):
        lose()
    assert str(raised.value.__cause__) == GLOO
    # What ended this process is told to others, who pass on the first cause.
    third = peers._Watch(Launch(2, 3, 1, other.launch.environment), 60, lambda: "")
    assert str(third.find_cause()).startswith("process 1 (")
    third.stop(peers.ENDED)


def test_the_sigterm_of_a_launcher_does_not_cut_the_word_short(
    store: distributed.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[int] = []

    def find_cause(watch: peers._Watch) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "process 1 is lost"

    def break_connection() -> None:
        raise RuntimeError(GLOO)

    monkeypatch.setattr(peers._Watch, "find_cause", find_cause)
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with pytest.raises(LostProcessError, match="process 1 is lost"), watched_by_others(60, lambda: ""):
            break_connection()
        assert received == []
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_errors_of_this_process_stay_what_they_are(store: distributed.TCPStore) -> None:
    with pytest.raises(FloatingPointError, match="not finite"), watched_by_others(60, lambda: ""):
        raise FloatingPointError("not finite")
    other = second(store)
    wait_for(lambda: other._peers)
    assert "has ended with FloatingPointError: not finite" in other._peers[0].state
    other.stop(peers.ENDED)


def test_a_process_that_was_stopped_itself_accuses_nobody(
    store: distributed.TCPStore, exits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])
    with watched_by_others(PATIENCE, lambda: ""):
        other = second(store)
        watch = peers._watches[0]
        wait_for(lambda: watch._peers)
        watch._meet = lambda: None  # type: ignore[method-assign]
        ahead[0] = 1000.0
        wait_for(lambda: watch._answered > clock() + 500)  # the thread that judges has seen that it slept
        assert watch._cause(PATIENCE, peers.GRACE) is None
    assert exits == []
    other.stop(peers.ENDED)


def test_blocks_may_be_nested_and_one_process_watches_nobody(
    store: distributed.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched_by_others(60, lambda: ""), watched_by_others(60, lambda: ""):
        assert len(peers._watches) == 1
    with watched_by_others(None, lambda: ""):
        assert not peers._watches
    monkeypatch.setenv("WORLD_SIZE", "1")
    with watched_by_others(60, lambda: ""):
        assert not peers._watches
