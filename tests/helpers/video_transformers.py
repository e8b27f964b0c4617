"""Narrow transformers of diffusers whose tokens can be those of several views, with the inputs of one forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from cameo import TokenLayout

__all__ = ["GRID", "TRANSFORMERS", "VIEWS", "Transformer"]

VIEWS, GRID, TEXT = 3, (3, 4), 5
CHANNELS = 4
ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": CHANNELS}


class Transformer(NamedTuple):
    """A class of diffusers with one kernel call per layer.

    `inputs` makes the keyword arguments of a forward from latents `[B, V, C, h, w]`.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[Tensor], dict[str, Any]]
    layer: str
    layout: TokenLayout

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()


def _text(samples: int) -> Tensor:
    return torch.randn(samples, TEXT, 16, generator=torch.Generator().manual_seed(1))


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        **ATTENTION,
    )


def _flux_inputs(latents: Tensor) -> dict[str, Any]:
    samples, views, channels, height, width = latents.shape
    places = torch.cartesian_prod(torch.arange(views), torch.arange(height), torch.arange(width))
    return {
        "hidden_states": latents.movedim(2, -1).reshape(samples, -1, channels),
        "encoder_hidden_states": _text(samples),
        "pooled_projections": torch.ones(samples, 8),
        "timestep": torch.full((samples,), 0.5),
        "img_ids": places.float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=12,
        patch_size=1,
        num_layers=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=CHANNELS,
        pos_embed_max_size=12,
        **ATTENTION,
    )


def _sd3_inputs(latents: Tensor) -> dict[str, Any]:
    samples = len(latents)
    return {
        "hidden_states": latents.transpose(1, 2).flatten(2, 3),  # the views below each other
        "encoder_hidden_states": _text(samples),
        "pooled_projections": torch.ones(samples, 8),
        "timestep": torch.full((samples,), 500),
    }


def _wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_layers=1,
        out_channels=CHANNELS,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        rope_max_seq_len=16,
        **ATTENTION,
    )


def _wan_inputs(latents: Tensor) -> dict[str, Any]:
    samples = len(latents)
    return {
        "hidden_states": latents.transpose(1, 2),
        "encoder_hidden_states": _text(samples),
        "timestep": torch.full((samples,), 500),
    }


_TEXT_FIRST, _TEXT_LAST = TokenLayout("b (t + v h w)", t=TEXT), TokenLayout("b (v h w + t)", t=TEXT)
TRANSFORMERS = {
    "FLUX.1 double": Transformer(_flux, _flux_inputs, "transformer_blocks.0.attn", _TEXT_FIRST),
    "FLUX.1 single": Transformer(_flux, _flux_inputs, "single_transformer_blocks.0.attn", _TEXT_FIRST),
    "SD3": Transformer(_sd3, _sd3_inputs, "transformer_blocks.0.attn", _TEXT_LAST),
    "SD3 last": Transformer(_sd3, _sd3_inputs, "transformer_blocks.1.attn", _TEXT_LAST),
    "Wan": Transformer(_wan, _wan_inputs, "blocks.0.attn1", TokenLayout("b (v h w)")),
}
