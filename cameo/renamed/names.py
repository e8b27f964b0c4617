"""Functions, keywords, attributes, methods, settings and keys of saved files under the names of earlier releases.

The tables below are the only place that knows an old name; `cameo.renamed.modules` is the same for modules. Every use
of an old name gives a `FutureWarning` that says what to write instead.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar

__all__ = [
    "ATTRIBUTES",
    "CONFIG_KEYS",
    "FUNCTIONS",
    "KEYWORDS",
    "METHODS",
    "SETTINGS",
    "old_attributes",
    "old_fields",
    "old_functions",
    "old_keywords",
    "rename_keys",
    "warn_renamed",
]

P = ParamSpec("P")
R = TypeVar("R")
Class = TypeVar("Class", bound=type)

# Module: old name of a function or type in it, new name, with its module where that is another one.
FUNCTIONS: dict[str, dict[str, str]] = {
    "cameo.backbone": {"core_module": "unwrap_peft"},
    "cameo.data.matches": {"Sizes": "cameo.geometry.grids.TokenGrids"},
    "cameo.evaluation.validation": {
        "covisible_pixels": "cameo.probing.denoising.covisible_pixels",
        "denoising_passes": "cameo.probing.denoising.denoising_passes",
        "fixed_inputs": "cameo.probing.denoising.fixed_inputs",
        "sample_batches": "cameo.probing.denoising.sample_batches",
    },
    "cameo.model": {"holder": "wrapper_of"},
    "cameo.training.data": {"to_device": "cameo.data.batches.to_device"},
    "cameo.training.setup": {"arms_of": "planned_runs"},
}
# Callable, by its qualified name: old keyword, new keyword.
KEYWORDS: dict[str, dict[str, str]] = {
    "CameoConfig": {"normalise": "normalize"},
    "CameoModel.capture": {"sites": "layers"},
    "CameoModel.push_to_hub": {"licence": "license"},
    "CameoModel.save_pretrained": {"licence": "license"},
    "CameoModel.split": {"site": "layer"},
    "Correspondence": {"sizes": "token_grids", "weight": "match_weight"},
    "Correspondence.from_depth": {"size": "token_grid"},
    "Correspondence.from_features": {"size": "token_grid"},
    "Correspondence.from_point_maps": {"size": "token_grid"},
    "LayerProbe": {"timesteps": "noise_levels"},
    "ProbeResult.chance": {"timestep": "noise_level"},
    "ProbeResult.per_scene": {"timestep": "noise_level"},
    "ProbeResult.precision": {"timestep": "noise_level"},
    "ProbeResult.skill": {"timestep": "noise_level"},
    "TokenLayout.locate": {"sizes": "token_grids"},
    "TokenLayout.refusal": {"normalise": "normalize"},
    "TokenLayout.shape": {"sizes": "token_grids"},
    "TokenLayout.split_key": {"sizes": "token_grids"},
    "TokenLayout.split_query": {"sizes": "token_grids"},
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
    "Release": {"licence": "license"},
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
    """Warn that `old` is now called `new`; `stacklevel` counts from the caller of this function."""
    warnings.warn(f"{old} is now called {new}; the next release drops the old name", FutureWarning, stacklevel + 1)


def old_functions(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module, which finds the functions that `FUNCTIONS` lists under their old names."""

    def get(name: str) -> Any:
        if name not in FUNCTIONS[module]:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = FUNCTIONS[module][name]
        warn_renamed(f"{module}.{name}", new, stacklevel=2)
        place, _, current = new.rpartition(".")
        return getattr(importlib.import_module(place or module), current)

    return get


def old_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: accept the keywords that `KEYWORDS` lists for this function under their old names too.

    Raises:
        TypeError: in the call, if a value is given under both names.
    """
    name = function.__qualname__
    table = KEYWORDS[name]

    @functools.wraps(function)
    def accepting(*args: P.args, **kwargs: P.kwargs) -> R:
        _rename_keywords(name, table, kwargs)
        return function(*args, **kwargs)

    return accepting


def old_fields(table: Mapping[str, str]) -> Callable[[Class], Class]:
    """Class decorator: accept fields of a dataclass under their old names too, as keywords and in old pickles.

    `dataclasses.replace` passes every field under its new name, and then what the caller changes. Where all fields
    are given, a value under an old name is therefore such a change, and counts.

    Example:
        >>> import warnings
        >>> from dataclasses import dataclass
        >>> @old_fields({"weight": "loss_weight"})
        ... @dataclass
        ... class Loss:
        ...     loss_weight: float = 0.02
        >>> with warnings.catch_warnings(action="ignore"):
        ...     Loss(weight=0.5).loss_weight
        0.5

    Raises:
        TypeError: in the call, if a value is given under both names.
    """

    def decorate(cls: Class) -> Class:
        initialize = vars(cls)["__init__"]
        names = {entry.name for entry in fields(cls) if entry.init}

        @functools.wraps(initialize)
        def accepting(self: Any, *args: Any, **kwargs: Any) -> None:
            _rename_keywords(cls.__name__, table, kwargs, by_replace=names <= kwargs.keys())
            initialize(self, *args, **kwargs)

        def restore(self: Any, state: Mapping[str, Any]) -> None:
            vars(self).update(rename_keys(state, table, f"pickled {cls.__name__}"))

        # setattr, since a type checker takes the assignments for ones to an instance.
        setattr(cls, "__init__", accepting)  # noqa: B010
        setattr(cls, "__setstate__", restore)  # noqa: B010
        return cls

    return decorate


def _rename_keywords(owner: str, table: Mapping[str, str], kwargs: dict[str, Any], *, by_replace: bool = False) -> None:
    """Give the keywords of a call their new names, in place; to be called by what the user calls."""
    for old in table.keys() & kwargs.keys():
        new = table[old]
        if new in kwargs and not by_replace:
            raise TypeError(f"{owner}: got {old}= and {new}=, which are one argument; give {new}= alone")
        warn_renamed(f"{owner}({old}=)", f"{new}=", stacklevel=3)
        kwargs[new] = kwargs.pop(old)


def old_attributes(cls: Class) -> Class:
    """Class decorator: give the attributes that `ATTRIBUTES` lists for this class under their old names too."""
    for old, new in ATTRIBUTES[cls.__name__].items():
        setattr(cls, old, _old_attribute(cls.__name__, old, new))
    return cls


def rename_keys(values: Mapping[str, Any], table: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return the values of a saved file or pickle with the current keys; no warning, since nobody has to change it.

    Example:
        >>> rename_keys({"normalise": "per_view", "weight": 0.1}, {"normalise": "normalize"}, "cameo_config.json")
        {'normalize': 'per_view', 'weight': 0.1}

    Raises:
        ValueError: if it holds a value under both names.
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
