"""Where the views meet in a CAT3D-style model: the self-attentions of a U-Net or of a transformer."""

from __future__ import annotations

from typing import Any

from torch import nn

from cameo.adapters.cat3d.denoiser import JointDiT, dit_attentions
from cameo.adapters.common.foreign_attention import LAYOUT, find_joining
from cameo.adapters.common.joint_views import joins_views, latent_stride_of
from cameo.adapters.common.unet_layers import default_layer_index, level_of, levels_of, self_attentions

__all__ = ["LAYOUT", "default_layer", "find_attentions", "token_stride"]

RELEASED_STRIDE = 8  # of Stable Diffusion's VAE, on which the U-Nets of others are built


def find_attentions(model: nn.Module) -> dict[str, Any]:
    """List the self-attentions of either kind of denoiser by path, in execution order; empty for other models.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> list(find_attentions(get_backbone("cat3d").build("transformer-tiny").unet))[-1]
        'transformer_blocks.5.attn1'
    """
    return dit_attentions(model) or self_attentions(model)


def token_stride(model: nn.Module, path: str) -> int | None:
    """Image pixels per token side of a layer; None where `inflate` was given no latent stride."""
    attention = model.get_submodule(path)
    by_itself = not joins_views(attention) and find_joining(attention) is not None
    latent_stride = RELEASED_STRIDE if by_itself else latent_stride_of(attention)
    if not latent_stride:
        return None
    return latent_stride * (model.config.patch_size if isinstance(model, JointDiT) else 2 ** level_of(model, path))


def default_layer(model: nn.Module) -> int:
    """Index of the layer to supervise, see `Cat3D.default_layer`."""
    if isinstance(model, JointDiT):
        return (len(model.transformer_blocks) - 1) // 2
    return default_layer_index(levels_of(model, self_attentions(model)))
