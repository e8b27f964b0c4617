"""Models and batches whose tensors have shapes and no contents, and what a GPU would do differently from a CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

__all__ = ["Fakes", "GpuAutocast", "encoders_of"]

# Functions of torch.nn.functional that autocast computes in float32 on CUDA, and in the precision of their input on a
# CPU: of all of them, those that the backbones keep tensors for.
FLOAT32_ON_CUDA = ("layer_norm", "group_norm")


class GpuAutocast:
    """Lets autocast on CPU tensors choose the precisions that it chooses on CUDA; can be entered again.

    Example:
        >>> with GpuAutocast(), torch.autocast("cpu", torch.bfloat16):
        ...     print(F.layer_norm(torch.ones(2, 4, dtype=torch.bfloat16), (4,)).dtype)
        torch.float32
    """

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> None:
        # Patched, since a TorchFunctionMode is not asked where a backward pass computes activations again.
        for name in FLOAT32_ON_CUDA:
            self._stack.enter_context(patch.object(F, name, _in_float32(getattr(F, name))))

    def __exit__(self, *raised: object) -> None:
        self._stack.close()


def _in_float32(function: Any) -> Any:
    def wide(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        args, kwargs = tree_map(_widened, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return wide


def _widened(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


class Fakes:
    """Turns modules and batches into ones without contents, and runs the encoders of a pipeline on them.

    Args:
        modes: context managers in which everything without contents is computed, from the outermost to the innermost.
    """

    def __init__(self, *modes: Any) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.modes = modes

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute on tensors without contents inside of the block."""
        with ExitStack() as stack:
            for mode in (self.mode, *self.modes):
                stack.enter_context(mode)
            yield

    def empty_module(self, module: nn.Module) -> None:
        """Replace parameters and buffers, of any device, by CPU tensors without contents, in place."""
        known: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None or isinstance(parameter, FakeTensor):
                    continue
                if id(parameter) not in known:
                    known[id(parameter)] = nn.Parameter(self._like(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = known[id(parameter)]
            for name, buffer in part._buffers.items():
                if buffer is not None and not isinstance(buffer, FakeTensor):
                    part._buffers[name] = self._like(buffer)

    def empty(self, value: Any) -> Any:
        """Return tensors, containers of tensors and dataclasses of them without their contents."""
        return tree_map(self._empty_leaf, value)

    def _empty_leaf(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._like(value)
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        found = object.__new__(type(value))  # whose checks would read values
        for entry in dataclasses.fields(value):
            object.__setattr__(found, entry.name, self.empty(getattr(value, entry.name)))
        return found

    def _like(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    @contextmanager
    def encoders_without_contents(self, encoders: Mapping[str, nn.Module]) -> Iterator[None]:
        """Let encoders take real tensors and return zeros of the right shapes, computed without contents."""
        with ExitStack() as stack:
            for module in encoders.values():
                name = "encode" if hasattr(module, "encode") else "forward"
                original = getattr(module, name)
                setattr(module, name, _Zeros(self, original))
                stack.callback(module.__dict__.pop, name)
            yield


class _Zeros:
    """A function that is computed without contents, for a caller that needs some."""

    def __init__(self, fakes: Fakes, function: Any) -> None:
        self.fakes, self.function = fakes, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.fakes.empty((args, kwargs))
        with self.fakes.computing(), torch.no_grad():
            result = self.function(*args, **kwargs)
            if hasattr(result, "latent_dist"):
                return _Encoded(_zeros(result.latent_dist.mode()))
        if hasattr(result, "latents"):
            return _Encoded(_zeros(result.latents))
        return type(result)(**{name: _zeros(value) for name, value in result.items()})


class _Encoded:
    """What a VAE returns, its distribution being one point."""

    def __init__(self, latents: Tensor) -> None:
        self.latents, self.latent_dist = latents, self

    def mode(self) -> Tensor:
        return self.latents


def _zeros(value: Any) -> Any:
    return tree_map(lambda one: torch.zeros(one.shape, dtype=one.dtype) if isinstance(one, Tensor) else one, value)


def encoders_of(pipeline: Any) -> dict[str, nn.Module]:
    """List the modules of a pipeline beside its denoiser, by name."""
    components = getattr(pipeline, "components", {})
    return {
        name: module
        for name, module in components.items()
        if isinstance(module, nn.Module) and module is not pipeline.denoiser
    }
