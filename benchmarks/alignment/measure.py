"""Time, memory and exactness of the alignment loss, forward and backward, against other ways to compute it.

    python -m benchmarks.alignment.measure [--device cuda] [--gates] [--again]

Everything of one size is measured in turn in one process: the library's implementations and checkpointed chunks in
three selections of rows, the dense form of the released path and its `torch.compile`, and what none can do without,
its matrix products and its GELUs, alone. On CUDA a head that averages is also measured with Cut Cross-Entropy and
Liger where they are installed. What is in `benchmarks/results/alignment_DEVICE.json` is not measured again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.alignment import gates
from benchmarks.alignment.cases import SELECTIONS, Case, Setting, make_case
from benchmarks.alignment.limits import limits
from benchmarks.alignment.peers import checkpointed_loss, dense_bytes, linear_peers, released_dense_loss
from benchmarks.common.measuring import (
    Results,
    interleaved,
    kernel_columns,
    kernel_time,
    peak_memory,
    peak_resident,
    summary,
    table_of,
)
from benchmarks.common.page import RESULTS
from cameo import alignment_loss

GRIDS, VIEWS, HEADS, BATCHES = (8, 16, 24, 32, 48, 64), (2, 4, 6, 12, 21), (5, 8, 10, 20), (1, 2, 3, 4)
# Without a GPU a selection with more pairs than this is left out, so that everything takes ten minutes.
MOST_PAIRS = {"cpu": 150_000_000, "cuda": 10**10}
# Beyond, what is not made for a GPU takes many times longer there than all else: portions, and small chunks.
MOST_SLOW_PAIRS, MOST_CHECKPOINTED_PAIRS = 10**8, 10**7
MOST_MEMORY = 0.6  # share of the free memory that the dense form may need
MOST_TRUTH_PAIRS = 1_500_000  # beyond, the float64 reference takes longer than all measurements
REPEATS, SECONDS = 20, {"cpu": 12.0, "cuda": 4.0}
GATE_SECONDS = {"cpu": 60.0, "cuda": 10.0}

Loss = Callable[[], Tensor]


def gate_settings(device: str) -> list[Setting]:
    """The sizes that the gates are about: 32x32 tokens, then 16x16."""
    if device == "cuda":
        return [Setting(tokens=side, batch=3, dtype="bfloat16") for side in (32, 16)]
    return [Setting(tokens=side) for side in (32, 16)]


def growth_settings(device: str) -> list[Setting]:
    """Growing tokens, views, heads and batch around one size, and a head that averages."""
    middle = gate_settings(device)[0 if device == "cuda" else 1]
    found = [replace(middle, tokens=side) for side in GRIDS]
    found += [replace(middle, views=count, batch=1) for count in VIEWS]
    found += [replace(middle, heads=count) for count in HEADS]
    found += [replace(middle, batch=count) for count in BATCHES]
    found += [replace(middle, tokens=side, head="mean") for side in (16, 32)]
    return list(dict.fromkeys(found))


def implementations(device: torch.device) -> dict[str, dict[str, str]]:
    """The library's own on this device, by name; the readable reference is the truth and not timed."""
    chunked = {"chunked": {"implementation": "chunked"}}
    if device.type != "cuda":
        return chunked
    triton = {"implementation": "triton"}
    return {"triton": triton, "triton with fast GELU": {**triton, "gelu": "fast"}, **chunked}


def losses(case: Case, *, compiled: bool, most_pairs: int) -> tuple[dict[str, Loss], dict[str, str]]:
    """What is measured, by method and selection, and what is left out and why."""
    device, found, left_out = case.query.device, {}, {}
    hidden = sum(layer.out_features for layer in case.head.hidden)
    need, free = dense_bytes(case.setting, hidden), _free_memory(device)
    if need <= MOST_MEMORY * free:
        found["dense, released"] = released_dense_loss(case)
        if compiled:
            found["dense compiled, released"] = released_dense_loss(case, compiled=True)
    else:
        left_out["dense, released"] = f"needs about {need / 1e9:.0f} GB of {free / 1e9:.0f} GB"
    for selection in SELECTIONS:
        pairs = case.rows(selection) * case.setting.tokens**2
        for name, chosen in implementations(device).items():
            most = min(most_pairs, MOST_SLOW_PAIRS) if device.type == "cuda" and name == "chunked" else most_pairs
            if pairs > most:
                left_out[f"{name}, {selection}"] = f"{pairs} pairs, more than {most}"
                continue
            found[f"{name}, {selection}"] = _ours(case, chosen, selection)
        if pairs <= (MOST_CHECKPOINTED_PAIRS if device.type == "cuda" else most_pairs / 4):
            found[f"checkpoint, {selection}"] = checkpointed_loss(case, selection)
        if selection != "released":
            peers = {f"{name}, {selection}": peer(selection) for name, peer in linear_peers(case).items()}
            found.update(peers)
    return found, left_out


