"""Tables and pictures of the convergence study in docs/results.md, from its results files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.page import PICTURES
from benchmarks.convergence import arms, curves, runs, summary
from benchmarks.convergence.runs import Run
from cameo.evaluation.pictures import save_figure
from cameo.probing.ablation import LayerEffect, QualityLoss, effects_table
from cameo.probing.layer_probe import LayerProbe
from cameo.tables import markdown_table

__all__ = ["PRESETS", "TABLES", "draw", "table_of_arms"]

PRESETS = ("tiny", "small")
COMMAND = "python -m benchmarks.convergence.study --preset {preset} --subjects {subject}"
NOT_RUN = f"Not run yet: `{COMMAND}`.\n"


def of_arms(preset: str, subject: str, *, named: bool) -> str:
    """Table of the arms of the study, or of what was varied beside them."""
    results = runs.load_results(preset, subject)
    long = {arm for pair in longer(results).values() for arm in pair}
    shown = {arm: group for arm, group in results.items() if (arm in arms.ARMS) == named and arm not in long}
    return with_origin({"none": results.get("none", []), **shown}, preset, subject)


def with_origin(shown: Mapping[str, Sequence[Run]], preset: str, subject: str) -> str:
    """Table of arms, of which `none` is the first, with where they come from."""
    if len(shown) < 2 or not shown["none"]:
        return NOT_RUN.format(preset=preset, subject=subject)
    return f"{origin(shown)}\n\n{table_of_arms(shown, arms.declared(preset, subject).shown)}\n"


def table_of_arms(results: Mapping[str, Sequence[Run]], shown: str) -> str:
    """Format the arms of a subject as a Markdown table; differences are to `none` with the same seed.

    Args:
        results: arm to its runs.
        shown: arm that stands for CAMEO; the attention of `none` is read at its layer.
    """
    header = (
        "arm", "seeds", "layer", "PSNR, covisible (dB)", "difference", "PSNR, all (dB)", "loss", "difference",
        "precision", "steps to the final quality of none, ratio", "the same in seconds", "seconds per step",
    )  # fmt: skip
    base = results.get("none", [])
    layer = supervised_layer(results, shown)
    rows = []
    for arm, group in results.items():
        differs = arm != "none" and bool(runs.paired(base, group))
        ratios = runs.speedups(base, group) if differs else []
        cost = runs.seconds_per_step(base) / runs.seconds_per_step(group) if differs else 1.0
        layers = sorted({run["layer"] for run in group})
        changed = partial(runs.differences, base, group)
        cells = (
            runs.arm_name(arm, group),
            str(len(group)),
            "-" if arm == "none" else ", ".join(short(layer) for layer in layers),
            f"{mean_of(group, runs.quality):.2f}",
            summary.shown_interval(changed(runs.quality), "+.2f") if differs else "-",
            f"{mean_of(group, lambda entry: entry['psnr_all']):.2f}",
            f"{mean_of(group, runs.loss):.4f}",
            summary.shown_interval(changed(runs.loss), "+.4f") if differs else "-",
            shown_precision(group, layer),
            summary.shown_speedup(ratios) if differs else "1",
            summary.shown_speedup(ratios, cost) if differs else "1",
            f"{runs.seconds_per_step(group):.3f}",
        )
        rows.append(cells)
    return markdown_table(header, rows)


def mean_of(group: Sequence[Run], figure: runs.Measure) -> float:
    """Mean over the runs of an arm of their final values."""
    return float(np.mean([runs.final(run, figure) for run in group]))


def supervised_layer(results: Mapping[str, Sequence[Run]], shown: str) -> str:
    """Layer of the arm that stands for CAMEO, or of `cameo` where that is missing; empty without either."""
    group = results.get(shown) or results.get("cameo") or []
    return str(group[0]["layer"]) if group else ""


def shown_precision(group: Sequence[Run], layer: str) -> str:
    """Precision as it is trained; where no head is trained, "mean of the heads / best head" at `layer`."""

    def percent(untrained: str) -> str:
        values = [runs.final(run, partial(runs.precision, run, layer=layer, untrained=untrained)) for run in group]
        return "-" if math.isnan(np.mean(values)) else f"{100 * np.mean(values):.1f} %"

    if all(runs.trains_attention(run) for run in group) or percent("mean") == "-":
        return percent("mean")
    return f"{percent('mean')} / {percent('best_head')}"


def short(path: str) -> str:
    """Shorten the path of a layer of a U-Net.

    Example:
        >>> short("up_blocks.1.attentions.0.transformer_blocks.0.attn1")
        'up 1.0'
    """
    parts = path.split(".")
    numbers = [part for part in parts[1:] if part.isdigit()]
    kept = numbers[: 1 if parts[0].startswith("mid") else 2]
    kind = ", temporal" if "temporal" in path else ""
    return f"{parts[0].partition('_')[0]} {'.'.join(kept)}{kind}"


def longer(results: Mapping[str, Sequence[Run]]) -> dict[int, dict[str, Sequence[Run]]]:
    """Arms of more steps than those of the study and nothing else changed but the weight, by their number of steps."""
    usual = max((run["settings"]["max_train_steps"] for run in results.get("none", [])), default=None)
    found: dict[int, dict[str, Sequence[Run]]] = {}
    for arm, group in results.items():
        steps = group[0]["settings"]["max_train_steps"]
        if usual is not None and steps > usual and arm in (with_cameo(steps), *without_cameo(steps)):
            found.setdefault(steps, {})[arm] = group
    return found


def with_cameo(steps: int) -> str:
    """Return the name of the arm of so many steps with CAMEO."""
    return f"max_train_steps={steps}"


def without_cameo(steps: int) -> tuple[str, str]:
    """Return the names of the arm of so many steps without CAMEO; results of 2026 have the weight under `weight`."""
    return f"{with_cameo(steps)},loss_weight=0.0", f"{with_cameo(steps)},weight=0.0"


def longer_pairs(results: Mapping[str, Sequence[Run]]) -> dict[int, dict[str, Sequence[Run]]]:
    """Of the longer arms those that exist without and with CAMEO, under the names `none` and `cameo`."""
    pairs = {}
    for steps, arms_of_steps in sorted(longer(results).items()):
        cameo = arms_of_steps.get(with_cameo(steps))
        none = next((arms_of_steps[arm] for arm in without_cameo(steps) if arm in arms_of_steps), None)
        if cameo and none:
            pairs[steps] = {"none": none, "cameo": cameo}
    return pairs


def longer_tables(preset: str, subject: str) -> str:
    """Tables of the longer runs."""
    found = longer_pairs(runs.load_results(preset, subject))
    tables = [with_origin(pair, preset, subject) for pair in found.values()]
    return "\n".join(tables) or NOT_RUN.format(preset=preset, subject=subject)


def levels(preset: str, subject: str) -> str:
    """Denoising loss and covisible PSNR at each noise level at the end of the runs."""
    results = runs.load_results(preset, subject)
    shown = {arm: group for arm, group in results.items() if arm in arms.ARMS}
    if len(shown) < 2 or "none" not in shown:
        return NOT_RUN.format(preset=preset, subject=subject)
    last = shown["none"][0]["validations"][-1]
    names = list(last["loss_by_level"])
    parts = [origin(shown), "Denoising loss:", level_table(shown, names, runs.loss_at, ".4f")]
    if "psnr_all_by_level" in last:
        parts += ["PSNR, covisible (dB):", level_table(shown, names, runs.quality_at, ".2f")]
    return "\n\n".join(parts) + "\n"


def level_table(
    shown: Mapping[str, Sequence[Run]], names: Sequence[str], figure: Callable[..., float], digits: str
) -> str:
    """Table of arms x noise levels, with the difference to `none` and its interval."""
    rows = []
    for arm, group in shown.items():
        cells = []
        for name in names:
            at_level = partial(figure, level=name)
            mean, changes = mean_of(group, at_level), runs.differences(shown["none"], group, at_level)
            difference = "" if arm == "none" else f" ({summary.shown_interval(changes, f'+{digits}')})"
            cells.append("-" if math.isnan(mean) else f"{mean:{digits}}{difference}")
        rows.append([runs.arm_name(arm, group), *cells])
    return markdown_table(["arm", *(f"level {name}" for name in names)], rows)


def origin(results: Mapping[str, Sequence[Run]]) -> str:
    """Command, device, date and size of the runs."""
    every = [run for group in results.values() for run in group]
    first = every[0]
    steps = sorted({run["validations"][-1]["step"] for run in every})
    command = COMMAND.format(preset=first["preset"], subject=first["subject"])
    if free := [run for run in every if run["arm"] not in arms.ARMS]:
        command += f" --arms {' '.join(sorted({run['arm'] for run in free}))}"
        command += f" --seeds {' '.join(sorted({str(run['seed']) for run in free}))}"
    return (
        f"`{command}` ({first['parameters'] / 1e6:.1f} million parameters), "
        f"{' or '.join(map(str, steps))} steps of batch {first['settings']['train_batch_size']}; "
        f"{summary.places_and_dates(every)}."
    )


def effects(preset: str, subject: str) -> str:
    """What each layer's attention finds in the trained models, and what cutting it costs."""
    parts = []
    results = runs.load_results(preset, subject)
    for arm in dict.fromkeys(("none", arms.declared(preset, subject).shown, "cameo")):
        run = next((run for run in results.get(arm, []) if "effects" in run), None)
        if run is None:
            continue
        probe = LayerProbe.from_dict(run["probe"])
        title = f"**Model of arm `{arm}`, seed {run['seed']}**"
        title += f", supervised layer `{run['layer']}`" if arm != "none" else ""
        parts += [title, probe.table(), effects_table([effect_of(values) for values in run["effects"]])]
    return "\n\n".join(parts) + "\n" if parts else NOT_RUN.format(preset=preset, subject=subject)


