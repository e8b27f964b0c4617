"""Draw the curves and fill the tables of docs/results.md from the results of the study.

    python benchmarks/results_page.py

Everything between `<!-- table: NAME -->` and `<!-- end -->` is written anew; the rest of the page is text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from convergence import curves
from report import PICTURES, RESULTS, ROOT, filled

from cameo.evaluation.pictures import save_figure
from cameo.files import write_atomically
from cameo.probing.ablation import LayerEffect, QualityLoss, effects_table
from cameo.probing.layer_probe import LayerProbe
from cameo.tables import markdown_table

__all__ = ["PAGE", "TABLES", "draw"]

PAGE = ROOT / "docs" / "results.md"
STUDY = RESULTS / "convergence"
PRESETS = ("tiny", "small")
SUBJECTS = ("cat3d", "mvdream", "zero123plus", "sv3d", "cat3d_transformer", "rgbd_room")
COMMAND = "python benchmarks/convergence/study.py --preset {preset} --subjects {subject}"
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
        if usual is not None and steps > usual and arm in (f"max_train_steps={steps}", without(steps)):
            found.setdefault(steps, {})[arm] = runs
    return found


def without(steps: int) -> str:
    """Name of the arm of so many steps without CAMEO."""
    return f"max_train_steps={steps},weight=0.0"


def longer_pairs(results: Mapping[str, Sequence[curves.Run]]) -> dict[int, dict[str, Sequence[curves.Run]]]:
    """Of the longer arms those that exist without and with CAMEO, under the names `none` and `cameo`."""
    return {
        steps: {"none": pair[without(steps)], "cameo": pair[f"max_train_steps={steps}"]}
        for steps, pair in sorted(longer(results).items())
        if len(pair) == 2
    }


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
        rows.append([arm, *cells])
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


def main() -> None:
    """Draw, then fill the page."""
    for preset in PRESETS:
        if path := draw(preset):
            print(path.relative_to(ROOT))
    write_atomically(PAGE, filled(PAGE.read_text(encoding="utf-8"), TABLES))
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
