"""`${oc.env:NAME}` and `${other_setting}` in settings: they are used resolved, and written and compared as typed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cameo.settings.text import Typed, is_null

__all__ = ["Interpolated", "comparable", "has_interpolation", "marked", "resolve", "shown_settings"]

OPENING = "${"


class Interpolated:
    """A value that came from an interpolation; `source` is what was typed, which is all that is ever written."""

    source: str = ""


class InterpolatedText(Interpolated, str):
    """A text from an interpolation, which error messages show as it was typed."""

    def __repr__(self) -> str:
        return repr(self.source)


class InterpolatedInt(Interpolated, int):
    """A whole number from an interpolation."""


class InterpolatedFloat(Interpolated, float):
    """A number from an interpolation."""


class InterpolatedList(Interpolated, list[Any]):
    """A list from an interpolation."""


class InterpolatedDict(Interpolated, dict[str, Any]):
    """A mapping from an interpolation."""


MARKED: dict[type, Any] = {
    str: InterpolatedText,
    int: InterpolatedInt,
    float: InterpolatedFloat,
    list: InterpolatedList,
    dict: InterpolatedDict,
}


def marked(value: Any, typed: Typed) -> Any:
    """Let a value remember the interpolation it was typed as; None, true and false cannot, and are never secrets."""
    if isinstance(typed, Interpolated) and type(value) in MARKED:
        value = MARKED[type(value)](value)
        value.source = typed.source
    return value


def has_interpolation(typed: Typed) -> bool:
    """Tell whether there is an interpolation anywhere in what was typed."""
    if isinstance(typed, Mapping):
        return any(has_interpolation(value) for value in typed.values())
    if isinstance(typed, list):
        return any(has_interpolation(value) for value in typed)
    return isinstance(typed, str) and OPENING in typed


def resolve(typed: Mapping[str, Typed], defaults: Mapping[str, Any]) -> dict[str, Typed]:
    """Resolve the interpolations among settings; they may name settings that are left at their default.

    Example:
        >>> resolve({"seed": "3", "output_dir": "runs/${backbone}-${seed}"}, {"backbone": "cat3d"})["output_dir"] + "!"
        'runs/cat3d-3!'

    Raises:
        ValueError: for a name that does not exist; names the setting, and shows no value.
    """
    if not has_interpolation(typed):
        return dict(typed)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = {name: json.loads(json.dumps(value)) for name, value in defaults.items()}
    try:
        container = OmegaConf.create({**known, **_plain(typed)})
    except OmegaConfBaseException as error:
        names = ", ".join(name for name, value in typed.items() if has_interpolation(value))
        raise ValueError(
            f"{names}: expected interpolations as ${{oc.env:NAME}} ({str(error).splitlines()[0]})"
        ) from None
    resolved_settings = dict(typed)
    for name, value in typed.items():
        if has_interpolation(value):
            try:
                resolved = OmegaConf.select(container, name, throw_on_missing=True)
                if OmegaConf.is_config(resolved):
                    resolved = OmegaConf.to_container(resolved, resolve=True)
            except OmegaConfBaseException as error:
                raise ValueError(f"{name}: {str(error).splitlines()[0]}") from None
            resolved_settings[name] = _put_in(value, resolved)
    return resolved_settings


def shown_settings(settings: Any) -> dict[str, Any]:
    """Return the settings that may be written or shown: without secrets, and with interpolations as they were typed."""
    return {
        entry.name: None if entry.metadata.get("secret") else _as_typed(getattr(settings, entry.name))
        for entry in fields(settings)
    }


def comparable(value: Any) -> Any:
    """Return what a checkpoint keeps of a value, to be compared with on resuming.

    An interpolation is kept as it was typed, with digits of a hash that tells whether it had the same value.
    """
    if isinstance(value, Interpolated):
        digits = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
        return f"{value.source} ({digits})"
    if isinstance(value, Mapping):
        return {name: comparable(entry) for name, entry in value.items()}
    return [comparable(entry) for entry in value] if isinstance(value, list | tuple) else value


def _as_typed(value: Any) -> Any:
    if isinstance(value, Interpolated):
        text = InterpolatedText(value.source)
        text.source = value.source
        return text
    if isinstance(value, Mapping):
        return {name: _as_typed(entry) for name, entry in value.items()}
    return [_as_typed(entry) for entry in value] if isinstance(value, list | tuple) else value


def _plain(typed: Typed) -> Any:
    """Return what was typed in plain types, as OmegaConf needs it."""
    if isinstance(typed, Mapping):
        return {str(name): _plain(value) for name, value in typed.items()}
    if isinstance(typed, list):
        return [_plain(value) for value in typed]
    return None if is_null(typed) else str(typed)


def _put_in(typed: Typed, resolved: Any) -> Typed:
    """Replace the interpolations in what was typed by their resolved text."""
    if isinstance(typed, Mapping):
        return {name: _put_in(value, resolved[name]) for name, value in typed.items()}
    if isinstance(typed, list):
        return [_put_in(*pair) for pair in zip(typed, resolved, strict=True)]
    if not has_interpolation(typed):
        return typed
    text = InterpolatedText(resolved if isinstance(resolved, str) else json.dumps(resolved))
    text.source = str(typed)
    return text