def _ours(case: Case, chosen: Mapping[str, str], selection: str) -> Loss:
    match, options = case.match(selection), {**case.options(selection), **chosen}
    return lambda: alignment_loss(case.query, case.key, match, case.head, **options)


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def measure_setting(setting: Setting, device: torch.device, *, gate: bool, budget: float) -> dict[str, Any]:
    """Seconds, peak memory and gradient error of everything at one size."""
    case = make_case(setting, device)
    found, left_out = losses(case, compiled=gate and setting.head == "mlp", most_pairs=MOST_PAIRS[device.type])
    runs = {name: partial(_with_gradients, case, loss) for name, loss in found.items()}
    peaks: dict[str, int] = {}
    for name, run in list(runs.items()):
        try:
            if "compiled" in name or device.type == "cuda":
                run()  # what compiling and tuning take is not the run's own
            peaks[name] = peak_memory(run, device)
        except Exception as error:  # a compiler or library that is missing or refuses: said in the results
            if name.startswith(tuple(implementations(device))):
                raise
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            del runs[name]
    parts = {
        (selection, part): limit
        for selection in SELECTIONS
        if any(name.endswith(f", {selection}") and not name.startswith("dense") for name in runs)
        for part, limit in limits(case, selection).items()
    }
    timed = {**runs, **{f"limit: {part}, {selection}": limit.run for (selection, part), limit in parts.items()}}
    # Everything ran once or twice by now.
    seconds = interleaved(timed, REPEATS, device, warm_up=0, budget=budget)
    limit: dict[str, dict[str, float]] = {}
    for (selection, part), one in parts.items():
        best = min(seconds[f"limit: {part}, {selection}"]) * one.factor
        limit.setdefault(selection, {})[part] = best
    # A cross-check of the allocator's count, where the system tells and where it is worth the time.
    watched = [name for name in runs if gate and device.type == "cpu" and name.startswith(("dense,", "chunked"))]
    resident = {name: peak_resident(runs[name]) for name in watched}
    return {
        "setting": asdict(setting),
        "rows": {selection: case.rows(selection) for selection in SELECTIONS},
        "all_rows": setting.rows,
        "gradient_bytes": 2 * case.query.numel() * case.query.element_size(),
        "runs": {
            name: {
                **summary(seconds[name]),
                **(kernel_time(runs[name]) if device.type == "cuda" else {}),
                "peak_bytes": peaks[name],
            }
            for name in runs
        },
        "resident_bytes": resident,
        "limit": limit,
        "left_out": left_out,
        "gradient_error": _gradient_errors(case, found),
    }


def _with_gradients(case: Case, loss: Loss) -> tuple[Tensor, ...]:
    return case.gradients(loss())


def _gradient_errors(case: Case, found: Mapping[str, Loss]) -> dict[str, float]:
    """Largest relative error of a gradient, in the norm, against the reference in float64, of the library's runs."""
    errors: dict[str, float] = {}
    for selection in SELECTIONS:
        if case.rows(selection) * case.setting.tokens**2 > MOST_TRUTH_PAIRS:
            continue
        truth = case.truth(selection)[1]
        for implementation in implementations(case.query.device):
            name = f"{implementation}, {selection}"
            if name in found:
                got = case.gradients(found[name]())
                pairs = zip(got, truth, strict=True)
                errors[name] = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
    return errors


def exactness(setting: Setting, device: torch.device) -> dict[str, Any]:
    """Errors of loss and gradients against the reference in float64, per precision, and between two runs."""
    found: dict[str, Any] = {"setting": asdict(setting), "errors": {}, "bitwise": {}}
    first = make_case(replace(setting, dtype="float32"), device)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        case = first.to(dtype)
        for selection in SELECTIONS:
            truth = case.truth(selection)
            methods = {name: _ours(case, chosen, selection) for name, chosen in implementations(device).items()}
            if selection == "released":
                methods["dense"] = released_dense_loss(case)
            for name, loss in methods.items():
                if name.startswith("triton") and dtype == torch.float64:
                    continue
                key = f"{name}, {selection}, {case.setting.dtype}"
                value = loss()
                gradients = case.gradients(value)
                found["errors"][key] = _errors(case, value, gradients, truth)
                again = loss()
                same = [value, *gradients], [again, *case.gradients(again)]
                found["bitwise"][key] = all(torch.equal(a, b) for a, b in zip(*same, strict=True))
    return found


