"""The first screen of docs/results.md: one panel and one row for each family of models, and what was demanded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks.convergence import arms, curves, runs
from benchmarks.convergence.runs import Run
from cameo.probing.denoising import ValidationSettings
from cameo.tables import markdown_table
from cameo.training.settings import TrainingConfig

__all__ = ["declared", "demands", "draw", "families", "shown_interval", "shown_speedup"]

CONTROLS = ("other_scene", "random")
# What is demanded of each family: a control may have at most this share of the gain; the upper end of the interval of
# the loss at low noise may be so many percent above `none`.
MOST_OF_THE_GAIN = 0.5
MOST_LOW_NOISE_LOSS = 3.0


def shown_interval(values: Sequence[float], digits: str, unit: str = "", gap: str = " ") -> str:
    """Format a mean with its 95 % interval over seeds, or the value alone where there is one seed.

    Example:
        >>> shown_interval([1.0, 2.0, 3.0], "+.1f", " dB"), shown_interval([1.0], ".2f"), shown_interval([], ".2f")
        ('+2.0 dB [-0.5, +4.5]', '1.00', '-')
    """
    mean, low, high = runs.interval(values)
    if math.isnan(mean):
        return "-"
    return f"{mean:{digits}}{unit}" + ("" if math.isnan(low) else f"{gap}[{low:{digits}}, {high:{digits}}]")


def shown_speedup(ratios: Sequence[float], factor: float = 1.0, gap: str = " ") -> str:
    """Geometric mean of the ratios with its interval; says how many seeds reached the quality where not all did."""
    if not ratios:
        return "none learns nothing"
    reached = [ratio * factor for ratio in ratios if ratio > 0]
    if len(reached) < len(ratios):
        values = ", ".join(f"{ratio:.2f}" for ratio in reached)
        return f"reached by {len(reached)} of {len(ratios)} seeds" + (f" ({values})" if values else "")
    mean, low, high = (math.exp(value) for value in runs.interval([math.log(ratio) for ratio in reached]))
    return f"{mean:.2f}" + ("" if math.isnan(low) else f"{gap}[{low:.2f}, {high:.2f}]")


def families(preset: str) -> str:
    """Table of the families: what CAMEO gains over `none`, in covisible PSNR and the rest, and what the controls do."""
    header = (
        "family", "seeds", "gain (dB)", "steps, ratio", "seconds, ratio", "loss", f"loss at level {runs.LOW_NOISE}",
        "another scene's matches: gain (dB), share", "these within a token of the truth",
        "random matches: gain (dB), share",
    )  # fmt: skip
    rows, every = [], []
    for subject in arms.families(preset):
        results, rules = runs.load_results(preset, subject), arms.declared(preset, subject)
        none, shown = results.get("none", []), results.get(rules.shown, [])
        every += [run for arm in ("none", rules.shown, *CONTROLS) for run in results.get(arm, [])]
        pairs = runs.paired(none, shown)
        if not pairs:
            rows.append([rules.title, "not run yet", *["-"] * (len(header) - 2)])
            continue
        ratios = runs.speedups(none, shown)
        cost = runs.seconds_per_step(none) / runs.seconds_per_step(shown)
        other, random = (shown_control(none, shown, results.get(control, [])) for control in CONTROLS)
        rows.append(
            [
                rules.title,
                str(len(pairs)),
                broken(runs.differences(none, shown, runs.quality), "+.2f"),
                shown_speedup(ratios, gap="<br>"),
                shown_speedup(ratios, cost, gap="<br>"),
                broken(runs.relative_differences(none, shown, runs.loss), "+.1f", " %"),
                broken(runs.relative_differences(none, shown, runs.low_noise_loss), "+.1f", " %"),
                other,
                shown_share(within_one_token(results.get("other_scene", []))),
                random,
            ]
        )
    command = f"`python -m benchmarks.convergence.study --preset {preset}`"
    where = f"{command}; {places_and_dates(every)}." if every else f"Not run yet: {command}."
    return f"{markdown_table(header, rows)}\n\n{where}\n"


def places_and_dates(group: Sequence[Run]) -> str:
    """Devices and dates of runs."""
    places = dict.fromkeys(f"{run['device']}, {run['threads']} threads, torch {run['torch']}" for run in group)
    dates = sorted({run["date"] for run in group})
    return f"{'; '.join(places)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


def broken(values: Sequence[float], digits: str, unit: str = "") -> str:
    """Mean and interval on two lines of a cell."""
    return shown_interval(values, digits, unit, gap="<br>")


def shown_control(none: Sequence[Run], shown: Sequence[Run], control: Sequence[Run]) -> str:
    """Gain of a control with its interval, and its share of the gain of CAMEO where that is established."""
    gains = runs.differences(none, control, runs.quality)
    if not gains:
        return "-"
    share = runs.share_of_gain(none, shown, control)
    return broken(gains, "+.2f") + ("" if math.isnan(share) else f"<br>{shown_share(share)}")


def shown_share(share: float) -> str:
    """Format a share as a percentage."""
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def within_one_token(group: Sequence[Run]) -> float:
    """Share of a control's matches that lie within one token of the true ones, mean over its runs; NaN if unknown."""
    known = [run["control_within_one_token"] for run in group if run.get("control_within_one_token") is not None]
    return float(np.mean(known)) if known else math.nan


