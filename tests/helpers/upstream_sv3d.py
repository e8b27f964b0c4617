"""SGM's `VideoUNet` from a checkout of generative-models, narrow, and inputs for it.

Axes: B samples, V views, T frames, h w token grid.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cameo import Correspondence
from tests.helpers.upstream_imports import imports_from, xformers_by_sdpa

SAMPLES, FRAMES, GRID = 2, 3, (3, 4)  # the token grid of the supervised layer
CHANNELS, HEADS, CONTEXT, FEATURES = 32, 2, 8, 1280


@contextmanager
def sgm_modules(folder: Path) -> Iterator[SimpleNamespace]:
    """The Python modules around `VideoUNet`; its packages' own imports need Lightning and more, so they stay away."""
    with ExitStack() as stack:
        stack.enter_context(imports_from(folder))
        stack.enter_context(xformers_by_sdpa())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("sgm", "sgm.modules", "sgm.modules.diffusionmodules"):
            package = ModuleType(name)
            package.__path__ = [str(folder / name.replace(".", "/"))]
            patch.setitem(sys.modules, name, package)
        names = (
            "attention",
            "video_attention",
            *(f"diffusionmodules.{name}" for name in ("openaimodel", "util", "video_model")),
        )
        modules = [importlib.import_module(f"sgm.modules.{name}") for name in names]
        yield SimpleNamespace(**{module.__name__.rpartition(".")[2]: module for module in modules})


def build(sgm: SimpleNamespace, **options: Any) -> nn.Module:
    """The release's settings, but two levels and narrow; no weight is zero."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "in_channels": 8,
        "model_channels": CHANNELS,
        "out_channels": 4,
        "num_res_blocks": 1,
        "attention_resolutions": [1, 2],
        "channel_mult": [1, 2],
        "num_head_channels": CHANNELS // HEADS,
        "num_classes": "sequential",
        "adm_in_channels": FEATURES,
        "context_dim": CONTEXT,
        "use_linear_in_transformer": True,
        "extra_ff_mix_layer": True,
        "use_spatial_context": True,
        "merge_strategy": "learned_with_images",
        "video_kernel_size": [3, 1, 1],
        "spatial_transformer_attn_type": "softmax-xformers",
    }
    model = sgm.video_model.VideoUNet(**(settings | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.05)
    return model


def arguments(samples: int = SAMPLES, frames: int = FRAMES, grid: tuple[int, int] = GRID, **to: Any) -> dict[str, Any]:
    """Inputs whose supervised layer, one level down, has this token grid."""
    generator = torch.Generator().manual_seed(1)
    rows = samples * frames
    shapes = {
        "x": (rows, 8, 2 * grid[0], 2 * grid[1]),
        "timesteps": (rows,),
        "context": (rows, 1, CONTEXT),
        "y": (rows, FEATURES),
    }
    given = {name: torch.randn(shape, generator=generator).to(**to) for name, shape in shapes.items()}
    indicator = torch.zeros(samples, frames).to(**to)
    return {**given, "num_video_frames": frames, "image_only_indicator": indicator}


def matches(grid: tuple[int, int] = GRID, samples: int = SAMPLES, frames: int = FRAMES) -> Correspondence:
    """Every token matches the same cell of the next view."""
    tokens = grid[0] * grid[1]
    index = torch.full((samples, frames, frames, tokens), -1)
    for view in range(frames):
        index[:, view, (view + 1) % frames] = torch.arange(tokens)
    return Correspondence(index, (grid,) * frames)
