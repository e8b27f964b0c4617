"""Checkpoints of earlier releases, which hold pickles: read so that they cannot run code, or refused.

They have no checksums. torch reads a pickle with `weights_only=True`, which builds tensors, numbers and texts alone.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cameo.errors import DataError

__all__ = ["FILES", "check_readable", "read_part"]

# What the parts of a checkpoint were called, `{rank}` for the number of the process.
FILES = {
    "optimizer": "optimizer.bin",
    "scheduler": "custom_checkpoint_0.pkl",
    "average": "custom_checkpoint_1.pkl",
    "scaler": "scaler.pt",
    "random_states": "random_states_{rank}.pkl",
}
# What numpy's random state is made of; none of these runs code of the file.
_reconstruct = np.zeros(0).__reduce__()[0]
NUMPY: list[Any] = [
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]


def check_readable(folder: Path) -> None:
    """Open every file of a checkpoint, as far as is needed to see that it is complete.

    Raises:
        DataError: names the file that is damaged, holds more than tensors and numbers, or is missing.
    """
    from safetensors import SafetensorError, safe_open

    if not any((folder / FILES[part]).is_file() for part in ("optimizer", "scheduler")):
        raise DataError(f"{folder}: has neither checksums nor the files of an earlier release")
    for part in ("optimizer", "scheduler"):
        read_part(folder, part)
    optional = (FILES["average"], FILES["scaler"], FILES["random_states"].format(rank="*"))
    for path in (path for pattern in optional for path in sorted(folder.glob(pattern))):
        _read(path)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), "pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: damaged or cut short ({error})") from error


def read_part(folder: Path, part: str, rank: int = 0) -> Any:
    """Return the state of a part of a checkpoint; random states that are lost are None, with a warning.

    Raises:
        DataError: if the file is missing, damaged, or holds more than tensors and numbers.
    """
    path = folder / FILES[part].format(rank=rank)
    if part != "random_states":
        return _read(path)
    if not path.is_file():
        warnings.warn(
            f"{path}: is missing, so the random generators begin anew; with dropout, losses differ from those of a run "
            "that was not interrupted",
            stacklevel=4,
        )
        return None
    saved = _read(path)
    try:
        kind, keys, *rest = saved["numpy_random_seed"]
        return {
            "python": saved["random_state"],
            "numpy": (kind, np.asarray(keys).tolist(), *rest),
            "torch": saved["torch_manual_seed"],
            "devices": saved.get("torch_cuda_manual_seed", []),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: holds no states of random generators ({error!r})") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: is missing")
    try:
        with torch.serialization.safe_globals(NUMPY), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path}: a pickle that is damaged, or holds more than tensors and numbers, and so might run code; it was "
            "not run"
        ) from error
    except Exception as error:  # torch raises what a damaged archive happens to cause
        raise DataError(f"{path}: damaged or cut short ({type(error).__name__}: {error})") from error
