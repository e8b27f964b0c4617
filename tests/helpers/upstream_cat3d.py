"""The U-Nets of MVGenMaster and of CAMEO's authors, of the released depth but narrow; both are copies of diffusers'."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

KINDS = ("MVGenMaster", "CAMEO")  # names of the checkouts
GRID, VIEWS = (4, 4), 3  # tokens of layer 10 for the inputs below
APART = 320  # attentions of this width stay within a view, in the code of both


def modules_of(folder: Path) -> SimpleNamespace:
    """Import the U-Net's module and that of its attention processors, while `folder` is on the path."""
    from my_diffusers.models import attention_processor
    from my_diffusers.models.unets import unet_2d_condition

    assert Path(unet_2d_condition.__file__).is_relative_to(folder)
    return SimpleNamespace(unet=unet_2d_condition, processors=attention_processor)


def build(modules: SimpleNamespace, *, finest: int = 32) -> nn.Module:
    """A U-Net without text and with normalized queries and keys, as their settings have it; in training mode."""
    torch.manual_seed(0)
    unet = modules.unet.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(finest, 32, 32, 32),
        attention_head_dim=2,
        cross_attention_dim=None,
        norm_num_groups=8,
        num_class_embeds=3,
    )
    unet.use_rope = False  # their loading sets it
    for module in unet.modules():
        if hasattr(module, "to_q"):
            module.norm_q, module.norm_k = (nn.LayerNorm(module.inner_dim // module.heads) for _ in "qk")
    return unet.train()


def inputs(views: int = VIEWS) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One sample: latents of several views, one time step, no text, and the domain of the data."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, views, 4, 8, 8, generator=generator)
    return (latents, torch.tensor([400]), None), {"class_labels": torch.tensor([1])}
