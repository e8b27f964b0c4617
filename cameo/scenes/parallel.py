"""Renders scenes in several processes: this one, and helpers that run this module.

Helpers are started as new programs and not by `multiprocessing`: a fork would copy the locks of threads that are gone,
of the ray tracer and of torch, and a spawn imports the main module again, which a script without an
`if __name__ == "__main__"` does not survive. What is rendered is a pure function of the scene's number, so it does not
matter who renders it.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO, NamedTuple

from cameo.errors import DataError

__all__ = ["available_cores", "render_scenes"]

# A helper needs seconds to start, so it is started only if this one process would need this much longer, in seconds.
WORTH_A_HELPER = 5.0
# Scenes after which the time per scene is known well enough.
TRIED_SCENES = 4


class _Rendered(NamedTuple):
    """What a helper answers: the `error` of a scene, None where it is on the disk."""

    scene: int
    error: str | None
    of_data: bool


class _Ended(NamedTuple):
    """That a helper has failed: its exit status, and the `scene` that it has left, None between two scenes."""

    status: int
    scene: int | None


def available_cores() -> int:
    """Return how many processor cores this process should use, at least 1.

    These are the cores that it may run on, no more than `OMP_NUM_THREADS` where that is set, divided by the processes
    that a launcher has started on this machine (`LOCAL_WORLD_SIZE`).

    Example:
        >>> available_cores() >= 1
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, launched = (os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"))
    if threads.isdecimal():
        cores = min(cores, int(threads))
    if launched.isdecimal():
        cores //= max(int(launched), 1)
    return max(cores, 1)


def render_scenes(
    render: Callable[[int], object], scenes: Sequence[int], *, processes: int | None, done: Callable[[], object]
) -> None:
    """Call `render(scene)` for each of `scenes`, here and in helpers.

    Args:
        render: writes a scene to the disk; sent to the helpers by pickle, which takes a method of a picklable object.
        scenes: numbers of the scenes.
        processes: processes at work, this one included. None takes as many as there are cores, as far as a helper is
            done before this process would be.
        done: called after each scene, in this thread.

    Raises:
        DataError: from a scene; the first error ends the helpers.
        RuntimeError: if a helper failed for another reason; has its traceback.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for scene in scenes:
        waiting.put(scene)
    rendered: queue.SimpleQueue[_Rendered | _Ended] = queue.SimpleQueue()
    left, helpers = len(scenes), 0
    with ExitStack() as stack:
        start, tried = 0.0, 0
        if processes is not None:
            helpers = _start(stack, min(processes - 1, left - 1), render, waiting, rendered)
        while left:
            here = _next(waiting)
            if here is not None:
                render(here)
                done()
                left, tried = left - 1, tried + 1
                if tried == 1:  # the first one also imports what it needs
                    start = time.perf_counter()
                if processes is None and tried == TRIED_SCENES:
                    seconds = (time.perf_counter() - start) / (tried - 1) * left
                    wanted = min(available_cores() - 1, int(seconds / WORTH_A_HELPER))
                    helpers = _start(stack, wanted, render, waiting, rendered)
            for result in _arrived(rendered, wait=here is None and helpers > 0):
                if isinstance(result, _Ended):
                    warnings.warn(
                        f"a process that helped to render scenes ended with status {result.status}; the others go on",
                        stacklevel=4,
                    )
                    helpers -= 1
                    if result.scene is not None:
                        waiting.put(result.scene)
                    continue
                if result.error is not None:
                    raise (DataError if result.of_data else RuntimeError)(result.error)
                done()
                left -= 1


def _next(waiting: queue.SimpleQueue[int]) -> int | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


def _arrived(rendered: queue.SimpleQueue[_Rendered | _Ended], *, wait: bool) -> Iterator[_Rendered | _Ended]:
    """Results that are there, and the ends of helpers that have failed; waits for one if asked to."""
    if wait:
        yield rendered.get()
    while not rendered.empty():
        yield rendered.get()


def _start(
    stack: ExitStack,
    count: int,
    render: Callable[[int], object],
    waiting: queue.SimpleQueue[int],
    rendered: queue.SimpleQueue[_Rendered | _Ended],
) -> int:
    """Start helpers, each with a thread that hands scenes to it; they end with the stack. Returns their number."""
    given = pickle.dumps(render)
    for _ in range(count):
        helper = stack.enter_context(_helper())
        threading.Thread(target=_hand_over, args=(helper, given, waiting, rendered), daemon=True).start()
    return max(count, 0)


@contextmanager
def _helper() -> Iterator[subprocess.Popen[bytes]]:
    """Run this module in a process of its own, which ends with the block."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)  # noqa: PTH109 - as it is in sys.path
    with _interrupts_blocked():
        helper = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
    try:
        yield helper
    finally:
        helper.kill()
        helper.wait()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Hold SIGINT back; a process that is started meanwhile never gets it: Ctrl-C reaches it too, its parent ends it.

    A signal that arrives meanwhile is delivered here afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _hand_over(
    helper: subprocess.Popen[bytes],
    given: bytes,
    waiting: queue.SimpleQueue[int],
    rendered: queue.SimpleQueue[_Rendered | _Ended],
) -> None:
    """Let a helper render scenes one by one until none is waiting."""
    assert helper.stdin is not None
    assert helper.stdout is not None
    scene: int | None = None
    try:
        helper.stdin.write(given)
        helper.stdin.flush()
        pickle.load(helper.stdout)  # it has started; until then the others take the scenes
        while (scene := _next(waiting)) is not None:
            pickle.dump(scene, helper.stdin)
            helper.stdin.flush()
            rendered.put(pickle.load(helper.stdout))
    except (OSError, EOFError, ValueError, pickle.UnpicklingError):
        with suppress(OSError):
            helper.stdin.close()  # ends one that still runs, whose answer was none
        rendered.put(_Ended(helper.wait(), scene))


def _help(given: BinaryIO, answers: BinaryIO) -> None:
    """Render the scenes whose numbers are given, until the end of `given`."""
    render = pickle.load(given)
    pickle.dump("ready", answers)
    answers.flush()
    while True:
        try:
            scene = pickle.load(given)
        except EOFError:  # also when the process that started this one is gone
            return
        result = _Rendered(scene, None, False)
        try:
            render(scene)
        except DataError as error:
            result = _Rendered(scene, str(error), True)
        except Exception:
            failed = f"scene {scene}: cannot be rendered; in a process that helped:\n{traceback.format_exc()}"
            result = _Rendered(scene, failed, False)
        pickle.dump(result, answers)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be held back at the start
    reply, sys.stdout = sys.stdout.buffer, sys.stderr
    from cameo.scenes import parallel  # the classes of this module under their own name

    parallel._help(sys.stdin.buffer, reply)
