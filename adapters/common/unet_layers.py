"""Where the self-attentions of diffusers' U-Nets are: their paths in execution order and their resolution level.

`named_modules` of these U-Nets lists the mid block after the up blocks, so its order is not the order in which the
layers run; nor is the order of `attn_processors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["checkpoints_reentrantly", "default_layer_index", "level_of", "levels_of", "self_attentions"]

UP_BLOCKS = {"up_blocks", "output_blocks"}
ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
PLACE = re.compile(r"(?:.+\.)?(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.attentions\.(\d+)\.(\w+)\.(\d+)\.attn1")


def self_attentions(model: nn.Module, *, prefix: str = "", blocks: str = "transformer_blocks") -> dict[str, nn.Module]:
    """List the modules `attn1` of a U-Net with Stable Diffusion's block names, in execution order.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> list(self_attentions(get_backbone("cat3d").build("tiny").unet))[0]
        'down_blocks.1.attentions.0.transformer_blocks.0.attn1'

    Args:
        model: `UNet2DConditionModel`, `UNetSpatioTemporalConditionModel` or a module that holds one.
        prefix: name of the U-Net inside `model`, such as "unet"; the paths returned start with it.
        blocks: list of transformer blocks to look into; "temporal_transformer_blocks" for video U-Nets.

    Returns:
        Modules by path relative to `model`; empty if there are none.
    """
    start = f"{prefix}." if prefix else ""
    found = []
    for path, module in model.named_modules():
        match = PLACE.fullmatch(path.removeprefix(start)) if path.startswith(start) else None
        if match and match[4] == blocks and path.startswith(start + match[1]):
            part, block, attention, _, depth = match.groups()
            found.append(((ORDER[part], int(block or 0), int(attention), int(depth)), path, module))
    return {path: module for _, path, module in sorted(found, key=lambda entry: entry[0])}


def level_of(model: nn.Module, path: str) -> int:
    """Count how often the latents were halved at this layer: its tokens are `latent stride * 2 ** level` pixels wide.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> level_of(get_backbone("cat3d").build("tiny").unet, "mid_block.attentions.0.transformer_blocks.0.attn1")
        1

    Args:
        model: the module that the path starts from.
        path: one of `self_attentions(model)`.
    """
    match = PLACE.fullmatch(path)
    if match is None:
        raise ValueError(f"path: expected the attn1 of a down, mid or up block, got {path!r}")
    unet = model.get_submodule(path[: match.start(1)].rstrip("."))
    coarsest = len(unet.down_blocks) - 1  # type: ignore[arg-type]
    part, block = match[1], int(match[2] or 0)
    return {"down_blocks": block, "mid_block": coarsest, "up_blocks": coarsest - block}[part]


def levels_of(model: nn.Module, paths: Iterable[str]) -> dict[str, int]:
    """Return `level_of` for several layers, by path."""
    return {path: level_of(model, path) for path in paths}


def default_layer_index(levels: Mapping[str, int]) -> int:
    """Position of the first attention of the up block one level below full resolution, or of the last layer.

    In the shape of Stable Diffusion 2.1 this is layer 10 of 16, the best of those that the paper compares.

    Example:
        >>> default_layer_index({"down_blocks.1.attn1": 1, "mid_block.attn1": 1, "up_blocks.0.attn1": 1})
        2

    Args:
        levels: how often the latents were halved at each attention, by its path, in execution order. The paths have
            the block names of diffusers or those of the original ldm code, for which `up_blocks` is `output_blocks`.
    """
    for index, (path, level) in enumerate(levels.items()):
        if level == 1 and UP_BLOCKS & set(path.split(".")):
            return index
    return len(levels) - 1


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether a part of `model` has gradient checkpointing switched on with a reentrant function.

    Reentrant checkpointing runs the forward without a graph, so queries and keys captured in it carry no gradient.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("cat3d").build("tiny").unet
        >>> unet.enable_gradient_checkpointing()
        >>> checkpoints_reentrantly(unet)
        False
    """
    functions = {
        getattr(module, "_gradient_checkpointing_func", None)
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
    }
    return any(_runs_without_graph(function) for function in functions if function is not None)


class _Probe(nn.Module):
    """Record whether its forward runs with a graph."""

    with_graph = True

    def forward(self, x: Tensor) -> Tensor:
        self.with_graph = torch.is_grad_enabled()
        return x * 1


def _runs_without_graph(checkpoint: Any) -> bool:
    probe = _Probe()
    with torch.enable_grad():
        checkpoint(probe, torch.zeros(1, requires_grad=True))
    return not probe.with_graph
