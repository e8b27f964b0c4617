"""Settings of a training run: a YAML file plus `key=value` overrides, names as in diffusers' training scripts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from cameo.choices import ROOM_RIG_NAMES
from cameo.correspondence.settings import FeatureSettings, MatcherSettings
from cameo.data.settings import EMBEDDED, RIG_SETTINGS, DataSettings
from cameo.errors import unknown_name
from cameo.files import write_atomically
from cameo.renamed import SETTINGS
from cameo.settings import (
    comparable,
    current_names,
    merged,
    read_yaml,
    renamed_settings,
    shown_settings,
    split_arguments,
    to_yaml,
    typed_values,
)
from cameo.settings.interpolation import has_interpolation, resolve
from cameo.settings.text import is_null
from cameo.training.settings.alignment import AlignmentSettings
from cameo.training.settings.hub import HubSettings
from cameo.training.settings.latents import LatentSettings
from cameo.training.settings.model import LoraSettings, ModelSettings
from cameo.training.settings.optimization import OptimizerSettings, ScheduleSettings
from cameo.training.settings.output import OutputSettings
from cameo.training.settings.processes import ProcessSettings

__all__ = ["TrainingConfig", "continued_settings", "load_config", "save_config", "settings_file"]


@renamed_settings(SETTINGS)
@dataclass
class TrainingConfig(
    # A dataclass takes over the fields of its bases from the last to the first.
    HubSettings,
    ProcessSettings,
    OutputSettings,
    OptimizerSettings,
    ScheduleSettings,
    LoraSettings,
    MatcherSettings,
    FeatureSettings,
    AlignmentSettings,
    LatentSettings,
    DataSettings,
    ModelSettings,
):
    """All settings of a training: those of its components, one dataclass each, side by side.

    Example:
        >>> config = TrainingConfig(preset="tiny", loss_weight=0.1)
        >>> config.loss_weight, config.num_views
        (0.1, 3)

    The comments above the fields say what each is; `cameo lora --help` prints them.

    Raises:
        ValueError: for a value of the wrong type or out of range, and for settings that contradict each other.
    """

    @property
    def uses_matches(self) -> bool:
        """Whether the run needs matches: CAMEO with a weight."""
        return self.supervision == "cameo" and self.loss_weight > 0

    @property
    def uses_features(self) -> bool:
        """Whether the run needs image features: to align with, or to match."""
        return self.loss_weight > 0 and (self.supervision == "repa" or self.correspondence == "features")

    @property
    def uses_matcher(self) -> bool:
        """Whether the run needs the matcher in its steps."""
        return self.uses_matches and self.correspondence == "matcher" and self.precomputed_correspondence is None

    def check(self) -> None:
        """Refuse settings of several components that contradict each other."""
        if self.compare_without_cameo and not self.loss_weight:
            raise ValueError("compare_without_cameo=true needs loss_weight > 0, or both runs would train without CAMEO")
        if self.torch_compile != "off" and self.supervision == "repa" and self.loss_weight:
            raise ValueError(
                f"torch_compile={self.torch_compile}: supervision=repa reads hidden tokens by hooks, which compiled "
                "code does not run; give torch_compile=off"
            )
        if self.correspondence_control == "other_scene" and self.train_batch_size < 2:
            raise ValueError(
                "correspondence_control=other_scene: takes the matches of the next sample of the batch, and there is "
                f"none with train_batch_size={self.train_batch_size}; give train_batch_size=2 or more"
            )


# What a resumed run may change: everything else would make it another run.
CHANGEABLE = frozenset(entry.name for entry in fields(TrainingConfig) if entry.metadata.get("changeable"))


def settings_file(recipe: str, folder: str | Path, overrides: Sequence[str] | Mapping[str, Any]) -> Path:
    """Choose the settings file of a recipe for the `backbone=` among the overrides: `<recipe>_<backbone>_tiny.yaml`.

    Example:
        >>> settings_file("lora", "recipes/configs", ["backbone=cat3d"]).name
        'lora_cat3d_tiny.yaml'

    Raises:
        ValueError: if there is no such file and no `config=` among the overrides.
    """
    given = _typed(overrides)
    backbone = given.get("backbone", TrainingConfig.backbone)
    path = Path(folder) / f"{recipe}_{backbone}_tiny.yaml"
    if "config" not in given and not path.is_file():
        files = sorted(Path(folder).glob(f"{recipe}_*_tiny.yaml"))
        known = [file.name.removeprefix(f"{recipe}_").removesuffix("_tiny.yaml") for file in files]
        raise ValueError(
            f"{unknown_name('backbone with settings of its own', backbone, known)}. For another backbone write "
            "config=your.yaml"
        )
    return path


def load_config(
    path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = (), *, interpolate: bool = True
) -> TrainingConfig:
    """Read a YAML file and apply `key=value` overrides; `config=other.yaml` among them replaces the file.

    `config=lora_cat3d_sd21`, without a suffix, is the file of that name beside `path`, one of those that come along.

    Embedded data that the file names gives way to a `train_data_dir=` or `camera_rig=` among the overrides, with the
    settings of its rig in rooms.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "run.yaml"
        >>> _ = file.write_text("preset: tiny\\nmax_train_steps: 10\\n")
        >>> load_config(file, ["learning_rate=1e-3"]).learning_rate
        0.001

    Args:
        path: settings file.
        overrides: arguments of a command line, or what `cameo.settings.split_arguments` made of them.
        interpolate: whether `${oc.env:NAME}` and `${other_setting}` are resolved; pass False for a file that others
            may have written, whose author must not read the variables of this machine.

    Raises:
        DataError: if the file does not exist or is not YAML.
        ValueError: for an unknown key, a value of the wrong type, or an override without `=`.
    """
    changed = _typed(overrides)
    path = _named_file(changed.pop("config", None), Path(path).expanduser())
    given = read_yaml(path)
    for name in given:
        if name not in _NAMES and name not in SETTINGS:
            raise ValueError(f"{path}: {unknown_name('setting', name, _NAMES)}")
    given = current_names(TrainingConfig, given)
    named = {name: value for name, value in changed.items() if not is_null(value)}
    # A rig in rooms goes with embedded rooms, one around an object with objects.
    fits = ("objects",) if named.get("camera_rig") not in ROOM_RIG_NAMES else ("scenes", "bare_rooms")
    other = "train_data_dir" in named or ("camera_rig" in named and given.get("data_format") not in fits)
    if given.get("data_format") in EMBEDDED and other:
        given["data_format"] = "auto"
    if given.get("camera_rig") in ROOM_RIG_NAMES and (other or named.get("camera_rig", "fan") not in ROOM_RIG_NAMES):
        given = {name: value for name, value in given.items() if name not in ("camera_rig", *RIG_SETTINGS)}
    places = {name: str(path) for name in given if name not in changed}
    if interpolate:
        typed = resolve(merged(given, changed), _defaults())
    else:
        typed = merged(given, resolve(changed, _defaults()))
        if kept := [name for name in places if has_interpolation(given[name])]:
            warnings.warn(
                f"{path}: the interpolations in {', '.join(kept)} are left as text, since the file may be of someone "
                "else; give what is needed on the command line",
                stacklevel=2,
            )
    return TrainingConfig(**typed_values(TrainingConfig, typed, places=places))


def _named_file(config: str | None, default: Path) -> Path:
    """Return the settings file that `config=` names: a path, or the name of a file beside the default one."""
    if config is None:
        return default
    path = Path(config).expanduser()
    if path.suffix or path.is_file() or path.name != config:
        return path
    known = sorted(file.stem for file in default.parent.glob("*.yaml"))
    if config not in known:
        raise ValueError(f"{unknown_name('config', config, known)}. For a file of yours write config=path/to/it.yaml")
    return default.with_name(f"{config}.yaml")


def continued_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings that a resumed run must share with the run it continues."""
    return {name: comparable(value) for name, value in vars(config).items() if name not in CHANGEABLE}


def save_config(config: TrainingConfig, path: str | Path) -> None:
    """Write the settings of a run beside its results: interpolations as they were typed, and no secret."""
    write_atomically(path, to_yaml(shown_settings(config)))


_NAMES = [entry.name for entry in fields(TrainingConfig)]


def _typed(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    return dict(overrides) if isinstance(overrides, Mapping) else split_arguments(overrides, TrainingConfig)[0]


def _defaults() -> dict[str, Any]:
    """The defaults, which interpolations may name."""
    return {
        entry.name: entry.default if entry.default_factory is MISSING else entry.default_factory()
        for entry in fields(TrainingConfig)
    }
