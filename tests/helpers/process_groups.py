"""A few processes that can exchange something, forked from this one: each as the only one of its machine."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from torch import distributed

from tests.helpers.training_runs import fresh_accelerate


def in_group(count: int, work: Callable[[int], Any], *, timeout: float = 120) -> list[Any]:
    """Call `work(rank)` in each of `count` processes; returns what each returned, or the error that it raised."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    results = context.SimpleQueue()
    members = [context.Process(target=_work, args=(work, rank, count, port, results)) for rank in range(count)]
    for member in members:
        member.start()
    for member in members:
        member.join(timeout)
        if member.exitcode != 0:
            for other in members:
                other.kill()
            raise AssertionError(f"a process of the group ended with {member.exitcode}")
    return [result for _, result in sorted((results.get() for _ in members), key=lambda pair: pair[0])]


def _work(work: Callable[[int], Any], rank: int, count: int, port: str, results: Any) -> None:
    # What the process before has left in cycles, such as a store, may end threads that are not here, and would hang.
    gc.freeze()
    group = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {name: str(value) for name, value in group.items()}
    with fresh_accelerate():
        PartialState(cpu=True)
        try:
            result = work(rank)
        except Exception as error:
            result = error
        results.put((rank, result))
        distributed.barrier()
    os._exit(0)
