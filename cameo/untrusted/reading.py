"""Read a JSON object or the header of safetensors; whatever is wrong with the file is said with its name and a cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cameo.errors import DataError
from cameo.files import open_plain, parse_object

__all__ = ["CURE", "check_weights", "read_object"]

CURE = "Save, copy or download it again"
# A configuration is a few kilobytes; more than this is none, and would only fill the memory.
LARGEST_JSON = 64 << 20


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "config.json"
        >>> _ = path.write_text('{"heads": 4}')
        >>> read_object(path)
        {'heads': 4}

    Raises:
        DataError: if it cannot be read, or is no JSON object in UTF-8 with finite numbers, each key once.
    """
    try:
        with open_plain(path) as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"expected at most {LARGEST_JSON >> 20} MiB of JSON")
        return parse_object(content)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged or cut short ({error}). {CURE}") from error


def check_weights(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a safetensors file by name, without reading one; looks whether it is complete.

    A changed value within a tensor is not found: the format holds no checksums.

    Raises:
        DataError: if it cannot be read, is cut short, or is no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_plain(path).close()
        with safe_open(str(path), "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, ValueError, OverflowError, SafetensorError) as error:
        raise DataError(f"{path}: damaged or cut short ({error}). {CURE}") from error
