"""Options of a `Backbone.load` that say where its files come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PLACE_OPTIONS", "place_of"]

PLACE_OPTIONS = ("cache_dir", "local_files_only", "token")


def place_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Select the options of a `Backbone.load` that say where its files come from; every read of a file takes them.

    Example:
        >>> place_of({"local_files_only": True, "torch_dtype": "auto"})
        {'local_files_only': True}
    """
    return {name: options[name] for name in PLACE_OPTIONS if name in options}