def _errors(
    case: Case, loss: Tensor, gradients: Iterable[Tensor], truth: tuple[Tensor, tuple[Tensor, ...]]
) -> dict[str, Any]:
    """Relative error of the loss; of each gradient relative error in the norm, 1 - cosine, and signed bias."""
    names = ["query", "key", *(name for name, _ in case.head.named_parameters())]
    found: dict[str, Any] = {"loss": float((loss.detach().double() - truth[0]).abs() / truth[0])}
    for name, got, true in zip(names, gradients, truth[1], strict=True):
        got, true = got.double().flatten(), true.flatten()
        found[name] = {
            "relative": float((got - true).norm() / true.norm()),
            "one_minus_cosine": float(1 - torch.dot(got, true) / (got.norm() * true.norm())),
            "bias": float((got - true).mean() / true.abs().mean()),
            # What errors of this size without any bias would show: one standard error of their mean.
            "bias_noise": float((got - true).square().mean().sqrt() / len(true) ** 0.5 / true.abs().mean()),
        }
    return found


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per size, method and selection of rows."""
    rows = []
    for entry in found.values():
        if "runs" not in entry:
            continue
        setting, dense = entry["setting"], entry["runs"].get("dense, released")
        for name, run in entry["runs"].items():
            method, selection = name.rsplit(", ", 1)
            limit = sum(entry["limit"].get(selection, {}).values())
            ours = not method.startswith("dense")
            rows.append(
                {
                    "tokens": f"{setting['tokens']}x{setting['tokens']}",
                    "views": setting["views"],
                    "heads": setting["heads"],
                    "batch": setting["batch"],
                    "head": setting["head"],
                    "method": method,
                    "rows": f"{selection} ({100 * entry['rows'][selection] / entry['all_rows']:.0f} %)",
                    "best ms": 1e3 * run["best"],
                    "median ms": 1e3 * run["median"],
                    **kernel_columns(run),
                    "peak MB": run["peak_bytes"] / 1e6,
                    "dense / this": dense["best"] / run["best"] if dense else None,
                    "this / limit": run["best"] / limit if limit and ours else None,
                    "gradient error": entry["gradient_error"].get(name),
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not in the results file yet and print it; with `--gates` only what they need."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gates", action="store_true", help="compare with what is demanded; measures only for that")
    parser.add_argument("--again", action="store_true", help="measure also what is in the results file")
    parser.add_argument("--smallest", action="store_true", help="one tiny size, to try the script; needs --output")
    parser.add_argument("--output", type=Path, help="results file")
    options = parser.parse_args(arguments)
    if options.smallest and options.output is None:
        parser.error("--smallest tries the script: it needs an --output beside the results")
    device = torch.device(options.device)
    results = Results(options.output or RESULTS / f"alignment_{device.type}.json", options.device, again=options.again)
    gated, grown = gate_settings(device.type), growth_settings(device.type)
    tried = replace(gated[1], dtype="float32")
    if options.smallest:
        tried = Setting(tokens=4, views=3, heads=2)
        gated, grown = [tried], []
    if options.gates:
        grown = [setting for setting in grown if setting.name in gates.needed(gated, grown)]
    runs: dict[str, Callable[[], dict[str, Any]]] = {}
    gate = not options.smallest
    budget = (GATE_SECONDS if gate else SECONDS)[device.type]
    for setting in gated:
        runs[setting.name] = partial(measure_setting, setting, device, gate=gate, budget=budget)
    # Before the sizes that take long, in case there is no time for all of them.
    runs[f"exactness, {tried.tokens}x{tried.tokens} tokens"] = partial(exactness, tried, device)
    for setting in grown:
        if setting not in gated:
            runs[setting.name] = partial(measure_setting, setting, device, gate=False, budget=SECONDS[device.type])
    for name, run in runs.items():
        print(f"{name}: {'in the results file' if results.has(name) else 'measuring'}", flush=True)
        results.get(name, run)
    print(f"\n{results.environment}\n\n{table_of(table(results.found))}")
    if options.gates:
        print("\n" + table_of(gates.check(results.found, device.type)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
