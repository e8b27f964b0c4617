"""What the alignment loss has to show, compared with what was measured. The demands are fixed; a miss is a miss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.alignment.cases import Setting
from benchmarks.common.measuring import gate

__all__ = ["check", "needed"]

# On a CPU dense / chunked depends on the machine; what is demanded there is in benchmarks.alignment.parts.
SPEED: dict[str, dict[str, dict[int, float]]] = {"cpu": {}, "cuda": {"released": {32: 20}, "all": {32: 8}}}
MEMORY_RATIO = {"cpu": 100, "cuda": 60}
GRADIENT_FACTOR, WORKSPACE = 1.25, {"cpu": 64e6, "cuda": 192e6}
# peak(4 N) / peak(N) in tokens; in views the same 5 % above the ratio of the numbers of tokens.
GROWTH = 1.05
LIMIT = 2.5
RELATIVE_ERROR = {"float64": 1e-12, "float32": 1e-5}
FIRST = {"cpu": "chunked", "cuda": "triton"}


def needed(gated: Iterable[Setting], grown: Iterable[Setting]) -> set[str]:
    """Names of the sizes that the gates need."""
    gated, grown = list(gated), list(grown)
    batches = {1, *(setting.batch for setting in gated)}
    growth = [
        setting
        for setting in grown
        if (setting.heads, setting.head) == (10, "mlp")
        and setting.batch in batches
        and setting.views in (4, 21)
        and setting.tokens in (16, 32, 64)
    ]
    return {setting.name for setting in [*gated, *growth]}


def check(found: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """One row per gate: what is demanded, what was measured, and whether it is met."""
    method = FIRST[device]
    entries = [entry for entry in found.values() if "runs" in entry and entry["setting"]["head"] == "mlp"]
    batch = 3 if device == "cuda" else 1
    return [
        *_speed(entries, method, SPEED[device], batch),
        *_memory(entries, method, device, batch),
        *(_limit(entries, method, batch) if device == "cuda" else []),
        *_exactness(found, method, device),
    ]


def _entry(entries: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """Return the entry of these settings, at 4 views and 10 heads unless told; empty if it is not there."""
    wanted = {"views": 4, "heads": 10, **wanted}
    hits = [entry for entry in entries if all(entry["setting"][name] == value for name, value in wanted.items())]
    return hits[0] if hits else {}


def _ratio(entry: Mapping[str, Any], above: str, below: str, figure: str) -> float | None:
    runs = entry.get("runs", {})
    return runs[above][figure] / runs[below][figure] if above in runs and below in runs else None


def _speed(
    entries: list[dict[str, Any]], method: str, gates: Mapping[str, Mapping[int, float]], batch: int
) -> list[dict[str, Any]]:
    text = {"released": "only rows with a target", "all": "nothing skipped"}
    rows = []
    for selection, bounds in gates.items():
        for side, bound in bounds.items():
            entry = _entry(entries, tokens=side, batch=batch)
            ratio = _ratio(entry, "dense, released", f"{method}, {selection}", "best")
            rows.append(gate(f"time of dense / {method}, {text[selection]}, {side}x{side}", f">= {bound}", ratio))
    return rows


def _memory(entries: list[dict[str, Any]], method: str, device: str, batch: int) -> list[dict[str, Any]]:
    workspace = WORKSPACE[device]
    shares = [
        run["peak_bytes"] / (GRADIENT_FACTOR * entry["gradient_bytes"] + workspace)
        for entry in entries
        for name, run in entry["runs"].items()
        if name.startswith(f"{method}, ")
    ]
    most = f"largest peak / (1.25 x (dq + dk) + {workspace / 1e6:g} MB), over all sizes"
    rows = [gate(most, "<= 1", max(shares, default=None))]
    entry = _entry(entries, tokens=32, batch=batch)
    ratio = _ratio(entry, "dense, released", f"{method}, released", "peak_bytes")
    rows.append(gate(f"memory of dense / {method}, 32x32", f">= {MEMORY_RATIO[device]}", ratio))
    peak = {
        side: _entry(entries, tokens=side, batch=batch).get("runs", {}).get(f"{method}, released") for side in (32, 64)
    }
    growth = peak[64]["peak_bytes"] / peak[32]["peak_bytes"] if peak[32] and peak[64] else None
    rows.append(gate("peak at 64x64 / peak at 32x32 (4 times the tokens)", f"<= {4 * GROWTH:g}", growth))
    side = 32 if batch == 3 else 16
    some, many = (
        _entry(entries, tokens=side, batch=1, views=views).get("runs", {}).get(f"{method}, released")
        for views in (4, 21)
    )
    growth = many["peak_bytes"] / some["peak_bytes"] if some and many else None
    rows.append(gate("peak at 21 views / peak at 4 views (5.25 times the tokens)", f"<= {21 / 4 * GROWTH:.4g}", growth))
    return rows


def _limit(entries: list[dict[str, Any]], method: str, batch: int) -> list[dict[str, Any]]:
    entry = _entry(entries, tokens=32, batch=batch)
    rows = []
    for selection, parts in entry.get("limit", {}).items():
        run = entry["runs"].get(f"{method}, {selection}")
        ratio = run["best"] / parts["gelu"] if run else None
        rows.append(gate(f"time of {method} / a GELU-only kernel, {selection}, 32x32", f"<= {LIMIT}", ratio))
        # Without the host, which is ahead of the device in a training step.
        ratio = run["kernels"] / parts["gelu"] if run and "kernels" in run else None
        rows.append(gate(f"kernels of {method} / a GELU-only kernel, {selection}, 32x32", f"<= {LIMIT}", ratio))
    return rows or [gate(f"time of {method} / a GELU-only kernel", f"<= {LIMIT}", None)]


def _exactness(found: Mapping[str, Any], method: str, device: str) -> list[dict[str, Any]]:
    errors = next((entry["errors"] for entry in found.values() if "errors" in entry), {})
    # Triton computes in float32; in float64 the chunked form stands in for it on every device.
    by_dtype = {"float64": "chunked", "float32": method}
    rows = []
    for dtype, bound in RELATIVE_ERROR.items():
        worst = [
            _worst(error)
            for key, error in errors.items()
            if key.startswith(by_dtype[dtype] + ",") and key.endswith(dtype)
        ]
        name = f"largest relative error of loss and gradients, {by_dtype[dtype]}, {dtype}"
        rows.append(gate(name, f"<= {bound:g}", max(worst, default=None)))
    ours, dense = (errors.get(f"{name}, released, bfloat16") for name in (method, "dense"))
    shares: dict[str, float | None] = dict.fromkeys(("loss", "relative", "one_minus_cosine", "bias"))
    if ours and dense:
        names = [name for name in ours if name != "loss"]
        shares["loss"] = _share(ours["loss"], dense["loss"])
        for figure in ("relative", "one_minus_cosine"):
            shares[figure] = max(_share(ours[name][figure], dense[name][figure]) for name in names)
        # A mean of unbiased errors is not 0 either: what lies within three standard errors of it is no bias.
        shares["bias"] = max(
            _share(ours[name]["bias"], max(abs(dense[name]["bias"]), 3 * ours[name]["bias_noise"])) for name in names
        )
    texts = {
        "loss": "error of the loss",
        "relative": "relative error of the worst gradient",
        "one_minus_cosine": "1 - cosine of the worst gradient",
        "bias": "signed bias of the worst gradient (or of three standard errors, if more)",
    }
    rows += [gate(f"bfloat16, {method} / dense: {texts[name]}", "<= 1", share) for name, share in shares.items()]
    if device == "cuda":
        same = next((entry["bitwise"] for entry in found.values() if "bitwise" in entry), {})
        ours_equal = [equal for key, equal in same.items() if key.startswith(method + ",")]
        rows.append(
            gate(
                "share of runs that repeat bit by bit",
                ">= 1",
                sum(ours_equal) / len(ours_equal) if ours_equal else None,
            )
        )
    return rows


def _share(ours: float, dense: float) -> float:
    """Our error in units of the dense one's; two that are both exact are equal."""
    return abs(ours) / abs(dense) if dense else float(ours != 0)


def _worst(error: Mapping[str, Any]) -> float:
    return max(value if name == "loss" else value["relative"] for name, value in error.items())
