"""Models of each kind that is saved, and what tests ask of them and of the folder they are saved in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel
from torch import nn

import cameo
from cameo.adapters.common.joint_views import inflate
from cameo.backbone import get_backbone

ADAPTER = get_backbone("cat3d")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LORA = "pytorch_lora_weights.safetensors"


def lora(**options: Any) -> LoraConfig:
    settings = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **options}
    return LoraConfig(**settings)


class Net(nn.Module):
    """A multi-view model that diffusers does not know."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.heads = 2

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key = (layer(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k))
        return nn.functional.scaled_dot_product_attention(query, key, key)


def plain_unet(folder: Path) -> UNet2DConditionModel:
    return inflate(UNet2DConditionModel.from_pretrained(folder, subfolder="unet"))


def wrapped(unet: nn.Module, base_model: Path | str | None = None) -> cameo.CameoModel:
    model = cameo.wrap(unet, backbone="cat3d")
    model.cameo_config.base_model = None if base_model is None else str(base_model)
    return model


def wrapped_lora(base: UNet2DConditionModel, base_model: Path | str | None = None) -> cameo.CameoModel:
    base.add_adapter(lora())
    return wrapped(base, base_model)


def wrapped_net(net: nn.Module) -> cameo.CameoModel:
    return cameo.wrap(net, layer="", layout="b (v h w)", heads=2)


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    args, kwargs = ADAPTER.example_inputs(model.get_base_model() if isinstance(model, PeftModel) else model)
    return model.eval()(*args, **kwargs).sample


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
