"""Where the files of a `Backbone.load` come from: names of bundled weights, and options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cameo.errors import unknown_name
from cameo.untrusted.asked import INDEX, check_pipeline

__all__ = ["BUNDLED_FOLDER", "PLACE_OPTIONS", "bundled_names", "place_of", "read_index", "unbundled"]

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


def read_index(name_or_path: str, revision: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `model_index.json` of a pipeline; a local folder is checked whole, before anything is built from it.

    Example:
        >>> read_index(unbundled("bundled:cat3d-transformer-tiny"), None, {})["_class_name"]
        'Cat3DPipeline'

    Raises:
        DataError: see `cameo.untrusted.asked.check_pipeline`.
        OSError: if there is no such pipeline.
    """
    from diffusers import DiffusionPipeline

    if (Path(name_or_path) / INDEX).exists():
        return check_pipeline(Path(name_or_path))
    index: dict[str, Any] = DiffusionPipeline.load_config(name_or_path, revision=revision, **place_of(options))
    return index


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
