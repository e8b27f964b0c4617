"""A toy model without an adapter and a narrow tiny U-Net, matches for both, and what tests ask of them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import cameo
from cameo import Correspondence
from cameo.backbone import get_backbone

GRID = (2, 3)
WIDTH = 8
LAYER = "blocks.1.attention"
DESCRIBED = {"layer": "mid_block.attentions.0", "layout": "b (v h w)", "heads": 2}  # of the U-Net


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(p(x), "b n (k d) -> b k n d", k=2) for p in (self.to_q, self.to_k, self.to_v))
        return self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b k n d -> b n (k d)"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x).tanh()


class Toy(nn.Module):
    """Three blocks over the joined tokens of all views."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.label = "toy"

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def toy(**options: Any) -> cameo.CameoModel:
    torch.manual_seed(0)
    return cameo.wrap(Toy(), layer=options.pop("layer", LAYER), layout="b (v h w)", **options)


def tokens(samples: int = 2, views: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, views * GRID[0] * GRID[1], WIDTH, generator=generator)


def matches(samples: int = 2, views: int = 2, grid: tuple[int, int] = GRID, seed: int = 0) -> Correspondence:
    """Random matches, half of the tokens visible."""
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    index = torch.randint(count, (samples, views, views, count), generator=generator)
    index[torch.rand(index.shape, generator=generator) < 0.5] = -1
    index[:, range(views), range(views)] = -1
    return Correspondence(index, (grid,) * views)


def nothing_visible(samples: int = 2, views: int = 2, grid: tuple[int, int] = GRID) -> Correspondence:
    return Correspondence(torch.full((samples, views, views, grid[0] * grid[1]), -1), (grid,) * views)


@functools.cache
def shared_unet() -> nn.Module:
    """A narrow tiny U-Net that tests share, so that none of them may change it; see `unet`."""
    torch.manual_seed(0)
    return (
        get_backbone("cat3d")
        .build("tiny", block_out_channels=(16, 32), heads=2, norm_num_groups=8, position="none")
        .unet
    )


def unet(kind: str = "plain") -> nn.Module:
    """A narrow tiny U-Net, plain or with LoRA (not zero, as after training)."""
    model = copy.deepcopy(shared_unet())
    if kind == "plain":
        return model
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    settings = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets)
    if kind == "peft":
        return get_peft_model(model, settings)
    model.requires_grad_(False)
    model.add_adapter(settings)
    return model


def inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return get_backbone("cat3d").example_inputs(model)


UNET_MATCHES = matches(1, 2, (4, 4))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def run_loss(model: cameo.CameoModel) -> Tensor:
    model(tokens(), correspondence=matches())
    return model.alignment_loss