def demands(preset: str) -> str:
    """Table of the families and what was demanded of each before the first run."""
    header = (
        "family", "gain above 0", f"another scene's matches: at most {100 * MOST_OF_THE_GAIN:.0f} % of the gain",
        f"random matches: at most {100 * MOST_OF_THE_GAIN:.0f} % of the gain",
        f"loss at low noise: upper end at most {MOST_LOW_NOISE_LOSS:.0f} % above none", "PSNR of none, first and last",
    )  # fmt: skip
    rows = []
    for subject in arms.families(preset):
        results, rules = runs.load_results(preset, subject), arms.declared(preset, subject)
        rows.append([rules.title, *verdicts(results, rules.shown)])
    return markdown_table(header, rows) + "\n"


def verdicts(results: Mapping[str, Sequence[Run]], shown_arm: str) -> list[str]:
    """Compare the runs of a family with what was demanded."""
    none, shown = results.get("none", []), results.get(shown_arm, [])
    _, lowest_gain, _ = runs.interval(runs.differences(none, shown, runs.quality))
    _, _, highest_loss = runs.interval(runs.relative_differences(none, shown, runs.low_noise_loss))
    cells = [verdict(lowest_gain, lowest_gain > 0)]
    for control in CONTROLS:
        share = runs.share_of_gain(none, shown, results.get(control, []))
        cells.append("no gain to share" if cells[0] == "missed" else verdict(share, share <= MOST_OF_THE_GAIN))
    cells.append(verdict(highest_loss, highest_loss <= MOST_LOW_NOISE_LOSS))
    first = np.mean([runs.quality(run["validations"][0]) for run in none]) if none else math.nan
    last = np.mean([runs.final(run, runs.quality) for run in none]) if none else math.nan
    return [*cells, f"{first:.2f}, {last:.2f} dB" if none else "-"]


def verdict(measured: float, is_met: bool) -> str:
    """Whether a demand is met; a figure that is NaN needs further runs or seeds."""
    return "open" if math.isnan(measured) else "met" if is_met else "missed"


def declared(preset: str) -> str:
    """Table of what the preset declares of each subject: model, data, steps, and what is measured."""
    header = (
        "subject", "backbone, preset", "data", "views", "steps, batch", "loss weight", "head",
        "PSNR at noise levels", "all noise levels", "shown arm", "layer",
    )  # fmt: skip
    rows = []
    for subject in arms.subjects_of(preset):
        rules, given = arms.declared(preset, subject), arms.settings_of(preset, subject, data="")
        validation: ValidationSettings = ValidationSettings(**given.pop("validation"))
        settings = TrainingConfig(**given)
        data = ", ".join(str(part) for part in (settings.data_format, settings.camera_rig) if part)
        rows.append(
            [
                f"{rules.title} (`{subject}`)",
                f"{settings.backbone}, {settings.preset}",
                data,
                f"{settings.num_views}, {settings.resolution} px",
                f"{settings.max_train_steps}, {settings.train_batch_size}",
                f"{settings.loss_weight:g}",
                settings.head if isinstance(settings.head, str) else settings.head.get("kind", "mlp"),
                ", ".join(f"{level:g}" for level in validation.high_levels),
                ", ".join(f"{level:g}" for level in validation.noise_levels),
                rules.shown,
                rules.layer_rule,
            ]
        )
    return markdown_table(header, rows) + "\n"


def draw(preset: str) -> Figure:
    """Draw the first figure: one panel for each family."""
    panels, notes = {}, {}
    for subject in arms.families(preset):
        results, rules = runs.load_results(preset, subject), arms.declared(preset, subject)
        none, shown = results.get("none", []), results.get(rules.shown, [])
        panels[rules.title] = {"none": none, "shown": shown, "other_scene": results.get("other_scene", [])}
        gains = runs.differences(none, shown, runs.quality)
        notes[rules.title] = shown_interval(gains, "+.2f", " dB") if gains else "not run yet"
    return curves.draw_families(panels, notes)
