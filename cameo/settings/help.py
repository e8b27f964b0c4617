"""`--help`: the settings of a recipe by component, each with the comment above its field."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cameo.settings.convert import describe, setting_fields, types_of

__all__ = ["Entry", "comments", "components", "entries_by_component", "help_text"]

WIDTH = 100
USAGE = (
    "Settings are given as key=value, --key=value or --key value, lists as [a,b] or a,b, mappings as {a: 1} or "
    "key.a=1, and None as null. config=FILE names a YAML file of settings; those of the command line take precedence; "
    "${oc.env:NAME} in it is the environment variable NAME. --print-config prints the settings that a run would use."
)


@dataclass(frozen=True)
class Entry:
    """What is said of one setting: its name, its default and its values as they are typed, and its comment."""

    name: str
    default: str
    values: str
    comment: str


def help_text(about: str, kinds: Sequence[type]) -> str:
    """Return the help of a recipe: what it does, how settings are given, and the settings by component."""
    sections = [about.strip(), textwrap.fill(USAGE, WIDTH)]
    for title, entries in entries_by_component(kinds):
        sections.append("\n".join([title, "-" * len(title), *map(_shown, entries)]))
    return "\n\n".join(sections)


def entries_by_component(kinds: Sequence[type]) -> Iterator[tuple[str, list[Entry]]]:
    """List the settings of these dataclasses by component, each once: the component's title and its settings.

    Example:
        >>> from cameo.data.settings import DataSettings
        >>> [(title, entries)] = entries_by_component([DataSettings])
        >>> title, next(entry.default for entry in entries if entry.name == "num_views")
        ('Data: a folder of posed images or meshes, or embedded scenes', '3')
    """
    shown: set[str] = set()
    for kind in kinds:
        for component in components(kind):
            known = comments(component)
            entries = [
                _entry(kind, name, known.get(name, ""))
                for name in vars(component).get("__annotations__", {})
                if name in setting_fields(kind) and name not in shown
            ]
            shown |= setting_fields(component).keys()
            if entries:
                yield (inspect.getdoc(component) or component.__name__).split("\n")[0].rstrip("."), entries


def components(kind: type) -> Iterator[type]:
    """List the dataclasses that a dataclass of settings is composed of, in the order of their settings."""
    return (component for component in reversed(kind.__mro__) if dataclasses.is_dataclass(component))


def comments(kind: type) -> dict[str, str]:
    """Return the comment above each field of a dataclass, on one line.

    Example:
        >>> from cameo.data.settings import DataSettings
        >>> comments(DataSettings)["num_views"][:15]
        'Views per sampl'
    """
    lines = textwrap.dedent(inspect.getsource(kind)).splitlines()
    body = ast.parse("\n".join(lines)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            texts[node.target.id] = " ".join(line.strip().lstrip("# ") for line in lines[first : node.lineno - 1])
    return texts


def _entry(kind: type, name: str, comment: str) -> Entry:
    entry = setting_fields(kind)[name]
    choices = entry.metadata.get("choices")
    type_ = types_of(kind)[name]
    values = ", ".join(choices) if choices else describe(type_)
    if choices and type(None) in getattr(type_, "__args__", ()):
        values += " or null"
    default: Any = entry.default if entry.default is not dataclasses.MISSING else None
    if entry.default_factory is not dataclasses.MISSING:
        default = entry.default_factory()
    return Entry(name, default if isinstance(default, str) else json.dumps(default), values, comment)


def _shown(entry: Entry) -> str:
    head = f"  {entry.name}={entry.default}  ({entry.values})"
    head = textwrap.fill(head, WIDTH, subsequent_indent=" " * 6, drop_whitespace=True)
    return "\n".join([head, textwrap.fill(entry.comment, WIDTH, initial_indent="      ", subsequent_indent="      ")])
