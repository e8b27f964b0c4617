"""Run a model that is in training for a look at it, and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cameo.wrap import CameoModel

__all__ = ["evaluation_mode", "native_precision"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off; every submodule gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def native_precision(model: CameoModel) -> Iterator[None]:
    """Autocast to the precision in which frozen weights are kept beside a float32 LoRA, as the training does."""
    parameters = list(model.base_model.parameters())
    half = next((one.dtype for one in parameters if one.dtype in (torch.float16, torch.bfloat16)), None)
    with torch.autocast(parameters[0].device.type, dtype=half, enabled=half is not None):
        yield
