"""Where the frames meet in SV3D: the attentions of diffusers' video U-Nets and of SGM's `VideoUNet`.

SGM's code is recognized by its structure; nothing of it is imported. The module may be the U-Net itself or hold it as
`diffusion_model` or `model.diffusion_model`, as SGM's engine does.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch.utils.checkpoint
from torch import nn

from cameo.adapters.common.joined_frames import is_inflated
from cameo.adapters.common.unet_layers import levels_of, self_attentions
from cameo.attention.layout import TokenLayout

__all__ = [
    "embedding_width",
    "find_attentions",
    "find_levels",
    "own_view_layout",
    "reentrant_checkpointing",
    "resolution_levels",
    "token_layout",
    "token_strides",
    "use_non_reentrant_checkpointing",
    "video_attentions",
]

TEMPORAL, JOINED, APART = "(b h w) v", "b (v h w)", "(b v) (h w)"
SVD_NUMBERS = 3  # frame rate, motion bucket, noise on the condition image: 256 features each
RELEASED_STRIDE = 8  # of Stable Diffusion's VAE, the one that all released weights were trained with

PLACE = re.compile(
    r"((?:(?:model\.)?diffusion_model\.)?)((input_blocks|output_blocks)\.(\d+)|middle_block)\.\d+\.(\w+)\.\d+\.attn1"
)
ADDED_EMBEDDING = re.compile(r"(^|\.)(label_emb\.0\.0|add_embedding\.linear_1)(\.base_layer)?$")


def find_attentions(model: nn.Module, *, temporal: bool) -> dict[str, Any]:
    """List the attentions of one kind by path, in execution order; empty unless the model has temporal ones.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> list(find_attentions(get_backbone("sv3d").build("tiny").unet, temporal=True))[0]
        'down_blocks.1.attentions.0.temporal_transformer_blocks.0.attn1'

    Args:
        model: a video U-Net of diffusers or SGM, or a module that holds SGM's.
        temporal: True for the attentions over time, False for the self-attentions of one frame each.
    """
    if over_time := self_attentions(model, blocks="temporal_transformer_blocks"):
        return over_time if temporal else self_attentions(model)
    return video_attentions(model, "time_stack" if temporal else "transformer_blocks")


def find_levels(model: nn.Module, *, temporal: bool) -> dict[str, int]:
    """How often the latents were halved at each of these attentions, by path."""
    paths = find_attentions(model, temporal=temporal)
    if self_attentions(model, blocks="temporal_transformer_blocks"):
        return levels_of(model, paths)
    return dict(zip(paths, resolution_levels(model, list(paths)), strict=True))


def token_layout(model: nn.Module, *, temporal: bool) -> TokenLayout:
    """Layout of the tokens; the conditioning frame is the last one, but the first in Stable Video Diffusion."""
    return TokenLayout(TEMPORAL if temporal else JOINED, references_last=int(not _is_svd(model)))


def own_view_layout(model: nn.Module, path: str) -> TokenLayout:
    """Layout of a spatial attention where each frame's tokens stand for the reference, which is in its input channels.

    A layer whose frames `inflate` has joined is looked at within each frame all the same.
    """
    pattern = JOINED if is_inflated(model, path) else APART
    return TokenLayout(pattern, own_view_shows=0, references_last=int(not _is_svd(model)))


def token_strides(model: nn.Module, *, temporal: bool) -> dict[str, int | None]:
    """Image pixels per token side of each layer, by path; None where the model has no latent stride."""
    latent_stride = (getattr(model, "config", None) or {}).get("latent_stride", RELEASED_STRIDE)
    levels = find_levels(model, temporal=temporal)
    return {path: latent_stride and latent_stride * 2**level for path, level in levels.items()}


def embedding_width(model: nn.Module) -> int:
    """Number of features that enter the added embedding; 0 if there is none."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and ADDED_EMBEDDING.search(path):
            return module.in_features
    return 0


def _is_svd(model: nn.Module) -> bool:
    """Whether the added embedding takes the three numbers of Stable Video Diffusion, the conditioning frame first."""
    each = (getattr(model, "config", None) or {}).get("addition_time_embed_dim", 256)
    return embedding_width(model) == SVD_NUMBERS * each


