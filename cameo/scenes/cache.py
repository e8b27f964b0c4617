"""Rendered scenes on disk: one safetensors file per scene, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from pathlib import Path

from torch import Tensor

from cameo.errors import DataError
from cameo.files import write_atomically
from cameo.scenes.views import Views

__all__ = ["default_cache_dir", "fingerprint", "read_views", "write_views"]

FIELDS = ("images", "depth", "intrinsics", "extrinsics")


def default_cache_dir() -> Path:
    """Return the folder of the environment variable `CAMEO_CACHE`, or `~/.cache/cameo`."""
    return Path(os.environ.get("CAMEO_CACHE") or Path.home() / ".cache" / "cameo").expanduser()


def fingerprint(settings: dict[str, object]) -> str:
    """Return 16 hexadecimal digits that change with any of the settings.

    Example:
        >>> fingerprint({"seed": 0}) == fingerprint({"seed": 1})
        False
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_views(path: Path, views: Views) -> None:
    """Write the views of one scene; a reader never sees a partial file.

    Raises `DataError` that names the folder where it cannot be written to.
    """
    from safetensors.torch import save

    tensors = {name: getattr(views, name).contiguous() for name in FIELDS}
    content = save(tensors, metadata={"key": views.key, "checksum": _checksum(tensors)})
    try:
        write_atomically(path, content)
    except OSError as error:
        raise DataError(
            f"{path.parent}: cannot write the scene cache ({error}); pass cache_dir= or set CAMEO_CACHE to a "
            "folder with room and write access"
        ) from error


def read_views(path: Path) -> Views | None:
    """Read the views of one scene; None where the file is absent, or damaged (with a warning)."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: tensors of a mapped file crash the process once somebody truncates it.
            tensors = {name: file.get_tensor(name).clone() for name in FIELDS}
            metadata = file.metadata()
        if metadata["checksum"] != _checksum(tensors):
            raise ValueError("checksum differs")
        return Views(**tensors, key=metadata["key"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{path}: damaged scene cache ({error}); the scene is rendered again", stacklevel=3)
        return None


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for name in FIELDS:
        value = zlib.crc32(tensors[name].contiguous().numpy().tobytes(), value)
    return f"{value:08x}"
