"""Tables and curves of the convergence study in docs/results.md, from its results files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.page import PICTURES, RESULTS
from benchmarks.convergence import curves
from cameo.evaluation.pictures import save_figure
from cameo.probing.ablation import LayerEffect, QualityLoss, effects_table
from cameo.probing.layer_probe import LayerProbe
from cameo.tables import markdown_table

__all__ = ["PRESETS", "TABLES", "draw"]

STUDY = RESULTS / "convergence"
PRESETS = ("tiny", "small")
SUBJECTS = ("cat3d", "mvdream", "zero123plus", "sv3d", "cat3d_transformer", "rgbd_room")
COMMAND = "python -m benchmarks.convergence.study --preset {preset} --subjects {subject}"
NOT_RUN = f"Not run yet: `{COMMAND}`.\n"


def arms(preset: str, subject: str, *, named: bool) -> str:
    """Table of the arms of the study, or of what was varied beside them."""
    results = curves.load_results(STUDY / preset / subject)
    long = {arm for pair in longer(results).values() for arm in pair}
    shown = {arm: runs for arm, runs in results.items() if (arm in curves.ARM_ORDER) == named and arm not in long}
    return table({"none": results.get("none", []), **shown}, preset, subject)


def table(shown: Mapping[str, Sequence[curves.Run]], preset: str, subject: str) -> str:
    """Table of arms, of which `none` is the first, with where they come from."""
    if len(shown) < 2 or not shown["none"]:
        return NOT_RUN.format(preset=preset, subject=subject)
    return f"{origin(shown)}\n\n{curves.table_of_arms(shown)}\n"


def longer(results: Mapping[str, Sequence[curves.Run]]) -> dict[int, dict[str, Sequence[curves.Run]]]:
    """Arms of more steps than those of the study and nothing else changed but the weight, by their number of steps."""
    usual = max((run["settings"]["max_train_steps"] for run in results.get("none", [])), default=None)
    found: dict[int, dict[str, Sequence[curves.Run]]] = {}
    for arm, runs in results.items():
        steps = runs[0]["settings"]["max_train_steps"]
        if usual is not None and steps > usual and arm in (with_cameo(steps), *without_cameo(steps)):
            found.setdefault(steps, {})[arm] = runs
    return found


def with_cameo(steps: int) -> str:
    """Return the name of the arm of so many steps with CAMEO."""
    return f"max_train_steps={steps}"


def without_cameo(steps: int) -> tuple[str, str]:
    """Return the names of the arm of so many steps without CAMEO; results of 2026 have the weight under `weight`."""
    return f"{with_cameo(steps)},loss_weight=0.0", f"{with_cameo(steps)},weight=0.0"


def longer_pairs(results: Mapping[str, Sequence[curves.Run]]) -> dict[int, dict[str, Sequence[curves.Run]]]:
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
    found = longer_pairs(curves.load_results(STUDY / preset / subject))
    tables = [table(pair, preset, subject) for pair in found.values()]
    return "\n".join(tables) or NOT_RUN.format(preset=preset, subject=subject)


def levels(preset: str, subject: str) -> str:
    """Denoising loss at each noise level at the end of the runs."""
    results = curves.load_results(STUDY / preset / subject)
    shown = {arm: runs for arm, runs in results.items() if arm in curves.ARM_ORDER}
    if len(shown) < 2:
        return NOT_RUN.format(preset=preset, subject=subject)
    names = list(shown["none"][0]["validations"][-1]["loss_by_level"])
    header = ["arm", *(f"level {name}" for name in names)]
    rows = []
    for arm, runs in shown.items():
        cells = []
        for name in names:
            value = partial(loss_at, level=name)
            mean = sum(curves.final(run, value) for run in runs) / len(runs)
            difference = "" if arm == "none" else f" ({curves.show_difference(shown['none'], runs, value)})"
            cells.append(f"{mean:.4f}{difference}")
        rows.append([curves.arm_name(arm, runs), *cells])
    return f"{origin(shown)}\n\n{markdown_table(header, rows)}\n"


def loss_at(entry: Mapping[str, Any], level: str) -> float:
    """Denoising loss of a validation at one noise level."""
    return float(entry["loss_by_level"][level])


def origin(results: Mapping[str, Sequence[curves.Run]]) -> str:
    """Command, device, date and size of the runs."""
    runs = [run for group in results.values() for run in group]
    first = runs[0]
    places = dict.fromkeys(f"{run['device']}, {run['threads']} threads, torch {run['torch']}" for run in runs)
    dates = sorted({run["date"] for run in runs})
    steps = sorted({run["validations"][-1]["step"] for run in runs})
    command = COMMAND.format(preset=first["preset"], subject=first["subject"])
    if free := [run for run in runs if run["arm"] not in curves.ARM_ORDER]:
        command += f" --arms {' '.join(sorted({run['arm'] for run in free}))}"
        command += f" --seeds {' '.join(sorted({str(run['seed']) for run in free}))}"
    return (
        f"`{command}` ({first['parameters'] / 1e6:.1f} million parameters), "
        f"{' or '.join(map(str, steps))} steps of batch {first['settings']['train_batch_size']}; "
        f"{'; '.join(places)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def effects(preset: str, subject: str) -> str:
    """What each layer's attention finds in the trained models, and what cutting it costs."""
    parts = []
    for arm in ("none", "cameo"):
        run = next(iter(curves.load_results(STUDY / preset / subject).get(arm, [])), None)
        if run is None or "effects" not in run:
            continue
        probe = LayerProbe.from_dict(run["probe"])
        title = f"**Model of arm `{arm}`, seed {run['seed']}**"
        title += f", supervised layer `{run['layer']}`" if arm == "cameo" else ""
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
        ("study", partial(arms, named=True)),
        ("sweeps", partial(arms, named=False)),
        ("longer", longer_tables),
        ("levels", levels),
        ("effects", effects),
    )
    for preset in PRESETS
    for subject in SUBJECTS
}


def draw(preset: str) -> Path | None:
    """Draw the curves of all subjects of a preset; None without results."""
    found = {subject: curves.load_results(STUDY / preset / subject) for subject in SUBJECTS}
    for subject in SUBJECTS:
        found |= {f"{subject}, {steps} steps": pair for steps, pair in longer_pairs(found[subject]).items()}
    found = {subject: results for subject, results in found.items() if results}
    if not found:
        return None
    devices = sorted({runs[0]["device"] for results in found.values() for runs in results.values()})
    figure = curves.draw_curves(found, f"preset {preset}, {', '.join(devices)}")
    return save_figure(figure, PICTURES / f"convergence_{preset}.png")
