"""Settings as they were typed: text, and lists and mappings of text, before a type is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import yaml  # type: ignore[import-untyped]

__all__ = ["Quoted", "Typed", "guess", "is_null", "merged", "parse_yaml"]

# A text, or lists and mappings of texts.
Typed: TypeAlias = Any
NULLS = ("null", "Null", "NULL", "None", "~", "")
WHOLE = re.compile(r"[-+]?[0-9]+")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


class Quoted(str):
    """A text that was typed in quotes: it is a text even where it could be a number or null."""


class _TextLoader(yaml.BaseLoader):
    """Reads YAML without guessing types: every scalar is its text, marked where it was quoted."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text = super().construct_scalar(node)
        return text if node.style is None else Quoted(text)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Typed]:
        given: dict[str, Typed] = {}
        shared: dict[str, Typed] = {}
        for key_node, value_node in node.value:
            key, value = (self.construct_object(entry, deep=True) for entry in (key_node, value_node))
            if not isinstance(key, str) or is_null(key):
                raise yaml.constructor.ConstructorError(None, None, "expected a name before `:`", key_node.start_mark)
            if key == "<<":  # YAML's merge key
                for mapping in value if isinstance(value, list) else [value]:
                    shared = {**mapping, **shared}
            elif key in given:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            else:
                given[key] = value
        return {**shared, **given}


def parse_yaml(text: str) -> Typed:
    """Read YAML and leave every scalar the text it is.

    Example:
        >>> parse_yaml("{revision: 1e3, mixed_precision: no, layers: [0, mid]}")
        {'revision': '1e3', 'mixed_precision': 'no', 'layers': ['0', 'mid']}

    Raises:
        ValueError: if it is not YAML; names the line, and does not show it, since it may hold a secret.
    """
    try:
        return yaml.load(text, Loader=_TextLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"not valid YAML ({where}{error.problem or error.context})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not valid YAML ({type(error).__name__})") from None


def is_null(text: Typed) -> bool:
    """Tell whether a text means "no value": null, None, `~` or nothing, without quotes."""
    return text is None or (isinstance(text, str) and not isinstance(text, Quoted) and text in NULLS)


def guess(typed: Typed) -> Any:
    """Convert a text whose type is not known, as in `preset_options`: to None, a bool, a number, or a text.

    Example:
        >>> guess({"heads": "8", "scale": "1e-3", "norm": "no", "levels": ["true", "null"]})
        {'heads': 8, 'scale': 0.001, 'norm': 'no', 'levels': [True, None]}
    """
    if isinstance(typed, Mapping):
        return {str(name): guess(value) for name, value in typed.items()}
    if isinstance(typed, list):
        return [guess(value) for value in typed]
    if isinstance(typed, Quoted):
        return str(typed)
    if is_null(typed):
        return None
    if typed in ("true", "True", "false", "False"):
        return typed in ("true", "True")
    if WHOLE.fullmatch(typed):
        return int(typed)
    return float(typed) if NUMBER.fullmatch(typed) else str(typed)


def merged(below: Mapping[str, Typed], above: Mapping[str, Typed]) -> dict[str, Typed]:
    """Put settings over others; mappings in both are merged key by key.

    Example:
        >>> merged({"rank": "4", "preset_options": {"heads": "2"}}, {"preset_options": {"width": "8"}})
        {'rank': '4', 'preset_options': {'heads': '2', 'width': '8'}}
    """
    result = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result
