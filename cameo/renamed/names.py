"""Keywords, attributes, methods, settings and keys of saved files under the names they had in earlier releases.

The tables below are the only place that knows an old name; `cameo.renamed.modules` is the same for modules. Every use
of an old name gives a `FutureWarning` that says what to write instead.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

__all__ = [
    "ATTRIBUTES",
    "CONFIG_KEYS",
    "KEYWORDS",
    "METHODS",
    "SETTINGS",
    "old_attributes",
    "old_fields",
    "old_keywords",
    "rename_keys",
    "warn_renamed",
]

P = ParamSpec("P")
R = TypeVar("R")
Class = TypeVar("Class", bound=type)

# Callable, by its qualified name: old keyword, new keyword.
KEYWORDS: dict[str, dict[str, str]] = {
    "CameoConfig": {"normalise": "normalize"},
    "Correspondence": {"sizes": "token_grids", "weight": "match_weight"},
    "Correspondence.from_depth": {"size": "token_grid"},
    "Correspondence.from_features": {"size": "token_grid"},
    "Correspondence.from_point_maps": {"size": "token_grid"},
    "LayerProbe": {"timesteps": "noise_levels"},
    "ProbeResult.chance": {"timestep": "noise_level"},
    "ProbeResult.per_scene": {"timestep": "noise_level"},
    "ProbeResult.precision": {"timestep": "noise_level"},
    "ProbeResult.skill": {"timestep": "noise_level"},
    "TokenLayout.refusal": {"normalise": "normalize"},
    "alignment_loss": {"normalise": "normalize"},
    "probe_layers": {"timesteps": "noise_levels"},
    "push_to_hub": {"licence": "license"},
    "save_pretrained": {"licence": "license"},
    "wrap": {"normalise": "normalize"},
}
# Class: old attribute, new attribute.
ATTRIBUTES: dict[str, dict[str, str]] = {
    "AttentionLayer": {"sizes": "token_grids"},
    "CameoConfig": {"normalise": "normalize"},
    "CameoModel": {"sites": "attention_layers", "supervised_sites": "supervised_layers"},
    "Correspondence": {"sizes": "token_grids", "visible": "matched", "weight": "match_weight"},
    "LayerProbe": {"timesteps": "noise_levels"},
    "TokenLayout": {"localise": "localize"},
}
# Methods of `cameo.backbone.Backbone`, which adapters of other packages override: old name, new name.
METHODS: dict[str, str] = {
    "hazard": "unsupported",
    "inflatable": "inflatable_layers",
    "licence": "license",
    "recognises": "recognizes",
    "sites": "attention_layers",
}
# Settings of a run, on the command line, in YAML, in checkpoints and as attributes: old name, new name.
SETTINGS: dict[str, str] = {"hub_licence": "hub_license", "normalise": "normalize", "weight": "loss_weight"}
# Keys of `cameo_config.json`: old key, new key.
CONFIG_KEYS: dict[str, str] = {"normalise": "normalize"}


def warn_renamed(old: str, new: str, *, stacklevel: int) -> None:
    """Warn that `old` is called `new` today; `stacklevel` counts from the caller of this function."""
    warnings.warn(f"{old} is now called {new}; the next release drops the old name", FutureWarning, stacklevel + 1)


def old_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: accept the keywords that `KEYWORDS` lists for this function under their old names too.

    Raises:
        TypeError: in the call, if a value is given under both names.
    """
    table = KEYWORDS[function.__qualname__]

    @functools.wraps(function)
    def accepting(*args: P.args, **kwargs: P.kwargs) -> R:
        for old in table.keys() & kwargs.keys():
            new = table[old]
            if new in kwargs:
                raise TypeError(
                    f"{function.__qualname__}: got {old}= and {new}=, which are one argument; give {new}= alone"
                )
            warn_renamed(f"{function.__qualname__}({old}=)", f"{new}=", stacklevel=2)
            kwargs[new] = kwargs.pop(old)
        return function(*args, **kwargs)

    return accepting


def old_fields(cls: Class) -> Class:
    """Class decorator: accept the fields of a dataclass that `KEYWORDS` lists under their old names too.

    `dataclasses.replace` hands over all fields under their names of today, so an old name counts where both are given.
    """
    table, initialize = KEYWORDS[cls.__name__], vars(cls)["__init__"]

    @functools.wraps(initialize)
    def accepting(self: Any, *args: Any, **kwargs: Any) -> None:
        for old in table.keys() & kwargs.keys():
            warn_renamed(f"{cls.__name__}({old}=)", f"{table[old]}=", stacklevel=2)
            kwargs[table[old]] = kwargs.pop(old)
        initialize(self, *args, **kwargs)

    setattr(cls, "__init__", accepting)  # noqa: B010 - a type checker takes the assignment for one to an instance
    return cls


def old_attributes(cls: Class) -> Class:
    """Class decorator: give the attributes that `ATTRIBUTES` lists for this class under their old names too."""
    for old, new in ATTRIBUTES[cls.__name__].items():
        setattr(cls, old, _old_attribute(cls.__name__, old, new))
    return cls


def rename_keys(values: Mapping[str, Any], table: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return the values of a saved file with the keys of today; no warning, since a saved file is no mistake.

    Example:
        >>> rename_keys({"normalise": "per_view", "weight": 0.1}, {"normalise": "normalize"}, "cameo_config.json")
        {'normalize': 'per_view', 'weight': 0.1}

    Raises:
        ValueError: if the file holds a value under both names.
    """
    renamed = {table.get(name, name): value for name, value in values.items()}
    if len(renamed) < len(values):
        twice = [f"{old} and {new}" for old, new in table.items() if old in values and new in values]
        raise ValueError(f"{where}: holds {twice[0]}, which are one setting; remove the first")
    return renamed


def _old_attribute(owner: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warn_renamed(f"{owner}.{old}", new, stacklevel=2)
        return getattr(self, new)

    def write(self: Any, value: Any) -> None:
        warn_renamed(f"{owner}.{old}", new, stacklevel=2)
        setattr(self, new, value)

    return property(read, write, doc=f"Old name of `{new}`.")