def effect_of(values: Mapping[str, Any]) -> LayerEffect:
    """Read an effect back."""
    drops = {
        name: QualityLoss(*value) for name, value in values.items() if name.startswith("drop_") and value is not None
    }
    return LayerEffect(**{**values, **drops})


TABLES: dict[str, Callable[[], str]] = {
    f"{name}_{preset}_{subject}": partial(function, preset, subject)
    for name, function in (
        ("study", partial(of_arms, named=True)),
        ("sweeps", partial(of_arms, named=False)),
        ("longer", longer_tables),
        ("levels", levels),
        ("effects", effects),
    )
    for preset in PRESETS
    for subject in arms.subjects_of(preset)
} | {
    f"{name}_{preset}": partial(function, preset)
    for name, function in (
        ("families", summary.families),
        ("demands", summary.demands),
        ("declared", summary.declared),
    )
    for preset in PRESETS
}


def draw(preset: str) -> list[Path]:
    """Draw the first figure and the curves of all subjects of a preset; nothing without results."""
    found: dict[str, Mapping[str, Sequence[Run]]] = {}
    layers: dict[str, str] = {}
    for subject in arms.subjects_of(preset):
        results, rules = runs.load_results(preset, subject), arms.declared(preset, subject)
        if not results:
            continue
        panels = {rules.title: results}
        panels |= {f"{rules.title}, {steps} steps": pair for steps, pair in longer_pairs(results).items()}
        found |= panels
        layers |= dict.fromkeys(panels, supervised_layer(results, rules.shown))
    if not found:
        return []
    devices = sorted({group[0]["device"] for results in found.values() for group in results.values()})
    figure = curves.draw_curves(found, layers, f"preset {preset}, {', '.join(devices)}")
    pictures = [save_figure(figure, PICTURES / f"convergence_{preset}.png")]
    first = save_figure(
        summary.draw(preset), PICTURES / f"families_{preset}.png", dpi=200
    )  # for screens of high density
    return [first, *pictures]
