"""Where the views meet in MVDream and ImageDream: the self-attentions of diffusers' U-Net or of the original code's.

The original ldm code and its diffusers port are recognized by their structure; nothing of them is imported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from cameo.adapters.common import joint_views
from cameo.adapters.common.unet_layers import levels_of, self_attentions
from cameo.adapters.mvdream.cameras import CAMERA_CHANNELS
from cameo.attention.layout import TokenLayout

__all__ = [
    "attends_to_text",
    "checkpointed_blocks",
    "context_channels",
    "disable_checkpointing",
    "embeds_cameras",
    "find_attentions",
    "find_levels",
    "has_image_view",
    "joins_views",
    "ldm_unet",
    "set_image_view",
    "token_layout",
]

LDM_ATTENTION = re.compile(
    r"(?P<prefix>(?:.+\.)?)(?:(?P<part>input_blocks|output_blocks)\.(?P<block>\d+)|middle_block)\.1"
    r"\.transformer_blocks\.\d+\.attn1"
)


def find_attentions(model: nn.Module) -> dict[str, Any]:
    """List the self-attentions of either form of the U-Net by path, in execution order; empty for other models.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> list(find_attentions(get_backbone("mvdream").build("tiny").unet))[0]
        'down_blocks.1.attentions.0.transformer_blocks.0.attn1'
    """
    return _ldm_attentions(model) or self_attentions(model)


def find_levels(model: nn.Module) -> dict[str, int]:
    """How often the latents were halved at each of these attentions, by path."""
    attentions = find_attentions(model)
    unet = ldm_unet(model)
    return levels_of(model, attentions) if unet is None else _ldm_levels(unet, attentions)


def ldm_unet(model: nn.Module) -> Any:
    """Return the U-Net of the original code in `model`, which may hold it or be it; None for another model."""
    path = next(iter(_ldm_attentions(model)), None)
    match = LDM_ATTENTION.fullmatch(path or "")
    return match and model.get_submodule(match["prefix"].rstrip("."))


def joins_views(model: nn.Module) -> bool:
    """Whether all self-attentions join the views of a sample; those of the original code always do."""
    if _ldm_attentions(model):
        return True
    attentions = self_attentions(model).values()
    return bool(attentions) and all(map(joint_views.joins_views, attentions))


def embeds_cameras(model: nn.Module) -> bool:
    """Whether a diffusers U-Net has the camera embedding of MVDream.

    Example:
        >>> embeds_cameras(nn.Linear(2, 2))
        False
    """
    first = getattr(getattr(model, "class_embedding", None), "linear_1", None)
    return getattr(first, "in_features", None) == CAMERA_CHANNELS


def token_layout(unet: nn.Module) -> TokenLayout:
    """Layout of the tokens in every layer; ImageDream's image prompt is the last view, supervised like any other."""
    return TokenLayout("b (v h w)", references_last=int(has_image_view(unet)))


def has_image_view(unet: nn.Module) -> bool:
    """Whether the last view of the attention is ImageDream's image prompt."""
    declared = getattr(unet, "image_view", None)
    return getattr(unet, "image_embed", None) is not None if declared is None else bool(declared)


def set_image_view(unet: nn.Module, present: bool) -> nn.Module:
    """Say whether the last view of an ImageDream U-Net's attention is the image prompt, in place; returns the U-Net.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> adapter = get_backbone("mvdream")
        >>> unet = adapter.build("imagedream-tiny").unet
        >>> adapter.attention_layers(unet)[0].layout.references_last
        1
        >>> adapter.attention_layers(set_image_view(unet, False))[0].layout
        TokenLayout("b (v h w)")

    Only the model's caller knows: the original code takes the image as the argument `ip_img`, and the variant
    "ipmv-local", which is called without it, has the same layers. Call this before `cameo.wrap`, and
    again for a base model that is loaded anew.
    """
    original = ldm_unet(unet)
    (unet if original is None else original).image_view = present
    return unet


def disable_checkpointing(model: nn.Module) -> nn.Module:
    """Switch the original code's gradient checkpointing off, in place; returns the same model.

    Example:
        >>> block = nn.Module()
        >>> block.use_checkpoint = True
        >>> disable_checkpointing(block).use_checkpoint
        False
    """
    for module in model.modules():
        for name in ("checkpoint", "use_checkpoint"):
            if getattr(module, name, None) is True:
                setattr(module, name, False)
    return model


def attends_to_text(model: nn.Module, path: str) -> str | None:
    """Say why a layer of the original code cannot be supervised, if its self-attention is switched off."""
    block = model.get_submodule(path.rpartition(".")[0])
    if getattr(block, "disable_self_attn", False):
        return "its self-attention is disabled, so it attends to the text"
    return None


def context_channels(unet: nn.Module) -> int:
    """Channels of the text tokens that the cross-attentions of the original code read."""
    path = next(name for name, _ in unet.named_modules() if name.endswith("attn2.to_k"))
    return int(unet.get_submodule(path).in_features)  # type: ignore[arg-type]


def checkpointed_blocks(model: nn.Module) -> list[str]:
    """Blocks of the original code that run through its own `CheckpointFunction`; empty for diffusers' U-Net.

    The U-Net's own flag has no effect.
    """
    if hasattr(model, "down_blocks") or not _ldm_attentions(model):  # diffusers' own checkpointing does no harm
        return []
    return [name for name, module in model.named_modules() if _checkpoints(module)]


def _ldm_attentions(model: nn.Module) -> dict[str, Any]:
    """Self-attentions of the original code; they are registered in execution order."""
    return {
        path: module
        for path, module in model.named_modules()
        if LDM_ATTENTION.fullmatch(path)
        and all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "heads"))
        and _takes_views(model.get_submodule(path.rpartition(".")[0]))
    }


def _takes_views(block: nn.Module) -> bool:
    """Whether a transformer block is three-dimensional: it takes the number of views and joins them itself."""
    return "num_frames" in inspect.signature(type(block).forward).parameters


def _ldm_levels(unet: Any, attentions: Mapping[str, nn.Module]) -> dict[str, int]:
    resampled = {
        part: [any(type(module).__name__ == kind for module in block.modules()) for block in getattr(unet, part)]
        for part, kind in (("input_blocks", "Downsample"), ("output_blocks", "Upsample"))
    }
    coarsest, levels = sum(resampled["input_blocks"]), {}
    for path in attentions:
        match = LDM_ATTENTION.fullmatch(path)
        assert match is not None
        part, block = match["part"], int(match["block"] or 0)
        before = sum(resampled[part][:block]) if part else 0
        levels[path] = before if part == "input_blocks" else coarsest - before
    return levels


def _checkpoints(module: nn.Module) -> bool:
    in_attention = getattr(module, "checkpoint", None) is True and hasattr(module, "attn1")
    return in_attention or (getattr(module, "use_checkpoint", None) is True and hasattr(module, "emb_layers"))
