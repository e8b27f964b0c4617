"""From the weights of Stable Diffusion's U-Net to those of a CAT3D-style one.

The names are the same in both; only the first convolution differs, which also reads the mask and the ray maps.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from cameo.adapters.cat3d.cameras import CONDITION_CHANNELS

__all__ = ["widen_input"]


def widen_input(unet: UNet2DConditionModel, channels: int = CONDITION_CHANNELS) -> UNet2DConditionModel:
    """Give the first convolution more input channels, in place, with weights of zero: the output stays as it is.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("mvdream").build("tiny").unet
        >>> widen_input(unet).config.in_channels - unet.config.out_channels
        7

    Args:
        unet: a U-Net of diffusers.
        channels: how many to append.
    """
    old = unet.conv_in
    wide = nn.Conv2d(old.in_channels + channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    wide = wide.to(old.weight)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : old.in_channels] = old.weight
        wide.bias.copy_(old.bias)  # type: ignore[union-attr]
    unet.conv_in = wide
    unet.register_to_config(in_channels=wide.in_channels)
    return unet
