"""Where the files of a `Backbone.load` come from: names of bundled weights, and options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cameo.errors import unknown_name

__all__ = ["BUNDLED_FOLDER", "PLACE_OPTIONS", "bundled_names", "place_of", "unbundled"]

BUNDLED_FOLDER = Path(__file__).parents[1] / "weights"

PLACE_OPTIONS = ("cache_dir", "local_files_only", "token")


def place_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Select the options of a `Backbone.load` that say where its files come from; every read of a file takes them.

    Example:
        >>> place_of({"local_files_only": True, "torch_dtype": "auto"})
        {'local_files_only': True}
    """
    return {name: options[name] for name in PLACE_OPTIONS if name in options}


def bundled_names() -> list[str]:
    """List the weights that are part of this package, as `Backbone.load` takes them; each folder is a saved pipeline.

    Example:
        >>> "bundled:cat3d-transformer-tiny" in bundled_names()
        True
    """
    return sorted(f"bundled:{path.parent.name}" for path in BUNDLED_FOLDER.glob("*/model_index.json"))


def unbundled(name_or_path: str) -> str:
    """Return the folder of bundled weights, and every other name as it is.

    Example:
        >>> Path(unbundled("bundled:cat3d-transformer-tiny")).name, unbundled("me/rooms")
        ('cat3d-transformer-tiny', 'me/rooms')

    Raises:
        ValueError: for bundled weights that this package does not have; lists those it has.
    """
    if not name_or_path.startswith("bundled:"):
        return name_or_path
    known = bundled_names()
    if name_or_path not in known:
        raise unknown_name("bundled weights", name_or_path, known)
    return str(BUNDLED_FOLDER / name_or_path.removeprefix("bundled:"))