def reentrant_checkpointing(model: nn.Module) -> str | None:
    """Say why reentrantly checkpointed transformer blocks cannot be supervised; None if there are none."""
    for module in model.modules():
        if getattr(module, "checkpoint", None) is not True or not hasattr(module, "attn1"):
            continue
        if any(_is_reentrant(function) for _, function in _checkpoint_functions(module)):
            return (
                f"{type(module).__name__} runs under reentrant gradient checkpointing, where queries and keys carry no "
                "gradient, so the alignment loss would train nothing. Call "
                "cameo.adapters.sv3d.use_non_reentrant_checkpointing(model), or build the model with "
                "use_checkpoint=False"
            )
    return None


def use_non_reentrant_checkpointing(model: nn.Module) -> list[str]:
    """Let the blocks of `model` checkpoint with `use_reentrant=False`, for the whole process.

    SGM's blocks call a function `checkpoint` that their Python modules import from torch, with no way to choose; this
    puts another function under that name in these modules, so every model that uses them is changed too. Outputs and
    gradients stay the same, memory too. A second call changes nothing.

    Example:
        >>> from torch import nn
        >>> use_non_reentrant_checkpointing(nn.Linear(2, 2))  # has no such blocks
        []

    Returns:
        Names of the Python modules that were changed.
    """
    changed = []
    for module in model.modules():
        if True not in (getattr(module, "checkpoint", None), getattr(module, "use_checkpoint", None)):
            continue
        for name, function in _checkpoint_functions(module):
            if _is_reentrant(function):
                safe = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
                sys.modules[name].checkpoint = safe  # type: ignore[attr-defined]
                changed.append(name)
    return changed


def _checkpoint_functions(module: nn.Module) -> Iterator[tuple[str, object]]:
    """List what is called `checkpoint` in the Python modules that define the class and its parents."""
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] != "torch" and kind.__module__ in sys.modules:
            yield kind.__module__, vars(sys.modules[kind.__module__]).get("checkpoint")


def _is_reentrant(function: object) -> bool:
    """Whether it is torch's function without `use_reentrant=False`; False for functions of others."""
    if isinstance(function, functools.partial):
        return _is_reentrant(function.func) and function.keywords.get("use_reentrant") is not False
    return function is torch.utils.checkpoint.checkpoint


def video_attentions(model: nn.Module, blocks: str) -> dict[str, nn.Module]:
    """Attentions of SGM's `VideoUNet`; empty if there are none, or if attentions over time are missing altogether."""
    found: dict[str, dict[str, nn.Module]] = {"time_stack": {}, "transformer_blocks": {}}
    for path, module in model.named_modules():  # registered in execution order
        if (match := PLACE.fullmatch(path)) and match[5] in found:
            found[match[5]][path] = module
    return found[blocks] if len(found["time_stack"]) == len(found["transformer_blocks"]) else {}


def resolution_levels(model: nn.Module, paths: list[str]) -> list[int]:
    """How often the latents were halved at each of these attentions of SGM's `VideoUNet`."""
    if not paths:
        return []
    match = PLACE.fullmatch(paths[0])
    assert match is not None
    unet = model.get_submodule(match[1].rstrip("."))
    level, level_of_block = 0, {}
    for part in ("input_blocks", "middle_block", "output_blocks"):
        module = unet.get_submodule(part)
        runs = {part: module} if part == "middle_block" else {f"{part}.{n}": m for n, m in module.named_children()}
        for name, block in runs.items():
            level_of_block[name] = level
            level += sum(map(_halvings, block.children()))
    places = [PLACE.fullmatch(path) for path in paths]
    return [level_of_block[place[2]] for place in places if place is not None]


def _halvings(module: nn.Module) -> int:
    """Return 1 for a module that halves the latents, -1 for one that doubles them."""
    resampler = module.h_upd if getattr(module, "updown", False) else module
    return {"Downsample": 1, "Upsample": -1}.get(type(resampler).__name__, 0)
