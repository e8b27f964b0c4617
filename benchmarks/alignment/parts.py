"""The alignment loss against its own parts timed alone, in one run: ratios that another machine hardly moves.

    python -m benchmarks.alignment.parts --device cpu [--seconds 20] [--again]

The product is `cameo.alignment_loss` with its gradient. Its parts are the matrix products, GELU and its derivative, and
the softmax with its gradient, each alone in buffers that are there; the limit is what its products would take at the
speed of a product of two matrices of 1024 x 1024. With two threads, one line lets each thread compute half of the key
views with operators of one thread. Everything of one size runs in turn. A figure is the time of the processor, divided
by the threads (which wait for each other busily, so waiting is in it), in the fastest round: other programs hardly move
it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.alignment.cases import Case, Setting, make_case
from benchmarks.alignment.limits import Limit, limits
from benchmarks.common.measuring import Results, gate, table_of
from benchmarks.common.page import RESULTS
from cameo import alignment_loss

SIDES, SELECTIONS, THREADS = (32, 16), ("released", "all"), (1, 2)
MOST = {"parts": 1.3, "limit": 4.0}
SQUARE, PRODUCTS_AT_ONCE = 1024, 4
REPEATS, SECONDS = 40, 20.0


def product(case: Case, selection: str) -> Callable[[], object]:
    """The loss and its gradient."""
    options = case.options(selection)

    def run() -> object:
        match = case.match(selection)
        loss = alignment_loss(case.query, case.key, match, case.head, implementation="chunked", **options)
        return case.gradients(loss)

    return run


def own_portions(case: Case, selection: str, threads: int) -> Callable[[], object]:
    """The same, by threads that each compute some of the key views alone."""
    dtype = torch.promote_types(case.query.dtype, torch.float32)
    match = replace(case.match(selection), match_weight=case.weights(selection, dtype))
    views = torch.arange(case.setting.views)
    shares = [(views % threads == thread).expand(len(views), -1) for thread in range(threads)]
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def some(pairs: Tensor) -> tuple[Tensor, ...]:
        options = {"pairs": pairs, "reduction": "sum", "implementation": "chunked"}
        return case.gradients(alignment_loss(case.query, case.key, match, case.head, **options))

    def run() -> object:
        first, *others = pool.map(some, shares)
        return [sum(parts, start=one) for one, *parts in zip(first, *others, strict=True)]

    return run


def softmax(case: Case, selection: str) -> Limit:
    """The softmax of all rows and its gradient, in place, as some rows at a time."""
    rows, keys = case.rows(selection), case.setting.tokens**2
    at_once = max(1, min(rows, (1 << 14) // keys))
    logits = torch.randn(at_once, keys)
    log_p, gradient = torch.empty_like(logits), torch.empty_like(logits)

    def run() -> None:
        for _ in range(64):
            torch.log_softmax(logits, dim=-1, out=log_p)
            torch.exp(log_p, out=gradient)
            gradient.mul_(0.5)

    return Limit(run, rows / (64 * at_once))


def square_products(case: Case, selection: str) -> Limit:
    """As many operations as all products of the loss have, as products of large square matrices."""
    heads, dimension = case.setting.heads, case.setting.dimension
    hidden = len(case.head.hidden[0].weight)
    operations = case.rows(selection) * case.setting.tokens**2 * 6 * (heads * dimension + hidden * heads + hidden)
    left, right, out = (torch.randn(SQUARE, SQUARE) for _ in range(3))

    def run() -> None:
        for _ in range(PRODUCTS_AT_ONCE):
            torch.mm(left, right, out=out)

    return Limit(run, operations / (2 * SQUARE**3 * PRODUCTS_AT_ONCE))


def fastest(runs: Mapping[str, Callable[[], object]], seconds: float, threads: int) -> dict[str, float]:
    """Return the processor's seconds of the fastest round of each run, in turn, for about so many seconds of it."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    start = time.process_time()
    for number in range(1 + REPEATS):  # the first warms up
        if number > 1 and time.process_time() - start > seconds:
            break
        for name, run in runs.items():
            before = time.process_time()
            run()
            found[name].append((time.process_time() - before) / threads)
    return {name: min(times[1:]) for name, times in found.items()}


def measure(side: int, threads: int, seconds: float) -> dict[str, Any]:
    """Seconds of the product, of its parts and of the limit at one size, for each selection of rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = make_case(Setting(tokens=side))
        found = {}
        for selection in SELECTIONS:
            parts = limits(case, selection) | {"softmax": softmax(case, selection)}
            limit = square_products(case, selection)
            runs: dict[str, Callable[[], object]] = {"product": product(case, selection), "limit": limit.run}
            runs |= {name: part.run for name, part in parts.items()}
            if threads > 1:
                runs["own portions"] = own_portions(case, selection, threads)
            timed = fastest(runs, seconds, threads)
            found[selection] = {
                "product": timed["product"],
                "parts": {name: timed[name] * part.factor for name, part in parts.items()},
                "limit": timed["limit"] * limit.factor,
                "own portions": timed.get("own portions"),
            }
    finally:
        torch.set_num_threads(before)
    return {"side": side, "threads": threads, "found": found}


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per size, selection of rows and number of threads."""
    rows = []
    for entry in found.values():
        for selection, one in entry["found"].items():
            own = one["own portions"]
            rows.append(
                {
                    "tokens": f"{entry['side']}x{entry['side']}",
                    "rows": selection,
                    "threads": entry["threads"],
                    "product ms": 1e3 * one["product"],
                    **{f"{name} ms": 1e3 * seconds for name, seconds in one["parts"].items()},
                    "product / parts": one["product"] / sum(one["parts"].values()),
                    "product / limit": one["product"] / one["limit"],
                    "product / own portions": None if own is None else one["product"] / own,
                }
            )
    return rows


def check(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compare both ratios with what is demanded, at every size, selection of rows and number of threads."""
    texts = {"parts": "the sum of its parts alone", "limit": "its products at the speed of large ones"}
    return [
        gate(
            f"time of chunked / {texts[name]}, {row['rows']}, {row['tokens']}, {row['threads']} threads",
            f"<= {MOST[name]}",
            row[f"product / {name}"],
        )
        for row in table(found)
        for name in MOST
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not in the results file yet, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="rows and columns of the tokens")
    parser.add_argument("--threads", type=int, nargs="+", default=THREADS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each size and selection of rows")
    parser.add_argument("--again", action="store_true", help="measure also what is in the results file")
    parser.add_argument("--output", type=Path, help="results file")
    options = parser.parse_args(arguments)
    results = Results(options.output or RESULTS / "alignment_parts_cpu.json", again=options.again)
    for side in options.sides:
        for threads in options.threads:
            name = f"{side}x{side} tokens, {threads} threads"
            results.get(name, partial(measure, side, threads, options.seconds))
            print(f"{name}: in the results file", flush=True)
    print(f"\n{table_of(table(results.found))}\n\n{table_of(check(results.found))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
