"""Stand-ins for U-Nets of other authors that join the views themselves: the traits of the published ones, own code."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

HEADS, WIDTH = 2, 16
FINE_WIDTH = 8  # attentions of this width stay within a view, as those of the published ones with 320 channels do


class FrameAttention(nn.Module):
    """Attention of a copy of diffusers: drops what its processor does not take, and normalizes queries and keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads, self.inner_dim = HEADS, width
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = nn.LayerNorm(width // HEADS), nn.LayerNorm(width // HEADS)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.5)])
        self.processor: Any = FrameProcessor()

    def get_processor(self) -> Any:
        return self.processor

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        taken = self.processor.takes & {*options}
        return self.processor(self, hidden_states, **{name: options[name] for name in taken})

    def attend(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        found = F.scaled_dot_product_attention(self.norm_q(query), self.norm_k(key), value)
        return self.to_out[1](self.to_out[0](found.transpose(1, 2).flatten(2)))


class FrameProcessor:
    """Joins the views by folding them into the tokens, but in the attentions of the finest level."""

    takes = frozenset({"how_many", "coordinates"})

    def __call__(
        self, attn: FrameAttention, hidden_states: Tensor, how_many: int | None = None, coordinates: Any = None
    ) -> Tensor:
        if how_many is None or attn.inner_dim == FINE_WIDTH:
            return attn.attend(hidden_states)
        samples, tokens = len(hidden_states) // how_many, hidden_states.shape[1]
        return attn.attend(hidden_states.reshape(samples, how_many * tokens, -1)).reshape(hidden_states.shape)


class SeparateProcessor:
    """Another kernel of the copy, which knows nothing of views."""

    takes: frozenset[str] = frozenset()

    def __call__(self, attn: FrameAttention, hidden_states: Tensor) -> Tensor:
        return attn.attend(hidden_states)


NARROW: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (FINE_WIDTH, WIDTH),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": HEADS,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
}


class FrameUNet(UNet2DConditionModel):
    """A copy of diffusers' U-Net that takes samples of views, `[B, V, C, h, w]`, with one time step for each sample."""

    @functools.wraps(UNet2DConditionModel.__init__)  # the signature is read
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.modules():
            if hasattr(block, "attn1"):
                block.attn1 = FrameAttention(block.attn1.inner_dim)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        views = sample.shape[1]
        each = {"repeats": views, "dim": 0}
        return super().forward(
            sample.flatten(0, 1),
            timestep.repeat_interleave(**each),
            encoder_hidden_states.repeat_interleave(**each),
            class_labels.repeat_interleave(**each),
            cross_attention_kwargs={"how_many": views},
            **options,
        )


class Fold(AttnProcessor2_0):
    """A processor for diffusers' own U-Net, told the number of views by `cross_attention_kwargs`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        n: int = 1,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states)
        joined = self.fold(hidden_states, n)
        return self.unfold(super().__call__(attn, joined), n, len(hidden_states))

    def fold(self, x: Tensor, n: int) -> Tensor:
        return x.reshape(len(x) // n, -1, x.shape[-1])

    def unfold(self, x: Tensor, n: int, rows: int) -> Tensor:
        return x.reshape(rows, -1, x.shape[-1])


class FoldOfThree(Fold):
    """Knows the number of views."""

    def __init__(self) -> None:
        super().__init__()
        self.group = 3

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, n=self.group)


class FoldByView(Fold):
    """The samples of a view follow each other, `(v b)`: not the order of a batch of `cameo`."""

    def fold(self, x: Tensor, n: int) -> Tensor:
        return super().fold(x.unflatten(0, (n, -1)).transpose(0, 1).flatten(0, 1), n)

    def unfold(self, x: Tensor, n: int, rows: int) -> Tensor:
        return super().unfold(x, n, rows).unflatten(0, (-1, n)).transpose(0, 1).flatten(0, 1)


class FoldTokensFirst(Fold):
    """The views of a cell follow each other, `(n v)`."""

    def fold(self, x: Tensor, n: int) -> Tensor:
        return x.unflatten(0, (-1, n)).transpose(1, 2).flatten(1, 2)

    def unfold(self, x: Tensor, n: int, rows: int) -> Tensor:
        return x.unflatten(1, (-1, n)).transpose(1, 2).flatten(0, 1)


class FoldRows(Fold):
    """Each row of the token grid attends to itself in all views."""

    def fold(self, x: Tensor, n: int) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        return x.unflatten(1, (side, side)).unflatten(0, (-1, n)).transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def unfold(self, x: Tensor, n: int, rows: int) -> Tensor:
        side = x.shape[1] // n
        return x.unflatten(1, (n, side)).unflatten(0, (-1, side)).transpose(1, 2).flatten(0, 1).flatten(1, 2)


def frame_unet() -> FrameUNet:
    torch.manual_seed(0)
    return FrameUNet(**NARROW, num_class_embeds=3)


def unet_with(processor: type) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**NARROW)
    unet.set_attn_processor(processor())
    return unet
