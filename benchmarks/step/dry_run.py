"""What a dry run says of a training step, beside what the step takes, and what it says of the released sizes.

    python -m benchmarks.step.dry_run [--again] [--released | --gpu] [--only NAME]

The runs below are of all backbones, with LoRA and with all weights, with and without gradient checkpointing. Each is
estimated and then measured: two steps of the library's own `Trainer`, and the memory events of the profiler in the
third (`benchmarks.step.real_step`). `--released` computes the table of released sizes instead, for a GPU that need not
be there; `--gpu` estimates the steps that `benchmarks.step.measure` has measured on one.
What is in `benchmarks/results/dry_run_cpu.json` is not measured again.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common.measuring import Results, read_results, table_of
from benchmarks.common.page import RESULTS, ROOT
from benchmarks.step import measure
from benchmarks.step.real_step import measure_step
from cameo.estimate.step import estimate_step
from cameo.training.runs import outlined_run
from cameo.training.settings import TrainingConfig, load_config

MEASURED, COMPUTED = RESULTS / "dry_run_cpu.json", RESULTS / "dry_run_released_cpu.json"
OF_GPU, ON_GPU = RESULTS / "dry_run_gpu_cpu.json", RESULTS / "training_step_cuda.json"
ALIGNED = "with alignment, matches from depth"
BOUND = 0.15  # a larger miss is to be explained
# Settings of each run beside those that all have, and whether all weights are trained.
RUNS: dict[str, tuple[bool, dict[str, Any]]] = {
    "mvdream tiny, LoRA": (
        False,
        {"backbone": "mvdream", "preset": "tiny", "num_views": 4, "num_reference_views": 0, "resolution": 96},
    ),
    "mvdream small, all weights, checkpointing": (
        True,
        {"backbone": "mvdream", "preset": "small", "num_reference_views": 0, "train_batch_size": 2}
        | {"gradient_checkpointing": True},
    ),
    "sv3d tiny, all weights": (True, {"backbone": "sv3d", "preset": "tiny", "num_views": 5, "train_batch_size": 2}),
    "sv3d small, LoRA, checkpointing": (
        False,
        {"backbone": "sv3d", "preset": "small", "num_views": 5, "train_batch_size": 2, "gradient_checkpointing": True},
    ),
    "zero123plus tiny, all weights": (
        True,
        {"backbone": "zero123plus", "preset": "tiny", "num_views": 7, "train_batch_size": 2},
    ),
    "zero123plus small, LoRA, checkpointing": (
        False,
        {"backbone": "zero123plus", "preset": "small", "num_views": 7, "train_batch_size": 1}
        | {"gradient_checkpointing": True},
    ),
    "cat3d small, LoRA, bf16": (
        False,
        {"backbone": "cat3d", "preset": "small", "resolution": 128, "train_batch_size": 2, "mixed_precision": "bf16"},
    ),
    "cat3d transformer-small, all weights, checkpointing, averaged weights": (
        True,
        {"backbone": "cat3d", "preset": "transformer-small", "train_batch_size": 4, "gradient_checkpointing": True}
        | {"use_ema": True},
    ),
}
# Views and sides in pixels for which the shipped settings of each release are computed, one sample at a time.
RELEASED = {
    "lora_cat3d_sd21": ((4, 512), (8, 512)),
    "lora_mvdream_sd21": ((4, 256), (8, 256)),
    "lora_zero123plus_v12": ((7, 320),),
    "lora_sv3d_p": ((21, 576), (11, 576)),
}
COMMON = {"loss_weight": 0.1, "num_scenes": 4, "views_per_scene": 7, "min_overlap": 0.0, "max_overlap": 1.0}


def settings(changes: Mapping[str, Any]) -> TrainingConfig:
    """The settings of one of `RUNS`."""
    return TrainingConfig(**{**COMMON, **changes})


def compare(name: str) -> dict[str, Any]:
    """Estimate a run, then measure it."""
    full, changes = RUNS[name]
    config = settings(changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimated, measured = (
            estimate_step(config, partial(outlined_run, full=full), "cpu"),
            measure_step(config, full=full),
        )
    return {
        "settings": dict(changes),
        "all_weights": full,
        "estimated": {
            "held": sum(estimated.held.values()),
            "added": estimated.beyond_held,
            "flops": estimated.total_flops,
        },
        "measured": measured,
        "counts_agree": (
            estimated.parameters["denoiser"] + estimated.parameters["alignment heads"] == measured["parameters"]
            and estimated.num_trained == measured["trained"]
        ),
    }


def table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per run: what a step adds to what is held before it, and the whole, both in MB, and the misses."""
    rows = []
    for name, entry in found.items():
        said, real = entry["estimated"], entry["measured"]
        whole = (said["held"] + said["added"]) / (real["held"] + real["added"])
        rows.append(
            {
                "run": name,
                "px": entry["settings"].get("resolution", 64),
                "views": entry["settings"].get("num_views", 3),
                "batch": entry["settings"].get("train_batch_size", 4),
                "held before, MB": real["held"] / 1e6,
                "step adds, estimated": said["added"] / 1e6,
                "step adds, measured": real["added"] / 1e6,
                "miss": f"{said['added'] / real['added'] - 1:+.1%}",
                "miss of the whole": f"{whole - 1:+.1%}",
                "process grew by, MB": None if real["resident"] is None else real["resident"] / 1e6,
                "counts": "equal" if entry["counts_agree"] else "differ",
            }
        )
    return rows


