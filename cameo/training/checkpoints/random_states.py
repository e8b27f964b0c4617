"""The states of the random generators of one process: of Python, numpy, torch, and of each GPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from cameo.errors import DataError

__all__ = ["random_states", "set_random_states"]


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all generators of this process, those of every GPU of the kind of `device` too.

    Example:
        >>> states = random_states(torch.device("cpu"))
        >>> first = (random.random(), np.random.rand(), torch.rand(()).item())
        >>> set_random_states(states, torch.device("cpu"))
        []
        >>> (random.random(), np.random.rand(), torch.rand(()).item()) == first
        True
    """
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what others may draw from
    states = {"python": random.getstate(), "numpy": (kind, np.asarray(keys).tolist(), *rest)}
    return states | {"torch": torch.get_rng_state(), "devices": _device_states(device)}


def set_random_states(states: dict[str, Any], device: torch.device) -> list[str]:
    """Set the generators to what `random_states` returned; returns what could not be restored, in words.

    Raises:
        DataError: if `states` is nothing that `random_states` returns.
    """
    try:
        random.setstate(states["python"])
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(states["torch"])
        saved, module = states["devices"], _module(device)
        here = len(_device_states(device))
        if module is not None and hasattr(module, "set_rng_state_all"):
            for number, state in enumerate(saved[:here]):
                module.set_rng_state(state, number)
        elif module is not None and saved:
            module.set_rng_state(saved[0])
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
        raise DataError(f"holds no states of random generators ({error!r})") from error
    if len(saved) != here:
        return [f"the checkpoint has the random states of {len(saved)} GPUs, and this process sees {here}"]
    return []


def _device_states(device: torch.device) -> list[torch.Tensor]:
    module = _module(device)
    if module is None:
        return []
    if hasattr(module, "get_rng_state_all"):
        return list(module.get_rng_state_all())
    return [module.get_rng_state()]


def _module(device: torch.device) -> Any:
    """The module of torch for a kind of GPU, if its generators have a state."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None
