"""The finished runs of the study, and what they say: figures, steps to a quality, differences with intervals.

A run is one result file, a mapping; runs of an arm differ in their seed. Runs with the same seed saw the same samples
in the same order with the same noise, so arms are compared seed by seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import page
from benchmarks.convergence.arms import ARMS

Run = Mapping[str, Any]
# Subject, arm and seed of a run.
RunOf = tuple[str, str, int]
# Reads a figure out of a validation, as `quality` does.
Measure = Callable[[Mapping[str, Any]], float]

RESULTS = page.RESULTS / "convergence"
# Validations whose mean is the final value of a run.
FINAL = 3
# Quantiles 0.975 of Student's t with 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NOT_REACHED = math.inf
# Noise level at which supervision may cost quality: the model sees its target almost clean.
LOW_NOISE = "0.15"


def result_path(preset: str, run_of: RunOf, results: Path | None = None) -> Path:
    """Where a finished run is kept; `results` is another folder than the one of the pages."""
    subject, arm, seed = run_of
    return (results or RESULTS) / preset / subject / f"{arm}-{seed}.json"


def read_run(path: Path) -> Run:
    """Read a result file."""
    run: Run = json.loads(path.read_text(encoding="utf-8"))
    return run


def load_results(preset: str, subject: str, results: Path | None = None) -> dict[str, list[Run]]:
    """Read the runs of a subject: arm to its runs in the order of their seeds, the named arms first."""
    found: dict[str, list[Run]] = {}
    for path in ((results or RESULTS) / preset / subject).glob("*.json"):
        run = read_run(path)
        found.setdefault(run["arm"], []).append(run)
    known = [arm for arm in ARMS if arm in found] + sorted(found.keys() - set(ARMS))
    return {arm: sorted(found[arm], key=lambda run: run["seed"]) for arm in known}


def arm_name(arm: str, group: Sequence[Run]) -> str:
    """Name of an arm in tables and pictures: REPA is named with the network whose features it aligns with.

    Example:
        >>> arm_name("repa", [{"settings": {"feature_model": "xfeat", "feature_pretrained": True}}])
        'REPA with XFeat features'
        >>> arm_name("repa", [{"settings": {"feature_model": "test_vit", "feature_pretrained": False}}])
        'REPA with untrained test_vit features'
    """
    if arm != "repa":
        return arm
    networks = [(run["settings"]["feature_model"], run["settings"]["feature_pretrained"]) for run in group]
    names = [{"xfeat": "XFeat"}.get(name, name) for name, _ in networks]
    shown = [name if trained else f"untrained {name}" for name, (_, trained) in zip(names, networks, strict=True)]
    return f"REPA with {' and '.join(dict.fromkeys(shown))} features"


def quality(entry: Mapping[str, Any]) -> float:
    """PSNR in dB of the predicted clean image at high noise, on pixels that a reference sees where there is one."""
    value = entry["psnr_covisible"]
    return float(entry["psnr_all"] if value is None else value)


def loss(entry: Mapping[str, Any]) -> float:
    """Denoising loss, mean over the noise levels."""
    return float(entry["loss"])


def loss_at(entry: Mapping[str, Any], level: str) -> float:
    """Denoising loss of a validation at one noise level; NaN if it was not measured there."""
    return float(entry["loss_by_level"].get(level, math.nan))


def quality_at(entry: Mapping[str, Any], level: str) -> float:
    """`quality` at one noise level; NaN if it was not measured there."""
    covisible, everywhere = (entry.get(f"psnr_{pixels}_by_level", {}) for pixels in ("covisible", "all"))
    value = (covisible or everywhere).get(level)
    return math.nan if value is None else float(value)


low_noise_loss: Measure = partial(loss_at, level=LOW_NOISE)


def trains_attention(run: Run) -> bool:
    """Whether a run supervises the attention; the head of others is untrained."""
    settings = run["settings"]
    weight = settings.get("loss_weight", settings.get("weight"))  # its name in the results of November 2026
    return bool(weight) and settings.get("supervision", "cameo") == "cameo"


def precision(run: Run, entry: Mapping[str, Any], layer: str, *, untrained: str = "mean") -> float:
    """Share of the matches that the attention finds within one token, as it is trained: through the alignment head.

    Where no head is trained, `untrained` is what is read at `layer`: "mean", the mean over the heads, or "best_head".
    In layers in which a query reaches one token of each view, the share of queries that find the right view. NaN where
    the layer was not read.
    """
    is_trained = trains_attention(run)
    readout = "through_head" if is_trained else untrained
    if not is_trained and layer in entry.get("precision_by_layer", {}):
        found = entry["precision_by_layer"][layer]
        return math.nan if found is None else float(found[f"{readout}@1"])
    if not is_trained and layer != run["layer"]:
        return math.nan
    if entry["precision"] is not None:
        return float(entry["precision"][f"{readout}@1"])
    return float((entry["precision_view"] or {}).get(readout, math.nan))


def final(run: Run, figure: Measure) -> float:
    """Mean of a figure over the last validations of a run."""
    return float(np.mean([figure(entry) for entry in run["validations"][-FINAL:]]))


def steps_to(run: Run, goal: float) -> float:
    """Steps after which a run first reaches a quality, linear between validations; infinite if it never does.

    Example:
        >>> validations = [{"step": 10 * i, "psnr_covisible": p} for i, p in enumerate((10.0, 12.0, 11.0, 14.0))]
        >>> steps_to({"validations": validations}, 11.0), steps_to({"validations": validations}, 13.0)
        (5.0, 26.666666666666668)
    """
    before = None
    for entry in run["validations"]:
        now = quality(entry)
        if now >= goal:
            if before is None:
                return float(entry["step"])
            step, value = before
            return step + (entry["step"] - step) * (goal - value) / (now - value)
        before = float(entry["step"]), now
    return NOT_REACHED


def seconds_per_step(runs: Sequence[Run]) -> float:
    """Median over the runs of an arm of the processor seconds of a step (of the wall clock on a GPU)."""
    name = "busy_seconds" if runs[0]["device"].endswith("CPU") else "seconds"
    return float(np.median([run["validations"][-1][name] / run["validations"][-1]["step"] for run in runs]))


def paired(base: Sequence[Run], arm: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pair the runs of `none` and of an arm by their seeds; seeds of which one is missing are left out."""
    by_seed = {run["seed"]: run for run in arm}
    return [(run, by_seed[run["seed"]]) for run in base if run["seed"] in by_seed]


