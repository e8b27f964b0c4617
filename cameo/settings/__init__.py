"""Settings as dataclasses: their text in YAML files and on command lines, their types, bounds and help.

A setting is a field of a dataclass that derives from `Settings`. Its annotation is its type, the comment above it is
its help, and `setting()` gives its default and bounds. Text is read by the type of the setting and by nothing else: in
`revision=1e3` the value of a text setting is the text `1e3`.
"""

from __future__ import annotations

from cameo.settings.command_line import run_recipe, split_arguments
from cameo.settings.convert import typed_values
from cameo.settings.fields import Settings, current_names, renamed_settings, setting
from cameo.settings.files import read_yaml, to_yaml
from cameo.settings.interpolation import Interpolated, comparable, shown_settings
from cameo.settings.text import merged

__all__ = [
    "Interpolated",
    "Settings",
    "comparable",
    "current_names",
    "merged",
    "read_yaml",
    "renamed_settings",
    "run_recipe",
    "setting",
    "shown_settings",
    "split_arguments",
    "to_yaml",
    "typed_values",
]
