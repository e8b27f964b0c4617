"""Run a module that has just run once more, so that nothing but time shows it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_leaves, tree_unflatten

__all__ = ["CannotTell", "left_as_it_was", "random_state_held", "run_again"]


class CannotTell(Exception):  # noqa: N818 - it is an answer and not a mistake
    """Why a check has no answer."""


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Give a module back with the attributes and buffers that it, its submodules and their processors had.

    Inside the block the hooks of the submodules do not run, no graph is recorded, and autocast caches nothing, since a
    cast of a weight that was made without a graph would cut off its gradient.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with left_as_it_was(layer):
        ...     layer.runs = 1
        >>> hasattr(layer, "runs")
        False
    """
    parts = list(module.modules())
    holders = [*parts, *(part.processor for part in parts if hasattr(part, "processor"))]
    before = [(holder, dict(vars(holder))) for holder in holders if hasattr(holder, "__dict__")]
    caches = torch.is_autocast_cache_enabled()
    try:
        torch.set_autocast_cache_enabled(False)
        for part in parts:
            buffers = {name: None if buffer is None else buffer.clone() for name, buffer in part._buffers.items()}
            vars(part).update(_buffers=buffers, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(caches)
        for holder, attributes in before:
            for name in set(vars(holder)) - set(attributes):
                del vars(holder)[name]
            vars(holder).update(attributes)


def random_state_held(device: torch.device) -> AbstractContextManager[None]:
    """Return a block after which the random states of the CPU and of a device are as before.

    Example:
        >>> with random_state_held(torch.device("cpu")):
        ...     first = torch.rand(1)
        >>> torch.equal(first, torch.rand(1))
        True

    Raises:
        CannotTell: the device does not give its random state.
    """
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    if not hasattr(getattr(torch, device.type, None), "set_rng_state_all"):
        raise CannotTell(f"the random state of {device.type} cannot be held")
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def run_again(module: nn.Module, leaves: Sequence[Any], form: TreeSpec) -> list[Tensor]:
    """Run `module.forward` without its hooks on copies of the arguments, with the random numbers of every such run.

    Example:
        >>> from torch.utils._pytree import tree_flatten
        >>> leaves, form = tree_flatten(((torch.ones(1, 2),), {}))
        >>> [output.shape for output in run_again(nn.Linear(2, 3), leaves, form)]
        [torch.Size([1, 3])]

    Args:
        module: in `left_as_it_was`.
        leaves, form: its arguments `(args, kwargs)`, flattened.

    Returns:
        All tensors of floating-point numbers in what it returns, without a graph.
    """
    args, kwargs = tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], form)
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
    with random_state_held(device):
        output = module.forward(*args, **kwargs)
    return [leaf.detach() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