def common_seeds(groups: Iterable[Sequence[Run]]) -> set[int]:
    """Seeds that all arms have."""
    seeds = [{run["seed"] for run in runs} for runs in groups]
    return set.intersection(*seeds) if seeds else set()


def differences(base: Sequence[Run], arm: Sequence[Run], figure: Measure) -> list[float]:
    """By seed, the final value of an arm minus that of `none`."""
    return [final(run, figure) - final(none, figure) for none, run in paired(base, arm)]


def relative_differences(base: Sequence[Run], arm: Sequence[Run], figure: Measure) -> list[float]:
    """By seed, by how many percent the final value of an arm is above that of `none`."""
    return [100 * (final(run, figure) / final(none, figure) - 1) for none, run in paired(base, arm)]


def speedups(base: Sequence[Run], arm: Sequence[Run]) -> list[float]:
    """By seed, steps of `none` to its own final quality over steps of the arm to the same; 0 if it is never reached.

    Both are read from their curves in the same way: `none` too may pass its final quality before its end. Seeds in
    which `none` ends no better than it begins say nothing and are left out.
    """
    ratios = []
    for none, run in paired(base, arm):
        goal = final(none, quality)
        if goal > quality(none["validations"][0]):
            ratios.append(steps_to(none, goal) / steps_to(run, goal))
    return ratios


def share_of_gain(base: Sequence[Run], shown: Sequence[Run], control: Sequence[Run]) -> float:
    """Gain of a control divided by that of CAMEO, over the seeds that all have; NaN where CAMEO's is not above 0.

    Where there are several seeds, its whole interval must be, since a share of a gain near 0 says nothing.
    """
    seeds = common_seeds((base, shown, control))
    both = [run for run in base if run["seed"] in seeds]
    gain, lowest, _ = interval(differences(both, shown, quality))
    if not both or gain <= 0 or lowest <= 0:
        return math.nan
    return float(np.mean(differences(both, control, quality))) / gain


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval from Student's t; the interval is NaN with fewer than two values.

    Example:
        >>> [round(value, 2) for value in interval([1.0, 2.0, 3.0])]
        [2.0, -0.48, 4.48]
    """
    if not values:
        return math.nan, math.nan, math.nan
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = T_QUANTILES[len(values) - 2] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half
