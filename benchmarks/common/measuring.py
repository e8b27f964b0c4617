"""Time and memory of alternatives measured side by side, and their results as JSON and as tables."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import operator
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from cameo.files import write_atomically
from cameo.tables import markdown_table

__all__ = [
    "Results",
    "environment",
    "gate",
    "interleaved",
    "kernel_columns",
    "kernel_time",
    "peak_memory",
    "peak_resident",
    "place_and_date",
    "read_results",
    "summary",
    "table_of",
    "write_results",
]

# The profiler, which counts memory here, greets and complains on a machine without a GPU unless it is told before.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Run = Callable[[], object]
COMPARISONS = {"<=": operator.le, ">=": operator.ge}
STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def interleaved(
    runs: Mapping[str, Run],
    repeats: int,
    device: torch.device | str = "cpu",
    *,
    warm_up: int = 1,
    budget: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of every run, measured round robin, so that a slow minute of the machine hits all alike.

    As in `timeit`, Python's garbage collector is off meanwhile: it takes a tenth of a second where a large model is
    held, at whatever run comes then.

    Example:
        >>> found = interleaved({"one": lambda: torch.ones(4), "two": lambda: torch.ones(8)}, repeats=3)
        >>> [len(seconds) for seconds in found.values()]
        [3, 3]

    Args:
        runs: what to measure, by name; what a run returns is dropped before the next one starts.
        repeats: rounds that are counted, at least 1.
        device: on "cuda" the seconds are those between two events on the current stream.
        warm_up: rounds before these, which compile and fill caches.
        budget: seconds after which no further round begins; at least one round is counted.

    Raises:
        ValueError: `repeats` below 1 or `warm_up` below 0.
    """
    if repeats < 1 or warm_up < 0:
        raise ValueError(f"repeats, warm_up: expected at least 1 and at least 0, got {repeats} and {warm_up}")
    once = _once_cuda if torch.device(device).type == "cuda" else _once_cpu
    found: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    with _without_garbage_collector():
        for number in range(warm_up + repeats):
            if number > warm_up and budget is not None and time.perf_counter() - start > budget:
                break
            for name, run in runs.items():
                seconds = once(run)
                if number >= warm_up:
                    found[name].append(seconds)
    return found


@contextlib.contextmanager
def _without_garbage_collector() -> Iterator[None]:
    collected = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def _once_cpu(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _once_cuda(run: Run) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    run()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3


def kernel_time(run: Run) -> dict[str, float | int]:
    """Seconds that the kernels of one run take on a CUDA device, and how many there are, copies included.

    What is left of the time between two events is that of the host, which a training step hides where it is ahead.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"kernels": sum(event.time_range.elapsed_us() for event in on_device) / 1e6, "launches": len(on_device)}


def kernel_columns(found: Mapping[str, Any], unit: str = "ms") -> dict[str, Any]:
    """Columns of a table for what `kernel_time` has found, none where it has not measured.

    Example:
        >>> kernel_columns({"kernels": 0.002, "launches": 5}), kernel_columns({"best": 1.0})
        ({'kernels ms': 2.0, 'launches': 5}, {})
    """
    if "kernels" not in found:
        return {}
    return {f"kernels {unit}": {"ms": 1e3, "s": 1}[unit] * found["kernels"], "launches": found["launches"]}


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """Best, median and number of measured seconds.

    Example:
        >>> summary([3.0, 1.0, 2.0])
        {'best': 1.0, 'median': 2.0, 'count': 3}
    """
    return {"best": min(seconds), "median": statistics.median(seconds), "count": len(seconds)}


def peak_memory(run: Run, device: torch.device | str = "cpu") -> int:
    """Largest number of bytes that `run` holds at a time beyond what was allocated before it.

    Example:
        >>> peak_memory(lambda: torch.ones(1 << 20).double().sum())     # 4 MB, and 8 MB of its copy
        12582912

    Counts tensors, also those that custom operators and compiled code make inside: on CUDA the allocator's own
    count, on a CPU the allocations and releases that the profiler reports. Memory that a library takes past
    torch's allocator is not in it; `peak_resident` sees that.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_resident(run: Run) -> int | None:
    """Growth of the process's resident memory at its largest during `run`, in bytes; None where unknown.

    Larger than `peak_memory` by what libraries and the allocator keep, smaller where freed pages lay ready. Linux only.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        RESET_PEAK.write_text("5")
        before = _status("VmRSS")
        run()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Device, threads, versions and date of a measurement."""
    device = torch.device(device)
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": str(date.today()),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def place_and_date() -> str:
    """Return what a figure is from, in a line: device, threads, torch and date."""
    return "{device}, {threads} thread(s), torch {torch}, {date}".format(**environment())


def _processor() -> str:
    """Name of the processor as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a results file; one that does not exist is empty."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write all results under a temporary name, then rename."""
    write_atomically(path, json.dumps(results, indent=1) + "\n")


class Results:
    """A results file that grows by one measurement at a time, so that an interrupted run goes on.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first = Results(Path(folder) / "sums.json").get("one", lambda: {"best": 1.0})
        ...     again = Results(Path(folder) / "sums.json").get("one", lambda: {"best": 2.0})
        >>> first["best"], again["best"]
        (1.0, 1.0)

    Args:
        path: the JSON file: measurement by name, each with its `environment`.
        device: where is measured.
        again: whether to measure also what is in the file.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu", *, again: bool = False) -> None:
        self.path, self.again, self.environment = Path(path), again, environment(device)
        self.found = read_results(path)

    def has(self, name: str) -> bool:
        """Whether `get` would take this from the file: it is there, and from such a device with so many threads."""
        kept = self.found.get(name, {}).get("environment", {})
        same = all(kept.get(fact) == self.environment[fact] for fact in ("device", "threads"))
        return same and not self.again

    def get(self, name: str, run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the measurement from the file, or measure it and write it there."""
        if not self.has(name):
            self.found[name] = {**run(), "environment": self.environment}
            write_results(self.path, self.found)
        return self.found[name]


def gate(name: str, demanded: str, measured: float | None) -> dict[str, Any]:
    """Return one line of a table of gates: what is demanded, what was measured, and whether the demand is met.

    Example:
        >>> gate("time of a step", "<= 1.05", 1.2)["state"]
        'missed'

    Args:
        name: what is compared.
        demanded: a sign and a bound, such as `">= 20"`.
        measured: the figure, or None where nothing was measured.
    """
    sign, bound = demanded.split()
    state = "not measured" if measured is None else "met" if COMPARISONS[sign](measured, float(bound)) else "missed"
    return {"gate": name, "demanded": demanded, "measured": measured, "state": state}


def table_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """Lay rows out under the names of the first one's columns; three figures of a number are shown.

    Example:
        >>> print(table_of([{"tokens": 64, "seconds": 0.12345}]))
        | tokens | seconds |
        | --- | --- |
        | 64 | 0.123 |
    """
    rows = list(rows)
    if not rows:
        return ""
    names = list(rows[0])
    return markdown_table(names, [[_shown(row.get(name)) for name in names] for row in rows])


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
