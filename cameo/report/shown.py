"""What of the settings a report shows: all but secrets and the folders of the machine."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from cameo.settings import shown_settings
from cameo.settings.help import comments, components

__all__ = ["ShownSetting", "settings_of", "without_folders"]

# An absolute path within a text: on Windows a drive and a backslash, elsewhere a slash that follows on no word.
ABSOLUTE = re.compile(r"(?<![\w:/.~…}\\-])(?:[A-Za-z]:[\\/]|/(?=[\w.]))[^\s'\",;:)\]}]*")


@dataclasses.dataclass(frozen=True)
class ShownSetting:
    """A setting as text: its name, its value and default as they are typed, its comment."""

    name: str
    value: str
    default: str
    comment: str

    @property
    def differs(self) -> bool:
        """Whether the value is not the default."""
        return self.value != self.default


def settings_of(settings: Any) -> list[ShownSetting]:
    """List the settings of a dataclass with their defaults; secrets are left out, and of absolute paths the folders.

    Example:
        >>> from cameo.training.settings import TrainingConfig
        >>> settings = settings_of(TrainingConfig(train_data_dir="/home/me/rooms", hub_token="hf_secret", rank=8))
        >>> [(one.name, one.value, one.default) for one in settings if one.differs]
        [('train_data_dir', '…/rooms', 'null'), ('rank', '8', '4')]
    """
    known = {name: text for part in components(type(settings)) for name, text in comments(part).items()}
    values = shown_settings(settings)
    shown = []
    for field in dataclasses.fields(settings):
        if field.metadata.get("secret"):
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        comment = known.get(field.name, "")
        shown.append(ShownSetting(field.name, _text(values[field.name]), _text(default), comment))
    return shown


def without_folders(text: str) -> str:
    """Replace the folders of absolute paths in a text, which tell of the machine, by an ellipsis.

    Example:
        >>> without_folders("cameo check-data config=/home/me/outputs/run/config.yaml and 3/4")
        'cameo check-data config=…/config.yaml and 3/4'
    """
    return ABSOLUTE.sub(lambda found: _last(found[0]), text)


def _text(value: Any) -> str:
    if isinstance(value, str):
        absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
        return _last(value) if absolute else without_folders(value)
    return without_folders(json.dumps(value, ensure_ascii=False))


def _last(path: str) -> str:
    return f"…/{PureWindowsPath(path).name}"  # which splits at slashes too
