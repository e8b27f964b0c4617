"""Settings files: YAML in which every scalar stays the text that was typed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from cameo.errors import DataError
from cameo.settings.interpolation import OPENING, Interpolated
from cameo.settings.text import Typed, guess, parse_yaml

__all__ = ["read_yaml", "to_yaml"]


def read_yaml(path: str | Path) -> dict[str, Typed]:
    """Read a settings file; the values are the texts that stand in it.

    Example:
        >>> import tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "run.yaml"
        >>> _ = file.write_text("mixed_precision: no\\nrevision: 1e3\\n")
        >>> read_yaml(file)
        {'mixed_precision': 'no', 'revision': '1e3'}

    Raises:
        DataError: if the file does not exist, is not UTF-8 or YAML, or holds no lines of `key: value`; names it.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such settings file")
    try:
        content = parse_yaml(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8 (byte {error.start}); save it as UTF-8") from error
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(content, Mapping):
        if content is None or content == "":
            return {}
        raise DataError(
            f"{path}: expected lines of `key: value`, got a {'list' if isinstance(content, list) else 'text'}"
        )
    return dict(content)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Write settings as YAML that reads back as the same values, here and with any other reader.

    Example:
        >>> print(to_yaml({"revision": "1e3", "rank": 4, "layer": None, "mixed_precision": "no"}), end="")
        revision: '1e3'
        rank: 4
        layer: null
        mixed_precision: 'no'
    """
    return str(yaml.dump(_plain(dict(values)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that some YAML reader could take for another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Text(str):
    """A text that must be quoted."""


_Dumper.add_representer(_Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'"))
PLAIN = re.compile(r"[A-Za-z_./][\w./ :+-]*")


def _plain(value: Any) -> Any:
    """Return a value in plain types, with interpolations as they were typed and `${` in other texts escaped."""
    if isinstance(value, Interpolated):
        return value.source
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, str):
        text = value.replace(OPENING, "\\" + OPENING)
        return str(text) if isinstance(guess(text), str) and PLAIN.fullmatch(text) else _Text(text)
    return value
