"""The published wrapper of Zero123++'s U-Net and its attention processor, by their structure."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from cameo.adapters.common.noise_schedules import linear_ddpm
from cameo.backbone import get_backbone

ADAPTER = get_backbone("zero123plus")


class PublishedProcessor(nn.Module):
    """Structure and behaviour of the published processor: a reference is gone once it was read."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.enabled, self.chained_proc = name, name.endswith("attn1.processor"), AttnProcessor2_0()

    def forward(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
        mode: str = "w", ref_dict: Any = None, is_cfg_guidance: bool = False,
    ) -> Tensor:  # fmt: skip
        tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if self.enabled and mode == "w":
            ref_dict[self.name] = tokens
        elif self.enabled:
            tokens = torch.cat([tokens, ref_dict.pop(self.name)], dim=1)
        return self.chained_proc(attn, hidden_states, tokens, attention_mask)

    __call__ = forward


class PublishedWrapper(nn.Module):
    """Structure of the published `RefOnlyNoisedUNet`."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        unet.set_attn_processor({name: PublishedProcessor(name) for name in unet.attn_processors})

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor, *, cross_attention_kwargs: Any) -> Any:
        stored: dict[str, Tensor] = {}
        given = cross_attention_kwargs
        noisy = linear_ddpm().add_noise(given["cond_lat"], given["cond_noise"], timestep)
        self.unet(noisy, timestep, context, cross_attention_kwargs={"mode": "w", "ref_dict": stored})
        reading = {"mode": "r", "ref_dict": stored, "is_cfg_guidance": False}
        return self.unet(sample, timestep, context, cross_attention_kwargs=reading)