def released_cases() -> Iterator[tuple[str, TrainingConfig, bool]]:
    """Name, settings and whether all weights are trained, of each line of the table of released sizes."""
    for file, sizes in RELEASED.items():
        config = load_config(ROOT / "recipes" / "configs" / f"{file}.yaml")
        for (views, side), full in product(sizes, (False, True)):
            changes = {"num_views": views, "resolution": side, "train_batch_size": 1, "gradient_accumulation_steps": 1}
            trained = "all weights" if full else "LoRA"
            yield f"{config.backbone}, {views} views, {side} px, {trained}", replace(config, **changes), full


def compute(config: TrainingConfig, full: bool) -> dict[str, Any]:
    """Estimate a step of a released size on a GPU."""
    step = estimate_step(config, partial(outlined_run, full=full), "cuda")
    facts = {"backbone": config.backbone, "views": config.num_views, "px": config.resolution, "all_weights": full}
    return {**facts, **asdict(step)}


def released_table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per released size: the peak, what it consists of, and what it would be with cached latents; in GB."""
    rows = []
    for entry in found.values():
        held, peaks = sum(entry["held"].values()), entry["peaks"]
        rows.append(
            {
                "backbone": entry["backbone"],
                "views": entry["views"],
                "px": entry["px"],
                "trained": "all weights" if entry["all_weights"] else "LoRA",
                "peak, GB": max(peaks.values()) / 1e9,
                "in the phase": max(peaks, key=peaks.get),
                "held between steps": held / 1e9,
                "without the encoders' phase": max(peak for name, peak in peaks.items() if name != "encoders") / 1e9,
                "kept for the backward pass": entry["kept"] / 1e9,
                "TFLOP a step": sum(entry["flops"].values()) / 1e12,
                "trained, millions": entry["num_trained"] / 1e6,
            }
        )
    return rows


def estimate_measured(kind: measure.Kind) -> dict[str, Any]:
    """Estimate a kind of step that `benchmarks.step.measure` measures at its released size."""
    step = estimate_step(measure.settings(kind, 1.0, None, None), partial(outlined_run, full=kind.full), "cuda")
    # The measured step has its latents, and no encoder runs.
    return {"peak": max(peak for name, peak in step.peaks.items() if name != "encoders")}


def gpu_table(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per step measured on a GPU: its peak, and what was said of it, in GB."""
    rows = []
    measured = read_results(ON_GPU)
    for name, entry in found.items():
        step = measured[name]["steps"].get(ALIGNED)
        if step is not None:
            estimated, real = entry["peak"] / 1e9, step["peak_bytes"] / 1e9
            miss = f"{estimated / real - 1:+.1%}"
            rows.append({"training": name, "estimated, GB": estimated, "measured, GB": real, "miss": miss})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Estimate and measure what is not in the results file yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="where steps are measured")
    parser.add_argument("--again", action="store_true", help="measure also what is in the results file")
    parser.add_argument("--only", choices=RUNS, help="only this run")
    parser.add_argument("--released", action="store_true", help="compute the released sizes instead; minutes")
    parser.add_argument("--gpu", action="store_true", help="estimate the steps that were measured on a GPU instead")
    parser.add_argument("--output", type=Path, help="results file")
    options = parser.parse_args(arguments)
    if options.released:
        results = Results(options.output or COMPUTED, "cpu", again=options.again)
        for name, config, full in released_cases():
            print(f"{name}: {'in the results file' if results.has(name) else 'computing'}", flush=True)
            results.get(name, partial(compute, config, full))
        print(f"\n{results.environment}\n\n{table_of(released_table(results.found))}")
        return 0
    if options.gpu:
        results = Results(options.output or OF_GPU, "cpu", again=options.again)
        measured = read_results(ON_GPU)
        for kind in measure.kinds(list(measure.FILES)):
            if kind.name in measured:
                results.get(kind.name, partial(estimate_measured, kind))
        print(f"\n{results.environment}\n\n{table_of(gpu_table(results.found))}")
        return 0
    results = Results(options.output or MEASURED, "cpu", again=options.again)
    for name in [options.only] if options.only else RUNS:
        print(f"{name}: {'in the results file' if results.has(name) else 'estimating and measuring'}", flush=True)
        results.get(name, partial(compare, name))
    print(f"\n{results.environment}\n\n{table_of(table(results.found))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
