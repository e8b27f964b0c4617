"""MVDream's and ImageDream's own U-Nets and their diffusers port: narrow settings, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HEAD_CHANNELS = 16
SETTINGS: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1],
    "channel_mult": [1, 2, 2, 2],
    "context_dim": 24,
    "camera_dim": 16,
}
LDM = {"use_spatial_transformer": True, "legacy": False, "use_checkpoint": False}
LINEAR = {"num_head_channels": HEAD_CHANNELS, "use_linear_in_transformer": True}
OPENAI = "ldm.modules.diffusionmodules.openaimodel"
KINDS = ("port", "port-imagedream", "mvdream", "mvdream-1.5", "mvdream-einsum", "imagedream")


def randomize(model: nn.Module) -> nn.Module:
    """Fresh weights everywhere: the code starts many layers at zero, which would hide them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = noise + (1 if parameter.ndim == 1 and name.endswith("weight") else 0)
    return model.eval()


def inputs_of(unet: nn.Module, *, samples: int = 2, height: int = 8, width: int = 8) -> dict[str, Any]:
    """Arguments of the original forward; the image prompt is the last view and has no camera."""
    generator = torch.Generator().manual_seed(1)
    has_image = hasattr(unet, "image_embed")
    views = 4 if has_image else 3
    rows = samples * views

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    cameras = normal(samples, views, 16)
    if has_image:
        cameras[:, -1] = 0
    inputs = {
        "x": normal(rows, 4, height, width),
        "timesteps": torch.tensor([300.0, 700.0])[:samples].repeat_interleave(views),
        "context": normal(rows, 7, 24),
        "camera": cameras.flatten(0, 1),
        "num_frames": views,
    }
    if has_image:
        inputs["ip"] = normal(samples, 5, 1280).repeat_interleave(views, dim=0)
        inputs["ip_img"] = normal(samples, 4, height, width)
    return inputs
