"""What the presets of the study declare: the training of each subject, and what each arm changes in it.

A preset is a file in `presets`. `common` holds for all subjects, and a subject's own lines override it. A line is a
setting of the training, a field of `Declared`, or `validation`, the settings of the measurement.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cameo.probing.denoising import ValidationSettings
from cameo.probing.layer_probe import LayerProbe
from cameo.settings import Settings, current_names, read_yaml, setting, split_arguments, typed_values
from cameo.training.settings import TrainingConfig

__all__ = ["ARMS", "PRESETS", "Declared", "arm_settings", "declared", "families", "settings_of", "subjects_of"]

PRESETS = Path(__file__).parent / "presets"
# In the order in which they run and are shown.
ARMS = ("none", "cameo", "linear", "other_scene", "random", "wrong_layer", "repa")
SCHEDULES = {"cameo": "constant", "linear": "linear"}
LAYER_RULE = re.compile(r"probe of none, seed (\d+)")


@dataclass(frozen=True)
class Declared(Settings):
    """What a preset declares of a subject beside the settings of its training, before the first run.

    Example:
        >>> Declared(shown="cameo", layer_rule="probe of none, seed 2").probe_seed
        2

    Raises:
        ValueError: for an unknown arm or rule.
    """

    # Name of the subject in figures and tables. By default the name under which the preset has it.
    title: str = setting("")
    # Arm that stands for CAMEO in the first figure and table: cameo (constant loss weight) or linear (the loss weight
    # decays to zero). The arms that are compared with it (other_scene, random, wrong_layer, repa, key=value) have the
    # same schedule. linear by default, since low noise pays for a constant weight.
    shown: str = setting("linear", choices=tuple(SCHEDULES))
    # Where the supervised layer comes from: "probe of none, seed N" is the layer that the probe ranks first in the
    # trained model of the arm none with seed N, for all arms and seeds; wrong_layer takes the one that it ranks last.
    layer_rule: str = setting("probe of none, seed 0")

    def check(self) -> None:
        """Raise `ValueError` for a rule that is not known."""
        if not LAYER_RULE.fullmatch(self.layer_rule):
            raise ValueError(f"layer_rule: expected 'probe of none, seed N', got {self.layer_rule!r}")

    @property
    def probe_seed(self) -> int:
        """Seed of the run of `none` that the probe looks into."""
        rule = LAYER_RULE.fullmatch(self.layer_rule)
        assert rule is not None  # checked when the settings were made
        return int(rule[1])


def subjects_of(preset: str) -> list[str]:
    """List the subjects of a preset in its order."""
    return list(_file(PRESETS / f"{preset}.yaml")["subjects"])


def families(preset: str) -> list[str]:
    """List the subjects that need no data from outside: those that run by default, and stand in the first figure."""
    return [name for name in subjects_of(preset) if _lines(preset, name).get("data_format") != "rgbd"]


def declared(preset: str, subject: str) -> Declared:
    """Read what a preset declares of a subject beside the settings of its training."""
    lines = _lines(preset, subject)
    values = {name: lines[name] for name in Declared.__dataclass_fields__ if name in lines}
    return Declared(**typed_values(Declared, {"title": subject, **values}))


def settings_of(preset: str, subject: str, data: str | None) -> dict[str, Any]:
    """Return the training settings of a subject, without those of an arm; `validation` holds those of the measurement.

    Args:
        preset: name of a file in `PRESETS`.
        subject: one of `subjects_of(preset)`.
        data: folder of an RGB-D sequence; only subjects with `data_format: rgbd` need it.
    """
    lines = {name: line for name, line in _lines(preset, subject).items() if name not in Declared.__dataclass_fields__}
    validation = typed_values(ValidationSettings, lines.pop("validation"))
    settings = {**typed_values(TrainingConfig, current_names(TrainingConfig, lines)), "validation": validation}
    if settings.get("data_format") == "rgbd":
        if data is None:
            raise SystemExit(f"--subjects {subject}: needs --data, the folder of an RGB-D sequence")
        settings["train_data_dir"] = data
    return settings


def arm_settings(arm: str, rules: Declared, probe: LayerProbe | None) -> dict[str, Any]:
    """Return what an arm changes in the settings of its subject; `none` needs no probe."""
    if arm == "none":
        return {"loss_weight": 0.0}
    if probe is None:
        raise SystemExit(f"--arms {arm}: its layer comes from the {rules.layer_rule}; run that first")
    ranked = [entry.path for entry in probe.ranking]
    changes: dict[str, dict[str, Any]] = {
        **{name: {"weight_schedule": schedule} for name, schedule in SCHEDULES.items()},
        "other_scene": {"correspondence_control": "other_scene"},
        "random": {"correspondence_control": "random"},
        "wrong_layer": {"layer": ranked[-1]},
        "repa": {"supervision": "repa"},
    }
    if arm not in changes:
        changes[arm] = free_arm(arm, ranked)
    return {"layer": ranked[0], "weight_schedule": SCHEDULES[rules.shown], **changes[arm]}


def free_arm(arm: str, ranked: Sequence[str]) -> dict[str, Any]:
    """Read `key=value,key=value`; `layers=3` means the best three, `rank=2` the layer on that place of the ranking."""
    if "=" not in arm:
        raise SystemExit(f"--arms {arm}: expected one of {', '.join(ARMS)} or key=value[,key=value]")
    ranking, settings = split_arguments(arm.split(","), Ranking, TrainingConfig)
    chosen, values = typed_values(Ranking, ranking), typed_values(TrainingConfig, settings)
    for name, least, most in (("layers", 1, len(ranked)), ("rank", 0, len(ranked) - 1)):
        if name in chosen and not least <= chosen[name] <= most:
            raise SystemExit(
                f"--arms {arm}: expected {name} in {least}..{most}, since the model has {len(ranked)} layers that can "
                f"be supervised, got {chosen[name]}"
            )
    if "layers" in chosen:
        values["layer"] = list(ranked[: chosen["layers"]])
    if "rank" in chosen:
        values["layer"] = ranked[chosen["rank"]]
    return values


@dataclass
class Ranking:
    """What an arm may say of its layer: the best `layers`, or the one on place `rank` of the ranking, from 0."""

    layers: int = 1
    rank: int = 0


@cache
def _file(path: Path) -> Mapping[str, Any]:
    return read_yaml(path)


def _lines(preset: str, subject: str) -> dict[str, Any]:
    """Everything that a preset says of a subject, as typed."""
    file = _file(PRESETS / f"{preset}.yaml")
    if subject not in file["subjects"]:
        raise SystemExit(f"--subjects {subject}: expected some of {', '.join(file['subjects'])}")
    return {**file["common"], **file["subjects"][subject]}
