"""Nested states, such as those of optimizers, as one safetensors file: tensors, and the structure around them as JSON.

| in the state | in the JSON of the header |
| --- | --- |
| None, bool, int, float, str, list, dict with names as keys | as JSON has them |
| tensor | `{"$tensor": name}` |
| tuple | `{"$tuple": [...]}` |
| dict with other keys, such as the numbers of parameters | `{"$pairs": [[key, value], ...]}` |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cameo.errors import DataError

__all__ = ["read_tensors", "state_to_bytes", "write_tensors"]

HEADER_KEY = "state"


def write_tensors(state: Any, path: str | Path) -> None:
    """Write a nested state of tensors, numbers, texts, lists, tuples and dicts to a safetensors file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "optimizer.safetensors"
        >>> write_tensors({"state": {0: {"step": torch.tensor(2.0)}}, "betas": (0.9, 0.999)}, path)
        >>> read_tensors(path)
        {'state': {0: {'step': tensor(2.)}}, 'betas': (0.9, 0.999)}

    Raises:
        TypeError: names what in the state is nothing of these.
        OSError: if the file cannot be written.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    structure = _encode(state, "", tensors)
    save_file(tensors, str(path), metadata={HEADER_KEY: json.dumps(structure)})


def state_to_bytes(state: Any) -> bytes:
    """Return the content of the file that `write_tensors` writes.

    Example:
        >>> len(state_to_bytes({"step": 2})) > 0
        True
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    structure = _encode(state, "", tensors)
    return save(tensors, metadata={HEADER_KEY: json.dumps(structure)})


def read_tensors(path: str | Path) -> Any:
    """Read what `write_tensors` wrote; the tensors are on the CPU, and are no views of the file.

    Raises:
        DataError: if the file is missing or damaged, or was written by something else; names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            structure = json.loads((file.metadata() or {})[HEADER_KEY])
            return _decode(structure, {name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: holds no state of a training that can be read ({error!r})") from error


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        # A copy on the CPU: tensors of a file may not share memory.
        tensors[place or "value"] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"$tensor": place or "value"}
    if isinstance(value, np.generic):
        return _encode(value.item(), place, tensors)
    if isinstance(value, dict):
        inner = {key: _encode(entry, f"{place}.{key}".lstrip("."), tensors) for key, entry in value.items()}
        if all(type(key) is str and not key.startswith("$") for key in inner):
            return inner
        return {"$pairs": [[_encode(key, place, tensors), entry] for key, entry in inner.items()]}
    if isinstance(value, list | tuple):
        entries = [_encode(entry, f"{place}.{number}".lstrip("."), tensors) for number, entry in enumerate(value)]
        return {"$tuple": entries} if isinstance(value, tuple) else entries
    raise TypeError(f"{place or 'state'}: {type(value).__name__} cannot be saved; expected tensors, numbers and texts")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "$tensor":
            return tensors[content]
        if kind == "$tuple":
            return tuple(_decode(entry, tensors) for entry in content)
        if kind == "$pairs":
            return {_decode(key, tensors): _decode(entry, tensors) for key, entry in content}
    return {key: _decode(entry, tensors) for key, entry in value.items()}
